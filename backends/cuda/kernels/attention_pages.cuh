// attention_pages: partial attention over token ranges for head_dim 64, 96, 128 and 256, codes of 2
// bits and more and pages that are contiguous in memory; compute capability 9.0, with ROW_TILES 4 9.0a.
//
//   S^T = K Q^T    (A = dequantised K: 16 tokens x 16 dims,   B = Q: 16 dims x 8 query rows)
//   O^T = V^T P^T  (A = dequantised V^T: 16 dims x 16 tokens, B = P^T: 16 tokens x 8 query rows)
//
// with ROW_TILES such products for the query rows of a tile, which share their A.
//
// One persistent block an SM serves HEADS kv heads.  A producer warp streams whole pages (16 tokens,
// HEADS heads: K codes, V codes, norms) into a ring in shared memory by bulk copies; CONSUMERS warps
// turn them into fragments.  Warp w has head w / SHARES and pages of its share; a unit, one stage of
// the ring, is SHARES * SUB pages.  The shares of a head write one part together.
//
// FUSED: each block plans and rotates what it needs of the queries itself, and when all blocks have
// written their parts (a barrier: all run at the same time) they merge them.
//
// Macros: D, KEY_BITS, VALUE_BITS, BLOCK_SIZE, HEADS (of a block), SHARES (8 / HEADS), SUB,
// HEAD_MAJOR (a page is [head][token], else [token][head]), UNIT = 16 SUB SHARES, NUM_SMEM (bytes),
// ROW_TILES (1, 2 or 4), FUSED (up to FEW_SEQUENCES sequences, Hadamard rotations); optional PAIRS.
#pragma once
#include "attention_merge_rows.cuh"
#include "attention_ring.cuh"

#define VALUES_EARLY (KEY_BITS < 4 && VALUE_BITS < 4)  // read V codes together with K codes

static_assert(sizeof(MergeSpace) <= ROWS_BYTES, "shared memory");
static_assert(CONSUMERS == HEADS * SHARES, "warps");
static_assert(D == 64 || D == 128 || D == 96 || D == 256 && !FUSED, "attention_pages");

// ---- the consumer warps

