// The fused operations on a GPU: grid-stride loops and block sums around the formulas of rk.h.
//
// Every function queues its work on the caller's stream and returns a cudaError_t; only wait()
// waits. Sums are taken in a fixed order: a result does not depend on how blocks are scheduled.

#include <cuda_runtime.h>

#include "clock.h"
#include "cuda_block.h"
#include "launch.h"

namespace flashode::cuda {
namespace {

constexpr int kUnroll = 4;          // elements that a thread works on at once: loads in flight
constexpr int kRows = 16;           // rows of coefficients that travel with one launch
constexpr int kSegments = 64;       // segments that travel with one launch

// Coefficients go by value, into the constant bank: a launch reads no host memory later.
struct Coefficients {
  double of[kRows * kMaxTerms];
};

// Elements i, i + stride, ... of one thread. Past the end the last element is read again, and
// nothing is written, so that loads need no branches.
struct Strip {
  int64_t n, first, stride;
  __device__ int64_t at(int u) const { return first + u * stride; }
  __device__ int64_t readable(int u) const { return at(u) < n ? at(u) : n - 1; }
};

// total[u] = sum_j coef_j k_j at kUnroll elements, in the order of the terms. The number of terms
// is a run-time number: the loop is bound by memory, and one kernel a dtype keeps builds short.
template <class T>
__device__ __forceinline__ void weighted_sum(wide_t<T> (&total)[kUnroll], const Terms& terms,
                                             const double* coef, const Strip& strip) {
  using A = wide_t<T>;
  for (int u = 0; u < kUnroll; ++u) total[u] = 0;
#pragma unroll 4
  for (int j = 0; j < terms.count; ++j) {
    const T* k = static_cast<const T*>(terms.k[j]);
    const A c = A(coef[j]);
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const A k_u = widen(k[strip.readable(u)]);
      total[u] = j == 0 ? c * k_u : add_term(total[u], c, k_u);
    }
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    combine_kernel(int64_t n, const T* y0, Terms terms, Coefficients coef, int rows, T* out,
                   Clock clock, Dtype dtype) {
  using A = wide_t<T>;
  if (blockIdx.x == 0 && threadIdx.x == 0 && clock.t != nullptr) {
    write_time(clock.t, clock.value, dtype);
  }
  const int64_t stride = int64_t(gridDim.x) * blockDim.x;
  for (int64_t first = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; first < n;
       first += stride * kUnroll) {
    const Strip strip{n, first, stride};
    for (int row = 0; row < rows; ++row) {  // rows after the first find the slopes in the caches
      A total[kUnroll];
      weighted_sum<T>(total, terms, coef.of + row * kMaxTerms, strip);
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        const A start = y0 ? widen(y0[strip.readable(u)]) : A(0);
        const T y1 = narrow<T>(start + total[u]);
        if (strip.at(u) < n) out[row * n + strip.at(u)] = y1;
      }
    }
  }
}

template <class T>
__device__ __forceinline__ void scaled_error_at(wide_t<T> (&scaled)[kUnroll], const T* y0,
                                                const T* y1, const Terms& terms,
                                                const double* coef, const Tolerance& tol,
                                                const Strip& strip) {
  using A = wide_t<T>;
  weighted_sum<T>(scaled, terms, coef, strip);
#pragma unroll
  for (int u = 0; u < kUnroll; ++u) {
    const int64_t i = strip.readable(u);
    const A rtol = tol.each_rtol ? static_cast<const A*>(tol.each_rtol)[i] : A(tol.rtol);
    const A atol = tol.each_atol ? static_cast<const A*>(tol.each_atol)[i] : A(tol.atol);
    scaled[u] = flashode::scaled_error<A>(scaled[u], widen(y0[i]), widen(y1[i]), rtol, atol);
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    scaled_error_kernel(int64_t n, const T* y0, const T* y1, Terms terms, Coefficients coef,
                        Tolerance tol, wide_t<T>* out) {
  const int64_t stride = int64_t(gridDim.x) * blockDim.x;
  for (int64_t first = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; first < n;
       first += stride * kUnroll) {
    const Strip strip{n, first, stride};
    wide_t<T> scaled[kUnroll];
    scaled_error_at<T>(scaled, y0, y1, terms, coef.of, tol, strip);
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      if (strip.at(u) < n) out[strip.at(u)] = scaled[u];
    }
  }
}

// Block (p, y) sums its share of inner product p = row * terms.count + j into a partial sum.
template <class T>
__global__ void __launch_bounds__(kThreads)
    inner_kernel(int64_t n, const T* g, Terms terms, double* partial) {
  const T* a = g + blockIdx.x / terms.count * n;
  const T* b = static_cast<const T*>(terms.k[blockIdx.x % terms.count]);
  const int64_t stride = int64_t(gridDim.y) * blockDim.x;
  double sum = 0;
  for (int64_t first = int64_t(blockIdx.y) * blockDim.x + threadIdx.x; first < n;
       first += stride * kUnroll) {
    const Strip strip{n, first, stride};
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int64_t i = strip.readable(u);
      const double product = double(widen(a[i])) * double(widen(b[i]));
      if (strip.at(u) < n) sum += product;
    }
  }
  sum = block_sum(sum);
  if (threadIdx.x == 0) partial[int64_t(blockIdx.x) * gridDim.y + blockIdx.y] = sum;
}

// Block p sums the partial sums of inner product p.
__global__ void __launch_bounds__(kThreads)
    sum_kernel(const double* partial, int64_t shares, double* out) {
  double sum = 0;
  for (int64_t i = threadIdx.x; i < shares; i += blockDim.x) sum += partial[blockIdx.x * shares + i];
  sum = block_sum(sum);
  if (threadIdx.x == 0) out[blockIdx.x] = sum;
}

// What the norms of one verdict share; a partial sum for every block follows.
struct Scratch {
  unsigned int finished;  // blocks of this launch
  double so_far;          // the largest norm of the launches before
  __device__ double* partial() { return reinterpret_cast<double*>(this + 1); }
};

// The partial sums that make up one norm, and how many elements they cover.
struct Share {
  int64_t begin, end, size;
};

// Takes the sum of this block. The last block to come here turns the partial sums into root mean
// squares; share_of says which of them belong together. It keeps the largest or gives the verdict.
template <class ShareOf>
__device__ void finish(double sum, int64_t norms, const ShareOf& share_of, Scratch* scratch,
                       const Verdict& verdict) {
  __shared__ bool last;
  double* partial = scratch->partial();
  if (threadIdx.x == 0) {
    partial[int64_t(blockIdx.x) * gridDim.y + blockIdx.y] = sum;
    __threadfence();  // the sum is visible before the count says so
    last = atomicAdd(&scratch->finished, 1u) == gridDim.x * gridDim.y - 1;
  }
  __syncthreads();
  if (!last) return;
  __threadfence();

  double largest = scratch->so_far;
  for (int64_t m = 0; m < norms; ++m) {
    const Share share = share_of(m);
    double sum_of_share = 0;
    for (int64_t b = share.begin + threadIdx.x; b < share.end; b += blockDim.x) {
      // volatile: from memory, where the other blocks' sums are, not from this block's cache.
      sum_of_share += static_cast<volatile double*>(partial)[b];
    }
    const double total = block_sum(sum_of_share);
    if (share.size > 0) largest = larger(largest, sqrt(total / double(share.size)));
  }
  if (threadIdx.x != 0) return;
  const bool to_be_continued = verdict.norm == nullptr && verdict.decision == nullptr;
  scratch->finished = 0;
  scratch->so_far = to_be_continued ? largest : 0.0;
  largest = larger(largest, verdict.known);
  if (verdict.norm != nullptr) *verdict.norm = largest;
  if (verdict.decision != nullptr) {
    *verdict.decision = decide(largest, verdict.dt, verdict.control);
    __threadfence_system();  // the host reads it
  }
}

// Block (m, y) sums its share of member m (members on the axis without a small limit).
template <class T>
__global__ void __launch_bounds__(kThreads)
    error_norm_kernel(const T* y0, const T* y1, Terms terms, Coefficients coef, Tolerance tol,
                      Members members, Scratch* scratch, Verdict verdict) {
  const int64_t begin = members.offsets[blockIdx.x], end = members.offsets[blockIdx.x + 1];
  const int64_t stride = int64_t(gridDim.y) * blockDim.x;
  double sum = 0;
  for (int64_t first = begin + int64_t(blockIdx.y) * blockDim.x + threadIdx.x; first < end;
       first += stride * kUnroll) {
    const Strip strip{end, first, stride};
    wide_t<T> scaled[kUnroll];
    scaled_error_at<T>(scaled, y0, y1, terms, coef.of, tol, strip);
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      if (strip.at(u) < end) sum += double(scaled[u]) * double(scaled[u]);
    }
  }
  const auto share_of = [&](int64_t m) {
    return Share{m * gridDim.y, (m + 1) * gridDim.y, members.offsets[m + 1] - members.offsets[m]};
  };
  finish(block_sum(sum), members.count, share_of, scratch, verdict);
}

// Segments by value, like coefficients. Each has blocks in proportion to its size: one large tensor
// among many small ones does not give all of them a large grid.
struct SegmentTable {
  int count;
  int first_block[kSegments + 1];
  Segment of[kSegments];

