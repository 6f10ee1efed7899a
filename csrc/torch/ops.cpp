// The fused operations on tensors, and their registration as torch.ops.flashode.
//
// `combine` is the template for a new operation: schema, checks, the call of the kernel, and where
// it is differentiable an autograd node. The fake implementations are in engines/native.py.

#include "native.h"

#include <ATen/DeviceGuard.h>
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>

#include <ATen/ops/matmul.h>
#include <ATen/ops/mul.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/tensor.h>
#include <ATen/ops/zeros.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <algorithm>
#include <array>

namespace flashode {

Dtype dtype_of(const at::Tensor& y) {
  switch (y.scalar_type()) {
    case at::kFloat: return Dtype::f32;
    case at::kDouble: return Dtype::f64;
    case at::kHalf: return Dtype::f16;
    case at::kBFloat16: return Dtype::bf16;
    default: TORCH_CHECK_TYPE(false, "flashode: no kernel for dtype ", y.scalar_type());
  }
}

at::ScalarType wide_type(at::ScalarType dtype) {
  return dtype == at::kDouble ? at::kDouble : at::kFloat;
}

namespace {

Tolerance tolerance_of(const Tolerances& tol) {
  return {tol.rtol, tol.atol, tol.each_rtol.defined() ? tol.each_rtol.const_data_ptr() : nullptr,
          tol.each_atol.defined() ? tol.each_atol.const_data_ptr() : nullptr};
}

#ifdef FLASHODE_WITH_CUDA
void check_cuda(int error) {
  TORCH_CHECK(error == 0, "flashode: CUDA error ", error, " (", cuda::error_text(error), ")");
}
#endif

[[noreturn]] void no_device(const at::Tensor& y) {
  TORCH_CHECK(false, "flashode: no kernels for ", y.device(),
              "; this build has CPU kernels", 
#ifdef FLASHODE_WITH_CUDA
              " and CUDA kernels");
#else
              " only: rebuild where nvcc is found");
#endif
}

}  // namespace

bool run_combine(const at::Tensor& y0, const Terms& k, const double* coef, int64_t rows,
                 const at::Tensor& out, const TimeTarget& time) {
  const int64_t n = rows == 0 ? 0 : out.numel() / rows;
  const void* const from = y0.defined() ? y0.const_data_ptr() : nullptr;
  if (out.is_cpu()) {
    return cpu::combine(dtype_of(out), n, from, k, coef, rows, out.mutable_data_ptr(),
                        at::get_num_threads());
  }
#ifdef FLASHODE_WITH_CUDA
  if (out.is_cuda()) {
    check_cuda(cuda::use_device(out.get_device()));
    const cuda::Clock clock{time.t.defined() ? time.t.mutable_data_ptr() : nullptr, time.value};
    check_cuda(cuda::combine(dtype_of(out), n, from, k, coef, rows, out.mutable_data_ptr(), clock,
                             current_stream(out.device())));
    return true;
  }
#endif
  no_device(out);
}

at::Tensor run_scaled_error(const at::Tensor& y0, const at::Tensor& y1, const Terms& k,
                            const double* coef, const Tolerances& tol) {
  at::Tensor out = at::empty(y0.sizes(), y0.options().dtype(wide_type(y0.scalar_type())));
  if (y0.is_cpu()) {
    cpu::scaled_error(dtype_of(y0), y0.numel(), y0.const_data_ptr(), y1.const_data_ptr(), k,
                      coef, tolerance_of(tol), out.mutable_data_ptr(), at::get_num_threads());
    return out;
  }
#ifdef FLASHODE_WITH_CUDA
  if (y0.is_cuda()) {
    check_cuda(cuda::use_device(y0.get_device()));
    check_cuda(cuda::scaled_error(dtype_of(y0), y0.numel(), y0.const_data_ptr(),
                                  y1.const_data_ptr(), k, coef, tolerance_of(tol),
                                  out.mutable_data_ptr(), current_stream(y0.device())));
    return out;
  }
#endif
  no_device(y0);
}

