// The fused operations on a GPU: grid-stride loops and block sums around the formulas of rk.h.
//
// Every function queues its work on the caller's stream and returns a cudaError_t; only wait()
// waits. Sums are taken in a fixed order: a result does not depend on how blocks are scheduled.

#include <cuda_runtime.h>

#include "clock.h"
#include "launch.h"

namespace flashode::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kUnroll = 4;          // elements that a thread works on at once: loads in flight
constexpr int64_t kMaxBlocks = 1056;  // eight on each of the 132 multiprocessors of a Hopper part
constexpr int kRows = 16;           // rows of coefficients that travel with one launch

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
        const T y1 = narrow<T>(widen(y0[strip.readable(u)]) + total[u]);
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

// Sum over the block, always in the same order. Every thread gets it.
__device__ double block_sum(double value) {
  __shared__ double shared[kThreads];
  __syncthreads();
  shared[threadIdx.x] = value;
  __syncthreads();
  for (int half = kThreads / 2; half > 0; half /= 2) {
    if (threadIdx.x < half) shared[threadIdx.x] += shared[threadIdx.x + half];
    __syncthreads();
  }
  return shared[0];
}

// Where the norm and the decision go, and what the decision needs.
struct Verdict {
  double* norm;
  Decision* decision;
  double dt;
  Controller control;
};

// Block (m, y) sums its share of member m (members on the axis without a small limit). The last block to finish turns the partial sums into
// the largest root mean square, decides about the step, and leaves the counter at zero.
template <class T>
__global__ void __launch_bounds__(kThreads)
    error_norm_kernel(const T* y0, const T* y1, Terms terms, Coefficients coef, Tolerance tol,
                      Members members, double* partial, unsigned int* finished, Verdict verdict) {
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
  sum = block_sum(sum);

  __shared__ bool last;
  if (threadIdx.x == 0) {
    partial[int64_t(blockIdx.x) * gridDim.y + blockIdx.y] = sum;
    __threadfence();  // the sum is visible before the count says so
    last = atomicAdd(finished, 1u) == gridDim.x * gridDim.y - 1;
  }
  __syncthreads();
  if (!last) return;
  __threadfence();

  double largest = 0;
  for (int64_t m = 0; m < members.count; ++m) {
    double share = 0;
    for (int64_t b = threadIdx.x; b < gridDim.y; b += blockDim.x) {
      // volatile: from memory, where the other blocks' sums are, not from this block's cache.
      share += static_cast<volatile double*>(partial)[m * gridDim.y + b];
    }
    const int64_t size = members.offsets[m + 1] - members.offsets[m];
    const double total = block_sum(share);
    const double norm = size > 0 ? sqrt(total / double(size)) : 0.0;
    if (largest == largest && !(norm <= largest)) largest = norm;  // a NaN is kept
  }
  if (threadIdx.x != 0) return;
  if (verdict.norm != nullptr) *verdict.norm = largest;
  if (verdict.decision != nullptr) {
    *verdict.decision = decide(largest, verdict.dt, verdict.control);
    __threadfence_system();  // the host reads it
  }
  *finished = 0;
}

int64_t blocks_for(int64_t n) {
  const int64_t wanted = (n + kThreads * kUnroll - 1) / (kThreads * kUnroll);
  return wanted < 1 ? 1 : wanted < kMaxBlocks ? wanted : kMaxBlocks;
}

template <class... Parameters, class... Arguments>
int launch(void (*kernel)(Parameters...), dim3 grid, void* stream, Arguments... arguments) {
  kernel<<<grid, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(arguments...);
  return cudaGetLastError();
}

// Calls body with a value of the dtype's storage type.
template <class Body>
int for_dtype(Dtype dtype, const Body& body) {
  switch (dtype) {
    case Dtype::f32: return body(float());
    case Dtype::f64: return body(double());
    case Dtype::f16: return body(Half());
    default: return body(BFloat16());
  }
}

Coefficients coefficients(const double* coef, int64_t rows, int count) {
  Coefficients packed;
  for (int64_t row = 0; row < rows; ++row) {
    for (int j = 0; j < count; ++j) packed.of[row * kMaxTerms + j] = coef[row * count + j];
  }
  return packed;
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

// The counter comes first, then a partial sum for every block.
int64_t norm_scratch_bytes(int64_t longest_member, int64_t members) {
  return int64_t(sizeof(double)) * (1 + blocks_for(longest_member) * members);
}

int error_norm(Dtype dtype, int64_t longest_member, const void* y0, const void* y1,
               const Terms& terms, const double* coef, const Tolerance& tol,
               const Members& members, void* scratch, double* norm, Decision* decision, double dt,
               const Controller& control, void* stream) {
  return for_dtype(dtype, [&](auto type) -> int {
    using T = decltype(type);
    const dim3 grid(unsigned(members.count), unsigned(blocks_for(longest_member)));
    return launch(error_norm_kernel<T>, grid, stream, static_cast<const T*>(y0),
                  static_cast<const T*>(y1), terms, coefficients(coef, 1, terms.count), tol,
                  members, static_cast<double*>(scratch) + 1, static_cast<unsigned int*>(scratch),
                  Verdict{norm, decision, dt, control});
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