__device__ __forceinline__ void consume(const Args& a, const i64* plan, u32 smem, int lane, int warp, u64 early) {
  const u32 full = smem + BARRIERS_AT, empty = full + 8 * STAGES;
  const int g = lane >> 2, c = lane & 3, head = warp / SHARES, share = warp % SHARES;
  const int kv_head = blockIdx.y * HEADS + head;
  const Places my = places_of(smem + RING_AT, head, share * SUB, lane);
  TileRows& mine = ((TileRows*)(dynamic_shared() + ROWS_AT))[warp];
  TileRows& first = (&mine)[-share];  // of the warps of this head

  u32 stage = 0, phase = 0;
  Walk walk = start_walk(a, plan);
  Segment segment;
#pragma unroll 1
  while (next_segment(a, walk, segment)) {
    const Rows rows = rows_of(a, segment);
    const float q_factor = stage_rows(a, segment, rows, kv_head, first, lane, head, share, early);
#if QUERY_IN_REGISTERS
    uint2 qb[ROW_TILES][PRODUCTS];
#pragma unroll
    for (int n = 0; n < ROW_TILES; n++)
#pragma unroll
      for (int j = 0; j < PRODUCTS; j++) qb[n][j] = first.query[n][j][lane];
#endif
    float o[ROW_TILES][PRODUCTS][4], top[ROW_TILES][2], sum[ROW_TILES][2];
#pragma unroll
    for (int n = 0; n < ROW_TILES; n++)
#pragma unroll
      for (int e = 0; e < 2; e++) top[n][e] = NEVER, sum[n][e] = 0.f;
    float up = FIRST_UP;
#pragma unroll
    for (int n = 0; n < ROW_TILES; n++)
#pragma unroll
      for (int i = 0; i < PRODUCTS; i++) o[n][i][0] = o[n][i][1] = o[n][i][2] = o[n][i][3] = 0.f;

#pragma unroll 1
    for (int u = segment.begin; u < segment.begin + segment.count; u++) {
    const u32 at = stage * STAGE_BYTES;
    barrier_wait(full + 8 * stage, phase);
    __syncwarp();
    u32 kw[SUB][2][K_WORDS], vw[SUB][4][V_WORDS];
    float kn[SUB][2], vn[SUB][2], x[SUB][ROW_TILES][4];
    auto read_v = [&](int p) {
      const u32 page = at + PAGE_AT(p, V_TOKEN);
#pragma unroll
      for (int e = 0; e < 4; e++)
        read_values(vw[p][e], my.values[e & 1] + page + (e >> 1) * 8 * V_TOKEN, my);
    };
    auto release = [&] {  // all reads of this stage are done
      __syncwarp();
      if (lane == 0) barrier_arrive(empty + 8 * stage);
    };
#pragma unroll
    for (int p = 0; p < SUB; p++) {
      const u32 page = at + PAGE_AT(p, K_TOKEN), norms = my.norms + at + PAGE_AT(p, N_TOKEN);
#pragma unroll
      for (int e = 0; e < 2; e++) {
        read_keys(kw[p][e], my.keys + page + e * 8 * K_TOKEN, my.k_select);
        kn[p][e] = __uint_as_float(ring32(norms + e * 8 * N_TOKEN));
        vn[p][e] = __uint_as_float(ring32(norms + e * 8 * N_TOKEN + AT_VN - AT_KN));
      }
    }
    if (VALUES_EARLY) {
#pragma unroll
      for (int p = 0; p < SUB; p++) read_v(p);
      release();
    }
#pragma unroll
    for (int p = 0; p < SUB; p++) {
      u32 f[PRODUCTS][4];
      keys(kw[p][0], kw[p][1], f, my.k_bank);
#if ROW_TILES == 1
      float z[4];  // two chains of products
      mma_zero(x[p][0], f[0], qb[0][0]);
      mma_zero(z, f[1], qb[0][1]);
#pragma unroll
      for (int j = 2; j < PRODUCTS; j += 2) {
        mma(x[p][0], f[j], qb[0][j]);
        mma(z, f[j + 1], qb[0][j + 1]);
      }
#pragma unroll
      for (int k = 0; k < 4; k++) x[p][0][k] += z[k];
#else
#pragma unroll
      for (int j = 0; j < PRODUCTS; j++)
#pragma unroll
        for (int n = 0; n < ROW_TILES; n++) {
#if QUERY_IN_REGISTERS
          const uint2 q = qb[n][j];
#else
          const uint2 q = first.query[n][j][lane];
#endif
          if (j == 0) mma_zero(x[p][n], f[j], q);
          else mma(x[p][n], f[j], q);
        }
#endif
    }
    // x: [8 rows][token row g: 0, 1; g + 8: 2, 3][query row 2c, 2c + 1].  Masked scores become -inf.
    const int first_token = (u * STAGE_PAGES + share * SUB) * PAGE;
#pragma unroll
    for (int p = 0; p < SUB; p++) kn[p][0] *= q_factor, kn[p][1] *= q_factor;
    if (first_token + SUB * PAGE - 1 > rows.all_high || first_token < rows.all_low) {
#pragma unroll
      for (int n = 0; n < ROW_TILES; n++) {
        int low[2], high[2];
#pragma unroll
        for (int k = 0; k < 2; k++) row_limits(a, segment, rows, 8 * n + 2 * c + k, low[k], high[k]);
#pragma unroll
        for (int p = 0; p < SUB; p++)
#pragma unroll
          for (int e = 0; e < 2; e++) {
            const int t = first_token + p * PAGE + my.token + 8 * e;
#pragma unroll
            for (int k = 0; k < 2; k++) {
              const float score = x[p][n][2 * e + k] * kn[p][e];
              x[p][n][2 * e + k] = t > high[k] || t < low[k] ? __uint_as_float(0xff800000u) : score;
            }
          }
      }
#pragma unroll
      for (int p = 0; p < SUB; p++)
#pragma unroll
        for (int e = 0; e < 2; e++) {
          const int t = first_token + p * PAGE + my.token + 8 * e;
          kn[p][e] = 1.f;
          if (t > rows.high || t < rows.low) vn[p][e] = 0.f;
        }
    }
    // Exponents relative to a lazy running maximum, so that p <= 2^5.
    float y[SUB][ROW_TILES][4], above = NEVER, norm = 0.f;
    auto subtract_top = [&] {
#pragma unroll
      for (int p = 0; p < SUB; p++)
#pragma unroll
        for (int n = 0; n < ROW_TILES; n++)
#pragma unroll
          for (int k = 0; k < 4; k++) y[p][n][k] = fmaf(x[p][n][k], kn[p][k / 2], -top[n][k % 2]);
    };
    subtract_top();
#pragma unroll
    for (int p = 0; p < SUB; p++) {
#pragma unroll
      for (int n = 0; n < ROW_TILES; n++)
        above = fmaxf(above, fmaxf(fmaxf(y[p][n][0], y[p][n][1]), fmaxf(y[p][n][2], y[p][n][3])));
      norm = fmaxf(norm, fmaxf(fabsf(vn[p][0]), fabsf(vn[p][1])));
    }
    if (__any_sync(FULL_WARP, above > LAZY || norm * up > NORM_LIMIT)) {
      const float change = lower_up(warp_max(norm), up);
#pragma unroll
      for (int n = 0; n < ROW_TILES; n++)
#pragma unroll
        for (int e = 0; e < 2; e++) {
          float now = top[n][e];
#pragma unroll
          for (int p = 0; p < SUB; p++)
            now = fmaxf(now, fmaxf(x[p][n][e] * kn[p][0], x[p][n][2 + e] * kn[p][1]));
#pragma unroll
          for (int k = 4; k < 32; k <<= 1) now = fmaxf(now, __shfl_xor_sync(FULL_WARP, now, k));
          const float down = exp2_approx(top[n][e] - now);
          top[n][e] = now;
          sum[n][e] *= down;
#pragma unroll
          for (int i = 0; i < PRODUCTS; i++) {
            o[n][i][e] *= down * change;
            o[n][i][2 + e] *= down * change;
          }
        }
      subtract_top();
    }
#pragma unroll
    for (int p = 0; p < SUB; p++) {
      if (!VALUES_EARLY) {
        read_v(p);
        if (p == SUB - 1) release();
      }
      uint2 b[ROW_TILES];
      const float weight[2] = {vn[p][0] * up, vn[p][1] * up};
#pragma unroll
      for (int n = 0; n < ROW_TILES; n++) {
        u32 w[2];
#pragma unroll
        for (int e = 0; e < 2; e++) {
          const float w0 = exp2_approx(y[p][n][2 * e]), w1 = exp2_approx(y[p][n][2 * e + 1]);
          sum[n][0] += w0;
          sum[n][1] += w1;
          w[e] = transpose8x8(pack_half2(w0 * weight[e], w1 * weight[e]));
        }
        b[n] = make_uint2(w[0], w[1]);
      }
      u32 lower[LANE_DIMS], upper[LANE_DIMS];
      values(vw[p][0], vw[p][1], lower, my.v_bank);
      values(vw[p][2], vw[p][3], upper, my.v_bank);
#pragma unroll
      for (int i = 0; i < PRODUCTS; i++) {
        const u32 f[4] = {lower[2 * i], lower[2 * i + 1], upper[2 * i], upper[2 * i + 1]};
#pragma unroll
        for (int n = 0; n < ROW_TILES; n++) mma(o[n][i], f, b[n]);
      }
    }
    if (++stage == STAGES) stage = 0, phase ^= 1;
    }

    // Write the part.  Lane (g, c) has dims LANE_DIMS g and on of rows 8 n + 2 c, 8 n + 2 c + 1.
    const i64 part = segment.slot * a.num_kv_heads + kv_head;
#pragma unroll
    for (int n = 0; n < ROW_TILES; n++)
#pragma unroll
      for (int e = 0; e < 2; e++) {
        for (int k = 4; k < 32; k <<= 1) sum[n][e] += __shfl_xor_sync(FULL_WARP, sum[n][e], k);
        const int r = 8 * n + 2 * c + e;
        const float inverse = sum[n][e] > 0.f ? __fdividef(1.f, sum[n][e]) : 0.f;
        const float2 scale = make_float2(
            sum[n][e] > 0.f ? top[n][e] + log2_approx(sum[n][e]) + first.shifts[r] : __uint_as_float(0xff800000u),
            1.f / up);
        u32 w[PRODUCTS];
#pragma unroll
        for (int i = 0; i < PRODUCTS; i++) {
#if VALUE_BITS == 2
          const float first = i % 2 ? o[n][i][e] : o[n][i + 1][2 + e], second = i % 2 ? o[n][i - 1][e] : o[n][i][2 + e];
#else
          const float first = o[n][i][e], second = o[n][i][2 + e];
#endif
          w[i] = pack_half2(first * inverse, second * inverse);
        }
        const bool here = SHARES > 1 && share > 0;
        if (r < rows.count) {
          const i64 row = part * a.tile_rows + r;
          store_words(here ? mine.part[r] : a.parts + row * D, g, w);
          if (g == 0) *(here ? mine.scales + r : a.part_scales + row) = scale;
        }
      }
#if SHARES > 1
    // The first share adds the others to its part.  It has just written what it reads of it.
    meet(head);
    if (share == 0) add_shares(a, part, rows.count, &mine, lane);
    meet(head);
#endif
  }
}

