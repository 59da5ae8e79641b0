// attention_wide: as attention_pages, for tiles of 16 or 32 query rows; compute capability 9.0a.
//
//   S^T = K Q^T    (A = dequantised K: 64 tokens x 16 dims,   B = Q: 16 dims x ROWS)
//   O^T = V^T P^T  (A = dequantised V^T: 64 dims x 16 tokens, B = P^T: 16 tokens x ROWS)
//
// Four warps serve a kv head and take 64 tokens at a time.  Of K each warp has a page of 16 tokens, of
// V^T a quarter of the dims of all four pages, so that the sums of output are shared out among them
// and nothing is dequantised twice.  A comes from registers; Q and the softmax weights P lie in shared
// memory, where each product reads them once for all four warps.
//
// Macros: as attention_pages, with WIDE, D 128, VALUE_BITS 4, ROW_TILES 2 or 4 (8 query rows each),
// HEADS 4, SHARES 4, SUB 1.
#pragma once
#include "attention_merge_rows.cuh"
#include "attention_ring.cuh"

#define ROWS (8 * ROW_TILES)
#define HEAD_THREADS 128
#define OUT_TILES (D / 64)  // of 64 dims
// setmaxnreg: with the 4 warps of the producer as many registers as 20 warps of 96 have.
#define PRODUCER_REGISTERS 32
#define CONSUMER_REGISTERS 112

static_assert(WIDE && D == 128 && HEADS == 4 && SHARES == 4 && SUB == 1 && VALUE_BITS == 4, "attention_wide");

// The query rows of a tile, brought to one factor of the scores, which is returned.  Dims stand in the
// order in which `keys` gives those of K: product j has those from 4 j on of each quarter.
#if FUSED
__device__ __forceinline__ float stage_wide_rows(const Args& a, const Segment& segment, const Rows& rows, int kv_head,
                                                 WideRows& to, int lane, int warp, int meeting) {
  const int part = lane & 7;
  const u64 early = early_signs(a.k_signs, a.k_steps, part);
  auto words = [&](int m, int row) {  // dims LANE_DIMS part + 2 m and the next one
    return (u32*)to.query[part % 2 * (LANE_DIMS / 2) + m][row / 8][row % 8] + part / 2;
  };
#pragma unroll 1
  for (int first = 4 * warp; first < ROWS; first += 16) {
    float v[LANE_DIMS] = {}, shift = 0.f, factor = 0.f;
    if (first < rows.count) factor = rotate_rows(a, segment, rows, kv_head, first, lane, early, v, shift);
    const int row = first + (lane >> 3);
#pragma unroll
    for (int m = 0; m < LANE_DIMS / 2; m++) *words(m, row) = pack_half2(v[2 * m], v[2 * m + 1]);
    if (part == 0) to.shifts[row] = shift;
    if (lane == 0) to.factors[first / 4] = factor;
  }
  named_barrier(meeting, HEAD_THREADS);
  float factor = 0.f;
#pragma unroll
  for (int i = 0; i < ROWS / 4; i++) factor = fmaxf(factor, to.factors[i]);
#pragma unroll 1
  for (int first = 4 * warp; first < ROWS; first += 16) {
    const float ratio = to.factors[first / 4] / factor;  // a power of two: exact
    if (ratio == 1.f) continue;
#pragma unroll
    for (int m = 0; m < LANE_DIMS / 2; m++) {
      u32* x = words(m, first + (lane >> 3));
      *x = pack_half2(half_to_float((u16)*x) * ratio, half_to_float((u16)(*x >> 16)) * ratio);
    }
  }
  return factor;
}
#else
__device__ __forceinline__ float stage_wide_rows(const Args& a, const Segment& segment, const Rows& rows, int kv_head,
                                                 WideRows& to, int lane, int warp, int) {
  const int r = lane % ROWS;
  const float2 own = r < rows.count ? a.q_factors[query_row(a, segment, rows, r, kv_head)] : make_float2(0.f, 0.f);
  const float factor = warp_max(own.x);
  if (warp == 0 && lane < ROWS) to.shifts[r] = own.y;
#pragma unroll 1
  for (int i = 32 * warp + lane; i < ROWS * (D / 8); i += HEAD_THREADS) {
    const int row = i / (D / 8), chunk = i % (D / 8);
    u32 w[4] = {};
    if (row < rows.count) {
      const i64 from = query_row(a, segment, rows, row, kv_head);
      const float ratio = a.q_factors[from].x / factor;  // powers of two: exact
#pragma unroll
      for (int c = 0; c < 4; c++) {
        const u32 x = ((const u32*)(a.q_rows + from * Q_PITCH))[c * (D / 8) + chunk];
        w[c] = pack_half2(half_to_float((u16)x) * ratio, half_to_float((u16)(x >> 16)) * ratio);
      }
    }
    *(uint4*)to.query[chunk][row / 8][row % 8] = make_uint4(w[0], w[1], w[2], w[3]);
  }
  return factor;
}
#endif

