// Rows of D numbers that 8 lanes share, LANE_DIMS neighbours in registers each; a warp has four rows.
#pragma once
#include "attention_rows.cuh"

#define LANE_DIMS (D / 8)

__device__ __forceinline__ void unpack_halves(uint4 x, float* v) {
  const u32 w[4] = {x.x, x.y, x.z, x.w};
#pragma unroll
  for (int k = 0; k < 8; k++) v[k] = half_to_float((u16)(w[k / 2] >> k % 2 * 16));
}
#if POWER_OF_TWO && D <= 128
// Signs of LANE_DIMS dims in a step of a rotation, set = negative.
__device__ __forceinline__ u32 eighth_signs(const u32* signs, int step, int part) {
  return signs[step * SIGN_WORDS + LANE_DIMS * part / 32] >> LANE_DIMS * part % 32 & ((1u << LANE_DIMS) - 1);
}
// Those of the first steps, LANE_DIMS bits each.
__device__ __forceinline__ u64 early_signs(const u32* signs, int steps, int part) {
  u64 early = 0;
#pragma unroll
  for (int k = 0; k < EARLY_STEPS; k++)
    if (k < steps) early |= (u64)eighth_signs(signs, k, part) << LANE_DIMS * k;
  return early;
}
__device__ __forceinline__ void flip_eighth(float (&v)[LANE_DIMS], u64 early, const u32* signs, int step, int part) {
  const float gain = rsqrtf((float)D);
  const u32 bits = step < EARLY_STEPS ? (u32)(early >> LANE_DIMS * step) : eighth_signs(signs, step, part);
#pragma unroll
  for (int i = 0; i < LANE_DIMS; i++) v[i] *= bits >> i & 1 ? -gain : gain;
}
// Dims of a row of the query, 16 bytes at a time.
template <int COUNT> __device__ __forceinline__ void load_dims(const Args& a, i64 at, float (&v)[COUNT]) {
  if (a.query_dtype == FLOAT32) {
#pragma unroll
    for (int i = 0; i < COUNT / 4; i++) {
      const uint4 x = ((const uint4*)((const float*)a.query + at))[i];
      v[4 * i] = __uint_as_float(x.x), v[4 * i + 1] = __uint_as_float(x.y);
      v[4 * i + 2] = __uint_as_float(x.z), v[4 * i + 3] = __uint_as_float(x.w);
    }
    return;
  }
#pragma unroll
  for (int i = 0; i < COUNT / 8; i++) {
    const uint4 x = ((const uint4*)((const u16*)a.query + at))[i];
    if (a.query_dtype == FLOAT16) {
      unpack_halves(x, v + 8 * i);
    } else {
      const u32 w[4] = {x.x, x.y, x.z, x.w};
#pragma unroll
      for (int k = 0; k < 8; k++) v[8 * i + k] = __uint_as_float(k % 2 ? w[k / 2] & 0xffff0000u : w[k / 2] << 16);
    }
  }
}
#endif
