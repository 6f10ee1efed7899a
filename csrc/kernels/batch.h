// Batches whose samples are solved on their own: where every sample stands, what one trial step does
// to it, and the operations on a whole batch, declared once per device.
//
// A state of `count` samples is one flat array: member after member, in each one row a sample. All
// times are on the sample's own forward clock.
#pragma once

#include <cfloat>

#include "clock.h"
#include "launch.h"
#include "status.h"

namespace flashode {

constexpr int kMaxDegree = 8;  // of dense output

// What is known of a sample, by number: two tables with a row for each of these, a column a sample.
enum Real {
  kT0, kT1,             // the trial step
  kSize,                // its length
  kStep,                // the same, signed; 0 while the sample rests
  kDt,                  // length of the next trial
  kErrorRatio, kPast0, kPast1,  // of this trial and of the last two accepted steps
  kDirection, kLow, kHigh,      // of the caller's clock; bounds of the times that the field sees
  kReals
};
enum Whole {
  kSample,              // its number in the caller's batch
  kFilled,              // outputs that are there
  kAccepted, kRejected,
  kTrials,              // since the last output
  kStatus,
  kCause,               // the status that it fails with when it can take no step
  kVerdict,             // whether the last trial was accepted
  kWholes
};

struct Samples {
  int64_t count = 0;
  double* reals = nullptr;
  int64_t* wholes = nullptr;
  // The outputs: sample s has `outputs` times from times + s * times_stride.
  const double* times = nullptr;
  int64_t times_stride = 0, outputs = 0;

