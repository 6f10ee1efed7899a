// Programs of compiled fields, called: their entries, and solves that autograd goes back through.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <pybind11/pybind11.h>

#include <atomic>
#include <memory>
#include <optional>
#include <vector>

#include "../compiled/call.h"

namespace flashode {

// A function of a program, and what was spent in it.
class Entry {
 public:
  explicit Entry(uintptr_t address) : run_(reinterpret_cast<int (*)(Call*)>(address)) {}

  // Runs without the GIL. Raises what the handler of a signal raised meanwhile, and MemoryError.
  void operator()(Call& call);

  int64_t calls() const { return calls_; }
  double seconds() const { return 1e-9 * double(nanoseconds_); }

 private:
  int (*run_)(Call*);
  std::atomic<int64_t> calls_ = 0, nanoseconds_ = 0;
};

struct Solved;

// One problem's solve by a program, from any start and with any values of the tensors that its field reads.
class ProgramSolve : public std::enable_shared_from_this<ProgramSolve> {
 public:
  // What it is beside its call, which is given where ctypes has it.
  struct Parts {
    std::shared_ptr<Entry> solve, reverse;  // no `reverse`: there are no gradients
    uintptr_t release;
    std::vector<int64_t> own;               // inputs that hold constants of samples
    std::vector<int64_t> differentiable;    // inputs with gradients
    bool own_clocks, steps_on_times;
    pybind11::object memory;                // what the call points to, and the library
  };
  ProgramSolve(uintptr_t call, const at::Tensor& y0, Parts parts);
  ~ProgramSolve();

  // The fields of flashode.solution.Outcome, or of flashode.batched.BatchOutcome. Gradients flow to `y0`, to the
  // differentiable inputs, and to times and grid where they are given.
  pybind11::dict solve(const at::Tensor& y0, const std::vector<at::Tensor>& inputs,
                       const std::optional<at::Tensor>& t, const std::optional<at::Tensor>& grid) const;

  // The values at the output times, with gradients to `y0` and the differentiable inputs; None where `y0` is
  // not like that of the problem or not finite, where modes of torch are not what they were, and where the solve fails.
  pybind11::object again(pybind11::handle y0, const std::vector<at::Tensor>& inputs) const;

  // Slopes that the last solve evaluated.
  int64_t nfe() const { return nfe_; }

  void pull_back(Solved& solved, const at::Tensor& grad_ys, at::Tensor& adj_y0, std::vector<at::Tensor>& adj_inputs,
                 at::Tensor& adj_t, at::Tensor& adj_grid) const;

 private:
  friend struct Solved;
  c10::intrusive_ptr<Solved> run(const at::Tensor& y0, const std::vector<at::Tensor>& inputs) const;
  bool is_alike(const at::Tensor& y0) const;
  at::Tensor plain(const at::Tensor& x) const;

  const Call call_;
  Parts parts_;
  const std::vector<int64_t> shape_;
  const at::ScalarType dtype_;
  const bool requires_grad_, grad_mode_;
  const c10::impl::LocalDispatchKeySet modes_;
  mutable std::atomic<int64_t> nfe_ = 0;
};

}  // namespace flashode
