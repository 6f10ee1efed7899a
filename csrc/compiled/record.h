// What a solve leaves behind: its accepted steps, from which the backward solve takes them again.
#pragma once

#include <new>

#include "memory.h"
#include "tile.h"

namespace flashode {

// What `Call::recording` points to.
struct Recording {
  virtual ~Recording() = default;
};

// Accepted steps where all samples share their clock.
template <class Field>
class Record final : public Recording {
 public:
  using V = StateOf<Field>;
  struct Step {
    double t0, t1, dt;
    Landing landing;
  };

  static constexpr bool keeps_states = true;

  explicit Record(int64_t tiles) : tiles_(tiles), states_(tiles * 2 * Field::width) {}

  bool add_time(double t1) { return times_.add(t1); }
  // Room for a step, whose states are written by their tiles.
  bool add(const Step& step) { return states_.add() && steps_.add(step); }

  const double* times() const { return times_.data(); }
  int64_t size() const { return steps_.size(); }
  int64_t tiles() const { return tiles_; }
  const Step& operator[](int64_t n) const { return steps_[n]; }
  // The state at the start of step n, and the slope that it began with.
  V* y0(int64_t n, int64_t tile) const { return states_[n] + tile * 2 * Field::width; }
  V* f0(int64_t n, int64_t tile) const { return y0(n, tile) + Field::width; }

 private:
  const int64_t tiles_;
  List<double> times_;
  List<Step> steps_;
  Rows<V> states_;
};

// Accepted steps of one tile whose samples have clocks of their own. Every lane counts its own
// steps: it takes part in row n where n < count[lane]. Elsewhere a row holds a step that can be
// taken.
template <class Field>
class TileRecord {
 public:
  using V = StateOf<Field>;
  using Real = typename Field::Real;
  static constexpr int L = Field::lanes;
  struct Times {
    double t0[L], t1[L], dt[L];
  };

  TileRecord() : states_(2 * Field::width) {}

  // Adds the step of one lane, of which `y0` and `f0` hold the numbers; false if there is no
  // memory.
  bool add(int l, double t0, double t1, double dt, const V* y0, const V* f0) {
    const int64_t n = count[l];
    if (n == size() && !add_row(t0, t1, dt, y0, f0)) return false;
    Times& times = times_[n];
    times.t0[l] = t0, times.t1[l] = t1, times.dt[l] = dt;
    V* const state = states_[n];
    for (int64_t f = 0; f < Field::width; ++f) {
      set_lane(state[f], l, lane(y0[f], l));
      set_lane(state[Field::width + f], l, lane(f0[f], l));
    }
    ++count[l];
    return true;
  }

  int64_t size() const { return times_.size(); }
  const Times& times(int64_t n) const { return times_[n]; }
  const V* y0(int64_t n) const { return states_[n]; }
  const V* f0(int64_t n) const { return states_[n] + Field::width; }

  int64_t count[L] = {};

 private:
  bool add_row(double t0, double t1, double dt, const V* y0, const V* f0) {
    V* const state = states_.add();
    Times times;
    for (int l = 0; l < L; ++l) times.t0[l] = t0, times.t1[l] = t1, times.dt[l] = dt;
    if (!state || !times_.add(times)) return false;
    for (int64_t f = 0; f < Field::width; ++f) state[f] = y0[f], state[Field::width + f] = f0[f];
    return true;
  }

  List<Times> times_;
  Rows<V> states_;
};

template <class Field>
class BatchRecord final : public Recording {
 public:
  explicit BatchRecord(int64_t tiles)
      : tiles_(tiles), of_tiles_(new (std::nothrow) TileRecord<Field>[size_t(tiles)]) {}
  ~BatchRecord() { delete[] of_tiles_; }

  bool exists() const { return of_tiles_ != nullptr; }
  int64_t tiles() const { return tiles_; }
  TileRecord<Field>& tile(int64_t k) { return of_tiles_[k]; }

 private:
  const int64_t tiles_;
  TileRecord<Field>* const of_tiles_;
};

template <class Field>
void release(void* recording) {
  delete static_cast<Recording*>(recording);
}

}  // namespace flashode
