// Batches whose samples are solved on their own, on a CPU.
//
// Short rows, of a few numbers a sample, are worked on many samples at a time: every element has the
// step of its sample beside it, and vectors run across samples. Long rows go one by one through the
// loops of a single solve. Both give a row the same bits, whatever else is in the batch.

#include "batch.h"
#include "cpu_blocks.h"

namespace flashode::cpu {
namespace {

constexpr int kTogether = 8;  // outputs of one sample that are made at a time

// Samples [begin, end) of a batch, and where their rows of member m are.
struct Span {
  int64_t begin, end;
  int64_t width(const Batch& batch, int64_t m) const {
    return batch.members.offsets[m + 1] - batch.members.offsets[m];
  }
  int64_t first(const Batch& batch, int64_t m) const {
    return batch.samples.count * batch.members.offsets[m] + begin * width(batch, m);
  }
  Span only(int64_t b) const { return {b, b + 1}; }
};

bool is_short(const Batch& batch) { return batch.steps != nullptr; }

Terms terms_of(const Terms& k, const Sum& sum) {
  Terms terms;
  for (int j = 0; j < sum.count; ++j) terms.k[terms.count++] = k.k[sum.stage[j]];
  return terms;
}

template <class T>
FLASHODE_INLINE void write_times(const Samples& s, const StageTimes& times, const Span& span) {
  T* t = static_cast<T*>(times.t);
#pragma omp simd
  for (int64_t b = span.begin; b < span.end; ++b) {
    t[b] = narrow<T>(wide_t<T>(time_of_stage<T>(s, b, times.c, times.nudge)));
  }
}

template <class T>
FLASHODE_INLINE void stage_span(const Batch& batch, const Span& span, const void* y0,
                                const Terms& terms, const Sum& sum, const StageTimes& times,
                                void* out) {
  using A = wide_t<T>;
  if (times.t != nullptr) write_times<T>(batch.samples, times, span);
  const T* from = static_cast<const T*>(y0);
  T* to = static_cast<T*>(out);
  for (int64_t m = 0; m < batch.members.count; ++m) {
    if (is_short(batch)) {
      const int64_t first = span.first(batch, m), n = span.width(batch, m) * (span.end - span.begin);
      alignas(64) A total[kTile];
      weighted_sum<T>(total, terms, Stepped{sum.weight, batch.steps}, first, n);
#pragma omp simd
      for (int64_t i = 0; i < n; ++i) {
        const T y = from[first + i], moved = narrow<T>(widen(y) + total[i]);
        to[first + i] = batch.steps[first + i] == 0 ? y : moved;
      }
      continue;
    }
    for (int64_t b = span.begin; b < span.end; ++b) {
      const int64_t first = span.only(b).first(batch, m), n = span.width(batch, m);
      const double step = batch.samples.at(kStep, b);
      double coef[kMaxTerms];
      for (int j = 0; j < sum.count; ++j) coef[j] = sum.weight[j] * step;
      if (step == 0) {
        std::copy_n(from + first, n, to + first);
      } else {
        combine_block<T>(from, terms, Uniform{coef}, to, first, n, false);
      }
    }
  }
}

// norm[b - span.begin] = largest over the members of the root mean square of the scaled error of
// sum_j coef_j k_j; `weight` times the steps, or as they are.
template <class T>
FLASHODE_INLINE void norms_of_span(const Batch& batch, const Span& span, const void* y0,
                                   const void* y1, const Terms& terms, const double* weight,
                                   bool stepped, double* norm) {
  using A = wide_t<T>;
  const T* a = static_cast<const T*>(y0);
  const T* c = static_cast<const T*>(y1);
  std::fill_n(norm, span.end - span.begin, 0.0);
  for (int64_t m = 0; m < batch.members.count; ++m) {
    const int64_t first = span.first(batch, m), width = span.width(batch, m);
    if (width == 0) continue;
    alignas(64) A scaled[kTile];
    if (is_short(batch)) {
      const int64_t n = width * (span.end - span.begin);
      if (stepped) {
        scaled_error_block<T>(a, c, terms, Stepped{weight, batch.steps}, batch.tolerance, scaled, first, n);
      } else {
        scaled_error_block<T>(a, c, terms, Uniform{weight}, batch.tolerance, scaled, first, n);
      }
    }
    for (int64_t b = span.begin; b < span.end; ++b) {
      double sum = 0;
      if (is_short(batch)) {
        const A* row = scaled + (b - span.begin) * width;
        for (int64_t i = 0; i < width; ++i) sum += double(row[i]) * double(row[i]);
      } else {
        double coef[kMaxTerms];
        for (int j = 0; j < terms.count; ++j) {
          coef[j] = stepped ? weight[j] * batch.samples.at(kStep, b) : weight[j];
        }
        const int64_t begin = first + (b - span.begin) * width;
        for (int64_t i = 0; i < width; i += kBlock) {
          sum += sum_of_squares<T>(a, c, terms, Uniform{coef}, batch.tolerance, begin + i,
                                   std::min(kBlock, width - i));
        }
      }
      double& so_far = norm[b - span.begin];
      so_far = larger(so_far, std::sqrt(sum / double(width)));
    }
  }
}

template <class T>
bool row_is_finite(const Batch& batch, int64_t b, const void* x) {
  wide_t<T> zero = 0;
  for (int64_t m = 0; m < batch.members.count; ++m) {
    const Span row{b, b + 1};
    const T* values = static_cast<const T*>(x) + row.first(batch, m);
    for (int64_t i = 0; i < row.width(batch, m); ++i) zero += widen(values[i]) - widen(values[i]);
  }
  return zero == 0;
}

// Why the error of a sample is not finite.
template <class T>
int64_t cause_of(const Batch& batch, int64_t b, const Terms& k, const void* y1) {
  for (int j = 0; j < k.count; ++j) {
    if (!row_is_finite<T>(batch, b, k.k[j])) return kNonfiniteField;
  }
  return row_is_finite<T>(batch, b, y1) ? kNonfiniteError : kNonfiniteState;
}

// Every element beside the step of its sample.
void spread_steps(const Batch& batch, const Span& span) {
  if (!is_short(batch)) return;
  const double* step = batch.samples.row(kStep);
  for (int64_t m = 0; m < batch.members.count; ++m) {
    double* each = batch.steps + span.first(batch, m);
    const int64_t width = span.width(batch, m);
    if (width == 2) {  // the planar systems that batches are mostly made of
      for (int64_t b = span.begin; b < span.end; ++b, each += 2) each[0] = each[1] = step[b];
    } else {
      for (int64_t b = span.begin; b < span.end; ++b, each += width) std::fill_n(each, width, step[b]);
    }
  }
}

// Output r of the sample: its row of member m.
template <class T>
FLASHODE_INLINE T* output_row(const Batch& batch, int64_t b, const Outputs& outputs, int64_t r, int64_t m) {
  const int64_t* offsets = batch.members.offsets;
  const int64_t width = offsets[m + 1] - offsets[m];
  return static_cast<T*>(outputs.ys) + outputs.samples * (r * batch.width + offsets[m]) +
         batch.samples.at(kSample, b) * width;
}

// Outputs `first` to `first + n` of a sample, all inside its step; vectors run across outputs where rows
// are short, along rows where they are long. Returns how many are finite before one is not.
template <class T>
FLASHODE_INLINE int64_t interpolate(const Batch& batch, int64_t b, const T* y0, const Terms& k,
                                    const Polynomial& dense, const Outputs& outputs, int64_t first,
                                    int64_t n) {
  using A = wide_t<T>;
  const Samples& s = batch.samples;
  const double t0 = s.at(kT0, b), t1 = s.at(kT1, b), step = s.at(kDirection, b) * s.at(kSize, b);
  double x[kTogether] = {}, coef[kTogether][kMaxTerms];
  A of_output[kMaxTerms][kTogether], zero[kTogether] = {};
  for (int64_t r = 0; r < n; ++r) x[r] = (s.times_of(b)[first + r] - t0) / (t1 - t0);
  for (int j = 0; j < dense.count; ++j) {
    double w[kTogether] = {};
    for (int power = dense.degree - 1; power >= 0; --power) {  // Horner
#pragma omp simd
      for (int r = 0; r < kTogether; ++r) w[r] = (w[r] + dense.weight[power][j]) * x[r];
    }
    for (int r = 0; r < kTogether; ++r) of_output[j][r] = A(coef[r][j] = w[r] * step);
  }
  for (int64_t m = 0; m < batch.members.count; ++m) {
    const Span row{b, b + 1};
    const int64_t begin = row.first(batch, m), width = row.width(batch, m);
    for (int64_t i = 0; is_short(batch) && i < width; ++i) {
      A total[kTogether] = {};
      for (int j = 0; j < dense.count; ++j) {
        const A k_j = widen(static_cast<const T*>(k.k[j])[begin + i]);
#pragma omp simd
        for (int r = 0; r < kTogether; ++r) {
          total[r] = j == 0 ? of_output[j][r] * k_j : add_term(total[r], of_output[j][r], k_j);
        }
      }
      for (int64_t r = 0; r < n; ++r) {
        const T y = narrow<T>(widen(y0[begin + i]) + total[r]);
        output_row<T>(batch, b, outputs, first + r, m)[i] = y;
        zero[r] += widen(y) - widen(y);
      }
    }
    for (int64_t r = 0; !is_short(batch) && r < n; ++r) {
      T* out = output_row<T>(batch, b, outputs, first + r, m);
      for (int64_t tile = 0; tile < width; tile += kTile) {
        alignas(64) A total[kTile];
        const int64_t length = std::min(kTile, width - tile);
        weighted_sum<T>(total, k, Uniform{coef[r]}, begin + tile, length);
        for (int64_t i = 0; i < length; ++i) {
          out[tile + i] = narrow<T>(widen(y0[begin + tile + i]) + total[i]);
          zero[r] += widen(out[tile + i]) - widen(out[tile + i]);
        }
      }
    }
  }
  return std::find_if(zero, zero + n, [](A z) { return z != 0; }) - zero;
}

template <class T>
void copy_row(const Batch& batch, int64_t b, const T* from, T* to) {
  for (int64_t m = 0; m < batch.members.count; ++m) {
    const Span row{b, b + 1};
    const int64_t first = row.first(batch, m);
    for (int64_t i = first; i < first + row.width(batch, m); ++i) to[i] = from[i];
  }
}

// The outputs in the step that a sample has just taken; returns how many.
template <class T>
FLASHODE_INLINE int64_t emit(const Batch& batch, int64_t b, const T* y0, const T* y1, const Terms& k,
                             const Polynomial& dense, const Outputs& outputs) {
  const Samples& s = batch.samples;
  const int64_t first = s.at(kFilled, b), end = first + outputs_within(s, b);
  const double* times = s.times_of(b);
  const double t1 = s.at(kT1, b);
  int64_t r = first;
  while (r < end && times[r] < t1) {
    int64_t n = 1;
    while (n < kTogether && r + n < end && times[r + n] < t1) ++n;
    const int64_t finite = interpolate<T>(batch, b, y0, k, dense, outputs, r, n);
    if (finite < n && dense.has_extra) {
      end_with(s, b, kNonfiniteField);  // its stages were not seen by the error test
      return r + finite - first;
    }
    r += n;
  }
  for (; r < end; ++r) {
    for (int64_t m = 0; m < batch.members.count; ++m) {
      const Span row{b, b + 1};
      std::copy_n(y1 + row.first(batch, m), row.width(batch, m), output_row<T>(batch, b, outputs, r, m));
    }
  }
  return end - first;
}

template <class T>
FLASHODE_INLINE void commit_span(const Batch& batch, const Span& span, void* y0, void* f0,
                                 const void* y1, const Terms& k, const void* f1,
                                 const Polynomial& dense, const Outputs& outputs) {
  const Samples& s = batch.samples;
  for (int64_t b = span.begin; b < span.end; ++b) {
    if (!s.running(b)) continue;
    if (s.at(kVerdict, b)) {
      T* y = static_cast<T*>(y0);
      const T* y_new = static_cast<const T*>(y1);
      const int64_t emitted = emit<T>(batch, b, y, y_new, k, dense, outputs);
      copy_row(batch, b, y_new, y);
      copy_row(batch, b, static_cast<const T*>(f1), static_cast<T*>(f0));
      commit_step(s, b, emitted);
    }
    begin_trial(batch, b);
  }
}

template <class T>
FLASHODE_INLINE void judge_span(const Batch& batch, const Span& span, const void* y0,
                                const void* y1, const Terms& terms, const Terms& k,
                                const Sum& error) {
  double norm[kTile];
  norms_of_span<T>(batch, span, y0, y1, terms, error.weight, true, norm);
  for (int64_t b = span.begin; b < span.end; ++b) {
    if (!batch.samples.running(b)) continue;
    const double ratio = norm[b - span.begin];
    judge_trial(batch, b, ratio);
    if (!is_finite(ratio)) {
      blame(batch, b, cause_of<T>(batch, b, k, y1), row_is_finite<T>(batch, b, k.k[0]));
    }
  }
}

template <class T>
FLASHODE_INLINE void probe_span(const Batch& batch, const Span& span, const void* y0,
                                const void* f0) {
  const double one = 1;
  double d0[kTile], d1[kTile];
  norms_of_span<T>(batch, span, y0, y0, {1, {y0}}, &one, false, d0);
  norms_of_span<T>(batch, span, y0, y0, {1, {f0}}, &one, false, d1);
  for (int64_t b = span.begin; b < span.end; ++b) {
    if (!batch.samples.running(b)) continue;
    const int64_t i = b - span.begin;
    if (!is_finite(d1[i])) {
      end_with(batch.samples, b, cause_of<T>(batch, b, {1, {f0}}, y0));
    } else {
      probe_with(batch.samples, b, d0[i], d1[i]);
    }
  }
}

template <class T>
FLASHODE_INLINE void first_trials_span(const Batch& batch, const Span& span, const void* y0,
                                       const void* f0, const void* f1) {
  const double difference[] = {1, -1};
  double d2[kTile];
  norms_of_span<T>(batch, span, y0, y0, {2, {f1, f0}}, difference, false, d2);
  for (int64_t b = span.begin; b < span.end; ++b) {
    if (batch.samples.running(b)) {
      first_trial(batch.samples, b, d2[b - span.begin], batch.control.order);
    }
  }
}

#define FLASHODE_FOR_DTYPE(T, name)                                                                \
  FLASHODE_CLONES void stage_##name(const Batch& batch, const Span& span, const void* y0,          \
                                    const Terms& terms, const Sum& sum, const StageTimes& times,   \
                                    void* out) {                                                   \
    stage_span<T>(batch, span, y0, terms, sum, times, out);                                        \
  }                                                                                                \
  FLASHODE_CLONES void judge_##name(const Batch& batch, const Span& span, const void* y0,          \
                                    const void* y1, const Terms& terms, const Terms& k,            \
                                    const Sum& error) {                                            \
    judge_span<T>(batch, span, y0, y1, terms, k, error);                                           \
  }                                                                                                \
  FLASHODE_CLONES void commit_##name(const Batch& batch, const Span& span, void* y0, void* f0,     \
                                     const void* y1, const Terms& k, const void* f1,               \
                                     const Polynomial& dense, const Outputs& outputs) {            \
    commit_span<T>(batch, span, y0, f0, y1, k, f1, dense, outputs);                                \
  }                                                                                                \
  void probe_##name(const Batch& batch, const Span& span, const void* y0, const void* f0) {        \
    probe_span<T>(batch, span, y0, f0);                                                            \
  }                                                                                                \
  void first_trials_##name(const Batch& batch, const Span& span, const void* y0, const void* f0,   \
                           const void* f1) {                                                       \
    first_trials_span<T>(batch, span, y0, f0, f1);                                                 \
  }

