// What the elementary functions of math.h are made of: constants and polynomials, for float and
// double.
//
// Polynomials are fits by Remez's exchange (minimax.py beside this file), lowest coefficient first;
// the logarithm of a double is fdlibm's (e_log.c). What is cut in pieces is cut so that a fused
// multiply-add of the first is exact (Cody and Waite, Software Manual for the Elementary
// Functions).
#pragma once

#include <cstdint>

namespace flashode {

template <class T>
struct Series;

template <>
struct Series<float> {
  static constexpr int mantissa = 23, bias = 127;
  static constexpr int32_t sign = INT32_MIN, fraction = (1 << mantissa) - 1;
  static constexpr int32_t root_half = 0x3f3504f3;  // the bits of sqrt(1/2)
  static constexpr float rounder = 0x1.8p23f;       // x + rounder has the integer next to x below
  static constexpr float least_normal = 0x1p-126f, infinity = __builtin_inff();
  static constexpr float log2_e = 0x1.715476p+0f;
  static constexpr float ln2[] = {0x1.62e43p-1f, -0x1.05c61p-29f};
  // With bits to spare: its product with any exponent is exact (fdlibm).
  static constexpr float ln2_short[] = {0x1.62e4p-1f, 0x1.7f7d1cp-20f};
  static constexpr float two_thirds[] = {0x1.555556p-1f, -0x1.555556p-26f};
  static constexpr float pi[] = {0x1.921fb6p+1f, -0x1.777a5cp-24f, -0x1.ee59dap-49f};
  static constexpr float inverse_pi = 0x1.45f306p-2f, farthest = 0x1p17f;
  static constexpr float least_exp = -104, most_exp = 89, flat_expm1 = -18, flat_tanh = 10,
                         flat_erf = 4;

  static constexpr float exp[] = {0.5f, 0.1666654053f, 0.04166628242f, 0.008367009024f,
                                  0.001394652247f};
  static constexpr float log[] = {0.3333331851f, -0.2500068988f, 0.2000219852f, -0.1662820278f,
                                  0.1418394542f, -0.1309856211f, 0.1285662917f, -0.07907858517f};
  static constexpr float atanh[] = {0.4000015257f, 0.2854708752f, 0.2341980874f};
  static constexpr float sin[] = {-0.166666592f, 0.008333056583f, -0.0001980885012f,
                                  2.604029601e-6f};
  static constexpr float atan[] = {-0.333332991f,   0.1999854837f,   -0.1426424216f,
                                   0.109521874f,    -0.08403454346f, 0.05795766324f,
                                   -0.03117792147f, 0.01091465073f,  -0.001793632813f};
  static constexpr float erf[] = {0.1283791657f,  -0.3761262582f,    0.1128358516f,  -0.0268538126f,
                                  0.00518832916f, -0.0008010207701f, 7.853910349e-5f};
  static constexpr float log_erfc[] = {-0.002620014435f, -1.117618182f,  -0.6542444992f,
                                       -0.08879659538f,  0.01483077178f, -0.00115707763f};
};

template <>
struct Series<double> {
  static constexpr int mantissa = 52, bias = 1023;
  static constexpr int64_t sign = INT64_MIN, fraction = (int64_t(1) << mantissa) - 1;
  static constexpr int64_t root_half = 0x3fe6a09e667f3bcd;
  static constexpr double rounder = 0x1.8p52;
  static constexpr double least_normal = 0x1p-1022, infinity = __builtin_inf();
  static constexpr double log2_e = 0x1.71547652b82fep+0;
  static constexpr double ln2[] = {0x1.62e42fefa39efp-1, 0x1.abc9e3b39803fp-56};
  static constexpr double pi[] = {0x1.921fb54442d18p+1, 0x1.1a62633145c07p-53,
                                  -0x1.f1976b7ed8fbcp-109};
  static constexpr double inverse_pi = 0x1.45f306dc9c883p-2, farthest = 0x1p26;
  static constexpr double least_exp = -746, most_exp = 710, flat_expm1 = -38, flat_tanh = 20,
                          flat_erf = 6;

  static constexpr double exp[] = {0.5000000000000005065,     0.1666666666666668506,
                                   0.04166666666657499808,    0.008333333333315125801,
                                   0.00138888889327196356,    0.0001984126990188715605,
                                   0.00002480150341358479235, 2.755722904612234505e-6,
                                   2.762691717256268103e-7,   2.511408680687472511e-8};
  static constexpr double log[] = {6.666666666666735130e-01, 3.999999999940941908e-01,
                                   2.857142874366239149e-01, 2.222219843214978396e-01,
                                   1.818357216161805012e-01, 1.531383769920937332e-01,
                                   1.479819860511658591e-01};
  static constexpr double ln2_short[] = {6.93147180369123816490e-01, 1.90821492927058770002e-10};
  static constexpr double two_thirds[] = {0x1.5555555555555p-1, 0x1.5555555555555p-55};
  static constexpr double atanh[] = {
      0.3999999999999997732, 0.285714285714452287,  0.2222222221750702022, 0.1818181887403027214,
      0.1538455661142311936, 0.1333632761059734133, 0.1167460794742271063, 0.1199079406046210511};
  static constexpr double sin[] = {-0.1666666666666666546,    0.008333333333333182261,
                                   -0.000198412698412047548,  2.755731921035525249e-6,
                                   -2.505210679975914128e-8,  1.605893596706622384e-10,
                                   -7.642892564881138762e-13, 2.720117402529329847e-15};
  static constexpr double atan[] = {
      -0.333333333333330681,     0.1999999999995146741,    -0.1428571428257548161,
      0.1111111100703621412,     -0.09090907003157842029,  0.07692279841145103131,
      -0.06666404072230818408,   0.05880527900062981835,   -0.0525351892901376856,
      0.04722323486536353423,    -0.04219182275476748398,  0.03664197848815360578,
      -0.0299039656313910884,    0.02198498508275560095,   -0.01390068433940968561,
      0.007196591317757321989,   -0.002884963912336558404, 0.0008313379325169715347,
      -0.0001521643556892666418, 0.00001322542564748391605};
  static constexpr double erf[] = {
      0.1283791670955125656,    -0.3761263890318351949,     0.1128379167094418368,
      -0.02686617064311137318,  0.005223977606117969579,    -0.0008548325929296912907,
      0.0001205529357648974046, -0.00001492471229555176183, 1.64471315041502842e-6,
      -1.620631331726649576e-7, 1.371097874156156364e-8,    -7.779465790464578579e-10};
  static constexpr double log_erfc[] = {
      -5.028734773801432382e-7,  -1.128374089265575903,     -0.6366436289536808667,
      -0.102703437329813162,     0.01899017503388606291,    0.0004106328223118976153,
      -0.001915948223418364788,  0.0007706470524859473134,  -0.0001350527910939232612,
      -0.0000202654406473383509, 0.00002282201562130548112, -8.667011326177912054e-6,
      2.135640009390641541e-6,   -3.732958300697868264e-7,  4.642190312891882702e-8,
      -3.934165072234093033e-9,  2.04490713077079271e-10,   -4.928472645340558535e-12};
};

}  // namespace flashode
