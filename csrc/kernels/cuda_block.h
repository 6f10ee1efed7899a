// What the CUDA sources share: blocks, the sum over one, and launching. For .cu files only.
#pragma once

#include "rk.h"

namespace flashode::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kMaxBlocks = 1056;  // eight on each of the 132 multiprocessors of a Hopper part

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

}  // namespace
}  // namespace flashode::cuda
