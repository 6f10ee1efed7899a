// A whole solve on a GPU: one thread a sample, by the templates that solve on a CPU. Work space of
// a thread is a local array: in registers if it is small, else in local memory, which the hardware
// lays out number by number, sample beside sample.
//
// Samples with clocks of their own, and fixed steps, need nothing of each other: every thread runs
// through a whole solve. Steps that all share are taken by all threads together, which agree on
// their length: one block, or as many as are on the device at the same time (a cooperative launch).
#pragma once

#include "own_clocks.h"
#include "product.h"
#include "solve.h"

namespace flashode {

constexpr int kThreads = 128;  // of a block

// What a kernel is called with; pointers are of the device. Mirrored in
// python/flashode/program/call.py.
struct DeviceCall {
  Call call;
  void* prepared;               // what `prepare` makes
  double* sums;                 // of each member, by thread: for members but the first
  double* of_blocks;            // sums of the blocks, twice
  unsigned long long* arrived;  // blocks at a barrier, ever
  double* accepted_times;       // room for `room` of them
  uint8_t* extends;  // of clocks of their own: rounds with outputs inside steps; as much room
  int64_t room;

  // Results of all threads, zero to begin with.
  unsigned long long* rounds;  // most trials
  unsigned long long* failed;  // of fixed steps: points of the grid from the first failure on
  int64_t *returned, *started, *probed, *nfe;
};

// How a program is spread over threads.
//   struct Spread {
//     static constexpr bool has_each;  // whether there are tolerances of each number
//     static constexpr int turns;      // samples of a thread where all step together, else 0
//   };

__device__ inline int64_t thread_number() { return int64_t(blockIdx.x) * kThreads + threadIdx.x; }

// ---- what all samples share --------------------------------------------------------------------

// By one block, before all else.
template <class Field>
__device__ void prepare_on_device(const DeviceCall& d) {
  using Real = typename Field::Real;
  Real* const prepared = static_cast<Real*>(d.prepared);
  Field::fetch(reinterpret_cast<const Real* const*>(d.call.inputs), prepared, threadIdx.x,
               kThreads);
  __syncthreads();
  if (threadIdx.x == 0) Field::derive(prepared);
}

constexpr size_t kShared = 40 << 10;  // bytes of a block's shared memory, with room for sums beside

// What was prepared, as near to the block as there is room for it.
template <class Field>
__device__ inline const typename Field::Real* nearby(const DeviceCall& d) {
  using Real = typename Field::Real;
  const Real* const prepared = static_cast<const Real*>(d.prepared);
  constexpr int size = Field::prepared;
  if constexpr (size > 0 && size * sizeof(Real) <= kShared) {
    __shared__ Real near[size];
    for (int i = threadIdx.x; i < size; i += kThreads) near[i] = prepared[i];
    __syncthreads();
    return near;
  } else {
    return prepared;
  }
}

// ---- samples that need nothing of each other ---------------------------------------------------

template <class Field, class Method, class Spread>
constexpr int64_t kSpace =
    Tile<Field, Method>::own_size(Spread::has_each) + Tile<Field, Method>::shared_size;

struct NoRecord {
  static constexpr bool keeps_states = false;
  template <class... Step>
  FLASHODE_HD bool add(const Step&...) {
    return true;
  }
  FLASHODE_HD bool add_time(double) { return true; }
};

// How often the field is called for the sample of a thread.
struct RoundsOfThread {
  const DeviceCall& d;
  int64_t most = 0;

  __device__ bool add(int64_t round, bool extends) {
    most = round + 1;
    if (!extends) return true;
    if (round < d.room) d.extends[round] = 1;
    return round < d.room;
  }
};

template <class Field, class Method, class Spread>
__device__ void solve_batch_on_device(const DeviceCall& d) {
  const auto* const prepared = nearby<Field>(d);
  if (thread_number() >= d.call.samples) return;
  StateOf<Field> space[kSpace<Field, Method, Spread>];
  RoundsOfThread rounds{d};
  TileSolver<Field, Method, RoundsOfThread, NoRecord> solver(d.call, prepared, space,
                                                             Spread::has_each, rounds);
  const Returned returned =
      solver.run(thread_number(), static_cast<NoRecord*>(nullptr), [] { return false; });
  if (returned != kDone) *d.returned = returned;
  if (solver.started) *d.started = 1;
  if (solver.probed) *d.probed = 1;
  const auto most = static_cast<unsigned long long>(rounds.most);
  if (most > *static_cast<volatile unsigned long long*>(d.rounds)) atomicMax(d.rounds, most);
}

// One sample as all there are, for Solve.
template <class Field, class Method>
class Alone {
 public:
  using Part = Tile<Field, Method>;