FLASHODE_FOR_DTYPE(float, f32)
FLASHODE_FOR_DTYPE(double, f64)
FLASHODE_FOR_DTYPE(Half, f16)
FLASHODE_FOR_DTYPE(BFloat16, bf16)

// As many samples at a time as fill a tile with short rows. Their number is no one's bits.
template <class Body>
void for_each_span(const Batch& batch, int terms, int threads, const Body& body) {
  const int64_t count = batch.samples.count;
  const int64_t some = std::max<int64_t>(1, kTile / std::max<int64_t>(1, batch.widest));
  const int64_t spans = (count + some - 1) / some;
  const int64_t work = count * batch.members.offsets[batch.members.count] * (terms + 2);
  const auto run = [&](int64_t i) { body(Span{i * some, std::min(count, (i + 1) * some)}); };
  if (threads == 1 || work <= kParallel) {
    for (int64_t i = 0; i < spans; ++i) run(i);
    return;
  }
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t i = 0; i < spans; ++i) run(i);
}

Tally counted(const Samples& s) {
  Tally tally{0, 0};
  for (int64_t b = 0; b < s.count; ++b) {
    if (s.running(b)) ++tally.running;
  }
  return tally;
}

}  // namespace

void stage(const Batch& batch, const void* y0, const Terms& k, const Sum& sum,
           const StageTimes& times, void* out, int threads) {
  const Terms terms = terms_of(k, sum);
  for_each_span(batch, sum.count, threads, [&](const Span& span) {
    FLASHODE_CALL(stage, batch.dtype, batch, span, y0, terms, sum, times, out);
  });
}

