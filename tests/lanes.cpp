// What test_lanes.py calls: the functions of csrc/compiled on arrays, with any number of lanes.
#include "compiled/math.h"
#include "compiled/product.h"
#include "kernels/control.h"

namespace flashode {

using Real = REAL;

// out[i] = function(x[i], y[i]), `lanes` at a time; n is a multiple of them.
template <int L, class F>
void run(const Real* x, const Real* y, Real* out, int64_t n, F function) {
  using V = Lanes<Real, L>;
  for (int64_t i = 0; i < n; i += L) {
    store(out + i, function(load_unaligned<V>(x + i), load_unaligned<V>(y + i)));
  }
}
template <class F>
void run(int lanes, const Real* x, const Real* y, Real* out, int64_t n, F function) {
  switch (lanes) {
    case 1:
      return run<1>(x, y, out, n, function);
    case 4:
      return run<4>(x, y, out, n, function);
    case 8:
      return run<8>(x, y, out, n, function);
    case 16:
      return run<16>(x, y, out, n, function);
    default:
      return run<32>(x, y, out, n, function);
  }
}

#define EACH(entry, ...)                                                                 \
  extern "C" void entry(int lanes, const Real* x, const Real* y, Real* out, int64_t n) { \
    run(lanes, x, y, out, n, [](const auto& a, const auto& b) {                          \
      using V = std::decay_t<decltype(a)>;                                               \
      (void)b;                                                                           \
      return V(__VA_ARGS__);                                                             \
    });                                                                                  \
  }
#define UNARY(name) EACH(of_##name, name(a))
#define LANE_BY_LANE(name)                                                                   \
  extern "C" void of_##name(int lanes, const Real* x, const Real* y, Real* out, int64_t n) { \
    auto function = [](const auto& a, const auto&) { return name(a); };                      \
    lanes == 1 ? run<1>(x, y, out, n, function) : run<16>(x, y, out, n, function);           \
  }
#define TRUTH(entry, mask) EACH(of_##entry, select(mask, splat<V>(1), zero<V>()))
UNARY(exp)
UNARY(expm1)
UNARY(log)
UNARY(log1p)
UNARY(sin)
UNARY(cos)
LANE_BY_LANE(tan)
LANE_BY_LANE(sinh)
LANE_BY_LANE(cosh)
UNARY(tanh)
LANE_BY_LANE(asin)
LANE_BY_LANE(acos)
UNARY(atan)
LANE_BY_LANE(asinh)
LANE_BY_LANE(acosh)
LANE_BY_LANE(atanh)
UNARY(erf)
LANE_BY_LANE(erfc)
UNARY(sigmoid)
UNARY(softplus)
LANE_BY_LANE(floor)
LANE_BY_LANE(ceil)
LANE_BY_LANE(trunc)
LANE_BY_LANE(round_even)
LANE_BY_LANE(square_root)
UNARY(sign)
UNARY(magnitude)
EACH(of_pow, pow(a, b))
EACH(of_maximum, maximum(a, b))
EACH(of_minimum, minimum(a, b))
EACH(of_formula, (a * 2 - b / 3) * (1 - a) + -b)
TRUTH(less, a < b)
TRUTH(at_most, a <= b)
TRUTH(equal, a == b)
TRUTH(unequal, a != b)
TRUTH(nan, is_nan(a))
TRUTH(finite, is_finite(a))
TRUTH(neither, (a == a) & !((a < b) | (a > b)))
EACH(of_sum, splat<V>(sum_of_lanes(a)))
EACH(of_any, splat<V>(any(a > b)))
EACH(of_all, splat<V>(all(a > b)))
EACH(of_float_and_back, convert<V>(convert<Lanes<float, lanes_of<V>>>(a)))
EACH(of_double_and_back, convert<V>(convert<Lanes<double, lanes_of<V>>>(a)))
EACH(of_mask_of_floats,
     select(mask_of<V>(convert<Lanes<float, lanes_of<V>>>(a) < 0), splat<V>(1), zero<V>()))
EACH(of_mask_of_doubles,
     select(mask_of<V>(convert<Lanes<double, lanes_of<V>>>(a) < 0), splat<V>(1), zero<V>()))