  __device__ explicit Alone(const Part& tile) : tile_(tile) {}

  template <class Body>
  FLASHODE_HD void for_each(const Body& body) const {
    body(tile_, tile_.first);
  }
  template <class Body>
  FLASHODE_HD bool all_of(const Body& body) const {
    return body(tile_, tile_.first);
  }
  FLASHODE_HD bool interrupted() const { return false; }
  FLASHODE_HD bool reports() const { return tile_.first == 0; }

 private:
  const Part& tile_;
};

// Fixed steps. If one fails, the solve is to be done again with a grid that ends before it.
template <class Field, class Method, class Spread>
__device__ void solve_alone(const DeviceCall& d) {
  const auto* const prepared = nearby<Field>(d);
  if (thread_number() >= d.call.samples) return;
  StateOf<Field> space[kSpace<Field, Method, Spread>];
  constexpr int64_t own = Tile<Field, Method>::own_size(Spread::has_each);
  Tile<Field, Method> tile(d.call, prepared, space, space + own, Spread::has_each);
  tile.load(thread_number());
  const Alone<Field, Method> alone(tile);
  NoRecord record;
  Solve<Field, Method, Alone<Field, Method>, NoRecord> solve(d.call, alone, &record);
  solve.run();
  if (solve.status() == kNonfiniteField) {
    atomicMax(d.failed, static_cast<unsigned long long>(d.call.grid_points - solve.accepted()));
  }
  if (alone.reports()) *d.nfe = solve.nfe();
}

// ---- samples that step together ----------------------------------------------------------------

// All threads of a launch, for Solve: each has `turns` samples, a number of threads apart.
template <class Field, class Method, class Spread>
class Together {
 public:
  using Real = typename Field::Real;
  using V = StateOf<Field>;
  using Part = Tile<Field, Method>;
  static constexpr int64_t own = Part::own_size(Spread::has_each);
  static constexpr int64_t space = Spread::turns * own + Part::shared_size;

  __device__ Together(const DeviceCall& d, const Real* prepared, V* space)
      : d_(d), prepared_(prepared), space_(space) {
    for_each([](Part& tile, int64_t i) { tile.load(i); });
    for (int64_t m = 1; m < d.call.member_count; ++m) sum_of(m) = 0;
  }

  template <class Body>
  __device__ __forceinline__ void for_each(const Body& body) const {
    for (int turn = 0; turn < Spread::turns; ++turn) {
      const int64_t i = thread_number() + turn * threads();
      if (i >= d_.call.samples) break;
      Part tile(d_.call, prepared_, space_ + turn * own, space_ + Spread::turns * own,
                Spread::has_each);
      tile.first = i;
      body(tile, i);
    }
  }

  template <class Body>
  __device__ __forceinline__ bool all_of(const Body& body) const {
    double refused = 0;
    for_each([&](const Part& tile, int64_t i) { refused += !body(tile, i); });
    return sum_of_all(refused) == 0;
  }

  // As Tiles::norm.
  template <class ErrorOf>
  __device__ __forceinline__ double norm(const ErrorOf& error_of) const {
    double first = 0;
    for_each([&](const Part& tile, int64_t) {
      tile.for_each_member(error_of(tile), [&](int64_t m, double sum) {
        if (m == 0) {
          first += sum;
        } else {
          sum_of(m) += sum;
        }
      });
    });
    double norm = 0;
    for (int64_t m = 0; m < d_.call.member_count; ++m) {
      const double sum = sum_of_all(m == 0 ? first : sum_of(m));
      if (m > 0) sum_of(m) = 0;
      const int64_t width = d_.call.members[m + 1] - d_.call.members[m];
      if (width > 0) norm = larger(norm, square_root(sum / double(width * d_.call.samples)));
    }
    return norm;
  }

  __device__ bool interrupted() const { return false; }
  __device__ bool reports() const { return thread_number() == 0; }

