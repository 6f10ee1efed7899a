// Batches whose samples are solved on their own, on a GPU.
//
// A sample has a team: one thread where its rows are short, a block where they are long. Which of the
// two depends on the length of a row alone, and a team adds up in an order of its own, so that a
// sample gets the same bits whatever else is in the batch.

#include <cuda_runtime.h>

#include "batch.h"
#include "cuda_block.h"

namespace flashode::cuda {
namespace {

constexpr int64_t kAlone = 64;  // numbers of a row up to which one thread does it

// One thread for every sample.
struct Thread {
  static __device__ int64_t first() { return int64_t(blockIdx.x) * blockDim.x + threadIdx.x; }
  static __device__ int64_t stride() { return int64_t(gridDim.x) * blockDim.x; }
  static __device__ int rank() { return 0; }
  static __device__ int size() { return 1; }
  static __device__ void sync() {}
  static __device__ double sum(double value) { return value; }
};

// One block for every sample.
struct Block {
  static __device__ int64_t first() { return blockIdx.x; }
  static __device__ int64_t stride() { return gridDim.x; }
  static __device__ int rank() { return threadIdx.x; }
  static __device__ int size() { return blockDim.x; }
  static __device__ void sync() { __syncthreads(); }
  static __device__ double sum(double value) { return block_sum(value); }
};

// Calls body(index) for the elements of a sample's row that this thread has: always the same ones.
template <class Team, class Body>
__device__ __forceinline__ void for_row(const Batch& batch, int64_t b, int64_t m, const Body& body) {
  const int64_t width = batch.members.offsets[m + 1] - batch.members.offsets[m];
  const int64_t first = batch.samples.count * batch.members.offsets[m] + b * width;
  for (int64_t i = Team::rank(); i < width; i += Team::size()) body(first + i, i, width);
}

template <class T>
__device__ __forceinline__ wide_t<T> sum_at(const Terms& k, const Sum& sum, double step, int64_t i) {
  using A = wide_t<T>;
  A total = 0;
  for (int j = 0; j < sum.count; ++j) {
    const A c = A(sum.weight[j] * step), k_j = widen(static_cast<const T*>(k.k[sum.stage[j]])[i]);
    total = j == 0 ? c * k_j : add_term(total, c, k_j);
  }
  return total;
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    stage_kernel(Batch batch, const T* y0, Terms k, Sum sum, StageTimes times, T* out) {
  using A = wide_t<T>;
  const Samples& s = batch.samples;
  for (int64_t b = Thread::first(); times.t != nullptr && b < s.count; b += Thread::stride()) {
    static_cast<T*>(times.t)[b] = narrow<T>(A(time_of_stage<T>(s, b, times.c, times.nudge)));
  }
  const int64_t* offsets = batch.members.offsets;
  const int64_t n = s.count * offsets[batch.members.count];
  int64_t m = 0;
  for (int64_t i = Thread::first(); i < n; i += Thread::stride()) {
    while (i >= s.count * offsets[m + 1]) ++m;
    const int64_t b = (i - s.count * offsets[m]) / (offsets[m + 1] - offsets[m]);
    const double step = s.at(kStep, b);
    out[i] = step == 0 ? y0[i] : narrow<T>(widen(y0[i]) + sum_at<T>(k, sum, step, i));
  }
}

// Largest over the members of the root mean square of the scaled error.
template <class T, class Team>
__device__ double norm_of(const Batch& batch, int64_t b, const T* y0, const T* y1, const Terms& k,
                          const Sum& sum, double step) {
  using A = wide_t<T>;
  const Tolerance& tol = batch.tolerance;
  double norm = 0;
  for (int64_t m = 0; m < batch.members.count; ++m) {
    const int64_t width = batch.members.offsets[m + 1] - batch.members.offsets[m];
    double squares = 0;
    for_row<Team>(batch, b, m, [&](int64_t i, int64_t, int64_t) {
      const A rtol = tol.each_rtol ? static_cast<const A*>(tol.each_rtol)[i] : A(tol.rtol);
      const A atol = tol.each_atol ? static_cast<const A*>(tol.each_atol)[i] : A(tol.atol);
      const A total = sum_at<T>(k, sum, step, i);
      const A error = flashode::scaled_error<A>(total, widen(y0[i]), widen(y1[i]), rtol, atol);
      squares += double(error) * double(error);
    });
    squares = Team::sum(squares);
    if (width > 0) norm = larger(norm, sqrt(squares / double(width)));
  }
  return norm;
}

template <class T, class Team>
__device__ bool row_is_finite(const Batch& batch, int64_t b, const void* x) {
  double zero = 0;
  for (int64_t m = 0; m < batch.members.count; ++m) {
    for_row<Team>(batch, b, m, [&](int64_t i, int64_t, int64_t) {
      const double value = widen(static_cast<const T*>(x)[i]);
      zero += value - value;
    });
  }
  return Team::sum(zero) == 0;
}

template <class T, class Team>
__device__ int64_t cause_of(const Batch& batch, int64_t b, const Terms& k, const void* y1) {
  for (int j = 0; j < k.count; ++j) {
    if (!row_is_finite<T, Team>(batch, b, k.k[j])) return kNonfiniteField;
  }
  return row_is_finite<T, Team>(batch, b, y1) ? kNonfiniteError : kNonfiniteState;
}

// Adds up what the threads counted. The last block to come here leaves the sums for the host.
__device__ void publish(unsigned running, unsigned inside, unsigned* scratch, Tally* tally) {
  running = unsigned(block_sum(running));
  inside = unsigned(block_sum(inside));
  if (threadIdx.x != 0) return;
  atomicAdd(&scratch[0], running);
  atomicAdd(&scratch[1], inside);
  __threadfence();  // the sums are there before the block says so
  if (atomicAdd(&scratch[2], 1u) != gridDim.x - 1) return;
  __threadfence();
  tally->running = atomicAdd(&scratch[0], 0u);
  tally->inside = atomicAdd(&scratch[1], 0u);
  scratch[0] = scratch[1] = scratch[2] = 0;
  __threadfence_system();  // the host reads it
}

template <class T, class Team>
__global__ void __launch_bounds__(kThreads)
    probe_kernel(Batch batch, const T* y0, const T* f0, unsigned* scratch, Tally* tally) {
  const Samples& s = batch.samples;
  Sum one;
  one.count = 1;
  one.stage[0] = 0;
  one.weight[0] = 1;
  unsigned running = 0;
  for (int64_t b = Team::first(); b < s.count; b += Team::stride()) {
    const bool runs = s.running(b);
    const double d0 = norm_of<T, Team>(batch, b, y0, y0, {1, {y0}}, one, 1);
    const double d1 = norm_of<T, Team>(batch, b, y0, y0, {1, {f0}}, one, 1);
    const int64_t cause = is_finite(d1) ? int64_t(kSuccess) : cause_of<T, Team>(batch, b, {1, {f0}}, y0);
    if (Team::rank() != 0 || !runs) continue;
    if (is_finite(d1)) {
      probe_with(s, b, d0, d1);
      ++running;
    } else {
      end_with(s, b, cause);
    }
  }
  publish(running, 0, scratch, tally);
}

template <class T, class Team>
__global__ void __launch_bounds__(kThreads)
    first_trials_kernel(Batch batch, const T* y0, const T* f0, const T* f1) {
  const Samples& s = batch.samples;
  Sum difference;
  difference.count = 2;
  difference.stage[0] = 0;
  difference.stage[1] = 1;
  difference.weight[0] = 1;
  difference.weight[1] = -1;
  for (int64_t b = Team::first(); b < s.count; b += Team::stride()) {
    const double d2 = norm_of<T, Team>(batch, b, y0, y0, {2, {f1, f0}}, difference, 1);
    if (Team::rank() == 0 && s.running(b)) first_trial(s, b, d2, batch.control.order);
  }
}

__global__ void __launch_bounds__(kThreads)
    begin_trials_kernel(Batch batch, unsigned* scratch, Tally* tally) {
  unsigned running = 0;
  for (int64_t b = Thread::first(); b < batch.samples.count; b += Thread::stride()) {
    begin_trial(batch, b);
    running += batch.samples.running(b);
  }
  publish(running, 0, scratch, tally);
}

template <class T, class Team>
__global__ void __launch_bounds__(kThreads)
    judge_kernel(Batch batch, const T* y0, const T* y1, Terms k, Sum error, bool extra,
                 unsigned* scratch, Tally* tally) {
  const Samples& s = batch.samples;
  unsigned running = 0, inside = 0;
  for (int64_t b = Team::first(); b < s.count; b += Team::stride()) {
    const bool runs = s.running(b);
    const double ratio = norm_of<T, Team>(batch, b, y0, y1, k, error, s.at(kStep, b));
    int64_t cause = kSuccess;
    bool f0_is_finite = true;
    if (!is_finite(ratio)) {
      cause = cause_of<T, Team>(batch, b, k, y1);
      f0_is_finite = row_is_finite<T, Team>(batch, b, k.k[0]);
    }
    Team::sync();  // all threads have read what the first of them writes
    if (Team::rank() != 0) continue;
    if (runs) {
      judge_trial(batch, b, ratio);
      if (!is_finite(ratio)) blame(batch, b, cause, f0_is_finite);
    }
    running += s.running(b);
    if (!extra) continue;
    if (s.running(b) && s.at(kVerdict, b) && output_inside(s, b)) {
      ++inside;
    } else {
      s.at(kStep, b) = 0;
    }
  }
  publish(running, inside, scratch, tally);
}

// Weights of the stages, x of the way through a step of a sample.
__device__ __forceinline__ void weights_at(const Polynomial& dense, double x, double* w) {
  for (int j = 0; j < dense.count; ++j) {
    w[j] = 0;
    for (int power = dense.degree - 1; power >= 0; --power) w[j] = (w[j] + dense.weight[power][j]) * x;
  }
}

// Output r of a sample, in the step that it has just taken. Returns whether it is finite.
template <class T, class Team>
__device__ bool write_output(const Batch& batch, int64_t b, const T* y0, const T* y1,
                             const Terms& k, const Polynomial& dense, const Outputs& outputs,
                             int64_t r) {
  using A = wide_t<T>;
  const Samples& s = batch.samples;
  const double t = s.times_of(b)[r], t0 = s.at(kT0, b), t1 = s.at(kT1, b);
  const bool at_end = t == t1;
  const int64_t* offsets = batch.members.offsets;
  const double step = s.at(kDirection, b) * s.at(kSize, b);
  Sum sum;
  sum.count = dense.count;
  for (int j = 0; j < dense.count; ++j) sum.stage[j] = dense.stage[j];
  weights_at(dense, (t - t0) / (t1 - t0), sum.weight);
  T* const ys = static_cast<T*>(outputs.ys) + r * outputs.samples * offsets[batch.members.count];
  double zero = 0;
  for (int64_t m = 0; m < batch.members.count; ++m) {
    T* const out = ys + outputs.samples * offsets[m];
    for_row<Team>(batch, b, m, [&](int64_t i, int64_t column, int64_t width) {
      const T y = at_end ? y1[i] : narrow<T>(A(widen(y0[i]) + sum_at<T>(k, sum, step, i)));
      out[s.at(kSample, b) * width + column] = y;
      zero += double(widen(y)) - double(widen(y));
    });
  }
  return !dense.has_extra || Team::sum(zero) == 0;
}

template <class T, class Team>
__global__ void __launch_bounds__(kThreads)
    commit_kernel(Batch batch, T* y0, T* f0, const T* y1, Terms k, const T* f1, Polynomial dense,
                  Outputs outputs, unsigned* scratch, Tally* tally) {
  const Samples& s = batch.samples;
  unsigned running = 0;
  for (int64_t b = Team::first(); b < s.count; b += Team::stride()) {
    const bool moves = s.running(b) && s.at(kVerdict, b);
    const int64_t begin = s.at(kFilled, b), count = moves ? outputs_within(s, b) : 0;
    int64_t emitted = 0;
    for (; emitted < count; ++emitted) {
      if (!write_output<T, Team>(batch, b, y0, y1, k, dense, outputs, begin + emitted)) break;
    }
    if (moves) {
      for (int64_t m = 0; m < batch.members.count; ++m) {
        for_row<Team>(batch, b, m, [&](int64_t i, int64_t, int64_t) {
          y0[i] = y1[i];
          f0[i] = f1[i];
        });
      }
    }
    Team::sync();  // all threads have read what the first of them writes
    if (Team::rank() != 0) continue;
    if (emitted < count) end_with(s, b, kNonfiniteField);  // seen in the stages of dense output only
    if (moves) commit_step(s, b, emitted);
    begin_trial(batch, b);
    running += s.running(b);
  }
  publish(running, 0, scratch, tally);
}

int64_t blocks_for(int64_t samples, bool alone) {
  const int64_t wanted = alone ? (samples + kThreads - 1) / kThreads : samples;
  return wanted < 1 ? 1 : wanted < kMaxBlocks ? wanted : kMaxBlocks;
}

// Calls body(a value of the dtype's storage type, the team of a sample, grid).
template <class Body>
int for_team(const Batch& batch, const Body& body) {
  const bool alone = batch.widest <= kAlone;
  const dim3 grid(unsigned(blocks_for(batch.samples.count, alone)));
  return for_dtype(batch.dtype, [&](auto type) -> int {
    return alone ? body(type, Thread(), grid) : body(type, Block(), grid);
  });
}

}  // namespace

int stage(const Batch& batch, const void* y0, const Terms& k, const Sum& sum,
          const StageTimes& times, void* out, void* stream) {
  const int64_t each = batch.width > 1 ? batch.width : 1;
  const dim3 grid(unsigned(blocks_for(batch.samples.count * each, true)));
  return for_dtype(batch.dtype, [&](auto type) -> int {
    using T = decltype(type);
    return launch(stage_kernel<T>, grid, stream, batch, static_cast<const T*>(y0), k, sum, times,
                  static_cast<T*>(out));
  });
}

int probe(const Batch& batch, const void* y0, const void* f0, unsigned* scratch, Tally* tally,
          void* stream) {
  return for_team(batch, [&](auto type, auto team, dim3 grid) -> int {
    using T = decltype(type);
    return launch(probe_kernel<T, decltype(team)>, grid, stream, batch, static_cast<const T*>(y0),
                  static_cast<const T*>(f0), scratch, tally);
  });
}

int first_trials(const Batch& batch, const void* y0, const void* f0, const void* f1, void* stream) {
  return for_team(batch, [&](auto type, auto team, dim3 grid) -> int {
    using T = decltype(type);
    return launch(first_trials_kernel<T, decltype(team)>, grid, stream, batch,
                  static_cast<const T*>(y0), static_cast<const T*>(f0), static_cast<const T*>(f1));
  });
}

int begin_trials(const Batch& batch, unsigned* scratch, Tally* tally, void* stream) {
  const dim3 grid(unsigned(blocks_for(batch.samples.count, true)));
  return launch(begin_trials_kernel, grid, stream, batch, scratch, tally);
}

int judge(const Batch& batch, const void* y0, const void* y1, const Terms& k, const Sum& error,
          bool extra, unsigned* scratch, Tally* tally, void* stream) {
  return for_team(batch, [&](auto type, auto team, dim3 grid) -> int {
    using T = decltype(type);
    return launch(judge_kernel<T, decltype(team)>, grid, stream, batch, static_cast<const T*>(y0),
                  static_cast<const T*>(y1), k, error, extra, scratch, tally);
  });
}

int commit(const Batch& batch, void* y0, void* f0, const void* y1, const Terms& k, const void* f1,
           const Polynomial& dense, const Outputs& outputs, unsigned* scratch, Tally* tally,
           void* stream) {
  return for_team(batch, [&](auto type, auto team, dim3 grid) -> int {
    using T = decltype(type);
    return launch(commit_kernel<T, decltype(team)>, grid, stream, batch, static_cast<T*>(y0),
                  static_cast<T*>(f0), static_cast<const T*>(y1), k, static_cast<const T*>(f1),
                  dense, outputs, scratch, tally);
  });
}

int host_tally(Tally** cell) {
  static thread_local Tally* pinned = nullptr;
  int error = cudaSuccess;
  if (pinned == nullptr) {
    error = cudaHostAlloc(reinterpret_cast<void**>(&pinned), sizeof(Tally), cudaHostAllocPortable);
  }
  *cell = pinned;
  return error;
}

}  // namespace flashode::cuda
