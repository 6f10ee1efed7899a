// Loops over tiles, on as many threads as there is work for; and stopping a solve from outside.
#pragma once

#ifdef _OPENMP
#include <omp.h>
#endif

#include <atomic>

#include "call.h"

namespace flashode {

// Multiply-adds, roughly, below which a loop is done before other threads have begun.
constexpr int64_t kWorthAThread = 1 << 18;

// How many threads to use for so many tiles, each of which costs so many operations.
inline int threads_for(const Call& call, int64_t tiles, int64_t operations) {
#ifdef _OPENMP
  const int64_t useful = tiles * operations / kWorthAThread;
  int64_t threads = call.threads < tiles ? call.threads : tiles;
  threads = threads < useful ? threads : useful;
  return threads < 1 ? 1 : int(threads);
#else
  return 1;
#endif
}

inline int this_thread() {
#ifdef _OPENMP
  return omp_get_thread_num();
#else
  return 0;
#endif
}

// Whether a solve is to stop. The caller is asked some times a second, by the thread that called.
class Interrupts {
 public:
  // `operations` is what passes between two calls of `now`.
  Interrupts(const Call& call, int64_t operations)
      : ask_(call.interrupted), period_(operations < kPeriod ? kPeriod / (operations + 1) : 1) {}

  bool now() {
    if (++count_ < period_) return false;
    count_ = 0;
    return ask_ && ask_() != 0;
  }

 private:
  static constexpr int64_t kPeriod = 1 << 26;

  int (*const ask_)();
  const int64_t period_;
  int64_t count_ = 0;
};

}  // namespace flashode
