// The kernels called on tensors: dtype, device, stream, and the tables that they take.

#include "native.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/tensor.h>
#include <ATen/ops/zeros.h>

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

}  // namespace

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
    double norm = larger(0.0, known);
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

void run_inner(const at::Tensor& g, int64_t n, int64_t rows, const Terms& k, const at::Tensor& out) {
  if (g.is_cpu()) {
    cpu::inner(dtype_of(g), n, g.const_data_ptr(), rows, k, out.mutable_data_ptr<double>(),
               at::get_num_threads());
    return;
  }
#ifdef FLASHODE_WITH_CUDA
  if (g.is_cuda()) {
    const at::Tensor scratch = at::empty({cuda::inner_scratch_bytes(n, rows, k.count)},
                                         g.options().dtype(at::kByte));
    check_cuda(cuda::use_device(g.get_device()));
    check_cuda(cuda::inner(dtype_of(g), n, g.const_data_ptr(), rows, k,
                           out.mutable_data_ptr<double>(), scratch.mutable_data_ptr(),
                           current_stream(g.device())));
    return;
  }
#endif
  no_device(g);
}

}  // namespace flashode
