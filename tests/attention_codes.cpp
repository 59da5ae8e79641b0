// Host program of test_attention_codes.py: the instructions of a GPU, the kernels' functions, and what runs
// every lane of a warp in turn.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <vector>
#define __device__
#define __forceinline__ inline
#define __restrict__
typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long i64;
#define FULL_WARP 0xffffffffu
#define SMEM_BASE 1024
using std::max;
using std::min;
struct float2 { float x, y; };
struct uint2 { u32 x, y; };
struct uint4 { u32 x, y, z, w; };
struct dim3 { u32 x = 0, y = 0, z = 0; };
static dim3 threadIdx, blockIdx;
inline float2 make_float2(float x, float y) { return {x, y}; }
inline uint2 make_uint2(u32 x, u32 y) { return {x, y}; }
inline uint4 make_uint4(u32 x, u32 y, u32 z, u32 w) { return {x, y, z, w}; }
inline float __uint_as_float(u32 x) { float r; std::memcpy(&r, &x, 4); return r; }
inline u32 __float_as_uint(float x) { u32 r; std::memcpy(&r, &x, 4); return r; }
inline u16 half_bits(float x) { _Float16 h = (_Float16)x; u16 r; std::memcpy(&r, &h, 2); return r; }
inline float half_to_float(u16 x) { _Float16 h; std::memcpy(&h, &x, 2); return (float)h; }
inline u32 pack_half2(float lo, float hi) { return half_bits(lo) | (u32)half_bits(hi) << 16; }
inline u16 float_to_bfloat16(float) { return 0; }
inline float exp2_approx(float x) { return std::exp2(x); }
inline float log2_approx(float x) { return std::log2(x); }
inline int here(int x) { return x; }
inline u32 blend(u32 mask, u32 x, u32 y) { return (x & mask) | (y & ~mask); }
inline u32 __byte_perm(u32 a, u32 b, u32 s) {
  u32 r = 0;
  for (int i = 0; i < 4; i++) r |= (u32)(((u64)b << 32 | a) >> 8 * (s >> 4 * i & 7) & 255) << 8 * i;
  return r;
}
inline u32 __funnelshift_r(u32 lo, u32 hi, u32 n) { return (u32)(((u64)hi << 32 | lo) >> (n & 31)); }
inline u32 __funnelshift_l(u32 lo, u32 hi, u32 n) { return (u32)(((u64)hi << 32 | lo) << (n & 31) >> 32); }
inline int __popc(u32 x) { return __builtin_popcount(x); }
inline u32 __ballot_sync(u32, bool) { return 0; }
template <typename T> T __shfl_xor_sync(u32, T x, int) { return x; }
template <typename T> T __shfl_up_sync(u32, T x, int) { return x; }
inline bool __any_sync(u32, bool x) { return x; }
inline void __syncwarp() {}
inline void named_barrier(int, int) {}
inline float rsqrtf(float x) { return 1 / std::sqrt(x); }
alignas(1024) static u8 memory[1 << 18];
inline u8* dynamic_shared() { return memory + SMEM_BASE; }
inline u32 load(u32 at) {
  if (at % 4 || at + 4 > sizeof memory) std::abort();
  u32 r;
  std::memcpy(&r, memory + at, 4);
  return r;
}
template <int OFF> u32 table32(u32 at) { return load(SMEM_BASE + OFF + at); }
template <int OFF> uint2 table64(u32 at) { return {load(SMEM_BASE + OFF + at), load(SMEM_BASE + OFF + at + 4)}; }
inline u32 ring32(u32 at) { return load(at); }
inline uint2 ring64(u32 at) { if (at % 8) std::abort(); return {load(at), load(at + 4)}; }
inline uint4 ring128(u32 at) { if (at % 16) std::abort(); return {load(at), load(at + 4), load(at + 8), load(at + 12)}; }

// ---- the kernels
#include "kernels.h"

// In: centroids of keys and values; a page of all heads; 8 query rows.  Out: each head's scores of the
// rows, then its values.
static void read(void* to, size_t bytes) { if (std::fread(to, 1, bytes, stdin) != bytes) std::abort(); }
int main() {
  static float k_centroids[256], v_centroids[256], query[8][D];
  read(k_centroids, 4 << KEY_BITS);
  read(v_centroids, 4 << VALUE_BITS);
  read(memory + SMEM_BASE + TABLE_BYTES, PAGE_BYTES);
  read(query, sizeof query);
  Args a = {};
  a.k_centroids = k_centroids, a.v_centroids = v_centroids;
  for (int tid = 0; tid < 32 * CONSUMERS; tid++) fill_tables(a, tid);
  static uint2 rows[PRODUCTS][32];
  for (int r = 0; r < 8; r++)
    for (int part = 0; part < 8; part++) {
      float v[LANE_DIMS];
      std::copy(query[r] + LANE_DIMS * part, query[r] + LANE_DIMS * (part + 1), v);
      put_fragments(rows, v, r, part);
    }
  for (int r = 0; r < 8; r++)
    for (int i = 0; i < D; i++)
      if (*fragment_of((u16*)rows, r, i) != half_bits(query[r][i])) std::abort();
  auto product = [](u32 x, u32 y) {
    return half_to_float((u16)x) * half_to_float((u16)y) + half_to_float((u16)(x >> 16)) * half_to_float((u16)(y >> 16));
  };
  for (int head = 0; head < HEADS; head++) {
    static float scores[PAGE][8], out[PAGE][D];
    std::memset(scores, 0, sizeof scores);
    for (int lane = 0; lane < 32; lane++) {
      const Places at = places_of(SMEM_BASE + TABLE_BYTES, head, 0, lane);
      const int g = lane >> 2, c = lane & 3;
      u32 kw[2][K_WORDS], vw[4][V_WORDS], f[PRODUCTS][4];
      for (int e = 0; e < 2; e++) read_keys(kw[e], at.keys + e * 8 * K_TOKEN, at.k_select);
      keys(kw[0], kw[1], f, at.k_bank);
      for (int j = 0; j < PRODUCTS; j++)
        for (int r = 0; r < 8; r++) {
          const uint2 q = rows[j][4 * r + c];
          for (int e = 0; e < 2; e++)
            scores[at.token + 8 * e][r] += product(f[j][e], q.x) + product(f[j][2 + e], q.y);
        }
      for (int e = 0; e < 4; e++)
        read_values(vw[e], at.values[e & 1] + (e >> 1) * 8 * V_TOKEN, at);
      u32 half[2][LANE_DIMS];
      values(vw[0], vw[1], half[0], at.v_bank);
      values(vw[2], vw[3], half[1], at.v_bank);
      for (int i = 0; i < LANE_DIMS; i++)
        for (int e = 0; e < 2; e++)
          for (int k = 0; k < 2; k++)
            out[token_of_row(2 * c + k) + 8 * e][dim_of_output(g, i)] =
                half_to_float((u16)(half[e][i] >> 16 * k));
    }
    std::fwrite(scores, sizeof scores, 1, stdout);
    std::fwrite(out, sizeof out, 1, stdout);
  }
}
