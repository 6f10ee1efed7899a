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

// out[row] = y0 + sum_j coef[row][j] k_j. Returns whether out is finite (always true on a GPU,
// where the answer would cost a wait).
bool run_combine(const at::Tensor& y0, const Terms& k, const double* coef, int64_t rows,
                 const at::Tensor& out, const TimeTarget& time = {});

at::Tensor run_scaled_error(const at::Tensor& y0, const at::Tensor& y1, const Terms& k,
                            const double* coef, const Tolerances& tol);

// Norms of one solve or one call: keeps the scratch memory of a GPU between steps.
class Norm {
 public:
  explicit Norm(std::vector<int64_t> offsets);

  // On a GPU this waits for the device: the one wait of an adaptive step.
  Decision decide(const at::Tensor& y0, const at::Tensor& y1, const Terms& k,
                  const double* coef, const Tolerances& tol, double dt, const Controller& control);

  // Leaves the norm on the device, without waiting.
  at::Tensor compute(const at::Tensor& y0, const at::Tensor& y1, const Terms& k,
                     const double* coef, const Tolerances& tol);

 private:
  Members members() const;
  void launch(const at::Tensor& y0, const at::Tensor& y1, const Terms& k, const double* coef,
              const Tolerances& tol, double* norm, Decision* decision, double dt,
              const Controller& control);

  std::vector<int64_t> offsets_;
  int64_t longest_ = 0;
  at::Tensor device_offsets_, scratch_;  // made for the first norm on a GPU
};

void* current_stream(c10::Device device);

// Registered operation flashode::combine, through the dispatcher: records gradients.
at::Tensor combine_op(const at::Tensor& y0, at::TensorList k, const at::Tensor& coef);

}  // namespace flashode
