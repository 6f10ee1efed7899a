// The fused operations on tensors, and their registration as torch.ops.flashode.
//
// `combine` is the template for a new operation: schema, checks, the call of the kernel, and where
// it is differentiable an autograd node. The fake implementations are in engines/native.py.

#include "native.h"

#include <ATen/DeviceGuard.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/tensor.h>
#include <ATen/ops/zeros_like.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <algorithm>

namespace flashode {
namespace {

using Combination = at::Tensor(const at::Tensor&, at::TensorList, const at::Tensor&);

// Through the dispatcher, as combine_op is.
at::Tensor spread_op(const at::Tensor& g, const at::Tensor& coef) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("flashode::spread", "")
                             .typed<at::Tensor(const at::Tensor&, const at::Tensor&)>();
  return op.call(g, coef);
}

at::Tensor inner_op(const at::Tensor& g, at::TensorList k) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("flashode::inner", "")
                             .typed<at::Tensor(const at::Tensor&, at::TensorList)>();
  return op.call(g, k);
}

// Everything the kernels assume, checked once per call.
struct Arguments {
  at::Tensor y0, y1;
  std::vector<at::Tensor> k;
  at::Tensor coef;
};

void check_alike(const char* name, const at::Tensor& x, const char* what, const at::Tensor& y0,
                 const char* reference, at::IntArrayRef shape) {
  TORCH_CHECK_VALUE(x.sizes() == shape && x.scalar_type() == y0.scalar_type() &&
                        x.device() == y0.device(),
                    name, ": ", what, " is ", x.scalar_type(), " ", x.sizes(), " on ", x.device(),
                    ", ", reference, " is ", y0.scalar_type(), " ", shape, " on ", y0.device());
}

void check_slopes(const char* name, at::TensorList k) {
  TORCH_CHECK_VALUE(k.size() <= size_t(kMaxTerms), name, ": ", k.size(), " slopes, at most ",
                    kMaxTerms, " are possible");
}

std::vector<at::Tensor> contiguous(at::TensorList k) {
  std::vector<at::Tensor> result;
  result.reserve(k.size());
  for (const at::Tensor& k_j : k) result.push_back(k_j.contiguous());
  return result;
}

Arguments checked(const char* name, const at::Tensor& y0, const at::Tensor& y1, at::TensorList k,
                  const at::Tensor& coef) {
  check_slopes(name, k);
  TORCH_CHECK_VALUE(coef.is_cpu() && coef.scalar_type() == at::kDouble && coef.dim() >= 1 &&
                        coef.dim() <= 2 && coef.size(-1) == int64_t(k.size()),
                    name, ": coef must be a float64 CPU tensor of shape (slopes,) or (rows, slopes)"
                    " for ", k.size(), " slopes, got ", coef.scalar_type(), " ", coef.sizes());
  check_alike(name, y1, "y1", y0, "y0", y0.sizes());
  for (const at::Tensor& k_j : k) check_alike(name, k_j, "a slope", y0, "y0", y0.sizes());
  return {y0.contiguous(), y1.contiguous(), contiguous(k), coef.contiguous()};
}

Tolerances tolerances(const char* name, const at::Tensor& y0, const at::Tensor& rtol,
                      const at::Tensor& atol) {
  Tolerances tol;
  const auto take = [&](const at::Tensor& x, double& number, at::Tensor& each) {
    if (x.dim() == 0) {
      number = x.item<double>();
      return;
    }
    TORCH_CHECK_VALUE(x.numel() == y0.numel() && x.device() == y0.device(), name,
                      ": a tolerance has one entry or one per element of y0, got ", x.sizes());
    each = x.to(wide_type(y0.scalar_type())).contiguous();
  };
  take(rtol, tol.rtol, tol.each_rtol);
  take(atol, tol.atol, tol.each_atol);
  return tol;
}

Terms terms_of(const std::vector<at::Tensor>& k) {
  Terms terms;
  terms.count = int(k.size());
  for (int j = 0; j < terms.count; ++j) terms.k[j] = k[j].const_data_ptr();
  return terms;
}

at::Tensor combine(const at::Tensor& y0, at::TensorList k, const at::Tensor& coef) {
  const Arguments args = checked("combine", y0, y0, k, coef);
  const c10::OptionalDeviceGuard guard(y0.device());
  std::vector<int64_t> shape = y0.sizes().vec();
  if (coef.dim() == 2) shape.insert(shape.begin(), coef.size(0));
  at::Tensor out = at::empty(shape, y0.options());
  run_combine(args.y0, terms_of(args.k), args.coef.const_data_ptr<double>(),
              coef.dim() == 2 ? coef.size(0) : 1, out);
  return out;
}