namespace {

// Segments by dtype: the index is that of the enumerator.
using SegmentTables = std::array<std::vector<Segment>, 4>;

// Tensors with no elements are left out; `slope` and `error` may be empty.
SegmentTables segments_of(const std::vector<at::Tensor>& slope, const std::vector<at::Tensor>& base,
                          const std::vector<at::Tensor>& value,
                          const std::vector<at::Tensor>& error) {
  SegmentTables tables;
  for (size_t i = 0; i < value.size(); ++i) {
    Segment segment{value[i].numel()};
    if (segment.n == 0) continue;
    if (!slope.empty() && slope[i].defined()) segment.slope = slope[i].const_data_ptr();
    segment.base = base[i].const_data_ptr();
    segment.value = value[i].mutable_data_ptr();
    if (!error.empty()) segment.error = error[i].mutable_data_ptr();
    tables[size_t(dtype_of(value[i]))].push_back(segment);
  }
  return tables;
}

}  // namespace

void run_accumulate(const std::vector<at::Tensor>& slope, const std::vector<at::Tensor>& base,
                    const std::vector<at::Tensor>& value, const std::vector<at::Tensor>& error,
                    double w_value, double w_error, bool first) {
  const SegmentTables tables = segments_of(slope, first ? base : value, value, error);
  for (size_t dtype = 0; dtype < tables.size(); ++dtype) {
    const std::vector<Segment>& table = tables[dtype];
    if (table.empty()) continue;
    const at::Tensor& like = value.front();
    if (like.is_cpu()) {
      cpu::accumulate(Dtype(dtype), table.data(), int64_t(table.size()), w_value, w_error, first,
                      at::get_num_threads());
      continue;
    }
#ifdef FLASHODE_WITH_CUDA
    if (like.is_cuda()) {
      check_cuda(cuda::use_device(like.get_device()));
      check_cuda(cuda::accumulate(Dtype(dtype), table.data(), int64_t(table.size()), w_value,
                                  w_error, first, current_stream(like.device())));
      continue;
    }
#endif
    no_device(like);
  }
}

Norm::Norm(std::vector<int64_t> offsets) : offsets_(std::move(offsets)) {
  for (size_t m = 1; m < offsets_.size(); ++m) {
    longest_ = std::max(longest_, offsets_[m] - offsets_[m - 1]);
  }
}

Members Norm::members() const { return {int64_t(offsets_.size()) - 1, offsets_.data()}; }

#ifdef FLASHODE_WITH_CUDA
// All parts queued one after the other; the last one gives the verdict on the largest.
void Norm::launch(at::ArrayRef<Change> states, const Quadrature* quadrature,
                  const cuda::Verdict& verdict) {
  const at::Tensor& like = states.front().y0;
  const SegmentTables tables =
      quadrature ? segments_of({}, quadrature->base, quadrature->value, quadrature->error)
                 : SegmentTables();
  check_cuda(cuda::use_device(like.get_device()));
  int64_t bytes = cuda::norm_scratch_bytes(longest_, members().count), parts = states.size();
  for (const auto& table : tables) {
    if (table.empty()) continue;
    bytes = std::max(bytes, cuda::norm_scratch_bytes(table.data(), int64_t(table.size())));
    ++parts;
  }
  if (!scratch_.defined() || scratch_.numel() < bytes) {
    scratch_ = at::zeros({bytes}, like.options().dtype(at::kByte));
    device_offsets_ = at::tensor(at::ArrayRef<int64_t>(offsets_), at::kLong).to(like.device());
  }
  const Members on_device{members().count, device_offsets_.const_data_ptr<int64_t>()};
  void* const scratch = scratch_.mutable_data_ptr();
  void* const stream = current_stream(like.device());
  const auto next_verdict = [&] { return --parts == 0 ? verdict : cuda::Verdict(); };
  for (const Change& state : states) {
    check_cuda(cuda::error_norm(dtype_of(state.y0), longest_, state.y0.const_data_ptr(),
                                state.y1.const_data_ptr(), state.k, state.coef,
                                tolerance_of(state.tol), on_device, scratch, next_verdict(), stream));
  }
  for (size_t dtype = 0; dtype < tables.size(); ++dtype) {
    if (tables[dtype].empty()) continue;
    check_cuda(cuda::error_norm(Dtype(dtype), tables[dtype].data(), int64_t(tables[dtype].size()),
                                quadrature->rtol, quadrature->atol, scratch, next_verdict(), stream));
  }
}
#endif

