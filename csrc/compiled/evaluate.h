// The field at one state, without a solve. Times are those that the field is to see.
#pragma once

#include "memory.h"
#include "tile.h"

namespace flashode {

template <class Field, class TimeAt>
Returned evaluate_at(const Call& call, const TimeAt& time_at) {
  using V = StateOf<Field>;
  using Real = typename Field::Real;
  const Buffer<Real> prepared(Field::prepared);
  const Buffer<V> space(2 * Field::width + Field::own + Field::scratch);
  if (!prepared.data() || !space.data()) return kOutOfMemory;
  V *const y = space.data(), *const f = y + Field::width, *const own = f + Field::width;
  Field::prepare(reinterpret_cast<const Real* const*>(call.inputs), prepared.data());
  for (int64_t first = 0; first < call.samples; first += Field::lanes) {
    load_state<Field>(call, first, call.y0, y);
    load_own<Field>(call, first, own);
    Field::slope(prepared.data(), own, time_at(first), y, f, own + Field::own);
    store_state<Field>(call, first, f, call.ys);
  }
  return kDone;
}

// ys = f(times[0], y0)
template <class Field>
Returned evaluate(const Call& call) {
  return evaluate_at<Field>(call, [&](int64_t) { return typename Field::Real(call.times[0]); });
}

// The same where sample b has its own time, times[b * times_stride].
template <class Field>
Returned evaluate_batch(const Call& call) {
  return evaluate_at<Field>(call, [&](int64_t first) {
    return convert<StateOf<Field>>(
        gather<TimeOf<Field>>(call, first, call.times, 0, call.times_stride));
  });
}

}  // namespace flashode