at::Tensor scaled_error_op(const at::Tensor& y0, const at::Tensor& y1, at::TensorList k,
                           const at::Tensor& coef, const at::Tensor& rtol, const at::Tensor& atol) {
  const Arguments args = checked("scaled_error", y0, y1, k, coef);
  const c10::OptionalDeviceGuard guard(y0.device());
  return run_scaled_error(args.y0, args.y1, terms_of(args.k), args.coef.const_data_ptr<double>(),
                          tolerances("scaled_error", y0, rtol, atol));
}

at::Tensor error_norm_op(const at::Tensor& y0, const at::Tensor& y1, at::TensorList k,
                         const at::Tensor& coef, const at::Tensor& rtol, const at::Tensor& atol,
                         at::IntArrayRef offsets) {
  const Arguments args = checked("error_norm", y0, y1, k, coef);
  TORCH_CHECK_VALUE(offsets.size() >= 2 && offsets.front() == 0 && offsets.back() == y0.numel() &&
                        std::is_sorted(offsets.begin(), offsets.end()),
                    "error_norm: offsets must rise from 0 to ", y0.numel(), ", got ", offsets);
  const c10::OptionalDeviceGuard guard(y0.device());
  return Norm(offsets.vec())
      .compute({args.y0, args.y1, terms_of(args.k), args.coef.const_data_ptr<double>(),
                tolerances("error_norm", y0, rtol, atol)});
}

// out[j] = sum_m coef[m][j] g_m: the kernel of combine, with the rows for terms.
at::Tensor spread(const at::Tensor& g, const at::Tensor& coef) {
  TORCH_CHECK_VALUE(coef.is_cpu() && coef.scalar_type() == at::kDouble &&
                        (coef.dim() == 1 ||
                         (coef.dim() == 2 && g.dim() >= 1 && g.size(0) == coef.size(0))),
                    "spread: coef must be a float64 CPU tensor of shape (slopes,), or (rows, slopes)"
                    " where g is (rows, ...); got ", coef.scalar_type(), " ", coef.sizes(),
                    " for g of shape ", g.sizes());
  const bool one_row = coef.dim() == 1;
  const int64_t rows = one_row ? 1 : coef.size(0), slopes = coef.size(-1);
  const at::ScalarType wide = wide_type(g.scalar_type());
  if (rows > kMaxTerms && g.scalar_type() != wide) {  // several passes, yet rounded once
    return spread(g.to(wide), coef).to(g.scalar_type());
  }
  const c10::OptionalDeviceGuard guard(g.device());
  std::vector<int64_t> shape = g.sizes().slice(one_row ? 0 : 1).vec();
  shape.insert(shape.begin(), slopes);
  at::Tensor out = at::empty(shape, g.options());
  const at::Tensor from = g.contiguous(), weights = coef.contiguous();
  const double* w = weights.const_data_ptr<double>();
  const int64_t row_bytes = rows == 0 ? 0 : int64_t(from.nbytes()) / rows;
  int64_t begin = 0;
  do {
    Terms terms;
    terms.count = int(std::min<int64_t>(rows - begin, kMaxTerms));
    std::vector<double> transposed(size_t(slopes * terms.count));
    for (int m = 0; m < terms.count; ++m) {
      terms.k[m] = static_cast<const char*>(from.const_data_ptr()) + (begin + m) * row_bytes;
      for (int64_t j = 0; j < slopes; ++j) {
        transposed[size_t(j * terms.count + m)] = w[(begin + m) * slopes + j];
      }
    }
    if (begin == 0) {
      run_combine({}, terms, transposed.data(), slopes, out);
    } else {
      for (int64_t j = 0; j < slopes; ++j) {
        const at::Tensor sum = out.select(0, j);
        run_combine(sum, terms, transposed.data() + j * terms.count, 1, sum);
      }
    }
    begin += kMaxTerms;
  } while (begin < rows);
  return out;
}

