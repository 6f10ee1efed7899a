// What a generated program is called with: plain data, mirrored by python/flashode/program/call.py.
//
// A state of B samples is one flat array. Number f of sample b lies at offset[f] + b * stride[f],
// whatever axis of the caller's tensor the samples are on. Reals are the program's own type.
#pragma once

#include "../kernels/standard.h"

namespace flashode {

// What a program returns: how the solve ended stands in the call.
enum Returned { kDone, kInterrupted, kOutOfMemory };

struct Call {
  // The state.
  int64_t samples, row;             // row: numbers of a whole state
  const int64_t *offset, *stride;   // of each of Field::width numbers
  const void* y0;
  void* ys;                         // `outputs` rows, the first of them y0
  void* y_end;                      // the last good state, laid out like y0

  // Error control. Member m of the state is numbers [members[m], members[m + 1]) of every sample.
  int64_t member_count;
  const int64_t* members;
  double rtol, atol;
  const void *each_rtol, *each_atol;  // laid out like y0; null where one number serves
  double safety, ifactor, dfactor, min_step, max_step, betas[3];
  double first_step;                // NaN: chosen from the problem
  int64_t max_num_steps;

  // Time, on the forward clock: the field sees direction * t, rounded, within [low, high].
  const double* times;              // sample b has those from times + b * times_stride
  int64_t outputs, times_stride;
  const double *direction, *low, *high;  // one number, or with clocks of their own one a sample
  double end;                       // no step passes it
  const double* stops;              // further times to land on
  const uint8_t* stop_jumps;        // whether the field jumps there
  int64_t stop_count;
  const double* grid;               // of fixed steps
  int64_t grid_points;
  int64_t perturb;

  // What the field reads beside the state: tensors shared by all samples, contiguous; and constants
  // of each sample, where constant r of sample b is own[r][own_offset[r] + b * own_stride[r]].
  const void* const* inputs;
  const void* const* own;
  const int64_t *own_offset, *own_stride;

  int64_t threads;
  int64_t records;                  // whether to keep what `reverse` needs
  int (*interrupted)();             // whether to stop; asked now and then by the calling thread. May be null

  // Results. Pointers are to arrays of `samples` where samples have clocks of their own, else to one.
  int64_t *status, *accepted, *rejected, *filled;
  double *t, *dt, *error_ratio;
  int64_t nfe;
  const double* accepted_times;     // the ends of the accepted steps; of one clock only
  void* recording;                  // to be released by flashode_release, which frees accepted_times too

  // Of the backward pass, and of single evaluations. Those of the inputs and of times are added to.
  const void* grad_ys;              // rows like ys
  void* adj_y0;
  void* const* grad_inputs;         // like `inputs`, null where no gradient is wanted
  void* const* grad_own;            // like `own`
  double* grad_t;                   // like `times`; null where no gradient is wanted
  double* grad_grid;                // like `grid`, or null

  // Of a sweep, the continuous adjoint: `times` run back, `ys` and `grad_ys` lie as the solve left them.
  const int64_t* input_sizes;       // numbers of each of the inputs
  int64_t input_count;
  int64_t seminorm;                 // whether integrals are no part of the error
  double drift, drift_t;            // most that the rebuilt state has parted from the stored one, and when
};

}  // namespace flashode
