// attention_window: attention to tokens kept in full precision, whole pages of a sequence, to be
// merged with attention to the packed ones.
//
// A block has one kv head and up to ROWS query rows of one sequence, and takes TOKENS tokens at
// once; both products are sums of float32.  Keys: four threads a token, each with every fourth
// chunk of its dims.  Values: a thread has one chunk of every (THREADS / CHUNKS)-th token.  All
// loads of TOKENS keys and values are on their way before the first is used.
//
// Macros: D, BLOCK_SIZE, WINDOW_DTYPE (of keys and values), ROWS (4 or 8).
#include "attention_common.cuh"

#define TYPE_BYTES (WINDOW_DTYPE < 2 ? 2 : WINDOW_DTYPE == 2 ? 4 : 8)  // as the enum in attention_common
#define WIDE (WINDOW_DTYPE < 3 && D * TYPE_BYTES % 16 == 0)  // rows can be read 16 bytes at a time
#define CHUNK (WIDE ? 16 / TYPE_BYTES : 1)                   // dims of a load
#define CHUNKS (D / CHUNK)
#define THREADS (CHUNKS > 128 ? 256 : 128)
#define TOKENS THREADS
#define KEYS (4 * TOKENS / THREADS)                          // tokens of a thread
#define KEY_CHUNKS ((CHUNKS + 3) / 4)                        // of a thread and token
#define PARALLEL (THREADS / CHUNKS)                          // tokens at once, values
#define VALUES ((TOKENS + PARALLEL - 1) / PARALLEL)
#define AT_ONCE (VALUES < 16 ? VALUES : 16)