Decision Norm::decide(at::ArrayRef<Change> states, const Quadrature* quadrature, double known,
                      double dt, const Controller& control) {
  const at::Tensor& like = states.front().y0;
  if (like.is_cpu()) {
    const int threads = at::get_num_threads();
    double norm = larger(0, known);
    for (const Change& state : states) {
      norm = larger(norm, cpu::error_norm(dtype_of(state.y0), state.y0.const_data_ptr(),
                                          state.y1.const_data_ptr(), state.k, state.coef,
                                          tolerance_of(state.tol), members(), threads));
    }
    if (quadrature) {
      const SegmentTables tables =
          segments_of({}, quadrature->base, quadrature->value, quadrature->error);
      for (size_t dtype = 0; dtype < tables.size(); ++dtype) {
        norm = larger(norm, cpu::error_norm(Dtype(dtype), tables[dtype].data(),
                                            int64_t(tables[dtype].size()), quadrature->rtol,
                                            quadrature->atol, threads));
      }
    }
    return flashode::decide(norm, dt, control);
  }
#ifdef FLASHODE_WITH_CUDA
  if (like.is_cuda()) {
    Decision* cell = nullptr;
    check_cuda(cuda::use_device(like.get_device()));
    check_cuda(cuda::host_cell(&cell));
    launch(states, quadrature, {nullptr, cell, known, dt, control});
    check_cuda(cuda::wait(current_stream(like.device())));
    return *cell;
  }
#endif
  no_device(like);
}

at::Tensor Norm::compute(const Change& state) {
  at::Tensor out = at::empty({}, state.y0.options().dtype(at::kDouble));
  if (state.y0.is_cpu()) {
    *out.mutable_data_ptr<double>() = decide(state, nullptr, 0, 1, Controller()).error_ratio;
    return out;
  }
#ifdef FLASHODE_WITH_CUDA
  if (state.y0.is_cuda()) {
    launch(state, nullptr, {out.mutable_data_ptr<double>()});
    return out;
  }
#endif
  no_device(state.y0);
}

// ---- the registered operations -------------------------------------------------------------

