// attention_query and attention_merge for very many rows: a lane has 32 dims of a row, so that few stages
// of a transform go from lane to lane, and registers are left for enough warps.
//
// Macros: MANY_ROWS; rows of the query can be read 16 bytes at a time, a row has few parts, rotations are
// Hadamard rotations of 64 or 128 dims.
#pragma once
#include "attention_eighths.cuh"
#include "attention_merge.cuh"
#include "attention_query.cuh"

#if MANY_ROWS

#define MANY_WARPS 8
#define DIMS 32              // of a lane
#define ROW_LANES (D / DIMS)
#define MANY_ROWS_A_BLOCK (32 * MANY_WARPS / ROW_LANES)
static_assert(MANY_WARPS == QUERY_WARPS, "write_plan");

__device__ __forceinline__ i64 row_of_lanes() { return (i64)blockIdx.x * MANY_ROWS_A_BLOCK + threadIdx.x / ROW_LANES; }
__device__ __forceinline__ void flip_dims(float (&v)[DIMS], const u32* signs, int step, int part) {
  const u32 negative = __ldg(signs + step * SIGN_WORDS + part);
#pragma unroll
  for (int i = 0; i < DIMS; i++) v[i] = __uint_as_float(__float_as_uint(v[i]) ^ (negative << (31 - i) & 0x80000000u));
}
__device__ __forceinline__ float gain_of(int steps) {
  float gain = 1.f;
#pragma unroll 1
  for (int i = 0; i < steps; i++) gain *= rsqrtf((float)D);
  return gain;
}
__device__ __forceinline__ uint4 pack_eight(const float* v, float factor) {
  return make_uint4(pack_half2(v[0] * factor, v[1] * factor), pack_half2(v[2] * factor, v[3] * factor),
                    pack_half2(v[4] * factor, v[5] * factor), pack_half2(v[6] * factor, v[7] * factor));
}

extern "C" __global__ void __launch_bounds__(32 * MANY_WARPS) attention_query_many(const Args a) {
  if (blockIdx.x == gridDim.x - 1) {
    write_plan(a);
    return;
  }
  const int part = threadIdx.x % ROW_LANES, heads = a.num_kv_heads * a.group;
  const i64 all = (i64)a.num_tokens * heads, own = row_of_lanes(), row = own < all ? own : all - 1;
  const int token = (int)(row / heads), head = (int)(row % heads);
  float v[DIMS], shift = 0.f, largest = 0.f;
  load_dims(a, token * a.q_token_stride + head * a.q_head_stride + DIMS * part, v);
  if (a.key_offset) {
    const float* o = offset_of(a, sequence_of_token(a, token), head / a.group) + DIMS * part;
#pragma unroll
    for (int i = 0; i < DIMS; i++) shift = fmaf(v[i], o[i], shift);
  }
#pragma unroll 1
  for (int step = 0; step < a.k_steps; step++) {
    flip_dims(v, a.k_signs, step, part);
    transform_lanes<ROW_LANES>(v, part);
  }
#pragma unroll
  for (int i = 0; i < DIMS; i++) largest = fmaxf(largest, fabsf(v[i]));
#pragma unroll
  for (int h = 1; h < ROW_LANES; h *= 2) {
    shift += __shfl_xor_sync(FULL_WARP, shift, h);
    largest = fmaxf(largest, __shfl_xor_sync(FULL_WARP, largest, h));
  }
  if (own >= all) return;
  const float gain = gain_of(a.k_steps);
  const PowerOfTwo up = power_below(largest * gain);
  const float factor = gain * up.first * up.second;
  uint4* to = (uint4*)(a.q_rows + row * Q_PITCH + DIMS * part);
#pragma unroll
  for (int i = 0; i < DIMS / 8; i++) to[i] = pack_eight(v + 8 * i, factor);
  if (part == 0) a.q_factors[row] = make_float2(a.score_factor / up.first / up.second, shift * a.offset_factor);
}

extern "C" __global__ void __launch_bounds__(32 * MANY_WARPS) attention_merge_many(const Args a) {
  const int part = threadIdx.x % ROW_LANES;
  const i64 row = row_of_lanes();
  const PartsOfRow parts = parts_of_row(a, a.plan, row);
  float x[DIMS] = {}, top = NEVER, sum = 0.f;
  if (a.sinks && parts.exists) {
    top = a.sinks[(i64)parts.head * a.sinks_step] * LOG2_E;
    sum = 1.f;
  }
#pragma unroll 1
  for (int k = 0; k < parts.count; k++) {
    const i64 at = parts.first + (i64)k * parts.stride;
    const float2 scale = a.part_scales[at];
    const uint4* from = (const uint4*)(a.parts + at * O_PITCH + DIMS * part);
    uint4 loaded[DIMS / 8];
#pragma unroll
    for (int i = 0; i < DIMS / 8; i++) loaded[i] = from[i];
    const float next = fmaxf(top, scale.x), down = exp2_approx(top - next), weight = exp2_approx(scale.x - next);
    top = next;
    sum = sum * down + weight;
#pragma unroll
    for (int i = 0; i < DIMS / 8; i++) {
      float y[8];
      unpack_halves(loaded[i], y);
#pragma unroll
      for (int j = 0; j < 8; j++) x[8 * i + j] = fmaf(weight * scale.y, y[j], x[8 * i + j] * down);
    }
  }
  float of_other = parts.exists ? make_room_for_other(a, row, top, sum, x) : 0.f;
  __syncwarp();
#pragma unroll 1
  for (int step = a.v_steps - 1; step >= 0; step--) {
    transform_lanes<ROW_LANES>(x, part);
    flip_dims(x, a.v_signs, step, part);
  }
  if (!parts.exists) return;
  const float inverse = sum > 0.f ? 1.f / sum : 0.f, factor = a.value_factor * inverse * gain_of(a.v_steps);
  of_other *= inverse;
  if (part == 0) a.lse[row] = sum > 0.f ? (top + log2_approx(sum)) * LN_2 : __uint_as_float(0xff800000u);
  const i64 at = row * D + DIMS * part;
#pragma unroll
  for (int i = 0; i < DIMS; i++) x[i] = of_other > 0.f ? fmaf(of_other, a.other_out[at + i], x[i] * factor) : x[i] * factor;
  if (a.query_dtype == FLOAT16) {
#pragma unroll
    for (int i = 0; i < DIMS / 8; i++) ((uint4*)((u16*)a.out + at))[i] = pack_eight(x + 8 * i, 1.f);
  } else {
#pragma unroll
    for (int i = 0; i < DIMS; i++) store_float(a.out, at + i, a.query_dtype, x[i]);
  }
}
#endif
