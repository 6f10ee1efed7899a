// The gradient of one evaluation of the field, of a whole batch at once.
#pragma once

#include "backward.h"

namespace flashode {

// time_at(first) is what the field sees of the tile that begins with that sample, and move(first,
// adj_t, chunk) takes the cotangents of its times.
template <class Field, class TimeAt, class Move>
Returned pull_back_at(Call& call, const TimeAt& time_at, const Move& move) {
  using V = StateOf<Field>;
  constexpr int64_t width = Field::width;
  constexpr int64_t space = 4 * width + 2 * Field::own + Field::kept + Field::scratch;
  const Chunks<Field> chunks(call, space, width * Field::lanes);
  if (!chunks.exist()) return kOutOfMemory;
  chunks.run(call, [&](const Chunk<Field>& chunk) {
    V *const y = chunk.space, *const f = y + width, *const adj = f + width, *const adj_y = adj + width;
    V *const own = adj_y + width, *const adj_own = own + Field::own, *const kept = adj_own + Field::own;
    V* const scratch = kept + Field::kept;
    for (int64_t tile = chunk.begin; tile < chunk.end; ++tile) {
      const int64_t first = tile * Field::lanes;
      load_state<Field>(call, first, call.y0, y);
      load_own<Field>(call, first, own);
      clear(adj, width);
      clear(adj_own, Field::own);
      add_cotangents<Field>(call, first, 0, adj);
      const auto t = time_at(first);
      V adj_t = zero<V>();
      Field::slope_keeping(chunk.prepared, own, t, y, f, kept, scratch);
      Field::pull_back(chunk.prepared, own, t, y, kept, adj, adj_y, &adj_t, adj_own, chunk.lane_sums,
                       chunk.sums, scratch);
      store_state<Field>(call, first, adj_y, call.adj_y0);
      store_own<Field>(call, first, adj_own);
      if (Field::timed && call.grad_t) move(first, adj_t, chunk);
    }
  });
  return kDone;
}

// Of f(times[0], y0), where row 0 of grad_ys holds the cotangents.
template <class Field>
Returned pull_back(Call& call) {
  const auto time_at = [&](int64_t) { return typename Field::Real(call.times[0]); };
  return pull_back_at<Field>(call, time_at, [](int64_t, const auto& adj_t, const Chunk<Field>& chunk) {
    chunk.grad_t[0] += double(sum_of_lanes(adj_t));
  });
}

// The same where sample b has its own time, times[b * times_stride].
template <class Field>
Returned pull_back_batch(Call& call) {
  const auto time_at = [&](int64_t first) {
    return convert<StateOf<Field>>(gather<TimeOf<Field>>(call, first, call.times, 0, call.times_stride));
  };
  return pull_back_at<Field>(call, time_at, [&](int64_t first, const auto& adj_t, const Chunk<Field>& chunk) {
    for (int l = 0; l < live_lanes<Field>(call, first); ++l) {
      *grad_t_of(call, chunk, first + l) += double(lane(adj_t, l));
    }
  });
}

}  // namespace flashode