Tally probe(const Batch& batch, const void* y0, const void* f0, int threads) {
  for_each_span(batch, 2, threads, [&](const Span& span) {
    FLASHODE_CALL(probe, batch.dtype, batch, span, y0, f0);
    spread_steps(batch, span);
  });
  return counted(batch.samples);
}

void first_trials(const Batch& batch, const void* y0, const void* f0, const void* f1, int threads) {
  for_each_span(batch, 2, threads, [&](const Span& span) {
    FLASHODE_CALL(first_trials, batch.dtype, batch, span, y0, f0, f1);
  });
}

Tally begin_trials(const Batch& batch, int threads) {
  for_each_span(batch, 0, threads, [&](const Span& span) {
    for (int64_t b = span.begin; b < span.end; ++b) begin_trial(batch, b);
    spread_steps(batch, span);
  });
  return counted(batch.samples);
}

Tally judge(const Batch& batch, const void* y0, const void* y1, const Terms& k, const Sum& error,
             bool extra, int threads) {
  const Samples& s = batch.samples;
  const Terms terms = terms_of(k, error);
  for_each_span(batch, error.count, threads, [&](const Span& span) {
    FLASHODE_CALL(judge, batch.dtype, batch, span, y0, y1, terms, k, error);
    if (!extra) return;
    for (int64_t b = span.begin; b < span.end; ++b) {
      if (!s.running(b) || !s.at(kVerdict, b) || !output_inside(s, b)) s.at(kStep, b) = 0;
    }
    spread_steps(batch, span);
  });
  Tally tally = counted(s);
  for (int64_t b = 0; extra && b < s.count; ++b) tally.inside += s.at(kStep, b) != 0;
  return tally;
}

Tally commit(const Batch& batch, void* y0, void* f0, const void* y1, const Terms& k, const void* f1,
              const Polynomial& dense, const Outputs& outputs, int threads) {
  Terms terms;
  for (int j = 0; j < dense.count; ++j) terms.k[terms.count++] = k.k[dense.stage[j]];
  for_each_span(batch, 2, threads, [&](const Span& span) {
    FLASHODE_CALL(commit, batch.dtype, batch, span, y0, f0, y1, terms, f1, dense, outputs);
    spread_steps(batch, span);
  });
  return counted(batch.samples);
}

}  // namespace flashode::cpu
