// What the formulas need of the C library. Where CUDA is compiled at run time (NVRTC) there are no
// standard headers: the functions are built in, and the rest is here.
#pragma once

#ifndef __CUDACC_RTC__

#include <cfloat>
#include <cmath>
#include <cstdint>
#include <cstring>

#else

using int8_t = signed char;
using int16_t = short;
using int32_t = int;
using int64_t = long;
using uint8_t = unsigned char;
using uint16_t = unsigned short;
using uint32_t = unsigned int;
using uint64_t = unsigned long;
static_assert(sizeof(int64_t) == 8, "longs are those of Linux");

#define INFINITY __int_as_float(0x7f800000)
#define NAN __int_as_float(0x7fffffff)
#define DBL_MIN 0x1p-1022

#endif  // __CUDACC_RTC__