struct Chunk {
  float x[CHUNK];
};
#if WIDE
typedef uint4 Raw;  // as it lies in memory
#else
typedef float Raw;
#endif
// `at` counts elements.
__device__ __forceinline__ Raw load_raw(const u8* base, i64 at) {
#if WIDE
  return *(const uint4*)(base + at * TYPE_BYTES);
#else
  return load_float(base, at, WINDOW_DTYPE);
#endif
}
__device__ __forceinline__ Chunk unpack(Raw raw) {
  Chunk r;
#if WIDE
  const u32 w[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
  for (int i = 0; i < CHUNK; i++) {
    const u32 x = w[i * TYPE_BYTES / 4];
    r.x[i] = WINDOW_DTYPE == FLOAT32  ? __uint_as_float(x)
             : WINDOW_DTYPE == FLOAT16 ? half_to_float((u16)(x >> i % 2 * 16))
                                       : __uint_as_float(i % 2 ? x & 0xffff0000u : x << 16);
  }
#else
  r.x[0] = raw;
#endif
  return r;
}

extern "C" __global__ void __launch_bounds__(THREADS) attention_window(const Args a) {
  __shared__ __align__(16) float q[ROWS][D];
  __shared__ float weights[ROWS][TOKENS];
  __shared__ float downs[ROWS], tops[ROWS], sums[ROWS];
  __shared__ i64 token_of[TOKENS];     // element where it begins; -1: seen by no row
  __shared__ float outs[PARALLEL][D];
  const int tid = threadIdx.x, lane = tid & 31, warp = tid >> 5, kv_head = blockIdx.y;
  const int s = a.full_tiles[2 * blockIdx.x], first = a.full_tiles[2 * blockIdx.x + 1];
  const int tokens = a.full_pages_each * BLOCK_SIZE, heads = a.num_kv_heads * a.group;
  const Sequence of_tile = sequence(a, s);
  const int count = min(ROWS, of_tile.query_len * a.group - first), position = a.full_query_positions[s];
  const int last_position = position + (first + count - 1) / a.group;
  const int first_position = a.window ? position + first / a.group - a.window + 1 : 0;
  auto row_of = [&](int r) {
    return ((i64)(of_tile.first_token + (first + r) / a.group) * a.num_kv_heads + kv_head) * a.group + (first + r) % a.group;
  };
  for (int i = tid; i < ROWS * D; i += THREADS) {
    const int r = i / D;
    const i64 row = row_of(r < count ? r : 0);
    const float x = load_float(a.query, row / heads * a.q_token_stride + row % heads * a.q_head_stride + i % D * a.q_dim_stride, a.query_dtype);
    q[r][i % D] = r < count ? x : 0.f;
  }
  if (tid < ROWS) tops[tid] = NEVER, sums[tid] = 0.f;
  const int chunk = tid % CHUNKS, of_value = tid / CHUNKS;
  float o[ROWS][CHUNK] = {};

#pragma unroll 1
  for (int base = 0; base < tokens; base += TOKENS) {
    if (tid < TOKENS) {
      const int t = base + tid, page = t / BLOCK_SIZE;
      const i64 at = (i64)s * a.full_pages_each + page;
      const int begin = t < tokens ? a.full_positions[at] : -1, here = begin + t % BLOCK_SIZE;
      const bool seen = begin >= 0 && here <= last_position && here >= first_position;
      const i64 slot = (i64)(seen ? a.full_pages[at] : 0) * BLOCK_SIZE + t % BLOCK_SIZE;
      token_of[tid] = seen ? (slot * a.num_kv_heads + kv_head) * D : -1;
#pragma unroll
      for (int r = 0; r < ROWS; r++) {  // the bounds of what row r sees
        const int p = position + (first + r) / a.group;
        const bool visible = seen && here <= p && (!a.window || here > p - a.window);
        weights[r][tid] = visible ? 0.f : __uint_as_float(0xff800000u);
      }
    }
    __syncthreads();
    Raw values[AT_ONCE];
    auto load_values = [&](int k0) {
#pragma unroll
      for (int k = 0; k < AT_ONCE; k++) {
        const int t = of_value + (k0 + k) * PARALLEL;
        const i64 token = of_value < PARALLEL && t < TOKENS ? token_of[t] : -1;
        values[k] = token >= 0 ? load_raw(a.full_values, token + chunk * CHUNK) : Raw();
      }
    };
    load_values(0);
    // Scores: tokens tid / 4, tid / 4 + THREADS / 4, ...
    float dots[KEYS][ROWS] = {};
    {
      const int c = tid & 3;
      i64 token[KEYS];
#pragma unroll
      for (int k = 0; k < KEYS; k++) token[k] = token_of[(tid >> 2) + k * (THREADS / 4)];
#pragma unroll 2
      for (int j = 0; j < KEY_CHUNKS; j++) {
        const int at = c + 4 * j;
        if (CHUNKS % 4 && at >= CHUNKS) break;
        Chunk keys[KEYS];
#pragma unroll
        for (int k = 0; k < KEYS; k++) keys[k] = unpack(load_raw(a.full_keys, max(token[k], 0ll) + at * CHUNK));
#pragma unroll
        for (int r = 0; r < ROWS; r++)
#pragma unroll
          for (int i = 0; i < CHUNK; i++)
#pragma unroll
            for (int k = 0; k < KEYS; k++) dots[k][r] = fmaf(q[r][at * CHUNK + i], keys[k].x[i], dots[k][r]);
      }
    }
#pragma unroll
    for (int k = 0; k < KEYS; k++)
#pragma unroll
      for (int r = 0; r < ROWS; r++) {
        float score = dots[k][r];
        score += __shfl_xor_sync(FULL_WARP, score, 1);
        score += __shfl_xor_sync(FULL_WARP, score, 2);
        score *= a.offset_factor;
        if (a.soft_cap_log2 != 0.f)  // as in attention_split
          score = a.soft_cap_log2 - 2.f * a.soft_cap_log2 * __fdividef(1.f, 1.f + exp2_approx(2.f * LOG2_E * score));
        float& weight = weights[r][(tid >> 2) + k * (THREADS / 4)];
        if ((tid & 3) == r % 4 && weight == 0.f) weight = score;
      }
    __syncthreads();
    for (int r = warp; r < ROWS; r += THREADS / 32) {
      float x[TOKENS / 32], top = tops[r], sum = 0.f;
#pragma unroll
      for (int k = 0; k < TOKENS / 32; k++) {
        x[k] = weights[r][32 * k + lane];
        top = fmaxf(top, x[k]);
      }
      top = warp_max(top);
#pragma unroll
      for (int k = 0; k < TOKENS / 32; k++) {
        x[k] = exp2_approx(x[k] - top);
        weights[r][32 * k + lane] = x[k];
        sum += x[k];
      }
      sum = warp_sum(sum);
      if (lane == 0) {
        downs[r] = exp2_approx(tops[r] - top);
        sums[r] = sums[r] * downs[r] + sum;
        tops[r] = top;
      }
    }
    __syncthreads();
#pragma unroll
    for (int r = 0; r < ROWS; r++)
#pragma unroll
      for (int i = 0; i < CHUNK; i++) o[r][i] *= downs[r];
#pragma unroll 1
    for (int k0 = 0; k0 < VALUES; k0 += AT_ONCE) {
      if (k0) load_values(k0);
#pragma unroll
      for (int k = 0; k < AT_ONCE; k++) {
        const int t = of_value + (k0 + k) * PARALLEL;
        const Chunk value = unpack(values[k]);
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
          const float weight = t < TOKENS ? weights[r][t] : 0.f;
#pragma unroll
          for (int i = 0; i < CHUNK; i++) o[r][i] = fmaf(weight, value.x[i], o[r][i]);
        }
      }
    }
    __syncthreads();
  }
#pragma unroll
  for (int r = 0; r < ROWS; r++) {  // add what the threads of a chunk have, in a fixed order
    if (r >= count) break;
    __syncthreads();
    if (of_value < PARALLEL)
#pragma unroll
      for (int i = 0; i < CHUNK; i++) outs[of_value][chunk * CHUNK + i] = o[r][i];
    __syncthreads();
    const float sum = sums[r], inverse = sum > 0.f ? 1.f / sum : 0.f;
    const i64 row = row_of(r);
    if (tid == 0) a.other_lse[row] = sum > 0.f ? (tops[r] + log2_approx(sum)) * LN_2 : __uint_as_float(0xff800000u);
    for (int d = tid; d < D; d += THREADS) {
      float x = 0.f;
#pragma unroll
      for (int k = 0; k < PARALLEL; k++) x += outs[k][d];
      a.other_out[row * D + d] = x * inverse;
    }
  }
}
