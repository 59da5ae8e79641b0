// Combine the parts of four output rows, 8 lanes each, and rotate back: for rows of few parts.
#pragma once
#include "attention_merge.cuh"
#include "attention_eighths.cuh"

#if FUSED && POWER_OF_TWO

#define PARTS_AT_ONCE 4  // are loaded before the first is used

__device__ __forceinline__ void merge_four_rows(const Args& a, const PartsOfRow& parts, u64 early, int lane) {
  const int part = lane & 7;
  const i64 row = parts.row;
  float x[LANE_DIMS] = {}, top = NEVER, sum = 0.f;
  if (a.sinks && parts.exists) {
    top = a.sinks[(i64)parts.head * a.sinks_step] * LOG2_E;
    sum = 1.f;
  }
  int most = parts.count;
#pragma unroll
  for (int k = 8; k < 32; k <<= 1) most = max(most, __shfl_xor_sync(FULL_WARP, most, k));
#pragma unroll 1
  for (int first = 0; first < most; first += PARTS_AT_ONCE) {
    uint4 loaded[PARTS_AT_ONCE][LANE_DIMS / 8];
    float2 scale[PARTS_AT_ONCE];
#pragma unroll
    for (int k = 0; k < PARTS_AT_ONCE; k++) {
      uint2 bits = make_uint2(0xff800000u, 0);
      const i64 at = parts.first + (i64)(first + k) * parts.stride;
      const uint4* from = (const uint4*)(a.parts + at * O_PITCH + LANE_DIMS * part);
#pragma unroll
      for (int i = 0; i < LANE_DIMS / 8; i++) loaded[k][i] = make_uint4(0, 0, 0, 0);
      if (first + k < parts.count) {
        bits = load_shared_by_blocks((const uint2*)(a.part_scales + at));
#pragma unroll
        for (int i = 0; i < LANE_DIMS / 8; i++) loaded[k][i] = load_shared_by_blocks(from + i);
      }
      scale[k] = make_float2(__uint_as_float(bits.x), __uint_as_float(bits.y));
    }
    float next = top;
#pragma unroll
    for (int k = 0; k < PARTS_AT_ONCE; k++) next = fmaxf(next, scale[k].x);
    const float down = exp2_approx(top - next);
    top = next;
    sum *= down;
#pragma unroll
    for (int i = 0; i < LANE_DIMS; i++) x[i] *= down;
#pragma unroll
    for (int k = 0; k < PARTS_AT_ONCE; k++) {
      const float weight = exp2_approx(scale[k].x - top), factor = weight * scale[k].y;
      sum += weight;
#pragma unroll
      for (int i = 0; i < LANE_DIMS / 8; i++) {
        float y[8];
        unpack_halves(loaded[k][i], y);
#pragma unroll
        for (int j = 0; j < 8; j++) x[8 * i + j] = fmaf(factor, y[j], x[8 * i + j]);
      }
    }
  }
  float of_other = parts.exists ? make_room_for_other(a, row, top, sum, x) : 0.f;
  const float inverse = sum > 0.f ? 1.f / sum : 0.f;
  of_other *= inverse;
#pragma unroll
  for (int i = 0; i < LANE_DIMS; i++) x[i] *= a.value_factor * inverse;
#pragma unroll 1
  for (int step = a.v_steps - 1; step >= 0; step--) {
    transform_lanes<8>(x, part);
    flip_eighth(x, early, a.v_signs, step, part);
  }
  if (!parts.exists) return;
  if (part == 0) a.lse[row] = sum > 0.f ? (top + log2_approx(sum)) * LN_2 : __uint_as_float(0xff800000u);
  const i64 at = row * D + LANE_DIMS * part;
  if (of_other > 0.f) {
#pragma unroll
    for (int i = 0; i < LANE_DIMS; i++) x[i] = fmaf(of_other, a.other_out[at + i], x[i]);
  }
  if (a.query_dtype == FLOAT16) {
#pragma unroll
    for (int i = 0; i < LANE_DIMS / 2; i++) ((u32*)((u16*)a.out + at))[i] = pack_half2(x[2 * i], x[2 * i + 1]);
  } else {
#pragma unroll
    for (int i = 0; i < LANE_DIMS; i++) store_float(a.out, at + i, a.query_dtype, x[i]);
  }
}
#endif
