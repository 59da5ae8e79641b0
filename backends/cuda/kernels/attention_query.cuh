// attention_query: rotate the query rows, one warp each; the last block writes the work list.
//
// A rotated row is stored as float16 times a power of two that brings its largest magnitude into
// [2^14, 2^15), so queries of any size keep 11 bits; the power goes into the score's factor.
#pragma once
#include "attention_rows.cuh"

#define QUERY_WARPS 8

__device__ __forceinline__ void write_plan(const Args& a) {
  __shared__ i64 sums[2][QUERY_WARPS];
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  i64* units_before = a.plan;
  i64* items_before = a.plan + a.num_seqs + 1;
  i64 units_so_far = 0, items_so_far = 0;
  if (threadIdx.x == 0) units_before[0] = items_before[0] = 0;
  for (int base = 0; base < a.num_seqs; base += 32 * QUERY_WARPS) {
    const int s = base + threadIdx.x;
    i64 units = 0, items = 0;
    if (s < a.num_seqs) {
      const Sequence q = sequence(a, s);
      items = num_tiles(a, q);
      units = items * num_units(a, q);
    }
    for (int k = 1; k < 32; k <<= 1) {
      const i64 u = __shfl_up_sync(FULL_WARP, units, k), i = __shfl_up_sync(FULL_WARP, items, k);
      if (lane >= k) {
        units += u;
        items += i;
      }
    }
    if (lane == 31) {
      sums[0][warp] = units;
      sums[1][warp] = items;
    }
    __syncthreads();
    for (int w = 0; w < warp; w++) {
      units += sums[0][w];
      items += sums[1][w];
    }
    if (s < a.num_seqs) {
      units_before[s + 1] = units_so_far + units;
      items_before[s + 1] = items_so_far + items;
    }
    for (int w = 0; w < QUERY_WARPS; w++) {
      units_so_far += sums[0][w];
      items_so_far += sums[1][w];
    }
    __syncthreads();
  }
}

extern "C" __global__ void __launch_bounds__(32 * QUERY_WARPS) attention_query(const Args a) {
  if (blockIdx.x == gridDim.x - 1) {
    write_plan(a);
    return;
  }
  __shared__ float rows[QUERY_WARPS][D];
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  const int heads = a.num_kv_heads * a.group;
  const i64 row = (i64)blockIdx.x * QUERY_WARPS + warp;
  if (row >= (i64)a.num_tokens * heads) return;
  const int token = (int)(row / heads), head = (int)(row % heads);
  float* x = rows[warp];
  const Signs signs = load_signs(a.k_signs, a.rotated_query ? 0 : a.k_steps, lane);
  const i64 at = token * a.q_token_stride + head * a.q_head_stride;
  for (int i = lane; i < D; i += 32) x[i] = load_float(a.query, at + i * a.q_dim_stride, a.query_dtype);

  float offset = 0.f;
  if (a.key_offset) {
    const int s = sequence_of_token(a, token);
    const float* o = offset_of(a, s, head / a.group);
    for (int i = lane; i < D; i += 32) offset = fmaf(x[i], o[i], offset);
    offset = warp_sum(offset) * a.offset_factor;
  }
  __syncwarp();
  if (a.rotated_query) {
    for (int i = lane; i < D; i += 32) x[i] = a.rotated_query[row * D + i];
    __syncwarp();
  } else {
    rotate_row(x, signs, a.k_signs, a.k_steps, lane);
  }
  float largest = 0.f;
  for (int i = lane; i < D; i += 32) largest = fmaxf(largest, fabsf(x[i]));
  const PowerOfTwo up = power_below(warp_max(largest));
  u16* to = a.q_rows + row * Q_PITCH;
  for (int i = lane; i < Q_PITCH; i += 32)
    to[i] = i < D ? (u16)pack_half2(up.times(x[i]), 0.f) : (u16)0;
  if (lane == 0)
    a.q_factors[row] = make_float2(a.score_factor / up.first / up.second, offset);
}
