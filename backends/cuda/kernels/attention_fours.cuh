// attention_query and attention_merge for very many rows: four rows a warp, 16 bytes a load.
//
// Macros: FOUR_ROWS; rows of the query can be read 16 bytes at a time, a row has few parts, rotations are
// Hadamard rotations of 64 or 128 dims.
#pragma once
#include "attention_merge_rows.cuh"
#include "attention_query.cuh"

#if FOUR_ROWS

#define FOURS_WARPS 8
static_assert(FOURS_WARPS == QUERY_WARPS, "write_plan");

// The row of 8 neighbouring lanes.
__device__ __forceinline__ i64 row_of_eight() {
  return ((i64)blockIdx.x * FOURS_WARPS + (threadIdx.x >> 5)) * 4 + (threadIdx.x >> 3 & 3);
}

extern "C" __global__ void __launch_bounds__(32 * FOURS_WARPS) attention_query_fours(const Args a) {
  if (blockIdx.x == gridDim.x - 1) {
    write_plan(a);
    return;
  }
  const int lane = threadIdx.x & 31, part = lane & 7, heads = a.num_kv_heads * a.group;
  const i64 all = (i64)a.num_tokens * heads, own = row_of_eight(), row = own < all ? own : all - 1;
  const int token = (int)(row / heads), head = (int)(row % heads);
  float v[LANE_DIMS], shift = 0.f, largest = 0.f;
  load_dims(a, token * a.q_token_stride + head * a.q_head_stride + LANE_DIMS * part, v);
  const u64 early = early_signs(a.k_signs, a.k_steps, part);
  if (a.key_offset) {
    const float* o = offset_of(a, sequence_of_token(a, token), head / a.group) + LANE_DIMS * part;
#pragma unroll
    for (int i = 0; i < LANE_DIMS; i++) shift = fmaf(v[i], o[i], shift);
  }
#pragma unroll 1
  for (int step = 0; step < a.k_steps; step++) {
    flip_eighth(v, early, a.k_signs, step, part);
    transform_eighth(v, part);
  }
#pragma unroll
  for (int i = 0; i < LANE_DIMS; i++) largest = fmaxf(largest, fabsf(v[i]));
#pragma unroll
  for (int k = 1; k < 8; k <<= 1) {
    shift += __shfl_xor_sync(FULL_WARP, shift, k);
    largest = fmaxf(largest, __shfl_xor_sync(FULL_WARP, largest, k));
  }
  const PowerOfTwo up = power_below(largest);
  if (own >= all) return;
  uint4* to = (uint4*)(a.q_rows + row * Q_PITCH + LANE_DIMS * part);
#pragma unroll
  for (int i = 0; i < LANE_DIMS / 8; i++) {
    u32 w[4];
#pragma unroll
    for (int k = 0; k < 4; k++) w[k] = pack_half2(up.times(v[8 * i + 2 * k]), up.times(v[8 * i + 2 * k + 1]));
    to[i] = make_uint4(w[0], w[1], w[2], w[3]);
  }
  if (part == 0) a.q_factors[row] = make_float2(a.score_factor / up.first / up.second, shift * a.offset_factor);
}

extern "C" __global__ void __launch_bounds__(32 * FOURS_WARPS) attention_merge_fours(const Args a) {
  const int lane = threadIdx.x & 31;
  const u64 early = early_signs(a.v_signs, a.v_steps, lane & 7);
  merge_four_rows(a, parts_of_row(a, a.plan, row_of_eight()), early, lane);
}
#endif
