// A CUDA runtime that runs kernels on the host, so that their logic is tested without a GPU.
//
// Threads are fibers. A few blocks, admitted in random order, are resident at a time, and chance
// picks the thread that runs until its next barrier or atomic: a result that depends on an order
// that CUDA does not promise changes with the seed. What CUDA leaves undefined is an error here:
// a barrier that part of a block misses, an access to unmapped memory. Shared memory starts as
// 0xff bytes, which are NaN. Memory is sequentially consistent: a missing fence goes unseen.
#pragma once

#include <signal.h>
#include <ucontext.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __syncthreads() on_host::barrier(__LINE__)

struct uint3 {
  unsigned x = 0, y = 0, z = 0;
};
struct dim3 {
  unsigned x, y, z;
  explicit dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorIllegalAddress = 700,
  cudaErrorLaunchFailure = 719,
};
using cudaStream_t = struct Stream*;

inline uint3 threadIdx, blockIdx;
inline dim3 blockDim, gridDim;

namespace on_host {

constexpr size_t kResident = 4;         // blocks that run at the same time
constexpr size_t kStackBytes = 1 << 16;

struct Block;

enum class Stop { yielded, at_barrier, bad_access, returned };

struct Thread {
  Block* block;
  uint3 index;
  Stop why;  // it is not running
  int line;  // of the barrier where it waits
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[kStackBytes]};
};

struct Block {
  uint3 index;
  std::vector<Thread> threads;
  size_t waiting, returned;
  std::map<int, std::vector<std::byte>> shared;  // by the line of the declaration
};

inline std::mt19937_64 chance;
inline ucontext_t scheduler;
inline Thread* running = nullptr;
inline const std::function<void()>* body = nullptr;  // what each thread runs
inline cudaError_t error = cudaSuccess;
inline std::string error_text = "no error";

inline void fail(cudaError_t code, std::string text) {
  error = code;
  error_text = std::move(text);
}

inline void stop(Stop why) {
  running->why = why;
  swapcontext(&running->context, &scheduler);
}

inline void barrier(int line) {
  running->line = line;
  stop(Stop::at_barrier);
}

template <class T>
T& shared(int line) {
  auto& bytes = running->block->shared.try_emplace(line, sizeof(T), std::byte{0xff}).first->second;
  return *reinterpret_cast<T*>(bytes.data());
}

inline void run_thread() {
  (*body)();
  stop(Stop::returned);
}

inline void prepare(Block& block, uint3 index) {
  block.index = index;
  block.waiting = block.returned = 0;
  block.shared.clear();
  for (size_t i = 0; i < block.threads.size(); ++i) {
    Thread& thread = block.threads[i];
    thread.block = &block;
    thread.index = {unsigned(i), 0, 0};
    getcontext(&thread.context);
    thread.context.uc_stack.ss_sp = thread.stack.get();
    thread.context.uc_stack.ss_size = kStackBytes;
    makecontext(&thread.context, run_thread, 0);
  }
}

// Whether the threads of a block that have stopped agree, as __syncthreads demands.
inline bool agree(const Block& block) {
  return block.returned == 0 &&
         std::all_of(block.threads.begin(), block.threads.end(),
                     [&](const Thread& thread) { return thread.line == block.threads[0].line; });
}

// Abandons the thread that touched unmapped memory; a fault of the emulator itself stays one.
inline void on_bad_access(int signal_number) {
  if (running == nullptr) {
    signal(signal_number, SIG_DFL);
    return;
  }
  running->why = Stop::bad_access;
  setcontext(&scheduler);
}

class Trap {
 public:
  Trap() {
    struct sigaction action = {};
    action.sa_handler = on_bad_access;
    sigaction(SIGSEGV, &action, &before_);
  }
  ~Trap() { sigaction(SIGSEGV, &before_, nullptr); }

 private:
  struct sigaction before_;
};

// Runs `kernel` once for every thread of every block; the first fault ends the launch.
inline void launch(dim3 grid, unsigned threads, const std::function<void()>& kernel) {
  if (grid.x - 1 > 0x7ffffffe || grid.y - 1 > 65534 || grid.z != 1 || threads - 1 > 1023) {
    return fail(cudaErrorInvalidConfiguration, "a grid that no GPU takes");
  }
  body = &kernel;
  gridDim = grid;
  blockDim = dim3(threads);
  std::vector<uint3> queue;
  for (unsigned y = 0; y < grid.y; ++y) {
    for (unsigned x = 0; x < grid.x; ++x) queue.push_back({x, y, 0});
  }
  std::shuffle(queue.begin(), queue.end(), chance);

  std::vector<Block> resident(std::min(kResident, queue.size()));
  std::vector<Thread*> ready, idle;  // idle: may run, and will when no other can
  const auto wake = [&](Block& block) {
    for (Thread& thread : block.threads) ready.push_back(&thread);
  };
  const auto admit = [&](Block& block) {
    if (queue.empty()) return;
    prepare(block, queue.back());
    queue.pop_back();
    wake(block);
  };
  for (Block& block : resident) {
    block.threads = std::vector<Thread>(threads);
    admit(block);
  }

  const Trap trap;
  while (!ready.empty() || !idle.empty()) {
    if (ready.empty()) ready.swap(idle);
    std::swap(ready[chance() % ready.size()], ready.back());
    Thread& thread = *ready.back();
    Block& block = *thread.block;
    ready.pop_back();
    threadIdx = thread.index;
    blockIdx = block.index;
    running = &thread;
    swapcontext(&scheduler, &thread.context);
    running = nullptr;

    if (thread.why == Stop::bad_access) {
      return fail(cudaErrorIllegalAddress, "an illegal memory access was encountered");
    }
    if (thread.why == Stop::yielded) {
      (chance() % 2 ? ready : idle).push_back(&thread);
      continue;
    }
    ++(thread.why == Stop::returned ? block.returned : block.waiting);
    if (block.returned == threads) {
      admit(block);
    } else if (block.returned + block.waiting == threads) {
      if (!agree(block)) {
        return fail(cudaErrorLaunchFailure, "a barrier that part of the block does not reach");
      }
      block.waiting = 0;
      wake(block);
    }
  }
}

}  // namespace on_host

// Other threads may get far on both sides of it: what a block counts as done must be done before.
template <class T>
T atomicAdd(T* target, std::type_identity_t<T> value) {
  on_host::stop(on_host::Stop::yielded);
  const T before = std::exchange(*target, *target + value);
  on_host::stop(on_host::Stop::yielded);
  return before;
}
template <class T>
T atomicMax(T* target, std::type_identity_t<T> value) {
  on_host::stop(on_host::Stop::yielded);
  return std::exchange(*target, std::max(*target, value));
}
inline void __threadfence() {}
inline void __threadfence_system() {}

inline cudaError_t cudaGetLastError() { return std::exchange(on_host::error, cudaSuccess); }
inline const char* cudaGetErrorString(cudaError_t) { return on_host::error_text.c_str(); }

constexpr unsigned cudaHostAllocPortable = 1;
inline cudaError_t cudaHostAlloc(void** memory, size_t bytes, unsigned) {
  *memory = std::malloc(bytes);
  return cudaSuccess;
}
inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }
inline cudaError_t cudaStreamSynchronize(cudaStream_t) { return cudaSuccess; }
inline cudaError_t cudaGetDeviceCount(int* count) { return *count = 1, cudaSuccess; }
inline cudaError_t cudaRuntimeGetVersion(int* version) { return *version = 0, cudaSuccess; }
inline cudaError_t cudaDriverGetVersion(int* version) { return *version = 0, cudaSuccess; }