// Four dims of tokens 2c, 2c + 1 (x) and of those 8 further (y) -> A fragments of a page.
__device__ __forceinline__ void wide_values(u32 x, u32 y, u32 (&f)[OUT_TILES][4], u32 bank) {
  const u32 first = __byte_perm(x, y, 0x5410), second = __byte_perm(x, y, 0x7632);
  const u32 odd = blend(0x0F0F0F0Fu, first, second << 4), even = blend(0x0F0F0F0Fu, first >> 4, second);
#pragma unroll
  for (int b = 0; b < OUT_TILES; b++)
#pragma unroll
    for (int e = 0; e < 2; e++) {
      f[b][2 * e] = look32<V_TABLE>(even, 2 * e + b, bank);
      f[b][2 * e + 1] = look32<V_TABLE>(odd, 2 * e + b, bank);
    }
}

// All lanes have the same segment; the compiler does not see it, and could not use uniform registers.
__device__ __forceinline__ int uniform(int x) { return __reduce_or_sync(FULL_WARP, x); }
__device__ __forceinline__ void for_all_lanes(Segment& g) {
  g.q.context = uniform(g.q.context), g.q.first_token = uniform(g.q.first_token);
  g.q.query_len = uniform(g.q.query_len), g.q.position = uniform(g.q.position);
  g.s = uniform(g.s), g.tile = uniform(g.tile), g.begin = uniform(g.begin), g.count = uniform(g.count);
}

