// Arithmetic that decides bits.
//
// CuPy compiles with -ftz=true and the compiler fuses a * b + c, so plain expressions would not give
// IEEE results.  PTX instructions with an explicit rounding and no .ftz are neither fused nor flushed.
// Everything between an input value and a stored bit goes through these helpers.

#pragma once

using u8 = unsigned char;
using u16 = unsigned short;
using u32 = unsigned int;
using u64 = unsigned long long;
using i64 = long long;

#define DEVICE __device__ __forceinline__

DEVICE float mul(float a, float b) { float r; asm("mul.rn.f32 %0, %1, %2;" : "=f"(r) : "f"(a), "f"(b)); return r; }
DEVICE float add(float a, float b) { float r; asm("add.rn.f32 %0, %1, %2;" : "=f"(r) : "f"(a), "f"(b)); return r; }
DEVICE float sub(float a, float b) { float r; asm("sub.rn.f32 %0, %1, %2;" : "=f"(r) : "f"(a), "f"(b)); return r; }
DEVICE float div(float a, float b) { float r; asm("div.rn.f32 %0, %1, %2;" : "=f"(r) : "f"(a), "f"(b)); return r; }
DEVICE float sqrt_rn(float a) { float r; asm("sqrt.rn.f32 %0, %1;" : "=f"(r) : "f"(a)); return r; }

// One rounding.  Equals add(mul(a, b), c) where the product is exact, as with b = +-1.
DEVICE float fma_rn(float a, float b, float c) { float r; asm("fma.rn.f32 %0, %1, %2, %3;" : "=f"(r) : "f"(a), "f"(b), "f"(c)); return r; }

// As fma, clamped to [0, 1]; NaN becomes 0.
DEVICE float fma_sat(float a, float b, float c) { float r; asm("fma.rn.sat.f32 %0, %1, %2, %3;" : "=f"(r) : "f"(a), "f"(b), "f"(c)); return r; }

DEVICE double mul(double a, double b) { double r; asm("mul.rn.f64 %0, %1, %2;" : "=d"(r) : "d"(a), "d"(b)); return r; }
DEVICE float to_float(i64 a) { float r; asm("cvt.rn.f32.s64 %0, %1;" : "=f"(r) : "l"(a)); return r; }
// Of |a| < 2**51, without the slow conversion: exact.
DEVICE double whole_to_double(i64 a) { double r; asm("sub.rn.f64 %0, %1, %2;" : "=d"(r) : "d"(__longlong_as_double(a + 0x4338000000000000)), "d"(0x1.8p52)); return r; }
DEVICE float to_float(double a) { float r; asm("cvt.rn.f32.f64 %0, %1;" : "=f"(r) : "d"(a)); return r; }

DEVICE u32 bits_of(float a) { return __float_as_uint(a); }
DEVICE float float_of(u32 a) { return __uint_as_float(a); }

// Comparisons by bits: the compiler's would take subnormal numbers for zero.
DEVICE u32 less(float a, float b) { return bits_of(sub(a, b)) >> 31; }  // 1 if a < b; a or b finite
DEVICE float magnitude(float a) { return float_of(bits_of(a) & 0x7fffffffu); }
DEVICE float larger(float a, float b) { return float_of(max(bits_of(a), bits_of(b))); }  // of magnitudes

constexpr u32 CANONICAL_NAN = 0x7fc00000u;  // the NaN NumPy writes
constexpr u32 INFINITY_BITS = 0x7f800000u;

// 2**e as a float, for e from -149 (the smallest subnormal) to 127.
DEVICE float power_of_two(int e) { return float_of(e >= -126 ? u32(e + 127) << 23 : 1u << (e + 149)); }

// floor(log2(a)) of a positive finite float, subnormal ones included.
DEVICE int exponent_of(float a) {
  const u32 bits = bits_of(a);
  return bits >> 23 ? int(bits >> 23) - 127 : -118 - __clz(bits);
}

// x * 2**e with one rounding: exact upwards in two steps, a single product downwards.
struct PowerOfTwo {
  float first, second;
  DEVICE explicit PowerOfTwo(int e) : first(power_of_two(min(e, 127))), second(power_of_two(max(e - 127, 0))) {}
  DEVICE float scale(float x) const { return mul(mul(x, first), second); }
};
