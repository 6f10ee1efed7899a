// The fused operations, declared once per device: raw pointers, 64-bit sizes, an opaque stream.
#pragma once

#include <cstdint>

#include "control.h"

namespace flashode {

// Slopes that one operation may take: dopri8 has 14 stages, its dense output adds more.
constexpr int kMaxTerms = 20;

struct Terms {
  int count = 0;
  const void* k[kMaxTerms];
};

// rtol and atol of every element, or one entry per element in the wide dtype where given.
struct Tolerance {
  double rtol = 0, atol = 0;
  const void* each_rtol = nullptr;
  const void* each_atol = nullptr;
};

// Members of a tuple state: member m is [offsets[m], offsets[m + 1]) of the flat state.
struct Members {
  int64_t count = 1;
  const int64_t* offsets = nullptr;  // in the memory of the device that runs the kernel
};

// One tensor that is integrated by quadrature, as gradients of parameters are: no stage needs its
// value, so that its slopes are added up one by one and never kept. Null `slope`: zero; null
// `error`: not wanted. `base` may be `value` itself.
struct Segment {
  int64_t n = 0;
  const void* slope = nullptr;
  const void* base = nullptr;
  void* value = nullptr;
  void* error = nullptr;
};

namespace cpu {

// out[row] = y0 + sum_j coef[row][j] k_j for every row; a null y0 is zero, and a single row may be
// written over y0. Returns whether all of out is finite.
bool combine(Dtype, int64_t n, const void* y0, const Terms&, const double* coef, int64_t rows,
             void* out, int threads);

// out = scaled_error of sum_j coef_j k_j, in the wide dtype.
void scaled_error(Dtype, int64_t n, const void* y0, const void* y1, const Terms&,
                  const double* coef, const Tolerance&, void* out, int threads);

// Largest over the members of the root mean square of the scaled error. The sums are taken in
// fixed chunks, so that the result does not depend on the number of threads.
double error_norm(Dtype, const void* y0, const void* y1, const Terms&, const double* coef,
                  const Tolerance&, const Members&, int threads);

// out[row][j] = <g_row, k_j>, the g_row one after the other; summed like the norm.
void inner(Dtype, int64_t n, const void* g, int64_t rows, const Terms&, double* out, int threads);

// value = base + w_value * slope, and error = w_error * slope, added to what is there unless this
// is the first slope of the step.
void accumulate(Dtype, const Segment*, int64_t count, double w_value, double w_error, bool first,
                int threads);

// Largest over segments of the root mean square of their scaled error, from base to value.
double error_norm(Dtype, const Segment*, int64_t count, double rtol, double atol, int threads);

}  // namespace cpu

// The same on the current device, queued on `stream`; each returns a cudaError_t. Defined where the
// build found nvcc (FLASHODE_WITH_CUDA).
namespace cuda {

struct Clock {  // where to write the time that func is to see with the combined state
  void* t = nullptr;
  double value = 0;
};

int combine(Dtype, int64_t n, const void* y0, const Terms&, const double* coef, int64_t rows,
            void* out, Clock, void* stream);

int scaled_error(Dtype, int64_t n, const void* y0, const void* y1, const Terms&,
                 const double* coef, const Tolerance&, void* out, void* stream);

// Where a norm goes, and what control makes of it, each where it is not null; both may lie in
// pinned host memory. `known` is a norm that the host has taken already: the larger one counts.
struct Verdict {
  double* norm = nullptr;
  Decision* decision = nullptr;
  double known = 0;
  double dt = 1;
  Controller control;
};

// Scratch for error_norm on the device. It must be zero before the first call.
int64_t norm_scratch_bytes(int64_t longest_member, int64_t members);
int64_t norm_scratch_bytes(const Segment*, int64_t count);

// The norms of several calls with one scratch make one verdict: a call whose verdict has nowhere to
// go leaves the largest norm so far in the scratch, the others take it and leave the scratch zero.
int error_norm(Dtype, int64_t longest_member, const void* y0, const void* y1, const Terms&,
               const double* coef, const Tolerance&, const Members&, void* scratch,
               const Verdict&, void* stream);
int error_norm(Dtype, const Segment*, int64_t count, double rtol, double atol, void* scratch,
               const Verdict&, void* stream);

int64_t inner_scratch_bytes(int64_t n, int64_t rows, int terms);
int inner(Dtype, int64_t n, const void* g, int64_t rows, const Terms&, double* out, void* scratch,
          void* stream);

int accumulate(Dtype, const Segment*, int64_t count, double w_value, double w_error, bool first,
               void* stream);

// Pinned host memory for one Decision, one cell per thread of the process.
int host_cell(Decision** cell);

int use_device(int index);
int wait(void* stream);
int device_count(int* count);
int runtime_version();
int driver_version();
const char* error_text(int error);

}  // namespace cuda

}  // namespace flashode