// out[m][j] = <g_m, k_j> in double; without m where g is shaped like a slope.
at::Tensor inner(const at::Tensor& g, at::TensorList k) {
  check_slopes("inner", k);
  TORCH_CHECK_VALUE(!k.empty(), "inner: there are no slopes");
  const bool one_row = g.dim() == k[0].dim();
  TORCH_CHECK_VALUE(one_row || g.dim() == k[0].dim() + 1, "inner: g must be shaped like a slope, ",
                    k[0].sizes(), ", or have rows in front, got ", g.sizes());
  const at::IntArrayRef shape = g.sizes().slice(one_row ? 0 : 1);
  for (const at::Tensor& k_j : k) check_alike("inner", k_j, "a slope", g, "a row of g", shape);
  const c10::OptionalDeviceGuard guard(g.device());
  const int64_t n = k[0].numel(), rows = one_row ? 1 : g.size(0), slopes = int64_t(k.size());
  const at::Tensor from = g.contiguous();
  const std::vector<at::Tensor> slope = contiguous(k);
  at::Tensor out = at::empty({rows, slopes}, g.options().dtype(at::kDouble));
  run_inner(from, n, rows, terms_of(slope), out);
  return one_row ? out.select(0, 0) : out;
}

// Whether an operation on these tensors is recorded for a backward pass.
bool recorded(const char* name, at::TensorList tensors, at::TensorList more = {}) {
  bool any = false;
  for (const at::TensorList list : {tensors, more}) {
    for (const at::Tensor& x : list) {
      TORCH_CHECK_NOT_IMPLEMENTED(!x._fw_grad(0).defined(), "flashode::", name,
                                  " has no forward-mode derivative; solve with engine='reference'");
      any |= x.requires_grad();
    }
  }
  return any && at::GradMode::is_enabled();
}

// combine, spread and inner are linear in each argument, and each other's derivatives: with g the
// gradient of combine,
//   grad_y0 = sum_m g_m,  grad_k_j = sum_m coef[m][j] g_m,  grad_coef[m][j] = <g_m, k_j>.
// The backward passes are made of these operations, so that derivatives of any order are exact.
struct Combine : public torch::autograd::Function<Combine> {
  static at::Tensor forward(torch::autograd::AutogradContext* ctx, const at::Tensor& y0,
                            at::TensorList k, const at::Tensor& coef) {
    const at::AutoDispatchBelowADInplaceOrView below;
    // The slopes are needed only for the gradient of the coefficients, that is, of time.
    std::vector<at::Tensor> saved = {coef};
    if (coef.requires_grad()) saved.insert(saved.end(), k.begin(), k.end());
    ctx->save_for_backward(saved);
    return combine_op(y0, k, coef);
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* ctx,
                                                 torch::autograd::variable_list grads) {
    const at::Tensor& g = grads[0];
    const auto saved = ctx->get_saved_variables();
    const at::Tensor& coef = saved[0];
    const int64_t slopes = coef.size(-1);
    torch::autograd::variable_list result(slopes + 2);
    if (!g.defined()) return result;
    const bool one_row = coef.dim() == 1;
    std::vector<int64_t> needed;
    for (int64_t j = 0; j < slopes; ++j) {
      if (ctx->needs_input_grad(1 + j)) needed.push_back(j);
    }
    at::Tensor weights = coef;
    if (int64_t(needed.size()) < slopes) weights = coef.index_select(-1, at::tensor(needed));
    const bool sums_rows = ctx->needs_input_grad(0) && !one_row;  // a slope with weights of one
    if (sums_rows) weights = at::cat({weights, at::ones({coef.size(0), 1}, coef.options())}, 1);
    if (weights.size(-1) > 0) {
      const std::vector<at::Tensor> parts = spread_op(g, weights).unbind(0);
      for (size_t i = 0; i < needed.size(); ++i) result[1 + needed[i]] = parts[i];
      if (sums_rows) result[0] = parts.back();
    }
    if (ctx->needs_input_grad(0) && one_row) result[0] = g;
    if (ctx->needs_input_grad(slopes + 1)) {
      const at::TensorList k = at::TensorList(saved).slice(1);
      result[slopes + 1] = k.empty() ? at::zeros_like(coef) : inner_op(g, k).to(at::kCPU);
    }
    return result;
  }
};

