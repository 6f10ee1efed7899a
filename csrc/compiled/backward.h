// What backward passes share: cotangents from the caller, gradients to him, and chunks of tiles in which
// the gradients of what samples share add up. Chunks do not depend on the number of threads, and are
// added one after the other, so that the result is the same whoever does the work.
#pragma once

#include "memory.h"
#include "parallel.h"
#include "step_back.h"

namespace flashode {

// ---- from the caller and to him ----------------------------------------------------------------

// Adds row `row` of the cotangents of the outputs. Lanes without a sample get none.
template <class Field>
void add_cotangents(const Call& call, int64_t first, int64_t row, StateOf<Field>* adj) {
  using Real = typename Field::Real;
  using V = StateOf<Field>;
  const int live = live_lanes<Field>(call, first);
  const Real* const rows = static_cast<const Real*>(call.grad_ys) + row * call.row;
  for (int64_t f = 0; f < Field::width; ++f) {
    const int64_t stride = call.stride[f];
    const Real* const from = rows + call.offset[f] + first * stride;
    V cotangent = zero<V>();
    if (live == Field::lanes && stride == 1) {
      cotangent = load_unaligned<V>(from);
    } else {
      for (int l = 0; l < live; ++l) set_lane(cotangent, l, from[l * stride]);
    }
    adj[f] = adj[f] + cotangent;
  }
}

template <class Field>
void store_own(const Call& call, int64_t first, const StateOf<Field>* adj_own) {
  using Real = typename Field::Real;
  const int live = live_lanes<Field>(call, first);
  for (int64_t r = 0; r < Field::own; ++r) {
    Real* const to = static_cast<Real*>(call.grad_own[r]);
    if (to == nullptr) continue;
    for (int l = 0; l < live; ++l) {
      to[call.own_offset[r] + (first + l) * call.own_stride[r]] = lane(adj_own[r], l);
    }
  }
}

// ---- chunks ------------------------------------------------------------------------------------

constexpr int64_t kMostChunks = 16;

// Tiles [begin, end) and the gradients that they have in common; with work space.
template <class Field>
struct Chunk {
  using Real = typename Field::Real;
  using V = StateOf<Field>;
  int64_t begin, end;
  const Real* prepared;
  V* lane_sums;
  Real* sums;
  double *grad_t, *grad_grid;  // as those of the call; null where they are
  V* space;
};

// The gradients of the times of one sample, which may be those of all.
template <class Field>
double* grad_t_of(const Call& call, const Chunk<Field>& chunk, int64_t sample) {
  return call.times_stride == 0 ? chunk.grad_t : call.grad_t + sample * call.times_stride;
}

template <class Field>
class Chunks {
 public:
  using Real = typename Field::Real;
  using V = StateOf<Field>;

  // `space` is the work space of a chunk, which the next one of the same thread uses again; `operations`
  // is what a tile takes.
  Chunks(const Call& call, int64_t space, int64_t operations)
      : call_(call),
        tiles_(tiles_of<Field>(call)),
        count_(tiles_ > kMostChunks ? kMostChunks : tiles_ > 0 ? tiles_ : 1),
        threads_(threads_for(call, count_, (tiles_ / count_ + 1) * operations)),
        points_(call.grad_grid ? call.grid_points : 0),
        times_(call.grad_t ? call.outputs : 0),
        prepared_(Field::prepared),
        vectors_(count_ * Field::lane_sums + threads_ * space),
        sums_(count_ * Field::sums),
        of_times_(count_ * (times_ + points_)),
        space_(space) {}

  bool exist() const {
    return prepared_.data() && vectors_.data() && sums_.data() && of_times_.data();
  }

  // body(chunk) for every chunk, and the gradients of the call from all of them.
  template <class Body>
  void run(Call& call, const Body& body) const {
    Field::prepare(reinterpret_cast<const Real* const*>(call.inputs), prepared_.data());
#pragma omp parallel for num_threads(threads_) schedule(dynamic) if (threads_ > 1)
    for (int64_t c = 0; c < count_; ++c) {
      const Chunk<Field> chunk = (*this)[c];
      clear(chunk.lane_sums, Field::lane_sums);
      clear(chunk.sums, Field::sums);
      clear(chunk.grad_t, times_);
      clear(chunk.grad_grid, points_);
      body(chunk);
    }
    finish(call);
  }

 private:
  Chunk<Field> operator[](int64_t c) const {
    double* const of_times = of_times_.data() + c * (times_ + points_);
    return {tiles_ * c / count_,
            tiles_ * (c + 1) / count_,
            prepared_.data(),
            vectors_.data() + c * Field::lane_sums,
            sums_.data() + c * Field::sums,
            call_.grad_t ? of_times : nullptr,
            call_.grad_grid ? of_times + times_ : nullptr,
            vectors_.data() + count_ * Field::lane_sums + this_thread() * space_};
  }

  template <class T>
  static void add(T* total, const T* part, int64_t count) {
    for (int64_t i = 0; i < count; ++i) total[i] = total[i] + part[i];
  }

  void finish(Call& call) const {
    const Chunk<Field> total = (*this)[0];
    for (int64_t c = 1; c < count_; ++c) {
      const Chunk<Field> part = (*this)[c];
      add(total.lane_sums, part.lane_sums, Field::lane_sums);
      add(total.sums, part.sums, Field::sums);
      add(total.grad_t, part.grad_t, times_);
      add(total.grad_grid, part.grad_grid, points_);
    }
    // Those of samples with times of their own are written by their tiles.
    if (call.times_stride == 0) add(call.grad_t, total.grad_t, times_);
    add(call.grad_grid, total.grad_grid, points_);
    Real* const folded = reinterpret_cast<Real*>(total.lane_sums);  // the sum lies where lanes began
    for (int64_t i = 0; i < Field::lane_sums; ++i) folded[i] = sum_of_lanes(total.lane_sums[i]);
    Field::finish(prepared_.data(), folded, total.sums, reinterpret_cast<Real* const*>(call.grad_inputs));
  }

  const Call& call_;
  const int64_t tiles_, count_;
  const int threads_;
  const int64_t points_, times_;
  const Buffer<Real> prepared_;
  const Buffer<V> vectors_;  // those sums, then the work space of threads
  const Buffer<Real> sums_;
  const Buffer<double> of_times_;
  const int64_t space_;
};

}  // namespace flashode
