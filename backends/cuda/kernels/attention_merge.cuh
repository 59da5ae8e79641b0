// attention_merge: combine the parts of each output row, add the sink, rotate back.
//
// merge_warps warps (1 or MERGE_WARPS) share a row: warp w takes parts w, w + merge_warps, ...
// A lane has dims 4 lane .. 4 lane + 3, and those 128, 256, ... further.
#pragma once
#include "attention_rows.cuh"

#define MERGE_WARPS 8
#define FOURS ((O_PITCH + 127) / 128)  // of dims a lane
#define AT_ONCE (24 / FOURS)           // parts that are loaded before the first is used

extern "C" __global__ void __launch_bounds__(32 * MERGE_WARPS) attention_merge(const Args a) {
  __shared__ float sums[MERGE_WARPS][O_PITCH];
  __shared__ float2 totals[MERGE_WARPS];  // maximum and softmax sum of each warp
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  const int heads = a.num_kv_heads * a.group, share = warp % a.merge_warps;
  const i64 row = (i64)blockIdx.x * (MERGE_WARPS / a.merge_warps) + warp / a.merge_warps;
  const bool exists = row < (i64)a.num_tokens * heads;
  float x[FOURS][4] = {}, top = NEVER, sum = 0.f;
  const Signs signs = load_signs(a.v_signs, a.merged ? 0 : a.v_steps, lane);

  if (exists) {
    const int token = (int)(row / heads), head = (int)(row % heads), kv_head = head / a.group;
    const int s = sequence_of_token(a, token);
    const i64 total = a.plan[a.num_seqs], before = a.plan[s], items = a.plan[a.num_seqs + 1 + s];
    if (a.sinks && share == 0) {
      top = fmaxf(top, a.sinks[(i64)head * a.sinks_step] * LOG2_E);
      sum = exp2_approx(a.sinks[(i64)head * a.sinks_step] * LOG2_E - top);
    }
    const Sequence q = sequence(a, s);
    const u32 r = (u32)(token - q.first_token) * a.group + head % a.group;
    const u32 tile = r / a.tile_rows, tile_row = r % a.tile_rows, units = num_units(a, q);
    int parts = 0;
    i64 slot = 0;
    if (units > 0) {  // which ranges hold the first and the last unit of this item
      const u64 begin = before + (u64)tile * units, end = begin + units;
      const u32 ranges = (u32)(total < a.num_ranges ? total : a.num_ranges);
      const bool small = total < 1 << 20;  // then 32 bits hold the products
      const u64 first = small ? ((u32)(begin + 1) * ranges - 1) / (u32)total : ((begin + 1) * ranges - 1) / total;
      const u64 last = small ? ((u32)end * ranges - 1) / (u32)total : (end * ranges - 1) / total;
      slot = first + items + tile;
      parts = (int)(last - first + 1) * PARTS_PER_SLOT;
    }
    const i64 stride = (i64)a.num_kv_heads * a.tile_rows;  // from one part to the next
    const i64 base = slot * PARTS_PER_SLOT * stride + (i64)kv_head * a.tile_rows + tile_row;
    const int mine = (parts - share + a.merge_warps - 1) / a.merge_warps;
    for (int first = 0; first < mine; first += 32) {
      auto at = [&](int k) { return base + (i64)(share + a.merge_warps * k) * stride; };
      const int count = min(32, mine - first);
      uint2 loaded[AT_ONCE][FOURS];
      auto load = [&](int k0) {
#pragma unroll
        for (int k = 0; k < AT_ONCE; k++)
#pragma unroll
          for (int i = 0; i < FOURS; i++) {
            loaded[k][i] = make_uint2(0, 0);
            if (k0 + k < count && 4 * lane + 128 * i < O_PITCH)
              loaded[k][i] = *(const uint2*)(a.parts + at(first + k0 + k) * O_PITCH + 4 * lane + 128 * i);
          }
      };
      load(0);
      float2 scale = make_float2(__uint_as_float(0xff800000u), 0.f);
      if (lane < count) scale = a.part_scales[at(first + lane)];
      const float next = fmaxf(top, warp_max(scale.x)), down = exp2_approx(top - next);
      top = next;
      const float weight = exp2_approx(scale.x - top);
      sum = sum * down + warp_sum(weight);
#pragma unroll
      for (int i = 0; i < FOURS; i++)
#pragma unroll
        for (int k = 0; k < 4; k++) x[i][k] *= down;
      for (int k0 = 0; k0 < count; k0 += AT_ONCE) {
        if (k0) load(k0);
#pragma unroll
        for (int k = 0; k < AT_ONCE; k++) {
          if (k0 + k >= count) break;
          const float factor = __shfl_sync(FULL_WARP, weight * scale.y, k0 + k);
#pragma unroll
          for (int i = 0; i < FOURS; i++) {
            const uint2 w = loaded[k][i];
            x[i][0] = fmaf(factor, half_to_float((u16)w.x), x[i][0]);
            x[i][1] = fmaf(factor, half_to_float((u16)(w.x >> 16)), x[i][1]);
            x[i][2] = fmaf(factor, half_to_float((u16)w.y), x[i][2]);
            x[i][3] = fmaf(factor, half_to_float((u16)(w.y >> 16)), x[i][3]);
          }
        }
      }
    }
  }
  auto keep = [&](float gain) {
#pragma unroll
    for (int i = 0; i < FOURS; i++)
#pragma unroll
      for (int k = 0; k < 4; k++)
        if (4 * lane + 128 * i < O_PITCH) sums[warp][4 * lane + 128 * i + k] = x[i][k] * gain;
  };
  if (a.merge_warps > 1) {
    keep(1.f);
    if (lane == 0) totals[warp] = make_float2(top, sum);
    __syncthreads();
    if (share) return;
    const float mine = top;
    for (int w = 1; w < a.merge_warps; w++) top = fmaxf(top, totals[warp + w].x);
    const float down = exp2_approx(mine - top);
    sum *= down;
#pragma unroll
    for (int i = 0; i < FOURS; i++)
#pragma unroll
      for (int k = 0; k < 4; k++) x[i][k] *= down;
    for (int w = 1; w < a.merge_warps; w++) {
      const float factor = exp2_approx(totals[warp + w].x - top);
      sum = fmaf(factor, totals[warp + w].y, sum);
#pragma unroll
      for (int i = 0; i < FOURS; i++)
#pragma unroll
        for (int k = 0; k < 4; k++)
          if (4 * lane + 128 * i < O_PITCH)
            x[i][k] = fmaf(factor, sums[warp + w][4 * lane + 128 * i + k], x[i][k]);
    }
  }
  if (!exists) return;
  keep(sum > 0.f ? a.value_factor / sum : 0.f);
  __syncwarp();
  if (lane == 0) a.lse[row] = sum > 0.f ? (top + log2_approx(sum)) * LN_2 : __uint_as_float(0xff800000u);
  if (a.merged) {
    for (int i = lane; i < D; i += 32) a.merged[row * D + i] = sums[warp][i];
    return;
  }
  rotate_row_back(sums[warp], signs, a.v_signs, a.v_steps, lane);
  for (int i = lane; i < D; i += 32) store_float(a.out, row * D + i, a.query_dtype, sums[warp][i]);
}