 private:
  __device__ int64_t threads() const { return int64_t(gridDim.x) * kThreads; }
  __device__ double& sum_of(int64_t m) const {
    return d_.sums[(m - 1) * threads() + thread_number()];
  }

  // Over a block, in an order that depends on nothing; all threads get it.
  static __device__ double sum_of_block(double x) {
    constexpr int parts = 8, each = kThreads / parts;
    __shared__ double of_threads[kThreads];
    __shared__ double of_parts[parts];
    of_threads[threadIdx.x] = x;
    __syncthreads();
    if (threadIdx.x < parts) {
      double sum = 0;
      for (int i = 0; i < each; ++i) sum += of_threads[threadIdx.x * each + i];
      of_parts[threadIdx.x] = sum;
    }
    __syncthreads();
    double sum = 0;
    for (int i = 0; i < parts; ++i) sum += of_parts[i];
    return sum;
  }

  // Blocks leave their sums in two places by turns: who writes the next one may be ahead of who
  // reads.
  __device__ double sum_of_all(double x) const {
    const double sum = sum_of_block(x);
    if (gridDim.x == 1) return sum;
    volatile double* const of_blocks = d_.of_blocks + (odd_ ? gridDim.x : 0);
    odd_ = !odd_;
    if (threadIdx.x == 0) of_blocks[blockIdx.x] = sum;
    wait_for_all();
    double share = 0;
    for (unsigned b = threadIdx.x; b < gridDim.x; b += kThreads) share += of_blocks[b];
    return sum_of_block(share);
  }

  __device__ void wait_for_all() const {
    __syncthreads();
    if (threadIdx.x == 0) {
      __threadfence();
      const unsigned long long blocks = gridDim.x, before = atomicAdd(d_.arrived, 1ull);
      const unsigned long long all = (before / blocks + 1) * blocks;
      while (atomicAdd(d_.arrived, 0ull) < all) {
      }
      __threadfence();
    }
    __syncthreads();
  }

  const DeviceCall& d_;
  const Real* const prepared_;
  V* const space_;
  mutable bool odd_ = false;
};

// The ends of accepted steps, as far as there is room.
struct TimesOfThread : NoRecord {
  const DeviceCall& d;
  int64_t size = 0;

  __device__ explicit TimesOfThread(const DeviceCall& d) : d(d) {}
  __device__ bool add_time(double t) {
    if (size < d.room && thread_number() == 0) d.accepted_times[size] = t;
    return size++ < d.room;
  }
};

template <class Field, class Method, class Spread>
__device__ void solve_together(const DeviceCall& d) {
  using Threads = Together<Field, Method, Spread>;
  StateOf<Field> space[Threads::space];
  const Threads threads(d, nearby<Field>(d), space);
  TimesOfThread record(d);
  Solve<Field, Method, Threads, TimesOfThread> solve(d.call, threads, &record);
  const Returned returned = solve.run();
  if (threads.reports()) *d.returned = returned, *d.nfe = solve.nfe();
}

template <class Field, class Method, class Spread>
__device__ void solve_on_device(const DeviceCall& d) {
  if constexpr (Method::adaptive) {
    solve_together<Field, Method, Spread>(d);
  } else {
    solve_alone<Field, Method, Spread>(d);
  }
}

// ---- the field at one state --------------------------------------------------------------------

// As in evaluate.h.
template <class Field, class Time, class TimeAt>
__device__ void evaluate_at(const DeviceCall& d, const TimeAt& time_at) {
  using V = StateOf<Field>;
  const auto* const prepared = nearby<Field>(d);
  const int64_t i = thread_number();
  if (i >= d.call.samples) return;
  V y[Field::width], f[Field::width], own[Field::own + 1], scratch[Field::scratch + 1];
  load_state<Field>(d.call, i, d.call.y0, y);
  load_own<Field>(d.call, i, own);
  Field::slope(prepared, own, Time(time_at(i)), y, f, scratch);
  store_state<Field>(d.call, i, f, d.call.ys);
}
template <class Field>
__device__ void evaluate_on_device(const DeviceCall& d) {
  evaluate_at<Field, typename Field::Real>(d, [&](int64_t) { return d.call.times[0]; });
}
template <class Field>
__device__ void evaluate_batch_on_device(const DeviceCall& d) {
  evaluate_at<Field, StateOf<Field>>(
      d, [&](int64_t i) { return d.call.times[i * d.call.times_stride]; });
}

}  // namespace flashode