#if FUSED
// When all blocks have written their parts.  What can be known before is found out before.
__device__ __forceinline__ void merge_in_blocks(const Args& a, const i64* plan, u32 block, u32 blocks, int warp, int lane) {
  const i64 all = (i64)a.num_tokens * a.num_kv_heads * a.group;
  // Four rows a warp, else one or less.
  const bool fours = POWER_OF_TWO && a.merge_warps == 1 && all > (i64)blocks * CONSUMERS;
  const int at_once = fours ? 4 * CONSUMERS : CONSUMERS / a.merge_warps;
  const int own = fours ? 4 * warp + (lane >> 3) : warp / a.merge_warps;
  const Signs signs = load_signs(a.v_signs, a.v_steps, lane);
#if POWER_OF_TWO
  const u64 early = early_signs(a.v_signs, a.v_steps, lane & 7);
#endif
  i64 row = (i64)block * at_once;
  PartsOfRow parts = parts_of_row(a, plan, row + own);
  named_barrier(MERGE_BARRIER, 32 * CONSUMERS);
  if (threadIdx.x == 0) grid_barrier(a.barrier, block, blocks);
  named_barrier(MERGE_BARRIER, 32 * CONSUMERS);
  auto& space = *(MergeSpace*)(dynamic_shared() + ROWS_AT);
  while (row < all) {
#if POWER_OF_TWO
    if (fours) merge_four_rows(a, parts, early, lane);
    else
#endif
      merge_rows(a, parts, signs, space, warp, lane);
    row += (i64)blocks * at_once;
    parts = parts_of_row(a, plan, row + own);
  }
}
#endif

