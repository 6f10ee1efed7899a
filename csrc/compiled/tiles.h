// A whole solve on one clock by the threads of a CPU: the tiles, and how they are gone through.
#pragma once

#include "parallel.h"
#include "record.h"
#include "solve.h"

namespace flashode {

// All tiles of a solve and what they need.
template <class Field, class Method>
class Tiles {
 public:
  using Real = typename Field::Real;
  using V = StateOf<Field>;
  using Part = Tile<Field, Method>;
  using Clock = OneClock<Field>;

  explicit Tiles(const Call& call)
      : call_(call),
        count_(tiles_of<Field>(call)),
        threads_(threads_for(call, count_, Part::operations)),
        prepared_(Field::prepared),
        own_size_(Part::own_size(Part::has_each(call))),
        space_(count_ * own_size_ + threads_ * Part::shared_size),
        tiles_(count_),
        sums_(count_ * (call.member_count > 1 ? call.member_count : 1)),
        interrupts_(call, count_ * Part::operations) {}

  bool exist() const { return prepared_.data() && space_.data() && tiles_.data() && sums_.data(); }

  void load() {
    Field::prepare(reinterpret_cast<const Real* const*>(call_.inputs), prepared_.data());
    V* space = space_.data();
    V* const shared = space + count_ * own_size_;
    for (int64_t i = 0; i < count_; ++i, space += own_size_) {
      new (tiles_.data() + i) Part(call_, prepared_.data(), space, shared, Part::has_each(call_));
      tiles_.data()[i].load(i * Field::lanes);
    }
  }

  int64_t count() const { return count_; }
  FLASHODE_HD bool interrupted() const { return interrupts_.now(); }
  FLASHODE_HD bool reports() const { return true; }  // how the solve ended
  const Part& operator[](int64_t i) const { return tiles_.data()[i]; }

  // body(tile, its number) for every tile.
  template <class Body>
  FLASHODE_HD void for_each(const Body& body) const {
    if (threads_ == 1) {
      for (int64_t i = 0; i < count_; ++i) body(tiles_.data()[i], i);
    } else {
      on_threads(body);
    }
  }

  // Whether body(tile, its number) is true for all of them; it is called for every one.
  template <class Body>
  FLASHODE_HD bool all_of(const Body& body) const {
    double* const answers = sums_.data();
    for_each([=](const Part& tile, int64_t i) { answers[i] = body(tile, i); });
    bool all = true;
    for (int64_t i = 0; i < count_; ++i) all = all && answers[i] != 0;
    return all;
  }

  // Largest over the members of the root mean square of what error_of(tile) says of each number.
  // Added up in the order of the tiles: how many threads there are changes no bit.
  template <class ErrorOf>
  FLASHODE_HD double norm(const ErrorOf& error_of) const {
    const Call* const call = &call_;
    double* const sums = sums_.data();
    for_each([=](const Part& tile, int64_t i) {
      const int live = live_lanes<Field>(*call, tile.first);
      tile.for_each_member(error_of(tile), [&](int64_t m, TimeOf<Field> sum) {
        for (int l = live; l < Field::lanes; ++l) set_lane(sum, l, 0);
        sums[i * call->member_count + m] = sum_of_lanes(sum);
      });
    });
    double norm = 0;
    for (int64_t m = 0; m < call->member_count; ++m) {
      const int64_t numbers = (call->members[m + 1] - call->members[m]) * call->samples;
      if (numbers == 0) continue;
      double sum = 0;
      for (int64_t i = 0; i < count_; ++i) sum += sums[i * call->member_count + m];
      norm = larger(norm, std::sqrt(sum / double(numbers)));
    }
    return norm;
  }

 private:
  // Kept out of the way of the loop that most solves run.
  template <class Body>
  __attribute__((noinline)) void on_threads(Body body) const {
    const Part* const tiles = tiles_.data();
    V* const shared = space_.data() + count_ * own_size_;
#pragma omp parallel for num_threads(threads_) schedule(static)
    for (int64_t i = 0; i < count_; ++i) {
      Part tile = tiles[i];
      tile.share(shared + this_thread() * Part::shared_size);
      body(tile, i);
    }
  }

  const Call& call_;
  const int64_t count_;
  const int threads_;
  const int64_t own_size_;
  const Buffer<Real> prepared_;
  const Buffer<V> space_;
  const Buffer<Part> tiles_;
  const Buffer<double> sums_;
  mutable Interrupts interrupts_;
};

template <class Field, class Method>
Returned solve(Call& call) {
  Tiles<Field, Method> tiles(call);
  auto* const record = new (std::nothrow) Record<Field>(tiles.count());
  call.recording = record;
  if (!record || !tiles.exist()) return kOutOfMemory;
  tiles.load();
  Solve<Field, Method, Tiles<Field, Method>, Record<Field>> solve(call, tiles, record);
  const Returned returned = solve.run();
  call.nfe = solve.nfe();
  call.accepted_times = record->times();
  return returned;
}

}  // namespace flashode
