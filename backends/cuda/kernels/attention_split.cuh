// attention_split: partial attention over token ranges; any head_dim, bits, block size and strides.
//
//   S = Q K^T   (A = 16 query rows x 16 dims,   B = dequantised K: 16 dims x 8 tokens)
//   O = P V     (A = 16 query rows x 16 tokens, B = dequantised V: 16 tokens x 8 dims)
//
// A block has one kv head and WARPS warps; a unit is 16 tokens a warp.  Codes go from global memory
// to registers and through a float16 table in shared memory straight into the B fragments: no tile
// is ever stored.  The order of dims within a product is free, so a lane takes consecutive ones:
// K: lane (g, c) reads run c of K_OCTETS * 8 dims of tokens g and g + 8;
// V: lane (g, c) reads run g of V_OCTETS * 8 dims of tokens 2c, 2c + 1, 2c + 8, 2c + 9.
// g = lane / 4, c = lane % 4, as in the mma fragments.
#pragma once
#include "attention_codes.cuh"
#include "attention_common.cuh"

#define WARPS 4
#define OCTETS ((D + 7) / 8)
#define K_OCTETS ((OCTETS + 3) / 4)
#define V_OCTETS ((OCTETS + 7) / 8)
#define K_BYTES (K_OCTETS * KEY_BITS)    // of a run
#define V_BYTES (V_OCTETS * VALUE_BITS)
#define K_WORDS ((K_BYTES + 3) / 4)
#define V_WORDS ((V_BYTES + 3) / 4)
#define K_PACKED ((D * KEY_BITS + 7) / 8)  // of a vector
#define V_PACKED ((D * VALUE_BITS + 7) / 8)
#define TILES (V_OCTETS * 8)             // of 8 dims each in O
#define LAZY 5.f                         // raise the maximum only if exceeded by 2^5

// Code i of a run: the first index has the high bits.
template <int BITS, int WORDS> __device__ __forceinline__ u32 code(const u32 (&w)[WORDS], int i) {
  const int word = i * BITS / 32, bit = i * BITS % 32;
  const u32 top = bit + BITS <= 32
      ? w[word] << bit
      : __funnelshift_l(w[word + 1 < WORDS ? word + 1 : word], w[word], bit);
  return top >> (32 - BITS);
}

__device__ __forceinline__ u32 pair(u32 first, u32 second) { return __byte_perm(first, second, 0x5410); }

