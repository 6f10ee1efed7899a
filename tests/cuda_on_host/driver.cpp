// What tests/test_cuda_on_host.py calls: the operations of both devices, and what they are made of.

#include "cuda.cu"  // these two with their launch turned into a call of the emulator
#include "cuda_batched.cu"

using namespace flashode;

namespace {

// What every operation reads.
struct Operands {
  int dtype, count;
  int64_t n, rows, members;
  const void *y0, *y1;
  const void* const* k;
  const double* coef;
  double rtol, atol;
  const void *each_rtol, *each_atol;
  const int64_t* offsets;
  const Segment* segments;  // of the quadrature: `rows` of them

  Dtype type() const { return Dtype(dtype); }
  Terms terms() const {
    Terms terms;
    terms.count = count;
    std::copy_n(k, count, terms.k);
    return terms;
  }
  Tolerance tolerance() const { return {rtol, atol, each_rtol, each_atol}; }
  Members split() const { return {members, offsets}; }
};

struct Control {
  int order;
  double safety, ifactor, dfactor, min_step, max_step, betas[3], past[2];
  operator Controller() const {
    return {order,    safety,   ifactor, dfactor, min_step, max_step, {betas[0], betas[1], betas[2]},
            {past[0], past[1]}};
  }
};

// A batch of samples solved on their own.
struct BatchOperands {
  int dtype, stages;
  int64_t count, outputs, members, width, widest, caller;
  double* reals;
  int64_t* wholes;
  const double* times;
  const int64_t* offsets;
  double* steps;
  const void* each_rtol;
  double rtol, atol;
  Control control;
  unsigned* scratch;

  Batch batch() const {
    Batch b;
    b.dtype = Dtype(dtype);
    b.samples = {count, reals, wholes, times, outputs, outputs};
    b.members = {members, offsets};
    b.width = width;
    b.widest = widest;
    b.tolerance = {rtol, atol, each_rtol, nullptr};
    b.control = control;
    b.remembers = true;
    b.max_num_steps = 11;
    b.steps = steps;
    return b;
  }
  Terms terms(const void* const* k) const {
    Terms terms;
    terms.count = stages;
    std::copy_n(k, stages, terms.k);
    return terms;
  }
  Sum sum(const double* weight) const {
    Sum sum;
    sum.count = stages;
    for (int j = 0; j < stages; ++j) sum.stage[j] = j, sum.weight[j] = weight[j];
    return sum;
  }
};

// ---- for the sum over a block, and for the emulator itself -----------------------------------

__global__ void two_sums(const double* value, double* sum) {
  for (int i = threadIdx.x; i < 2 * cuda::kThreads; i += cuda::kThreads) {
    sum[i] = cuda::block_sum(value[i]);
  }
}

__global__ void some_leave_before_a_barrier() {
  if (threadIdx.x == 1) return;
  __syncthreads();
}

__global__ void two_barriers() {
  if (threadIdx.x == 1) {
    __syncthreads();
  } else {
    __syncthreads();
  }
}

__global__ void null_is_read() { *static_cast<volatile double*>(nullptr); }

__global__ void nothing() {}

}  // namespace

extern "C" {

int threads_per_block() { return cuda::kThreads; }

// What follows does not depend on `seed`, which orders blocks and threads.
void schedule(uint64_t seed, int64_t max_blocks) {
  on_host::chance.seed(seed);
  cuda::kMaxBlocks = max_blocks;
}

const char* error_text(int error) { return cuda::error_text(error); }

int cuda_combine(const Operands& a, void* out, void* t, double time) {
  return cuda::combine(a.type(), a.n, a.y0, a.terms(), a.coef, a.rows, out, {t, time}, nullptr);
}
void cpu_combine(const Operands& a, void* out) {
  cpu::combine(a.type(), a.n, a.y0, a.terms(), a.coef, a.rows, out, 1);
}

int cuda_scaled_error(const Operands& a, void* out) {
  return cuda::scaled_error(a.type(), a.n, a.y0, a.y1, a.terms(), a.coef, a.tolerance(), out,
                            nullptr);
}
void cpu_scaled_error(const Operands& a, void* out) {
  cpu::scaled_error(a.type(), a.n, a.y0, a.y1, a.terms(), a.coef, a.tolerance(), out, 1);
}

int64_t inner_scratch_bytes(const Operands& a) {
  return cuda::inner_scratch_bytes(a.n, a.rows, a.count);
}
int cuda_inner(const Operands& a, const void* g, double* out, void* scratch) {
  return cuda::inner(a.type(), a.n, g, a.rows, a.terms(), out, scratch, nullptr);
}
void cpu_inner(const Operands& a, const void* g, double* out) {
  cpu::inner(a.type(), a.n, g, a.rows, a.terms(), out, 1);
}

int64_t norm_scratch_bytes(int64_t longest, int64_t members) {
  return cuda::norm_scratch_bytes(longest, members);
}
int cuda_error_norm(const Operands& a, int64_t longest, void* scratch, double* norm,
                    Decision* decision, double known, double dt, const Control& control) {
  return cuda::error_norm(a.type(), longest, a.y0, a.y1, a.terms(), a.coef, a.tolerance(),
                          a.split(), scratch, {norm, decision, known, dt, control}, nullptr);
}
double cpu_error_norm(const Operands& a) {
  return cpu::error_norm(a.type(), a.y0, a.y1, a.terms(), a.coef, a.tolerance(), a.split(), 1);
}

int cuda_accumulate(const Operands& a, double w_value, double w_error, bool first) {
  return cuda::accumulate(a.type(), a.segments, a.rows, w_value, w_error, first, nullptr);
}
void cpu_accumulate(const Operands& a, double w_value, double w_error, bool first) {
  cpu::accumulate(a.type(), a.segments, a.rows, w_value, w_error, first, 1);
}
int64_t segment_scratch_bytes(const Operands& a) {
  return cuda::norm_scratch_bytes(a.segments, a.rows);
}
int cuda_segment_norm(const Operands& a, void* scratch, double* norm, double known) {
  return cuda::error_norm(a.type(), a.segments, a.rows, a.rtol, a.atol, scratch,
                          {norm, nullptr, known}, nullptr);
}
double cpu_segment_norm(const Operands& a) {
  return cpu::error_norm(a.type(), a.segments, a.rows, a.rtol, a.atol, 1);
}

void decision_of(double norm, double dt, const Control& control, Decision* decision) {
  *decision = decide(norm, dt, Controller(control));
}

void widen_all(int dtype, const uint16_t* bits, float* wide, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    wide[i] = Dtype(dtype) == Dtype::f16 ? widen(Half{bits[i]}) : widen(BFloat16{bits[i]});
  }
}
void narrow_all(int dtype, const float* wide, uint16_t* bits, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    const float x = wide[i];
    bits[i] = Dtype(dtype) == Dtype::f16 ? narrow<Half>(x).bits : narrow<BFloat16>(x).bits;
  }
}
void round_times(int dtype, const double* t, int nudge, double* rounded, int64_t n) {
  for (int64_t i = 0; i < n; ++i) rounded[i] = round_time(t[i], nudge, Dtype(dtype));
}

