// The warps of attention_prefill that multiply: scores, softmax weights and output of 64 rows a group.
#pragma once
#include "attention_eighths.cuh"
#include "attention_prefill_layout.cuh"
#include "attention_wgmma.cuh"

#define WEIGHT_LIMIT 0x7800  // 2^15 as float16

// The largest factor of the scores of a block's rows; for all threads, with a barrier.
__device__ __forceinline__ float largest_factor(const Args& a, const Share& share, float* factors, int tid) {
  if (tid < TILE_ROWS) {
    const float own = tid < share.rows.count ? a.q_factors[query_row(a, share.segment, share.rows, tid, share.kv_head)].x : 0.f;
    const float most = warp_max(own);
    if (tid % 32 == 0) factors[tid / 32] = most;
  }
  __syncthreads();
  float most = factors[0];
#pragma unroll
  for (int i = 1; i < TILE_ROWS / 32; i++) most = fmaxf(most, factors[i]);
  return most;
}
// The query rows of a group, brought to one factor of the scores.
__device__ __forceinline__ void stage_query(const Args& a, const Share& share, u32 to, int group, int thread, float factor) {
  const int row = thread % 8 + thread / 32 * 8, chunk = thread / 8 % 4;  // and 32 rows, 4 chunks further
  uint4 x[D / 16];
  float ratio[2];
#pragma unroll
  for (int h = 0; h < 2; h++) {
    const int r = group * GROUP_ROWS + row + 32 * h;
    const bool exists = r < share.rows.count;
    const i64 from = query_row(a, share.segment, share.rows, exists ? r : 0, share.kv_head);
    ratio[h] = exists ? a.q_factors[from].x / factor : 0.f;  // a power of two: exact
#pragma unroll
    for (int k = 0; k < D / 32; k++) x[2 * k + h] = ((const uint4*)(a.q_rows + from * Q_PITCH))[chunk + 4 * k];
  }
#pragma unroll
  for (int k = 0; k < D / 16; k++) {
    float v[8];
    unpack_halves(x[k], v);
    u32 w[4];
#pragma unroll
    for (int i = 0; i < 4; i++) w[i] = pack_half2(v[2 * i] * ratio[k % 2], v[2 * i + 1] * ratio[k % 2]);
    store128(to + ((chunk + k / 2 * 4) * GROUP_ROWS + row + k % 2 * 32) * 16, make_uint4(w[0], w[1], w[2], w[3]));
  }
}

