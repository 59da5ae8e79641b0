// Input and output types, named by macros: HALF, BFLOAT16, FLOAT, DOUBLE.  Conversions to float32 are
// exact but for DOUBLE; conversions from float32 round to nearest even.

#pragma once
#include "exact.cuh"

struct Half { u16 bits; };
struct BFloat16 { u16 bits; };
using Float = float;
using Double = double;

template <class X> constexpr bool IS_HALF = false;
template <> constexpr bool IS_HALF<Half> = true;

DEVICE float to_float(Half a) { float r; asm("cvt.f32.f16 %0, %1;" : "=f"(r) : "h"(a.bits)); return r; }
DEVICE float to_float(BFloat16 a) { return float_of(u32(a.bits) << 16); }
DEVICE float to_float(float a) { return a; }

DEVICE void store_as(Half* p, float a) { asm("cvt.rn.f16.f32 %0, %1;" : "=h"(p->bits) : "f"(a)); }
DEVICE void store_as(BFloat16* p, float a) { asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(p->bits) : "f"(a)); }
DEVICE void store_as(float* p, float a) { *p = a; }
DEVICE void store_as(double* p, float a) { asm("cvt.f64.f32 %0, %1;" : "=d"(*p) : "f"(a)); }

// 16 bytes of X -> values, and back.
template <class X> constexpr int PER_16_BYTES = 16 / sizeof(X);

DEVICE void widen(uint4 q, float* x, Half) {
  const u32 w[4] = {q.x, q.y, q.z, q.w};
#pragma unroll
  for (int i = 0; i < 4; i++) {
    x[2 * i] = to_float(Half{u16(w[i])});
    x[2 * i + 1] = to_float(Half{u16(w[i] >> 16)});
  }
}
DEVICE void widen(uint4 q, float* x, BFloat16) {
  const u32 w[4] = {q.x, q.y, q.z, q.w};
#pragma unroll
  for (int i = 0; i < 4; i++) {
    x[2 * i] = float_of(w[i] << 16);
    x[2 * i + 1] = float_of(w[i] & 0xffff0000u);
  }
}
DEVICE void widen(uint4 q, float* x, float) {
  x[0] = float_of(q.x); x[1] = float_of(q.y); x[2] = float_of(q.z); x[3] = float_of(q.w);
}
DEVICE void widen(uint4 q, float* x, double) {
  x[0] = to_float(__hiloint2double(q.y, q.x));
  x[1] = to_float(__hiloint2double(q.w, q.z));
}

DEVICE u32 pack_pair(float low, float high, Half) { u32 r; asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low)); return r; }
DEVICE u32 pack_pair(float low, float high, BFloat16) { u32 r; asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low)); return r; }

template <class X> DEVICE uint4 narrow(const float* x, X type) {
  return make_uint4(pack_pair(x[0], x[1], type), pack_pair(x[2], x[3], type), pack_pair(x[4], x[5], type), pack_pair(x[6], x[7], type));
}
DEVICE uint4 narrow(const float* x, float) { return make_uint4(bits_of(x[0]), bits_of(x[1]), bits_of(x[2]), bits_of(x[3])); }
DEVICE uint4 narrow(const float* x, double) {
  double a, b;
  store_as(&a, x[0]);
  store_as(&b, x[1]);
  return make_uint4(__double2loint(a), __double2hiint(a), __double2loint(b), __double2hiint(b));
}