extern "C" __global__ void __launch_bounds__(PAGES_THREADS, 1) attention_pages(const Args a) {
  const u32 smem = shared_address(dynamic_shared());
  if (smem != SMEM_BASE) trap();  // table32 has it as a constant
  const int tid = threadIdx.x, lane = tid & 31, warp = tid >> 5;
  i64* plan = FUSED ? (i64*)(dynamic_shared() + PLAN_AT) : a.plan;
  if (warp >= CONSUMERS) {
    if (REGISTERS_MOVED) give_registers<56>();
    if (warp > CONSUMERS) return;
    if (lane == 0) {
      init_ring(smem);
      fence_barrier_init();
    }
    if (FUSED) write_short_plan(a, plan, lane);
    __syncwarp();
    named_barrier_arrive(MERGE_BARRIER, WORKING_THREADS);
    produce(a, plan, smem, lane);
  } else {
    // With 4 warps of 56 as many as 12 warps of 168.
    if (REGISTERS_MOVED) take_registers<224>();
#if FUSED
    const u64 early = query_signs(a, lane);
#else
    const u64 early = 0;
#endif
    fill_tables(a, tid);
    named_barrier(MERGE_BARRIER, WORKING_THREADS);
    consume(a, plan, smem, lane, warp, early);
#if FUSED
    merge_in_blocks(a, plan, blockIdx.y * gridDim.x + blockIdx.x, gridDim.x * gridDim.y, warp, lane);
#endif
  }
}
