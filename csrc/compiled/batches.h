// A whole solve of samples with clocks of their own by the threads of a CPU, tile by tile.
#pragma once

#include "own_clocks.h"
#include "parallel.h"
#include "record.h"

namespace flashode {

// How often the field was called with a batch whose samples all step together.
template <class Method>
class Rounds {
 public:
  // False if there is no memory.
  bool add(int64_t round, bool extends) {
    most_ = round < most_ ? most_ : round + 1;
    if (Method::extra == 0) return true;
    while (extends_.size() <= round) {
      if (!extends_.add(0)) return false;
    }
    if (extends) extends_[round] = 1;
    return true;
  }
  bool add(const Rounds& other) {
    bool added = true;
    for (int64_t i = 0; i < other.most_; ++i)
      added = add(i, Method::extra && other.extends_[i]) && added;
    return added;
  }
  int64_t calls() const {
    int64_t extending = 0;
    for (int64_t i = 0; i < extends_.size(); ++i) extending += extends_[i];
    return most_ * (Method::stages - 1) + extending * Method::extra;
  }

 private:
  int64_t most_ = 0;
  List<uint8_t> extends_;  // whether in this round a sample had an output inside its step
};

template <class Field, class Method>
Returned solve_batch(Call& call) {
  using Real = typename Field::Real;
  using Part = Tile<Field, Method>;
  using Solver = TileSolver<Field, Method, Rounds<Method>, TileRecord<Field>>;
  const int64_t tiles = tiles_of<Field>(call);
  constexpr int64_t steps = 64;  // for the least of work there may be
  const int threads = threads_for(call, tiles, steps * Part::operations);
  const Buffer<Real> prepared(Field::prepared);
  BatchRecord<Field>* record = nullptr;
  if (call.records) call.recording = record = new (std::nothrow) BatchRecord<Field>(tiles);
  if (!prepared.data() || (call.records && (!record || !record->exists()))) return kOutOfMemory;
  Field::prepare(reinterpret_cast<const Real* const*>(call.inputs), prepared.data());

  std::atomic<int> returned{kDone};
  bool started = false, probed = false;
  Rounds<Method> rounds;
  const auto work = [&](int thread, const auto& next_tile) {
    const bool has_each = Part::has_each(call);
    const Buffer<StateOf<Field>> space(Part::own_size(has_each) + Part::shared_size);
    if (!space.data()) returned = kOutOfMemory;
    Rounds<Method> own_rounds;
    Solver solver(call, prepared.data(), space.data(), has_each, own_rounds);
    Interrupts interrupts(call, Part::operations);
    const auto stopped = [&] {
      if (thread == 0 && interrupts.now()) returned = kInterrupted;
      return returned.load(std::memory_order_relaxed) != kDone;
    };
    for (int64_t i; !stopped() && (i = next_tile()) < tiles;) {
      const Returned code =
          solver.run(i * Field::lanes, record ? &record->tile(i) : nullptr, stopped);
      if (code == kOutOfMemory) returned = code;
    }
#pragma omp critical
    {
      started = started || solver.started, probed = probed || solver.probed;
      if (!rounds.add(own_rounds)) returned = kOutOfMemory;
    }
  };
  int64_t next = 0;
  if (threads == 1) {
    work(0, [&] { return next++; });
  } else {
    std::atomic<int64_t> shared{0};
#pragma omp parallel num_threads(threads)
    work(this_thread(), [&] { return shared++; });
  }
  call.nfe = started + probed + rounds.calls();
  return Returned(returned.load());
}

}  // namespace flashode