  FLASHODE_HD double* row(Real r) const { return reals + r * count; }
  FLASHODE_HD int64_t* row(Whole w) const { return wholes + w * count; }
  FLASHODE_HD double& at(Real r, int64_t b) const { return reals[r * count + b]; }
  FLASHODE_HD int64_t& at(Whole w, int64_t b) const { return wholes[w * count + b]; }
  FLASHODE_HD const double* times_of(int64_t b) const {
    return times + at(kSample, b) * times_stride;
  }
  FLASHODE_HD double end(int64_t b) const { return times_of(b)[outputs - 1]; }
  FLASHODE_HD bool running(int64_t b) const { return at(kStatus, b) == kRunning; }
};

// Everything that the operations read of a batch.
struct Batch {
  Dtype dtype = Dtype::f32;
  Samples samples;
  Members members;  // of one row: member m is [offsets[m], offsets[m + 1])
  int64_t width = 0, widest = 0;  // numbers of a row, and of its largest member
  Tolerance tolerance;
  Controller control;
  bool remembers = false;  // control looks at the steps before
  int64_t max_num_steps = 0;
  double* steps = nullptr;  // kStep of every element; for rows that are short, on a CPU
};

// sum_j weight_j k[stage_j]
struct Sum {
  int count = 0;
  int stage[kMaxTerms];
  double weight[kMaxTerms];
};

// The times that go with a stage: t0 + c * size, moved by `nudge`; t1 where c is 1.
struct StageTimes {
  double c;
  int nudge;
  void* t;  // where to write them, in the dtype of the state
};

// Dense output: stages with any weight, weight[power][j] of x^(power + 1).
struct Polynomial {
  int count = 0, degree = 0;
  int stage[kMaxTerms];
  double weight[kMaxDegree][kMaxTerms];
  bool has_extra = false;  // it needs stages that the error test does not see
};

// Where outputs go: row r of all `samples` of the caller's batch, laid out like a state.
struct Outputs {
  void* ys;
  int64_t samples;
};

struct Tally {
  unsigned running;  // samples that have not ended
  unsigned inside;   // samples with an output inside the step just accepted
};

// ---- one sample ------------------------------------------------------------------------------

// What a sample sees at a stage.
template <class T>
FLASHODE_HD double time_of_stage(const Samples& s, int64_t b, double c, int nudge) {
  const double t0 = s.at(kT0, b);
  const double t = s.at(kStep, b) == 0 ? t0 : c == 1 ? s.at(kT1, b) : t0 + c * s.at(kSize, b);
  const double rounded = round_time<T>(t, nudge), low = s.at(kLow, b), high = s.at(kHigh, b);
  return s.at(kDirection, b) * (rounded < low ? low : rounded > high ? high : rounded);
}

// A trial step of the given length.
FLASHODE_HD void set_trial(const Samples& s, int64_t b, double size, double t1) {
  s.at(kSize, b) = size;
  s.at(kT1, b) = t1;
  s.at(kStep, b) = s.at(kDirection, b) * size;
}

FLASHODE_HD void end_with(const Samples& s, int64_t b, int64_t status) {
  s.at(kStatus, b) = status;
  s.at(kStep, b) = 0;
}

// The next trial, moved back to the last time; or the end of the sample if it can take none.
FLASHODE_HD void begin_trial(const Batch& batch, int64_t b) {
  const Samples& s = batch.samples;
  if (!s.running(b)) return;
  if (s.at(kTrials, b) >= batch.max_num_steps) return end_with(s, b, kMaxSteps);
  ++s.at(kTrials, b);
  const double t0 = s.at(kT0, b), end = s.end(b);
  double dt = clamp_step(s.at(kDt, b), batch.control), t1 = t0 + dt;
  const bool lands = t1 >= end;
  if (lands) t1 = end;
  s.at(kDt, b) = dt;
  if (!(t1 > t0) || dt < DBL_MIN) return end_with(s, b, s.at(kCause, b));
  // A free step keeps its own length: t1 - t0 is rounded, and no rounding lengthens a step.
  if (lands && t1 - t0 < dt) dt = t1 - t0;
  s.at(kDt, b) = dt;
  set_trial(s, b, dt, t1);
}

// Whether a trial stands, and how long the next one is.
FLASHODE_HD void judge_trial(const Batch& batch, int64_t b, double error_ratio) {
  const Samples& s = batch.samples;
  Controller control = batch.control;
  control.past[0] = s.at(kPast0, b);
  control.past[1] = s.at(kPast1, b);
  const Decision decision = decide(error_ratio, s.at(kSize, b), control);
  s.at(kErrorRatio, b) = error_ratio;
  s.at(kDt, b) = decision.next_dt;
  s.at(kVerdict, b) = decision.accepted;
  s.at(kCause, b) = kStepUnderflow;
  if (!decision.accepted) {
    ++s.at(kRejected, b);
  } else if (batch.remembers) {
    remember(error_ratio, control);
    s.at(kPast0, b) = control.past[0];
    s.at(kPast1, b) = control.past[1];
  }
}

// A trial whose error is not finite. The sample goes on with shorter ones, unless that cannot help.
FLASHODE_HD void blame(const Batch& batch, int64_t b, int64_t cause, bool f0_is_finite) {
  const Samples& s = batch.samples;
  s.at(kCause, b) = cause;
  if (!f0_is_finite || s.at(kSize, b) <= batch.control.min_step) end_with(s, b, cause);
}

// How many outputs lie in the step to t1, beyond those that are there.
FLASHODE_HD int64_t outputs_within(const Samples& s, int64_t b) {
  const double* times = s.times_of(b);
  const double t1 = s.at(kT1, b);
  int64_t end = s.at(kFilled, b);
  while (end < s.outputs && times[end] <= t1) ++end;
  return end - s.at(kFilled, b);
}

// Whether one of them lies before its end.
FLASHODE_HD bool output_inside(const Samples& s, int64_t b) {
  const int64_t first = s.at(kFilled, b);
  return first < s.outputs && s.times_of(b)[first] < s.at(kT1, b);
}

// After an accepted step and its outputs.
FLASHODE_HD void commit_step(const Samples& s, int64_t b, int64_t emitted) {
  if (emitted > 0) s.at(kTrials, b) = 0;
  s.at(kFilled, b) += emitted;
  ++s.at(kAccepted, b);
  s.at(kT0, b) = s.at(kT1, b);
  if (s.running(b) && s.at(kT0, b) == s.end(b)) end_with(s, b, kSuccess);
}

// Hairer, Norsett, Wanner I, II.4: the Euler step that probes the field, and the first trial.
FLASHODE_HD void probe_with(const Samples& s, int64_t b, double d0, double d1) {
  const double t0 = s.at(kT0, b), span = s.end(b) - t0;
  double h0 = first_guess(d0, d1);
  if (span < h0) h0 = span;
  s.at(kErrorRatio, b) = d1;
  set_trial(s, b, h0, t0 + h0);
}
FLASHODE_HD void first_trial(const Samples& s, int64_t b, double d2, int order) {
  const double h0 = s.at(kSize, b);
  s.at(kDt, b) = initial_step(h0, s.at(kErrorRatio, b), d2 / h0, order);
}

// ---- the operations --------------------------------------------------------------------------

namespace cpu {

// out = y0 + step * sum_j weight_j k_j where samples move, y0 where they rest; and the times.
void stage(const Batch&, const void* y0, const Terms& k, const Sum&, const StageTimes&, void* out,
           int threads);

// Norms of y0 and f0 that make the first guess; fails samples whose slopes are not finite.
Tally probe(const Batch&, const void* y0, const void* f0, int threads);
// Sizes of the first trials from the slopes f1 at the end of the probing step.
void first_trials(const Batch&, const void* y0, const void* f0, const void* f1, int threads);

Tally begin_trials(const Batch&, int threads);

// Decides on every trial. With `extra`, samples without an output inside the step come to rest.
Tally judge(const Batch&, const void* y0, const void* y1, const Terms& k, const Sum& error,
             bool extra, int threads);

// Writes the outputs in accepted steps, makes y1 and the last slope the state, begins new trials.
Tally commit(const Batch&, void* y0, void* f0, const void* y1, const Terms& k, const void* f1,
              const Polynomial&, const Outputs&, int threads);

}  // namespace cpu

namespace cuda {

// The same, queued on `stream`. The tally, which may lie in pinned host memory, is written when the
// operation is done; `scratch` is three zeros, and is left so.
int stage(const Batch&, const void* y0, const Terms& k, const Sum&, const StageTimes&, void* out,
          void* stream);
int probe(const Batch&, const void* y0, const void* f0, unsigned* scratch, Tally* tally,
          void* stream);
int first_trials(const Batch&, const void* y0, const void* f0, const void* f1, void* stream);
int begin_trials(const Batch&, unsigned* scratch, Tally* tally, void* stream);
int judge(const Batch&, const void* y0, const void* y1, const Terms& k, const Sum& error, bool extra,
          unsigned* scratch, Tally* tally, void* stream);
int commit(const Batch&, void* y0, void* f0, const void* y1, const Terms& k, const void* f1,
           const Polynomial&, const Outputs&, unsigned* scratch, Tally* tally, void* stream);

// Pinned host memory for Tally, one cell per thread of the process.
int host_tally(Tally** cell);

}  // namespace cuda

}  // namespace flashode