struct Spread : public torch::autograd::Function<Spread> {
  static at::Tensor forward(torch::autograd::AutogradContext* ctx, const at::Tensor& g,
                            const at::Tensor& coef) {
    const at::AutoDispatchBelowADInplaceOrView below;
    ctx->save_for_backward({g, coef});
    return spread_op(g, coef);
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* ctx,
                                                 torch::autograd::variable_list grads) {
    const at::Tensor& h = grads[0];
    const auto saved = ctx->get_saved_variables();
    const at::Tensor &g = saved[0], &coef = saved[1];
    torch::autograd::variable_list result(2);
    if (!h.defined() || coef.size(-1) == 0) return result;
    const bool one_row = coef.dim() == 1;
    if (ctx->needs_input_grad(0)) {  // grad_g_m = sum_j coef[m][j] h_j
      result[0] = one_row ? spread_op(h, coef.unsqueeze(1)).select(0, 0) : spread_op(h, coef.t());
    }
    if (ctx->needs_input_grad(1)) result[1] = inner_op(g, h.unbind(0)).to(at::kCPU);
    return result;
  }
};

struct Inner : public torch::autograd::Function<Inner> {
  static at::Tensor forward(torch::autograd::AutogradContext* ctx, const at::Tensor& g,
                            at::TensorList k) {
    const at::AutoDispatchBelowADInplaceOrView below;
    std::vector<at::Tensor> saved = {g};
    saved.insert(saved.end(), k.begin(), k.end());
    ctx->save_for_backward(saved);
    return inner_op(g, k);
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* ctx,
                                                 torch::autograd::variable_list grads) {
    const auto saved = ctx->get_saved_variables();
    const at::Tensor& g = saved[0];
    torch::autograd::variable_list result(saved.size());
    if (!grads[0].defined()) return result;
    const at::Tensor coef = grads[0].to(at::kCPU);
    if (ctx->needs_input_grad(0)) {  // grad_g_m = sum_j coef[m][j] k_j
      const at::Tensor k = at::stack(at::TensorList(saved).slice(1));
      result[0] = coef.dim() == 1 ? spread_op(k, coef.unsqueeze(1)).select(0, 0)
                                  : spread_op(k, coef.t());
    }
    const std::vector<at::Tensor> parts = spread_op(g, coef).unbind(0);
    for (size_t j = 0; j < parts.size(); ++j) result[1 + j] = parts[j];
    return result;
  }
};

at::Tensor combine_autograd(const at::Tensor& y0, at::TensorList k, const at::Tensor& coef) {
  if (recorded("combine", {y0, coef}, k)) return Combine::apply(y0, k, coef);
  const at::AutoDispatchBelowADInplaceOrView below;
  return combine_op(y0, k, coef);
}

at::Tensor spread_autograd(const at::Tensor& g, const at::Tensor& coef) {
  if (recorded("spread", {g, coef})) return Spread::apply(g, coef);
  const at::AutoDispatchBelowADInplaceOrView below;
  return spread_op(g, coef);
}

at::Tensor inner_autograd(const at::Tensor& g, at::TensorList k) {
  if (recorded("inner", g, k)) return Inner::apply(g, k);
  const at::AutoDispatchBelowADInplaceOrView below;
  return inner_op(g, k);
}

}  // namespace

at::Tensor combine_op(const at::Tensor& y0, at::TensorList k, const at::Tensor& coef) {
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("flashode::combine", "").typed<Combination>();
  return op.call(y0, k, coef);
}

TORCH_LIBRARY(flashode, m) {
  m.def("combine(Tensor y0, Tensor[] k, Tensor coef) -> Tensor");
  m.def("spread(Tensor g, Tensor coef) -> Tensor");
  m.def("inner(Tensor g, Tensor[] k) -> Tensor");
  m.def(
      "scaled_error(Tensor y0, Tensor y1, Tensor[] k, Tensor coef, Tensor rtol, Tensor atol) -> "
      "Tensor");
  m.def(
      "error_norm(Tensor y0, Tensor y1, Tensor[] k, Tensor coef, Tensor rtol, Tensor atol, int[] "
      "offsets) -> Tensor");
}

TORCH_LIBRARY_IMPL(flashode, CPU, m) {
  m.impl("combine", &combine);
  m.impl("spread", &spread);
  m.impl("inner", &inner);
  m.impl("scaled_error", &scaled_error_op);
  m.impl("error_norm", &error_norm_op);
}

TORCH_LIBRARY_IMPL(flashode, CUDA, m) {
  m.impl("combine", &combine);
  m.impl("spread", &spread);
  m.impl("inner", &inner);
  m.impl("scaled_error", &scaled_error_op);
  m.impl("error_norm", &error_norm_op);
}

TORCH_LIBRARY_IMPL(flashode, Autograd, m) {
  m.impl("combine", &combine_autograd);
  m.impl("spread", &spread_autograd);
  m.impl("inner", &inner_autograd);
}

}  // namespace flashode