__device__ __forceinline__ void multiply(const Args& a, const Share& share, u32 smem, int group, int thread, float factor) {
  const int lane = thread & 31, warp = thread >> 5, g = lane >> 2, c = lane & 3;
  const u32 query_at = smem + QUERY_AT + group * GROUP_BYTES;
  stage_query(a, share, query_at, group, thread, factor);
  // Rows g and g + 8 of the 16 of this warp: what they see, and what their scores are shifted by.
  int row[2], low[2], high[2];
  float shift[2];
#pragma unroll
  for (int e = 0; e < 2; e++) {
    row[e] = group * GROUP_ROWS + 16 * warp + g + 8 * e;
    row_limits(a, share.segment, share.rows, row[e], low[e], high[e]);
    shift[e] = row[e] < share.rows.count
        ? a.q_factors[query_row(a, share.segment, share.rows, row[e], share.kv_head)].y : 0.f;
  }
  const bool capped = a.soft_cap_log2 != 0.f;
  fence_async();
  named_barrier(1 + group, 128);
  const u64 query = wgmma_matrix(query_at, 16 * GROUP_ROWS, 128);
  const u64 keys = wgmma_matrix(smem + KEYS_AT, 16 * TILE_TOKENS, 128);
  const u64 values = wgmma_matrix(smem + VALUES_AT, 128, 16 * TILE_TOKENS);

  // x: [tokens 8 j + 2 c, + 1][row g: 0, 1; g + 8: 2, 3]; o likewise with dims.
  float x[TILE_TOKENS / 2], o[D / OUT_DIMS][SUMS], top[2] = {NEVER, NEVER}, sum[2] = {0.f, 0.f};
  float up = FIRST_UP;
#pragma unroll
  for (int b = 0; b < D / OUT_DIMS; b++)
#pragma unroll
    for (int i = 0; i < SUMS; i++) o[b][i] = 0.f;

  u32 stage = 0, phase = 0;
  auto start_scores = [&](u32 at) {
#pragma unroll
    for (int k = 0; k < D / 16; k++)
      wgmma_64(x, query + k * (2 * 16 * GROUP_ROWS >> 4), keys + ((at * TILE_BYTES + k * 2 * 16 * TILE_TOKENS) >> 4), k > 0);
    wgmma_commit();
  };
  // The groups take turns at the tensor cores: one computes weights while the other multiplies.
  auto take_turn = [&] { named_barrier(TURN + group, 256); };
  auto give_turn = [&](bool last) {
    if (!last || group + 1 < GROUPS) named_barrier_arrive(TURN + (group + 1) % GROUPS, 256);
  };
  if (share.begin < share.end) {
    if (group + 1 == GROUPS) give_turn(false);
    barrier_wait(prefill_barrier(smem, KEY_FULL, 0), 0);
    take_turn();
    wgmma_fence();
    start_scores(0);
    give_turn(false);
    wgmma_wait();
    settle_sums(x);
  }
#pragma unroll 1
  for (int u = share.begin; u < share.end; u++) {
    const u32 norms = smem + NORMS_AT + stage * NORM_BYTES + 16 * c;  // a pair of tokens: of keys, of values
    barrier_wait(prefill_barrier(smem, VALUE_FULL, stage), phase);
    // Weights are relative to a running maximum.  That of an earlier tile is tried first, and kept if no
    // weight in float16 exceeds 2^15.
    u32 p[TILE_TOKENS / 16][4];
    float more[2];
    auto weigh = [&](bool scores_lack_norms) {
      u32 largest[2] = {0, 0};
      uint4 ahead = ring128(norms);
#pragma unroll
      for (int j = 0; j < TILE_TOKENS / 8; j++) {
        const uint4 n = ahead;
        if (j + 1 < TILE_TOKENS / 8) ahead = ring128(norms + 64 * (j + 1));
        const float weight[2] = {__uint_as_float(n.z) * up, __uint_as_float(n.w) * up};
#pragma unroll
        for (int e = 0; e < 2; e++) {
          const float y0 = x[4 * j + 2 * e], y1 = x[4 * j + 2 * e + 1];
          const float w0 = exp2_approx(scores_lack_norms ? fmaf(y0, __uint_as_float(n.x), -top[e]) : y0 - top[e]);
          const float w1 = exp2_approx(scores_lack_norms ? fmaf(y1, __uint_as_float(n.y), -top[e]) : y1 - top[e]);
          more[e] = j ? more[e] + (w0 + w1) : w0 + w1;
          const u32 both = pack_half2(w0 * weight[0], w1 * weight[1]);
          p[j / 2][j % 2 * 2 + e] = both;
          largest[e] = larger_halves(largest[e], both);
        }
      }
      largest[0] = larger_halves(largest[0], largest[1]);
      return (largest[0] & 0x7fff) > WEIGHT_LIMIT || (largest[0] >> 16 & 0x7fff) > WEIGHT_LIMIT || !(more[0] + more[1] < 1e30f);
    };
    const int first_token = u * TILE_TOKENS;
    const bool masked = first_token + TILE_TOKENS - 1 > share.rows.all_high || first_token < share.rows.all_low;
    if (masked || capped || __any_sync(FULL_WARP, weigh(true))) {
      float most[2] = {__uint_as_float(0xff800000u), __uint_as_float(0xff800000u)}, norm = 0.f;
#pragma unroll
      for (int j = 0; j < TILE_TOKENS / 8; j++) {
        const uint4 n = ring128(norms + 64 * j);
        norm = fmaxf(norm, fmaxf(fabsf(__uint_as_float(n.z)), fabsf(__uint_as_float(n.w))));
        x[4 * j] *= __uint_as_float(n.x), x[4 * j + 2] *= __uint_as_float(n.x);
        x[4 * j + 1] *= __uint_as_float(n.y), x[4 * j + 3] *= __uint_as_float(n.y);
      }
      if (capped) {  // c tanh(x), exact to float32 rounding of c
#pragma unroll
        for (int i = 0; i < TILE_TOKENS / 2; i++)
          x[i] = a.soft_cap_log2 - 2.f * a.soft_cap_log2 * __fdividef(1.f, 1.f + exp2_approx(2.f * LOG2_E * (x[i] + shift[i / 2 % 2])));
      }
      if (masked) {
#pragma unroll
        for (int i = 0; i < TILE_TOKENS / 2; i++) {
          const int t = first_token + i / 4 * 8 + 2 * c + i % 2, e = i / 2 % 2;
          if (t > high[e] || t < low[e]) x[i] = __uint_as_float(0xff800000u);
        }
      }
#pragma unroll
      for (int i = 0; i < TILE_TOKENS / 2; i++) most[i / 2 % 2] = fmaxf(most[i / 2 % 2], x[i]);
      const float change = lower_up(warp_max(norm), up);
#pragma unroll
      for (int e = 0; e < 2; e++) {
        float now = fmaxf(most[e], __shfl_xor_sync(FULL_WARP, most[e], 1));
        now = fmaxf(top[e], fmaxf(now, __shfl_xor_sync(FULL_WARP, now, 2)));
        const float down = exp2_approx(top[e] - now);
        top[e] = now;
        sum[e] *= down;
#pragma unroll
        for (int b = 0; b < D / OUT_DIMS; b++)
#pragma unroll
          for (int i = 0; i < SUMS; i += 4) o[b][i + 2 * e] *= down * change, o[b][i + 2 * e + 1] *= down * change;
      }
      weigh(false);
    }
    __syncwarp();
    if (lane == 0) barrier_arrive(prefill_barrier(smem, KEY_EMPTY, stage));
    sum[0] += more[0], sum[1] += more[1];
    const bool last = u + 1 == share.end;
    const u32 at = stage;
    if (++stage == STAGES) stage = 0, phase ^= 1;
    if (!last) barrier_wait(prefill_barrier(smem, KEY_FULL, stage), phase);
    take_turn();
    settle(p);
    settle_sums(x);
#pragma unroll
    for (int b = 0; b < D / OUT_DIMS; b++) settle_sums(o[b]);
    wgmma_fence();
#pragma unroll
    for (int j = 0; j < TILE_TOKENS / 16; j++)
#pragma unroll
      for (int b = 0; b < D / OUT_DIMS; b++)
        wgmma_across(o[b], p[j], values + ((at * TILE_BYTES + j * 2 * 128 + b * OUT_DIMS / 8 * 16 * TILE_TOKENS) >> 4));
    wgmma_commit();
    start_scores(stage);  // behind the last tile for nothing: a branch here would part the products
    give_turn(last);
    wgmma_wait();
#pragma unroll
    for (int b = 0; b < D / OUT_DIMS; b++) settle_sums(o[b]);
    settle_sums(x);
    if (lane == 0) barrier_arrive(prefill_barrier(smem, VALUE_EMPTY, at));
  }

  // Write the part, by way of the query's place in shared memory: 16 rows of this warp, chunks of 8 dims,
  // turned around so that neither writing nor reading meets a bank twice.
  const i64 part = (share.segment.slot * a.num_kv_heads + share.kv_head) * a.tile_rows;
  const u32 rows_at = query_at + warp * 16 * 2 * D;
  auto chunk_at = [&](int r, int chunk) { return rows_at + r * 2 * D + (chunk ^ r & (D % 64 ? 3 : 7)) * 16; };
  named_barrier(1 + group, 128);  // the last products have read the query
#pragma unroll
  for (int e = 0; e < 2; e++) {
    sum[e] += __shfl_xor_sync(FULL_WARP, sum[e], 1);
    sum[e] += __shfl_xor_sync(FULL_WARP, sum[e], 2);
    const float inverse = sum[e] > 0.f ? __fdividef(1.f, sum[e]) : 0.f;
#pragma unroll
    for (int i = 0; i < D / 8; i++) {
      const float* pair = o[8 * i / OUT_DIMS] + 4 * (i % (OUT_DIMS / 8)) + 2 * e;
      store32(chunk_at(g + 8 * e, i) + 4 * c, pack_half2(pair[0] * inverse, pair[1] * inverse));
    }
    if (c == 0 && row[e] < share.rows.count)
      a.part_scales[part + row[e]] = make_float2(
          sum[e] > 0.f ? top[e] + log2_approx(sum[e]) + (capped ? 0.f : shift[e]) : __uint_as_float(0xff800000u), 1.f / up);
  }
  __syncwarp();
#pragma unroll
  for (int i = lane; i < 16 * D / 8; i += 32) {
    const int r = i / (D / 8), chunk = i % (D / 8), at = group * GROUP_ROWS + 16 * warp + r;
    if (at < share.rows.count) *(uint4*)(a.parts + (part + at) * O_PITCH + 8 * chunk) = ring128(chunk_at(r, chunk));
  }
}
