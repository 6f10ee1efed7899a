// The field with its vector-Jacobian products: one call of the Python field under autograd, and one
// backward pass through the graph that it leaves.
#pragma once

#include <ATen/core/grad_mode.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros_like.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/autograd.h>

#include <string_view>
#include <utility>
#include <vector>

#include "field.h"

namespace flashode {

// f(t, y) and, for the cotangent a, a^T df/dy and a^T df/d(t, params); undefined where zero.
struct Slopes {
  at::Tensor f, of_y;
  std::vector<at::Tensor> of_integrals;
};

class Vjp {
 public:
  Vjp(Field& field, std::vector<at::Tensor> params, bool needs_t, py::object examine)
      : field_(field), params_(std::move(params)), needs_t_(needs_t),
        examine_(std::move(examine)) {}

  // The time of the next evaluation. On a GPU the kernel that makes the state writes it.
  TimeTarget set_time(double t, int nudge) {
    time_ = at::empty({}, field_.like.options());
    const double value = field_.time_value(t, nudge);
    if (!time_.is_cpu()) return {time_, value};
    write_time(time_.mutable_data_ptr(), value, dtype_of(time_));
    return {};
  }

  // At the time last set. Nothing may write to y or to the cotangent while others can see them.
  Slopes evaluate(const at::Tensor& y, const at::Tensor& cotangent, bool with_params) {
    const at::Tensor leaf = y.variable_data();  // the same memory, without history
    leaf.set_requires_grad(true);
    time_.set_requires_grad(needs_t_);
    py::object returned;
    at::Tensor value;
    {
      const at::AutoGradMode recording(true);
      const py::object state = shown(leaf, field_.shapes);
      returned = field_.value_at(wrap(time_), state);
      value = field_.flat_value(returned);
    }
    if (!examine_.is_none()) {
      examine_(wrap(value), wrap(leaf), wrap(time_));
      examine_ = py::none();
    }
    Slopes slopes;
    slopes.of_integrals.resize(1 + params_.size());
    if (value.requires_grad()) {
      std::vector<at::Tensor> inputs = {leaf};
      if (needs_t_) inputs.push_back(time_);
      if (with_params) inputs.insert(inputs.end(), params_.begin(), params_.end());
      std::vector<at::Tensor> products = pull_back(value, inputs, cotangent);
      slopes.of_y = products[0];
      size_t next = 1;
      if (needs_t_) slopes.of_integrals[0] = products[next++];
      for (size_t i = 0; with_params && i < params_.size(); ++i) {
        slopes.of_integrals[1 + i] = products[next++];
      }
    }
    if (!slopes.of_y.defined()) slopes.of_y = at::zeros_like(y);
    slopes.f = own_memory(std::move(value), returned);
    return slopes;
  }

  const std::vector<at::Tensor>& params() const { return params_; }

 private:
  // A slope without its graph, copied unless its memory is ours alone.
  at::Tensor own_memory(at::Tensor value, const py::object& returned) const {
    if (!field_.shapes.empty()) return value.variable_data();  // joined from its members just now
    const bool as_returned = value.unsafeGetTensorImpl() == unpack(returned).unsafeGetTensorImpl();
    const at::Tensor f = value.variable_data().contiguous();
    if (!as_returned) return f.clone();
    value.reset();  // or the counts would include our own, as they would that of f
    const int64_t views = f.storage().is_alias_of(unpack(returned).storage()) ? 1 : 0;
    return views == 0 || is_ours_alone(returned.ptr(), views) ? f : f.clone();
  }

  std::vector<at::Tensor> pull_back(const at::Tensor& value, const std::vector<at::Tensor>& inputs,
                                    const at::Tensor& cotangent) {
    std::vector<at::Tensor> products;
    try {
      const py::gil_scoped_release other_threads_run;
      // The graph is kept: a part of it may belong to the caller and be walked again.
      products = torch::autograd::grad({value}, inputs, {cotangent}, keeps_graph_, false, true);
    } catch (python_error& error) {
      if (!PyErr_Occurred()) error.restore();
      py::error_already_set raised;
      // The backward pass of a field that torch.compile made writes into what it saved, and refuses
      // to begin where that is to be kept.
      const std::string_view text = raised.what();
      const bool refused = text.find("donated buffer") != std::string_view::npos;
      if (!refused || !keeps_graph_) throw raised;
      keeps_graph_ = false;
      return pull_back(value, inputs, cotangent);
    }
    for (at::Tensor& product : products) {
      if (!product.defined()) continue;
      if (product.layout() != at::kStrided) product = product.to_dense();
      product = product.resolve_conj().resolve_neg().contiguous();
    }
    return products;
  }

  Field& field_;
  const std::vector<at::Tensor> params_;
  const bool needs_t_;
  py::object examine_;  // called once, with the first value, its y and its t
  at::Tensor time_;
  bool keeps_graph_ = true;  // of the field, when it has been walked
};

}  // namespace flashode