  __device__ int segment_of_block() const {
    int s = 0;
    while (int(blockIdx.x) >= first_block[s + 1]) ++s;
    return s;
  }
  // Where the strips of this thread begin, and their stride.
  __device__ Strip first_strip(int s) const {
    const int64_t stride = int64_t(first_block[s + 1] - first_block[s]) * blockDim.x;
    return {of[s].n, int64_t(blockIdx.x - first_block[s]) * blockDim.x + threadIdx.x, stride};
  }
};

template <class T>
__global__ void __launch_bounds__(kThreads)
    accumulate_kernel(SegmentTable table, double w_value, double w_error, bool is_first) {
  using A = wide_t<T>;
  const int s = table.segment_of_block();
  const Segment& segment = table.of[s];
  const T* slope = static_cast<const T*>(segment.slope);
  const T* base = static_cast<const T*>(segment.base);
  T* value = static_cast<T*>(segment.value);
  T* error = static_cast<T*>(segment.error);
  for (Strip strip = table.first_strip(s); strip.first < strip.n;
       strip.first += strip.stride * kUnroll) {
    A k[kUnroll], value0[kUnroll], error0[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int64_t i = strip.readable(u);
      k[u] = slope ? widen(slope[i]) : A(0);
      value0[u] = widen(base[i]);
      error0[u] = error && !is_first ? widen(error[i]) : A(0);
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int64_t i = strip.at(u);
      if (i >= strip.n) continue;
      value[i] = narrow<T>(add_term(value0[u], A(w_value), k[u]));
      if (error) error[i] = narrow<T>(add_term(error0[u], A(w_error), k[u]));
    }
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    segment_norm_kernel(SegmentTable table, double rtol, double atol, Scratch* scratch,
                        Verdict verdict) {
  using A = wide_t<T>;
  const int s = table.segment_of_block();
  const Segment& segment = table.of[s];
  const T* y0 = static_cast<const T*>(segment.base);
  const T* y1 = static_cast<const T*>(segment.value);
  const T* error = static_cast<const T*>(segment.error);
  double sum = 0;
  for (Strip strip = table.first_strip(s); strip.first < strip.n;
       strip.first += strip.stride * kUnroll) {
    A scaled[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int64_t i = strip.readable(u);
      scaled[u] = flashode::scaled_error<A>(widen(error[i]), widen(y0[i]), widen(y1[i]), A(rtol),
                                            A(atol));
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      if (strip.at(u) < strip.n) sum += double(scaled[u]) * double(scaled[u]);
    }
  }
  const auto share_of = [&](int64_t m) {
    return Share{table.first_block[m], table.first_block[m + 1], table.of[m].n};
  };
  finish(block_sum(sum), table.count, share_of, scratch, verdict);
}

int64_t blocks_for(int64_t n) {
  const int64_t wanted = (n + kThreads * kUnroll - 1) / (kThreads * kUnroll);
  return wanted < 1 ? 1 : wanted < kMaxBlocks ? wanted : kMaxBlocks;
}

Coefficients coefficients(const double* coef, int64_t rows, int count) {
  Coefficients packed;
  for (int64_t row = 0; row < rows; ++row) {
    for (int j = 0; j < count; ++j) packed.of[row * kMaxTerms + j] = coef[row * count + j];
  }
  return packed;
}

// Calls body(table, blocks, whether it is the last) for as many tables as the segments need.
template <class Body>
int for_each_table(const Segment* segments, int64_t count, const Body& body) {
  int error = cudaSuccess;
  for (int64_t begin = 0; begin < count && error == cudaSuccess; begin += kSegments) {
    SegmentTable table;
    table.count = int(count - begin < kSegments ? count - begin : kSegments);
    table.first_block[0] = 0;
    for (int s = 0; s < table.count; ++s) {
      table.of[s] = segments[begin + s];
      table.first_block[s + 1] = table.first_block[s] + int(blocks_for(table.of[s].n));
    }
    error = body(table, dim3(unsigned(table.first_block[table.count])), begin + kSegments >= count);
  }
  return error;
}

}  // namespace

int combine(Dtype dtype, int64_t n, const void* y0, const Terms& terms, const double* coef,
            int64_t rows, void* out, Clock clock, void* stream) {
  return for_dtype(dtype, [&](auto type) -> int {
    using T = decltype(type);
    int error = cudaSuccess;
    for (int64_t row = 0; row < rows && error == cudaSuccess; row += kRows) {
      const int64_t some = rows - row < kRows ? rows - row : kRows;
      error = launch(combine_kernel<T>, dim3(unsigned(blocks_for(n))), stream, n,
                     static_cast<const T*>(y0), terms,
                     coefficients(coef + row * terms.count, some, terms.count), int(some),
                     static_cast<T*>(out) + row * n, clock, dtype);
    }
    return error;
  });
}

int scaled_error(Dtype dtype, int64_t n, const void* y0, const void* y1, const Terms& terms,
                 const double* coef, const Tolerance& tol, void* out, void* stream) {
  return for_dtype(dtype, [&](auto type) -> int {
    using T = decltype(type);
    return launch(scaled_error_kernel<T>, dim3(unsigned(blocks_for(n))), stream, n,
                  static_cast<const T*>(y0), static_cast<const T*>(y1), terms,
                  coefficients(coef, 1, terms.count), tol, static_cast<wide_t<T>*>(out));
  });
}

int64_t norm_scratch_bytes(int64_t longest_member, int64_t members) {
  return int64_t(sizeof(Scratch) + sizeof(double) * blocks_for(longest_member) * members);
}

int64_t norm_scratch_bytes(const Segment* segments, int64_t count) {
  int64_t blocks = 0;
  for (int64_t s = 0; s < count; ++s) blocks += blocks_for(segments[s].n);
  return int64_t(sizeof(Scratch) + sizeof(double) * blocks);
}

int error_norm(Dtype dtype, int64_t longest_member, const void* y0, const void* y1,
               const Terms& terms, const double* coef, const Tolerance& tol,
               const Members& members, void* scratch, const Verdict& verdict, void* stream) {
  return for_dtype(dtype, [&](auto type) -> int {
    using T = decltype(type);
    const dim3 grid(unsigned(members.count), unsigned(blocks_for(longest_member)));
    return launch(error_norm_kernel<T>, grid, stream, static_cast<const T*>(y0),
                  static_cast<const T*>(y1), terms, coefficients(coef, 1, terms.count), tol,
                  members, static_cast<Scratch*>(scratch), verdict);
  });
}

int error_norm(Dtype dtype, const Segment* segments, int64_t count, double rtol, double atol,
               void* scratch, const Verdict& verdict, void* stream) {
  return for_dtype(dtype, [&](auto type) -> int {
    return for_each_table(segments, count, [&](const SegmentTable& table, dim3 grid, bool last) {
      return launch(segment_norm_kernel<decltype(type)>, grid, stream, table, rtol, atol,
                    static_cast<Scratch*>(scratch), last ? verdict : Verdict());
    });
  });
}

int64_t inner_scratch_bytes(int64_t n, int64_t rows, int terms) {
  return int64_t(sizeof(double)) * blocks_for(n) * rows * terms;
}

int inner(Dtype dtype, int64_t n, const void* g, int64_t rows, const Terms& terms, double* out,
          void* scratch, void* stream) {
  const unsigned pairs = unsigned(rows * terms.count), blocks = unsigned(blocks_for(n));
  if (pairs == 0) return cudaSuccess;
  double* const partial = static_cast<double*>(scratch);
  const int error = for_dtype(dtype, [&](auto type) -> int {
    using T = decltype(type);
    return launch(inner_kernel<T>, dim3(pairs, blocks), stream, n, static_cast<const T*>(g), terms,
                  partial);
  });
  if (error != cudaSuccess) return error;
  return launch(sum_kernel, dim3(pairs), stream, static_cast<const double*>(partial),
                int64_t(blocks), out);
}

int accumulate(Dtype dtype, const Segment* segments, int64_t count, double w_value, double w_error,
               bool first, void* stream) {
  return for_dtype(dtype, [&](auto type) -> int {
    return for_each_table(segments, count, [&](const SegmentTable& table, dim3 grid, bool) {
      return launch(accumulate_kernel<decltype(type)>, grid, stream, table, w_value, w_error, first);
    });
  });
}

int host_cell(Decision** cell) {
  static thread_local Decision* pinned = nullptr;
  int error = cudaSuccess;
  if (pinned == nullptr) {
    error = cudaHostAlloc(reinterpret_cast<void**>(&pinned), sizeof(Decision), cudaHostAllocPortable);
  }
  *cell = pinned;
  return error;
}

int use_device(int index) { return cudaSetDevice(index); }

int wait(void* stream) { return cudaStreamSynchronize(static_cast<cudaStream_t>(stream)); }

int device_count(int* count) {
  const int error = cudaGetDeviceCount(count);
  cudaGetLastError();  // "no driver" is an answer here, not a fault to be found by the next call
  return error;
}

int runtime_version() {
  int version = 0;
  cudaRuntimeGetVersion(&version);
  return version;
}

int driver_version() {
  int version = 0;
  cudaDriverGetVersion(&version);
  return version;
}

const char* error_text(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }

}  // namespace flashode::cuda
