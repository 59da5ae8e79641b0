// Combine the parts of each output row, add the sink, rotate back; by MERGE_WARPS warps of a block.
//
// a.merge_warps warps (1, 2, 4 or MERGE_WARPS) share a row: warp w takes parts w, w + merge_warps, ...
// A lane has dims 4 lane .. 4 lane + 3, and those 128, 256, ... further.
#pragma once
#include "attention_rows.cuh"

#define MERGE_WARPS 8
#define MERGE_BARRIER 1                // of these warps
#define FOURS ((O_PITCH + 127) / 128)  // of dims a lane
// Parts that are loaded before the first is used.  Within attention_pages a row has many of them; a
// kernel of its own runs more warps at a time with fewer registers.
#if defined(FUSED) && FUSED
#define AT_ONCE (24 / FOURS)
#else
#define AT_ONCE (8 / FOURS)
#endif

struct MergeSpace {                // shared memory of a block
  float sums[MERGE_WARPS][O_PITCH];
  float2 totals[MERGE_WARPS];      // maximum and softmax sum of each warp
};

// Where the parts of an output row are: `count` from `first` on, `stride` rows from one to the next.
struct PartsOfRow {
  i64 row, first;
  int stride, count, head;
  bool exists;
};
__device__ __forceinline__ PartsOfRow parts_of_row(const Args& a, const i64* plan, i64 row) {
  const u32 heads = a.num_kv_heads * a.group;
  const int token = (int)((u32)row / heads), head = (int)((u32)row % heads);
  PartsOfRow p = {row, 0, a.num_kv_heads * a.tile_rows, 0, head, token < a.num_tokens};
  if (!p.exists) return p;
  const int s = sequence_of_token(a, token);
  const i64 total = plan[a.num_seqs], before = plan[s], items = plan[a.num_seqs + 1 + s];
  const Sequence q = sequence(a, s);
  const u32 r = (u32)(token - q.first_token) * a.group + head % a.group;
  const u32 tile = r / a.tile_rows, tile_row = r % a.tile_rows, units = num_units(a, q);
#if defined(PREFILL) && PREFILL
  p.first = (items + tile) * a.num_ranges * p.stride + (i64)(head / a.group) * a.tile_rows + tile_row;
  p.count = a.num_ranges;
  return p;
#endif
  if (units > 0) {  // which ranges hold the first and the last unit of this item
    const u64 begin = before + (u64)tile * units, end = begin + units;
    const u32 ranges = (u32)(total < a.num_ranges ? total : a.num_ranges);
    const bool small = total < 1 << 20;  // then 32 bits hold the products
    const u64 first = small ? ((u32)(begin + 1) * ranges - 1) / (u32)total : ((begin + 1) * ranges - 1) / total;
    const u64 last = small ? ((u32)end * ranges - 1) / (u32)total : (end * ranges - 1) / total;
    p.first = (i64)(first + items + tile) * p.stride + (i64)(head / a.group) * a.tile_rows + tile_row;
    p.count = (int)(last - first + 1);
  }
  return p;
}

// Weight of the other part of a row, which is not rotated, beside sums `x`, which are brought to the maximum of both.
template <int COUNT> __device__ __forceinline__ float make_room_for_other(const Args& a, i64 row, float& top, float& sum, float (&x)[COUNT]) {
  if (!a.other_out) return 0.f;
  const float other = a.other_lse[row] * LOG2_E, next = fmaxf(top, other), down = exp2_approx(top - next);
  const float weight = exp2_approx(other - next);
  top = next;
  sum = sum * down + weight;
#pragma unroll
  for (int i = 0; i < COUNT; i++) x[i] *= down;
  return weight;
}