__device__ __forceinline__ void consume_wide(const Args& a, const i64* plan, u32 smem, int lane, int warp) {
  const u32 full = smem + BARRIERS_AT, empty = full + 8 * STAGES;
  const int g = lane >> 2, c = lane & 3, head = warp / 4, quarter = warp % 4;
  const int kv_head = blockIdx.y * HEADS + head, meeting = 2 + head;
  const u32 v_bank = here(lane * 4), k_bank = KEY_BITS == 2 ? v_bank % 64 * 2 : v_bank;
  const int row_token = token_of_row(g);
  const u32 ring = smem + RING_AT;
  const u32 k_at = here(ring + PAGE_AT(quarter, K_TOKEN) + row_token * K_TOKEN + head * K_HEAD + (KEY_BEGIN(c) & ~3));
  const u32 n_at = here(ring + PAGE_AT(quarter, N_TOKEN) + AT_KN + row_token * N_TOKEN + head * N_HEAD);
  // For ring_matrices: rows of 8 tokens each, 0 and 8 of a page and of the next one.
  const u32 v_at = here(ring + AT_V + head * V_HEAD + PAGE_AT(lane >> 4, V_TOKEN) +
                        (token_of_row(lane & 7) + (lane & 8)) * V_TOKEN + 16 * quarter);
  const u32 k_select = selector<REVERSED(KEY_BITS), KEY_RUN>(KEY_BEGIN(c));
  WideRows& mine = ((WideRows*)(dynamic_shared() + ROWS_AT))[head];
  const u32 free_weights = shared_address(&mine.weights_free);
  const u64 query = wgmma_matrix(shared_address(mine.query), 128 * ROW_TILES, 128);
  const u32 weights_at = shared_address(mine.weights);
  const u64 weights = wgmma_matrix(weights_at, 128 * ROW_TILES, 128);
  const u32 put_at = weights_at + 2 * quarter * 128 * ROW_TILES + 4 * v_bank;

  u32 stage = 0, phase = 0, weights_phase = 1;
  Walk walk = start_walk(a, plan);
  Segment segment;
#pragma unroll 1
  while (__any_sync(FULL_WARP, next_segment(a, walk, segment))) {
    for_all_lanes(segment);
    const Rows rows = rows_of(a, segment);
    const float q_factor = stage_wide_rows(a, segment, rows, kv_head, mine, lane, quarter, meeting);
    fence_async();
    named_barrier(meeting, HEAD_THREADS);
    // o: [64 dims][row tile: 8 rows][dim of row g: 0, 1; g + 8: 2, 3][query row 2c, 2c + 1]
    float o[OUT_TILES][4 * ROW_TILES], top[ROW_TILES][2], sum[ROW_TILES][2];
#pragma unroll
    for (int n = 0; n < ROW_TILES; n++)
#pragma unroll
      for (int e = 0; e < 2; e++) top[n][e] = NEVER, sum[n][e] = 0.f;
#pragma unroll
    for (int b = 0; b < OUT_TILES; b++)
#pragma unroll
      for (int i = 0; i < 4 * ROW_TILES; i++) o[b][i] = 0.f;
    float up = FIRST_UP;

#pragma unroll 1
    for (int u = segment.begin; u < segment.begin + segment.count; u++) {
      const u32 at = stage * STAGE_BYTES;
      barrier_wait(full + 8 * stage, phase);
      __syncwarp();
      float x[4 * ROW_TILES], kn[2], vn[2];
      {
        u32 kw[2][K_WORDS], f[PRODUCTS][4];
#pragma unroll
        for (int e = 0; e < 2; e++) read_keys(kw[e], k_at + at + e * 8 * K_TOKEN, k_select);
#pragma unroll
        for (int e = 0; e < 2; e++) {
          kn[e] = __uint_as_float(ring32(n_at + at + e * 8 * N_TOKEN)) * q_factor;
          vn[e] = __uint_as_float(ring32(n_at + at + e * 8 * N_TOKEN + AT_VN - AT_KN));
        }
        keys(kw[0], kw[1], f, k_bank);
        settle(f);
        wgmma_fence();
#pragma unroll
        for (int j = 0; j < PRODUCTS; j++) wgmma<false>(x, f[j], query + j * (2 * 128 * ROW_TILES >> 4), j > 0);
        wgmma_commit();
        wgmma_wait();
      }

      // x: [8 rows][token row g: 0, 1; g + 8: 2, 3][query row 2c, 2c + 1].  Masked scores become -inf.
      const int first_token = (u * STAGE_PAGES + quarter) * PAGE;
      if (first_token + PAGE - 1 > rows.all_high || first_token < rows.all_low) {
#pragma unroll
        for (int n = 0; n < ROW_TILES; n++) {
          int low[2], high[2];
#pragma unroll
          for (int k = 0; k < 2; k++) row_limits(a, segment, rows, here(8 * n) + 2 * c + k, low[k], high[k]);
#pragma unroll
          for (int e = 0; e < 2; e++) {
            const int t = first_token + row_token + 8 * e;
#pragma unroll
            for (int k = 0; k < 2; k++) {
              const float score = x[4 * n + 2 * e + k] * kn[e];
              x[4 * n + 2 * e + k] = t > high[k] || t < low[k] ? __uint_as_float(0xff800000u) : score;
            }
          }
        }
#pragma unroll
        for (int e = 0; e < 2; e++) {
          const int t = first_token + row_token + 8 * e;
          kn[e] = 1.f;
          if (t > rows.high || t < rows.low) vn[e] = 0.f;
        }
      }
      // Exponents relative to a lazy running maximum, the same for all four warps; see attention_pages.
      float above = NEVER, more[ROW_TILES][2];
      u32 w[2][ROW_TILES];
      auto weigh = [&] {
        const float weight[2] = {vn[0] * up, vn[1] * up};
#pragma unroll
        for (int n = 0; n < ROW_TILES; n++) {
#pragma unroll
          for (int e = 0; e < 2; e++) {
            const float y0 = fmaf(x[4 * n + 2 * e], kn[e], -top[n][0]), y1 = fmaf(x[4 * n + 2 * e + 1], kn[e], -top[n][1]);
            above = fmaxf(above, fmaxf(y0, y1));
            const float w0 = exp2_approx(y0), w1 = exp2_approx(y1);
            more[n][0] = e ? more[n][0] + w0 : w0;
            more[n][1] = e ? more[n][1] + w1 : w1;
            w[e][n] = pack_half2(w0 * weight[e], w1 * weight[e]);
          }
        }
      };
      auto put = [&] {
        const u32* all = &w[0][0];
#pragma unroll
        for (int i = 0; i < 2 * ROW_TILES; i += 4) store_matrices(put_at + 128 * i, all[i], all[i + 1], all[i + 2], all[i + 3]);
        fence_async();
      };
      weigh();
      barrier_wait(free_weights, weights_phase);
      weights_phase ^= 1;
      __syncwarp();
      put();
      const float norm = fmaxf(fabsf(vn[0]), fabsf(vn[1]));
      if (named_barrier_or(meeting, HEAD_THREADS, above > LAZY || norm * up > NORM_LIMIT)) {
        float now[ROW_TILES][2];
#pragma unroll
        for (int n = 0; n < ROW_TILES; n++)
#pragma unroll
          for (int e = 0; e < 2; e++) {
            float m = fmaxf(x[4 * n + e] * kn[0], x[4 * n + 2 + e] * kn[1]);
#pragma unroll
            for (int k = 4; k < 32; k <<= 1) m = fmaxf(m, __shfl_xor_sync(FULL_WARP, m, k));
            if (g == 0) mine.totals[quarter][8 * n + 2 * c + e].x = m;
          }
        const float largest_here = warp_max(norm);
        if (lane == 0) mine.norms[quarter] = largest_here;
        named_barrier(meeting, HEAD_THREADS);
        const float largest = fmaxf(fmaxf(mine.norms[0], mine.norms[1]), fmaxf(mine.norms[2], mine.norms[3]));
        const float change = lower_up(largest, up);
#pragma unroll
        for (int n = 0; n < ROW_TILES; n++)
#pragma unroll
          for (int e = 0; e < 2; e++) {
            now[n][e] = top[n][e];
#pragma unroll
            for (int q = 0; q < 4; q++) now[n][e] = fmaxf(now[n][e], mine.totals[q][8 * n + 2 * c + e].x);
            const float down = exp2_approx(top[n][e] - now[n][e]);
            top[n][e] = now[n][e];
            sum[n][e] *= down;
#pragma unroll
            for (int b = 0; b < OUT_TILES; b++) {
              o[b][4 * n + e] *= down * change;
              o[b][4 * n + 2 + e] *= down * change;
            }
          }
        weigh();
        put();
        named_barrier(meeting, HEAD_THREADS);
      }
#pragma unroll
      for (int n = 0; n < ROW_TILES; n++) sum[n][0] += more[n][0], sum[n][1] += more[n][1];

      // Lane (g, c) has dims 32 quarter + 4 g and on.
      u32 f[STAGE_PAGES][OUT_TILES][4];
#pragma unroll
      for (int p = 0; p < STAGE_PAGES; p += 2) {
        const uint4 v = ring_matrices(v_at + at + PAGE_AT(p, V_TOKEN));
        wide_values(v.x, v.y, f[p], v_bank);
        wide_values(v.z, v.w, f[p + 1], v_bank);
      }
      settle(f);
      wgmma_fence();
#pragma unroll
      for (int p = 0; p < STAGE_PAGES; p++)
#pragma unroll
        for (int b = 0; b < OUT_TILES; b++) wgmma<true>(o[b], f[p][b], weights + p * (2 * 128 * ROW_TILES >> 4), true);
      wgmma_commit();
      __syncwarp();  // all reads of this stage are done
      if (lane == 0) barrier_arrive(empty + 8 * stage);
      wgmma_wait();
      if (lane == 0) barrier_arrive(free_weights);
      if (++stage == STAGES) stage = 0, phase ^= 1;
    }
    // Write the part.
#pragma unroll
    for (int n = 0; n < ROW_TILES; n++)
#pragma unroll
      for (int e = 0; e < 2; e++) {
#pragma unroll
        for (int k = 4; k < 32; k <<= 1) sum[n][e] += __shfl_xor_sync(FULL_WARP, sum[n][e], k);
        if (g == 0) mine.totals[quarter][8 * n + 2 * c + e].y = sum[n][e];
      }
    named_barrier(meeting, HEAD_THREADS);
    const i64 part = segment.slot * a.num_kv_heads + kv_head;
#pragma unroll
    for (int n = 0; n < ROW_TILES; n++)
#pragma unroll
      for (int e = 0; e < 2; e++) {
        const int r = 8 * n + 2 * c + e;
        float all = 0.f;
#pragma unroll
        for (int q = 0; q < 4; q++) all += mine.totals[q][r].y;
        const float inverse = all > 0.f ? __fdividef(1.f, all) : 0.f;
        if (r < rows.count) {
          const i64 row = part * a.tile_rows + r;
          *(uint2*)(a.parts + row * D + 32 * quarter + 4 * g) =
              make_uint2(pack_half2(o[0][4 * n + e] * inverse, o[0][4 * n + 2 + e] * inverse),
                         pack_half2(o[OUT_TILES - 1][4 * n + e] * inverse, o[OUT_TILES - 1][4 * n + 2 + e] * inverse));
          if (quarter == 0 && g == 0)
            a.part_scales[row] =
                make_float2(all > 0.f ? top[n][e] + log2_approx(all) + mine.shifts[r] : __uint_as_float(0xff800000u), 1.f / up);
        }
      }
    named_barrier(meeting, HEAD_THREADS);  // before the rows of the next segment come
  }
}