// x[k] and g[m] hold `lanes` samples side by side.
template <int M, int K, int L>
void multiply(const Real* w, const int64_t* strides, const Real* x, const Real* g, Real* out,
              Real* sums, Real* each) {
  using V = Lanes<Real, L>;
  const V *vx = reinterpret_cast<const V*>(x), *vg = reinterpret_cast<const V*>(g);
  product<M, K>(w, strides[0], strides[1], vx, reinterpret_cast<V*>(out));
  outer<M, K>(vg, vx, sums, strides[0], strides[1]);
  outer_lanes<M, K>(vg, vx, reinterpret_cast<V*>(each));
}
#define SHAPE(M, K)                                                                       \
  extern "C" void multiply_##M##_##K(int lanes, const Real* w, const int64_t* strides,    \
                                     const Real* x, const Real* g, Real* out, Real* sums, \
                                     Real* each) {                                        \
    if (lanes == 1) return multiply<M, K, 1>(w, strides, x, g, out, sums, each);          \
    if (lanes == 4) return multiply<M, K, 4>(w, strides, x, g, out, sums, each);          \
    multiply<M, K, 48>(w, strides, x, g, out, sums, each);                                \
  }
SHAPE(2, 50)
SHAPE(50, 2)
SHAPE(33, 37)

// Control of clocks of their own: x are error ratios, y sizes of steps; out are sizes of the next.
struct Given {
  int order;
  double safety, ifactor, dfactor, min_step, max_step, betas[3], past[2];
};
template <int L>
void control(const Given& given, const double* ratio, const double* dt, double* next,
             double* accepted, double* past, int64_t n) {
  using V = Lanes<double, L>;
  for (int64_t i = 0; i < n; i += L) {
    ControllerOf<V> control;
    control.order = given.order;
    control.safety = given.safety, control.ifactor = given.ifactor, control.dfactor = given.dfactor;
    control.min_step = given.min_step, control.max_step = given.max_step;
    for (int b = 0; b < 3; ++b) control.betas[b] = given.betas[b];
    for (int p = 0; p < 2; ++p) control.past[p] = splat<V>(given.past[p]);
    const V ratios = load_unaligned<V>(ratio + i);
    const auto decision = decide(ratios, load_unaligned<V>(dt + i), control);
    remember(ratios, control);
    store(next + i, decision.next_dt);
    store(accepted + i, select(decision.accepted, splat<V>(1), zero<V>()));
    store(past + i, control.past[0]);
  }
}
extern "C" void control_of(int lanes, const Given* given, const double* ratio, const double* dt,
                           double* next, double* accepted, double* past, int64_t n) {
  return lanes == 1 ? control<1>(*given, ratio, dt, next, accepted, past, n)
                    : control<8>(*given, ratio, dt, next, accepted, past, n);
}

template <int L>
void first(const double* d0, const double* d1, const double* d2, double* guess, double* step,
           int64_t n) {
  using V = Lanes<double, L>;
  for (int64_t i = 0; i < n; i += L) {
    const V a = load_unaligned<V>(d0 + i), b = load_unaligned<V>(d1 + i), h0 = first_guess(a, b);
    store(guess + i, larger(h0, a * 0));
    store(step + i, initial_step(h0, b, load_unaligned<V>(d2 + i), 5));
  }
}
extern "C" void first_of(int lanes, const double* d0, const double* d1, const double* d2,
                         double* guess, double* step, int64_t n) {
  return lanes == 1 ? first<1>(d0, d1, d2, guess, step, n) : first<8>(d0, d1, d2, guess, step, n);
}

template <int L>
void rounded(const double* t, int nudge, double* out, int64_t n) {
  for (int64_t i = 0; i < n; i += L) {
    store(out + i, round_time<Real>(load_unaligned<Lanes<double, L>>(t + i), nudge));
  }
}
extern "C" void rounded_of(int lanes, const double* t, int nudge, double* out, int64_t n) {
  if (lanes == 1) return rounded<1>(t, nudge, out, n);
  return lanes == 4 ? rounded<4>(t, nudge, out, n) : rounded<16>(t, nudge, out, n);
}

}  // namespace flashode