// The row of each warp of a block; a.merge_warps neighbours have the same.
__device__ __forceinline__ void merge_rows(const Args& a, const PartsOfRow& parts, const Signs& signs,
                                           MergeSpace& space, int warp, int lane) {
  const int share = warp % a.merge_warps;
  const i64 row = parts.row;
  float x[FOURS][4] = {}, top = NEVER, sum = 0.f;
  if (parts.exists) {
    if (a.sinks && share == 0) {
      const float sink = a.sinks[(i64)parts.head * a.sinks_step] * LOG2_E;
      top = fmaxf(top, sink);
      sum = exp2_approx(sink - top);
    }
    const int mine = (parts.count - share + a.merge_warps - 1) / a.merge_warps;
    for (int first = 0; first < mine; first += 32) {
      const i64 base = parts.first + (i64)(share + a.merge_warps * first) * parts.stride;
      const u32 step = (u32)a.merge_warps * parts.stride;  // rows to the next part of this warp
      const u8* from = (const u8*)(a.parts + base * O_PITCH + 4 * lane);
      const int count = min(32, mine - first);
      uint2 loaded[AT_ONCE][FOURS];
      auto load = [&](int k0) {
#pragma unroll
        for (int k = 0; k < AT_ONCE; k++)
#pragma unroll
          for (int i = 0; i < FOURS; i++) {
            loaded[k][i] = make_uint2(0, 0);
            if (k0 + k < count && 4 * lane + 128 * i < O_PITCH)
              loaded[k][i] = load_shared_by_blocks((const uint2*)(from + (u32)(k0 + k) * step * (2 * O_PITCH) + 256 * i));
          }
      };
      uint2 bits = make_uint2(0xff800000u, 0);
      if (lane < count) bits = load_shared_by_blocks((const uint2*)(a.part_scales + base + (u32)lane * step));
      load(0);
      const float2 scale = make_float2(__uint_as_float(bits.x), __uint_as_float(bits.y));
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
  float* sums = space.sums[warp];
  auto keep = [&](float gain) {
#pragma unroll
    for (int i = 0; i < FOURS; i++)
#pragma unroll
      for (int k = 0; k < 4; k++)
        if (4 * lane + 128 * i < O_PITCH) sums[4 * lane + 128 * i + k] = x[i][k] * gain;
  };
  if (a.merge_warps > 1) {
    keep(1.f);
    if (lane == 0) space.totals[warp] = make_float2(top, sum);
    named_barrier(MERGE_BARRIER, 32 * MERGE_WARPS);
    if (share == 0) {
      const float mine = top;
      for (int w = 1; w < a.merge_warps; w++) top = fmaxf(top, space.totals[warp + w].x);
      const float down = exp2_approx(mine - top);
      sum *= down;
#pragma unroll
      for (int i = 0; i < FOURS; i++)
#pragma unroll
        for (int k = 0; k < 4; k++) x[i][k] *= down;
      for (int w = 1; w < a.merge_warps; w++) {
        const float factor = exp2_approx(space.totals[warp + w].x - top);
        sum = fmaf(factor, space.totals[warp + w].y, sum);
#pragma unroll
        for (int i = 0; i < FOURS; i++)
#pragma unroll
          for (int k = 0; k < 4; k++)
            if (4 * lane + 128 * i < O_PITCH)
              x[i][k] = fmaf(factor, space.sums[warp + w][4 * lane + 128 * i + k], x[i][k]);
      }
    }
  }
  if (parts.exists && share == 0) {
    float of_other = 0.f;  // weight of the other part, which is not rotated
    if (a.other_out) {
      const float other = a.other_lse[row] * LOG2_E, next = fmaxf(top, other), down = exp2_approx(top - next);
      top = next;
      of_other = exp2_approx(other - top);
      sum *= down;
#pragma unroll
      for (int i = 0; i < FOURS; i++)
#pragma unroll
        for (int k = 0; k < 4; k++) x[i][k] *= down;
      sum += of_other;
    }
    const float inverse = sum > 0.f ? 1.f / sum : 0.f;
    of_other *= inverse;
    keep(a.value_factor * inverse);
    __syncwarp();
    if (lane == 0) a.lse[row] = sum > 0.f ? (top + log2_approx(sum)) * LN_2 : __uint_as_float(0xff800000u);
    if (a.merged) {
      for (int i = lane; i < D; i += 32) a.merged[row * D + i] = sums[i];
    } else {
      rotate_row_back(sums, signs, a.v_signs, a.v_steps, lane);
      for (int i = lane; i < D; i += 32) {
        const float y = of_other > 0.f ? fmaf(of_other, a.other_out[row * D + i], sums[i]) : sums[i];
        store_float(a.out, row * D + i, a.query_dtype, y);
      }
    }
  }
  if (a.merge_warps > 1) named_barrier(MERGE_BARRIER, 32 * MERGE_WARPS);  // before space is reused
  __syncwarp();
}

extern "C" __global__ void __launch_bounds__(32 * MERGE_WARPS) attention_merge(const Args a) {
  __shared__ MergeSpace space;
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  const Signs signs = load_signs(a.v_signs, a.merged ? 0 : a.v_steps, lane);
  const i64 row = (i64)blockIdx.x * (MERGE_WARPS / a.merge_warps) + warp / a.merge_warps;
  merge_rows(a, parts_of_row(a, a.plan, row), signs, space, warp, lane);
}