extern "C" __global__ void __launch_bounds__(PAGES_THREADS, 1) attention_wide(const Args a) {
  const u32 smem = shared_address(dynamic_shared());
  if (smem != SMEM_BASE) trap();
  const int tid = threadIdx.x, lane = tid & 31, warp = __shfl_sync(FULL_WARP, tid >> 5, 0);
  if (warp >= CONSUMERS) {
    give_registers<PRODUCER_REGISTERS>();
    if (warp > CONSUMERS) return;
    if (lane == 0) {
      init_ring(smem);
      for (int i = 0; i < HEADS; i++)
        barrier_init(shared_address(&((WideRows*)(dynamic_shared() + ROWS_AT))[i].weights_free), 4);
      fence_barrier_init();
    }
    __syncwarp();
    named_barrier(MERGE_BARRIER, WORKING_THREADS);
    produce(a, a.plan, smem, lane);
  } else {
    take_registers<CONSUMER_REGISTERS>();
    if (FUSED && warp == 0) {
      // Each block writes the same numbers.  Global memory, for the compiler then knows that all lanes
      // read the same and keeps what follows from it in uniform registers.
      i64* plan = (i64*)(dynamic_shared() + PLAN_AT);
      write_short_plan(a, plan, lane);
      for (int i = lane; i < 2 * (a.num_seqs + 1); i += 32) a.plan[i] = plan[i];
    }
    fill_tables(a, tid);
    named_barrier(MERGE_BARRIER, WORKING_THREADS);
    consume_wide(a, a.plan, smem, lane, warp);
#if FUSED
    const u64 early = early_signs(a.v_signs, a.v_steps, lane & 7);
    const u32 block = blockIdx.y * gridDim.x + blockIdx.x, blocks = gridDim.x * gridDim.y;
    i64 row = 4 * ((i64)block * CONSUMERS + warp);
    const i64 all = (i64)a.num_tokens * a.num_kv_heads * a.group;
    PartsOfRow parts = parts_of_row(a, a.plan, row + (lane >> 3));
    named_barrier(MERGE_BARRIER, 32 * CONSUMERS);
    if (tid == 0) grid_barrier(a.barrier, block, blocks);
    named_barrier(MERGE_BARRIER, 32 * CONSUMERS);
    while (row < all) {
      merge_four_rows(a, parts, early, lane);
      row += 4 * (i64)blocks * CONSUMERS;
      parts = parts_of_row(a, a.plan, row + (lane >> 3));
    }
#endif
  }
}
