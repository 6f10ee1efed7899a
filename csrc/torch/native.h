// What the torch-facing sources share: kernels called on tensors, on the right device and stream.
#pragma once

#include <ATen/core/Tensor.h>

#include <vector>

#include "../kernels/launch.h"

namespace flashode {

// All tensors below are contiguous, of one dtype and on one device; Terms point into such.

Dtype dtype_of(const at::Tensor& y);
at::ScalarType wide_type(at::ScalarType dtype);

// Tolerances as the kernels take them; the tensors, where defined, are wide and contiguous.
struct Tolerances {
  double rtol = 0, atol = 0;
  at::Tensor each_rtol, each_atol;
};

// Where to write the time that goes with a combined state.
struct TimeTarget {
  at::Tensor t;
  double value = 0;
};

// out[row] = y0 + sum_j coef[row][j] k_j; an undefined y0 is zero. Returns whether out is finite
// (always true on a GPU, where the answer would cost a wait).
bool run_combine(const at::Tensor& y0, const Terms& k, const double* coef, int64_t rows,
                 const at::Tensor& out, const TimeTarget& time = {});

// out[row][j] = <g[row], k_j> for rows of n elements, in double.
void run_inner(const at::Tensor& g, int64_t n, int64_t rows, const Terms& k, const at::Tensor& out);

at::Tensor run_scaled_error(const at::Tensor& y0, const at::Tensor& y1, const Terms& k,
                            const double* coef, const Tolerances& tol);

// Adds one slope to tensors that are integrated by quadrature, as gradients of parameters are:
// value = base + w_value * slope and error = w_error * slope for the `first` slope of a step, and
// value += w_value * slope, error += w_error * slope for those after it. An undefined slope is
// zero. `error` may be empty: not wanted. Dtypes may differ between the tensors.
void run_accumulate(const std::vector<at::Tensor>& slope, const std::vector<at::Tensor>& base,
                    const std::vector<at::Tensor>& value, const std::vector<at::Tensor>& error,
                    double w_value, double w_error, bool first);

// A flat state over one step, with the error sum_j coef_j k_j.
struct Change {
  const at::Tensor &y0, &y1;
  const Terms& k;
  const double* coef;
  const Tolerances& tol;
};

// Tensors integrated by quadrature over one step, and the errors that run_accumulate left.
struct Quadrature {
  const std::vector<at::Tensor> &base, &value, &error;
  double rtol, atol;
};

// Norms of one solve or one call: keeps the scratch memory of a GPU between steps.
class Norm {
 public:
  // Every flat state has its members at these offsets.
  explicit Norm(std::vector<int64_t> offsets);

  // What control makes of the largest norm of all members of the states, of all tensors of the
  // quadrature, and of `known`. On a GPU this waits for the device: the one wait of an adaptive step.
  Decision decide(at::ArrayRef<Change> states, const Quadrature* quadrature, double known,
                  double dt, const Controller& control);
  Decision decide(const at::Tensor& y0, const at::Tensor& y1, const Terms& k, const double* coef,
                  const Tolerances& tol, double dt, const Controller& control) {
    return decide(Change{y0, y1, k, coef, tol}, nullptr, 0, dt, control);
  }


  // Leaves the norm on the device, without waiting.
  at::Tensor compute(const Change& state);

 private:
  Members members() const;
  void launch(at::ArrayRef<Change> states, const Quadrature* quadrature,
              const cuda::Verdict& verdict);

  std::vector<int64_t> offsets_;
  int64_t longest_ = 0;
  at::Tensor device_offsets_, scratch_;  // made for the first norm on a GPU
};

void* current_stream(c10::Device device);

// Raises for a device without kernels, and for an error of the CUDA runtime.
[[noreturn]] void no_device(const at::Tensor& y);
void check_cuda(int error);

// Registered operation flashode::combine, through the dispatcher: records gradients.
at::Tensor combine_op(const at::Tensor& y0, at::TensorList k, const at::Tensor& coef);

}  // namespace flashode