int sum_twice(const double* value, double* sum) {
  return cuda::launch(two_sums, dim3(1), nullptr, value, sum);
}
int faulty(int fault) {
  switch (fault) {
    case 0: return cuda::launch(some_leave_before_a_barrier, dim3(1), nullptr);
    case 1: return cuda::launch(two_barriers, dim3(1), nullptr);
    case 2: return cuda::launch(null_is_read, dim3(1), nullptr);
    case 3: return cuda::launch(nothing, dim3(0), nullptr);
    default: return cuda::launch(nothing, dim3(1, 65536), nullptr);
  }
}

// ---- batches: one operation, on the emulator or on the CPU ---------------------------------------

int batch_stage(bool gpu, const BatchOperands& a, const void* y0, const void* const* k,
                const double* weight, void* out, void* t, Tally*) {
  const StageTimes times{0.3, 0, t};
  if (gpu) return cuda::stage(a.batch(), y0, a.terms(k), a.sum(weight), times, out, nullptr);
  cpu::stage(a.batch(), y0, a.terms(k), a.sum(weight), times, out, 1);
  return 0;
}
int batch_probe(bool gpu, const BatchOperands& a, const void* y0, const void* f0, Tally* tally) {
  if (gpu) return cuda::probe(a.batch(), y0, f0, a.scratch, tally, nullptr);
  *tally = cpu::probe(a.batch(), y0, f0, 1);
  return 0;
}
int batch_first_trials(bool gpu, const BatchOperands& a, const void* y0, const void* f0,
                       const void* f1, Tally*) {
  if (gpu) return cuda::first_trials(a.batch(), y0, f0, f1, nullptr);
  cpu::first_trials(a.batch(), y0, f0, f1, 1);
  return 0;
}
int batch_begin(bool gpu, const BatchOperands& a, Tally* tally) {
  if (gpu) return cuda::begin_trials(a.batch(), a.scratch, tally, nullptr);
  *tally = cpu::begin_trials(a.batch(), 1);
  return 0;
}
int batch_judge(bool gpu, const BatchOperands& a, const void* y0, const void* y1,
                const void* const* k, const double* weight, const void* extra, Tally* tally) {
  if (gpu) {
    return cuda::judge(a.batch(), y0, y1, a.terms(k), a.sum(weight), extra, a.scratch, tally, nullptr);
  }
  *tally = cpu::judge(a.batch(), y0, y1, a.terms(k), a.sum(weight), extra, 1);
  return 0;
}
int batch_commit(bool gpu, const BatchOperands& a, void* y0, void* f0, const void* y1,
                 const void* const* k, const void* f1, const double* dense, void* ys, Tally* tally) {
  Polynomial polynomial;
  polynomial.count = a.stages;
  polynomial.degree = 4;
  polynomial.has_extra = true;
  for (int j = 0; j < a.stages; ++j) {
    polynomial.stage[j] = j;
    for (int power = 0; power < 4; ++power) polynomial.weight[power][j] = dense[power * a.stages + j];
  }
  if (gpu) {
    return cuda::commit(a.batch(), y0, f0, y1, a.terms(k), f1, polynomial, {ys, a.caller}, a.scratch,
                        tally, nullptr);
  }
  *tally = cpu::commit(a.batch(), y0, f0, y1, a.terms(k), f1, polynomial, {ys, a.caller}, 1);
  return 0;
}

}  // extern "C"