namespace {

// Everything the kernels assume, checked once per call.
struct Arguments {
  at::Tensor y0, y1;
  std::vector<at::Tensor> k;
  at::Tensor coef;
};

Arguments checked(const char* name, const at::Tensor& y0, const at::Tensor& y1, at::TensorList k,
                  const at::Tensor& coef) {
  TORCH_CHECK_VALUE(k.size() <= size_t(kMaxTerms), name, ": ", k.size(), " slopes, at most ",
                    kMaxTerms, " are possible");
  TORCH_CHECK_VALUE(coef.is_cpu() && coef.scalar_type() == at::kDouble && coef.dim() >= 1 &&
                        coef.dim() <= 2 && coef.size(-1) == int64_t(k.size()),
                    name, ": coef must be a float64 CPU tensor of shape (slopes,) or (rows, slopes)"
                    " for ", k.size(), " slopes, got ", coef.scalar_type(), " ", coef.sizes());
  Arguments args{y0.contiguous(), y1.contiguous(), {}, coef.contiguous()};
  const auto check_alike = [&](const at::Tensor& x, const char* what) {
    TORCH_CHECK_VALUE(x.sizes() == y0.sizes() && x.scalar_type() == y0.scalar_type() &&
                          x.device() == y0.device(),
                      name, ": ", what, " is ", x.scalar_type(), " ", x.sizes(), " on ", x.device(),
                      ", y0 is ", y0.scalar_type(), " ", y0.sizes(), " on ", y0.device());
  };
  check_alike(y1, "y1");
  for (const at::Tensor& k_j : k) {
    check_alike(k_j, "a slope");
    args.k.push_back(k_j.contiguous());
  }
  return args;
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

// combine is linear in y0 and in every slope, and bilinear in slopes and coefficients:
//   grad_y0 = sum_m g_m,  grad_k_j = sum_m coef[m][j] g_m,  grad_coef[m][j] = <g_m, k_j>.
// The backward is made of differentiable operations, so that second derivatives are exact.
struct Combine : public torch::autograd::Function<Combine> {
  static at::Tensor forward(torch::autograd::AutogradContext* ctx, const at::Tensor& y0,
                            at::TensorList k, const at::Tensor& coef) {
    const at::AutoDispatchBelowADInplaceOrView below;
    const int64_t slopes = int64_t(k.size());
    ctx->saved_data["slopes"] = slopes;
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
    const int64_t slopes = ctx->saved_data["slopes"].toInt();
    const at::Tensor& coef = saved[0];
    torch::autograd::variable_list result(slopes + 2);
    if (!g.defined()) return result;
    const bool one_row = coef.dim() == 1;
    const at::ScalarType wide = wide_type(g.scalar_type());
    const at::Tensor rows = one_row ? coef.unsqueeze(0) : coef;
    const at::Tensor g_rows = (one_row ? g.unsqueeze(0) : g).to(wide);
    const at::Tensor g_flat = g_rows.unsqueeze(-1).flatten(1);  // also where y has no dimensions
    const at::Tensor weights = rows.to(g.device(), wide);
    if (ctx->needs_input_grad(0)) result[0] = one_row ? g : g_rows.sum(0).to(g.scalar_type());
    for (int64_t j = 0; j < slopes; ++j) {
      if (!ctx->needs_input_grad(1 + j)) continue;
      const at::Tensor w_j = weights.select(1, j);
      const at::Tensor grad =
          one_row ? at::mul(g_rows.select(0, 0), w_j.select(0, 0))
                  : at::matmul(w_j, g_flat).view_as(g_rows.select(0, 0));
      result[1 + j] = grad.to(g.scalar_type());
    }
    if (ctx->needs_input_grad(slopes + 1)) {
      std::vector<at::Tensor> columns;
      const at::Tensor g_double = g_flat.to(at::kDouble);
      for (int64_t j = 0; j < slopes; ++j) {
        columns.push_back(at::matmul(g_double, saved[1 + j].flatten().to(at::kDouble)));
      }
      const at::Tensor grad = at::stack(columns, 1).to(at::kCPU);
      result[slopes + 1] = one_row ? grad.select(0, 0) : grad;
    }
    return result;
  }
};

at::Tensor combine_autograd(const at::Tensor& y0, at::TensorList k, const at::Tensor& coef) {
  return Combine::apply(y0, k, coef);
}

}  // namespace

at::Tensor combine_op(const at::Tensor& y0, at::TensorList k, const at::Tensor& coef) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("flashode::combine", "")
                             .typed<at::Tensor(const at::Tensor&, at::TensorList, const at::Tensor&)>();
  return op.call(y0, k, coef);
}

TORCH_LIBRARY(flashode, m) {
  m.def("combine(Tensor y0, Tensor[] k, Tensor coef) -> Tensor");
  m.def(
      "scaled_error(Tensor y0, Tensor y1, Tensor[] k, Tensor coef, Tensor rtol, Tensor atol) -> "
      "Tensor");
  m.def(
      "error_norm(Tensor y0, Tensor y1, Tensor[] k, Tensor coef, Tensor rtol, Tensor atol, int[] "
      "offsets) -> Tensor");
}

TORCH_LIBRARY_IMPL(flashode, CPU, m) {
  m.impl("combine", &combine);
  m.impl("scaled_error", &scaled_error_op);
  m.impl("error_norm", &error_norm_op);
}

TORCH_LIBRARY_IMPL(flashode, CUDA, m) {
  m.impl("combine", &combine);
  m.impl("scaled_error", &scaled_error_op);
  m.impl("error_norm", &error_norm_op);
}

TORCH_LIBRARY_IMPL(flashode, Autograd, m) { m.impl("combine", &combine_autograd); }

}  // namespace flashode