extern "C" __global__ void __launch_bounds__(32 * WARPS, MIN_BLOCKS) attention_split(const Args a) {
  __shared__ u32 k_table[1 << KEY_BITS], v_table[1 << VALUE_BITS];
  __shared__ float o_sum[16][TILES * 8 + 4];
  __shared__ float maxima[WARPS][16], sums[WARPS][16], ups[WARPS];
  const int tid = threadIdx.x, lane = tid & 31, warp = tid >> 5, g = lane >> 2, c = lane & 3;
  const int kv_head = blockIdx.y;

  for (int i = tid; i < 1 << KEY_BITS; i += 32 * WARPS) k_table[i] = pack_half2(a.k_centroids[i], 0.f);
  for (int i = tid; i < 1 << VALUE_BITS; i += 32 * WARPS) v_table[i] = pack_half2(a.v_centroids[i], 0.f);
  __syncthreads();

  const u8* k_head = a.k_packed + kv_head * a.k_head_stride;
  const u8* v_head = a.v_packed + kv_head * a.v_head_stride;
  const float* kn_head = a.k_norms + kv_head * a.kn_head_stride;
  const float* vn_head = a.v_norms + kv_head * a.vn_head_stride;

  Walk walk = start_walk(a, a.plan);
  Segment segment;
  while (next_segment(a, walk, segment)) {
    const Rows rows = rows_of(a, segment);
    // The rows g and g + 8 of this lane, and what they see.
    int low[2], high[2];
    float factor[2], shift[2];
    u32 qa[2 * K_OCTETS][4];
#pragma unroll
    for (int e = 0; e < 2; e++) {
      const int r = g + 8 * e;
      row_limits(a, segment, rows, r, low[e], high[e]);
      factor[e] = shift[e] = 0.f;
      const u16* q_row = 0;
      if (r < rows.count) {
        const i64 row = query_row(a, segment, rows, r, kv_head);
        const float2 f = a.q_factors[row];
        factor[e] = f.x, shift[e] = f.y;
        q_row = a.q_rows + row * Q_PITCH + c * K_OCTETS * 8;
      }
#pragma unroll
      for (int i = 0; i < 2 * K_OCTETS; i++) {
        const uint2 x = q_row ? *(const uint2*)(q_row + 4 * i) : make_uint2(0, 0);
        qa[i][e] = x.x, qa[i][2 + e] = x.y;
      }
    }

    const int* table = a.block_tables + segment.s * a.table_row_stride;
    float o[TILES][4];
#pragma unroll
    for (int i = 0; i < TILES; i++) o[i][0] = o[i][1] = o[i][2] = o[i][3] = 0.f;
    float top[2] = {NEVER, NEVER}, sum[2] = {0.f, 0.f};
    float up = FIRST_UP;

    for (int u = segment.begin; u < segment.begin + segment.count; u++) {
      const int t0 = u * UNIT + warp * 16;
      if (t0 > rows.high || t0 + 15 < rows.low || rows.low > rows.high) continue;
      auto block_of = [&](int& t) {  // t becomes the token's place in its block
        t = max(rows.low, min(t, rows.high));
        const i64 b = table[(i64)(t / BLOCK_SIZE) * a.table_step];
        t %= BLOCK_SIZE;
        return b;
      };
      u32 kw[2][K_WORDS], vw[4][V_WORDS];
      float kn[4], vn[4];
#pragma unroll
      for (int e = 0; e < 2; e++) {
        int t = t0 + g + 8 * e;
        const i64 b = block_of(t);
        load_codes<K_BYTES, K_ALIGN, K_PACKED>(
            kw[e], k_head + b * a.k_block_stride + t * a.k_token_stride, c * K_BYTES);
      }
#pragma unroll
      for (int e = 0; e < 4; e++) {
        int t = t0 + 2 * c + (e & 1) + (e >> 1) * 8;
        const i64 b = block_of(t);
        kn[e] = kn_head[b * a.kn_block_stride + t * a.kn_token_stride];
        vn[e] = vn_head[b * a.vn_block_stride + t * a.vn_token_stride];
        load_codes<V_BYTES, V_ALIGN, V_PACKED>(
            vw[e], v_head + b * a.v_block_stride + t * a.v_token_stride, g * V_BYTES);
      }

      float x[2][4];  // [tokens 2c.., 2c + 8..][row g: 0, 1; row g + 8: 2, 3]
#pragma unroll
      for (int e = 0; e < 2; e++) {
        x[e][0] = x[e][1] = x[e][2] = x[e][3] = 0.f;
#pragma unroll
        for (int i = 0; i < 2 * K_OCTETS; i++) {
          u32 v[4];
#pragma unroll
          for (int k = 0; k < 4; k++) v[k] = k_table[code<KEY_BITS>(kw[e], 4 * i + k)];
          mma(x[e], qa[i][0], qa[i][1], qa[i][2], qa[i][3], pair(v[0], v[1]), pair(v[2], v[3]));
        }
      }
#pragma unroll
      for (int e = 0; e < 2; e++)
#pragma unroll
        for (int k = 0; k < 4; k++) {
          x[e][k] = fmaf(x[e][k] * kn[2 * e + (k & 1)], factor[k >> 1], shift[k >> 1]);
          if (a.soft_cap_log2 != 0.f)  // c tanh(x), exact to float32 rounding of c
            x[e][k] = a.soft_cap_log2 - 2.f * a.soft_cap_log2 * __fdividef(1.f, 1.f + exp2_approx(2.f * LOG2_E * x[e][k]));
        }
      if (t0 + 15 > rows.all_high || t0 < rows.all_low) {
#pragma unroll
        for (int e = 0; e < 2; e++)
#pragma unroll
          for (int k = 0; k < 4; k++) {
            const int t = t0 + 2 * c + 8 * e + (k & 1);
            if (t > high[k >> 1] || t < low[k >> 1]) x[e][k] = __uint_as_float(0xff800000u);
            if (t > rows.high || t < rows.low) vn[2 * e + (k & 1)] = 0.f;
          }
      }

      // Exponents relative to a lazy running maximum, so that p <= 2^5.
      float now[2], norm = fmaxf(fmaxf(fabsf(vn[0]), fabsf(vn[1])), fmaxf(fabsf(vn[2]), fabsf(vn[3])));
#pragma unroll
      for (int e = 0; e < 2; e++)
        now[e] = fmaxf(fmaxf(x[0][2 * e], x[0][2 * e + 1]), fmaxf(x[1][2 * e], x[1][2 * e + 1]));
      if (__any_sync(FULL_WARP, now[0] > top[0] + LAZY || now[1] > top[1] + LAZY || norm * up > NORM_LIMIT)) {
        const float change = lower_up(warp_max(norm), up);
#pragma unroll
        for (int e = 0; e < 2; e++) {
          now[e] = fmaxf(now[e], __shfl_xor_sync(FULL_WARP, now[e], 1));
          now[e] = fmaxf(now[e], __shfl_xor_sync(FULL_WARP, now[e], 2));
          now[e] = fmaxf(now[e], top[e]);
          const float down = exp2_approx(top[e] - now[e]);
          top[e] = now[e];
          sum[e] *= down;
#pragma unroll
          for (int i = 0; i < TILES; i++) {
            o[i][2 * e] *= down * change;
            o[i][2 * e + 1] *= down * change;
          }
        }
      }
      u32 p[2][2];  // [tokens][row]
#pragma unroll
      for (int e = 0; e < 2; e++)
#pragma unroll
        for (int k = 0; k < 2; k++) {
          const float w0 = exp2_approx(x[e][2 * k] - top[k]), w1 = exp2_approx(x[e][2 * k + 1] - top[k]);
          sum[k] += w0 + w1;
          p[e][k] = pack_half2(w0 * (vn[2 * e] * up), w1 * (vn[2 * e + 1] * up));
        }
#pragma unroll
      for (int i = 0; i < TILES; i++) {
        u32 v[4];
#pragma unroll
        for (int k = 0; k < 4; k++) v[k] = v_table[code<VALUE_BITS>(vw[k], i)];
        mma(o[i], p[0][0], p[0][1], p[1][0], p[1][1], pair(v[0], v[1]), pair(v[2], v[3]));
      }
    }

    // Merge the warps in a fixed order and write the part.
#pragma unroll
    for (int e = 0; e < 2; e++) {
      sum[e] += __shfl_xor_sync(FULL_WARP, sum[e], 1);
      sum[e] += __shfl_xor_sync(FULL_WARP, sum[e], 2);
      if (c == 0) {
        maxima[warp][g + 8 * e] = top[e];
        sums[warp][g + 8 * e] = sum[e];
      }
    }
    if (lane == 0) ups[warp] = up;
    __syncthreads();
    float least = ups[0];
    for (int w = 1; w < WARPS; w++) least = fminf(least, ups[w]);
    float scale[2];
    for (int e = 0; e < 2; e++) {
      float most = maxima[0][g + 8 * e];
      for (int w = 1; w < WARPS; w++) most = fmaxf(most, maxima[w][g + 8 * e]);
      float all = 0.f;
      for (int w = 0; w < WARPS; w++) all += sums[w][g + 8 * e] * exp2_approx(maxima[w][g + 8 * e] - most);
      scale[e] = all > 0.f ? exp2_approx(top[e] - most) * (least / up) / all : 0.f;
      const int r = g + 8 * e;
      if (warp == 0 && c == 0 && r < rows.count)
        a.part_scales[(segment.slot * a.num_kv_heads + kv_head) * a.tile_rows + r] =
            make_float2(all > 0.f ? most + log2_approx(all) : __uint_as_float(0xff800000u), 1.f / least);
    }
    for (int w = 0; w < WARPS; w++) {
      if (w == warp) {
#pragma unroll
        for (int i = 0; i < TILES; i++)
#pragma unroll
          for (int k = 0; k < 4; k++) {
            float& to = o_sum[g + 8 * (k >> 1)][(2 * c + (k & 1)) * TILES + i];
            to = (w ? to : 0.f) + o[i][k] * scale[k >> 1];
          }
      }
      __syncthreads();
    }
    for (int i = tid; i < rows.count * (O_PITCH / 2); i += 32 * WARPS) {
      const int r = i / (O_PITCH / 2), d = i % (O_PITCH / 2) * 2;
      ((u32*)(a.parts + ((segment.slot * a.num_kv_heads + kv_head) * a.tile_rows + r) * (i64)O_PITCH))[d / 2] =
          pack_half2(o_sum[r][d], o_sum[r][d + 1]);
    }
    __syncthreads();
  }
}
