// How codes become fragments of the products of attention_pages and attention_wide.
//
// Dequantising is a table read: two codes (four at 2 bits) make a byte, the byte and the lane make
// an address by one PRMT, and the table holds one copy of its float16 pairs for each bank, so reads
// never conflict.  Byte value b: K pairs at 256 b, V pairs at 256 b + 128, or the same ones if keys and
// values have the same bits.  From 5 bits on a byte holds one code, and the two halves of an entry are
// for one in its low and one in its high bits; PAIRS: two codes of 5 bits have an entry of their own.
#pragma once
#include "attention_eighths.cuh"

#ifndef WIDE
#define WIDE 0
#endif
#define CONSUMERS (WIDE ? 16 : 8)  // warps
#define ONE_TABLE (!WIDE && KEY_BITS == VALUE_BITS)  // for keys and values
#define V_TABLE (ONE_TABLE ? 0 : 128)
#define UPPER (ONE_TABLE ? 128 : 65536)   // second table of 3 bits: the upper 6 bits of a byte
#ifndef PAIRS
#define PAIRS 0
#endif
#define TABLE_BYTES (PAIRS || !ONE_TABLE && (KEY_BITS == 3 || VALUE_BITS == 3) ? 131072 : 65536)
static_assert(!PAIRS || ONE_TABLE && KEY_BITS == 5, "tables");
#define PRODUCTS (D / 16)                 // of a tile of keys with a tile of rows; tiles of O
#define K_WORDS ((D * KEY_BITS + 127) / 128)    // a quarter of a vector
#define V_WORDS ((D * VALUE_BITS + 255) / 256)  // an eighth
#define SPLIT_EIGHTHS (D == 96 && VALUE_BITS == 4)  // of values: 8 dims and 4 of the last 32

// ---- dequantising; `bank` is the lane's offset within a table row

#define BYTE(k) (0x5504 + 0x10 * (k))  // PRMT: byte k of a moved up, the low byte of b below it

template <int OFF> __device__ __forceinline__ u32 look32(u32 w, int k, u32 bank) {
  return table32<OFF>(__byte_perm(w, bank, BYTE(k)));
}
template <int OFF> __device__ __forceinline__ uint2 look64(u32 w, int k, u32 bank) {
  return table64<OFF>(__byte_perm(w, bank, BYTE(k)));
}
__device__ __forceinline__ u32 low_halves(u32 a, u32 b) { return __byte_perm(a, b, 0x5410); }

// The 6-bit fields of 3 N bytes, little-endian, least significant first; OFF: table of the side.
template <int OFF, int N, int WORDS>
__device__ __forceinline__ void look_sixes(const u32 (&w)[WORDS], u32 (&out)[4 * N], u32 bank) {
  u32 shifted[WORDS];
#pragma unroll
  for (int i = 0; i < WORDS; i++)
    shifted[i] = i + 1 < WORDS ? __funnelshift_r(w[i], w[i + 1], 4) : w[i] >> 4;
#pragma unroll
  for (int k = 0; k < N; k++) {
    const int b0 = 3 * k, b1 = b0 + 1, b2 = b0 + 2;
    out[4 * k] = look32<OFF>(w[b0 / 4], b0 % 4, bank);
    out[4 * k + 1] = look32<OFF + UPPER>(shifted[b0 / 4], b0 % 4, bank);
    out[4 * k + 2] = look32<OFF>(shifted[b1 / 4], b1 % 4, bank);
    out[4 * k + 3] = look32<OFF + UPPER>(w[b2 / 4], b2 % 4, bank);
  }
}

// Code i of a run of N, more than 4 bits each, as the half of a table entry.  At 8 bits the bytes of
// the run are in order, else reversed: code N - 1 is then the lowest field of `w`.  A shift brings
// the field to the low or the high end of a byte, so that few shifted copies of `w` are needed.
template <int BITS> __device__ __forceinline__ bool at_high_end(int i) {
  return BITS == 8 ? false : (i * BITS & (BITS == 6 ? 2 : 1)) != 0;
}
template <int OFF, int BITS, int N, int WORDS>
__device__ __forceinline__ u32 look_code(const u32 (&w)[WORDS], int i, u32 bank) {
  const int field = BITS == 8 ? i : N - 1 - i;
  const int bit = field * BITS - (at_high_end<BITS>(field) ? 8 - BITS : 0), shift = bit % 8, word = bit / 32;
  const u32 x = shift == 0 ? w[word] : word + 1 < WORDS ? __funnelshift_r(w[word], w[word + 1 < WORDS ? word + 1 : word], shift) : w[word] >> shift;
  return look32<OFF>(x, bit % 32 / 8, bank);
}
template <int BITS, int N> __device__ __forceinline__ u32 pair_codes(u32 x, int i, u32 y, int j) {
  return __byte_perm(x, y, (at_high_end<BITS>(N - 1 - i) ? 0x32 : 0x10) | (at_high_end<BITS>(N - 1 - j) ? 0x7600 : 0x5400));
}

// N fields of 10 bits, little-endian, least significant first.
template <int N, int WORDS, int SIZE>
__device__ __forceinline__ void look_tens(const u32 (&w)[WORDS], u32 (&out)[SIZE], u32 bank) {
#pragma unroll
  for (int k = 0; k < N; k++) {
    const int bit = 10 * k - 7;  // entries are 128 bytes
    const int word = max(bit, 0) / 32;
    const u32 x = bit < 0 ? w[0] << 7
        : bit % 32 + 17 > 32 && word + 1 < WORDS ? __funnelshift_r(w[word], w[word + 1 < WORDS ? word + 1 : word], bit % 32)
                                                 : w[word] >> bit % 32;
    out[k] = table32<0>(x & 0x1FF80u | bank);
  }
}
// Every other field of `bits` bits, from the lowest on, in word i of a run of fields.
__device__ constexpr u32 alternate(int bits, int i) {
  u32 mask = 0;
  for (int k = 0; k < 32; k++)
    if ((32 * i + k) / bits % 2 == 0) mask |= 1u << k;
  return mask;
}

// A quarter of the tokens of rows g and g + 8 -> A fragments of all products.
__device__ __forceinline__ void keys(const u32 (&lower)[K_WORDS], const u32 (&upper)[K_WORDS],
                                     u32 (&a)[PRODUCTS][4], u32 bank) {
#if KEY_BITS == 2
  // A byte holds a nibble of either token, so one read gives both rows.
#pragma unroll
  for (int i = 0; i < K_WORDS; i++) {
    const u32 odd = blend(0x0F0F0F0Fu, lower[i], upper[i] << 4), even = blend(0x0F0F0F0Fu, lower[i] >> 4, upper[i]);
#pragma unroll
    for (int k = 0; k < min(4, PRODUCTS - 4 * i); k++) {
      const uint2 x = look64<0>(even, k, bank), y = look64<0>(odd, k, bank);
      a[4 * i + k][0] = x.x, a[4 * i + k][1] = x.y, a[4 * i + k][2] = y.x, a[4 * i + k][3] = y.y;
    }
  }
#else
#pragma unroll
  for (int e = 0; e < 2; e++) {
    u32 pairs[LANE_DIMS];
    const u32(&w)[K_WORDS] = e ? upper : lower;
#if KEY_BITS == 4
#pragma unroll
    for (int i = 0; i < LANE_DIMS; i++) pairs[i] = look32<0>(w[i / 4], i % 4, bank);
#elif KEY_BITS == 3
    u32 backwards[LANE_DIMS];
    look_sixes<0, LANE_DIMS / 4>(w, backwards, bank);
#pragma unroll
    for (int i = 0; i < LANE_DIMS; i++) pairs[i] = backwards[LANE_DIMS - 1 - i];
#elif PAIRS
    u32 backwards[LANE_DIMS];
    look_tens<LANE_DIMS>(w, backwards, bank);
#pragma unroll
    for (int i = 0; i < LANE_DIMS; i++) pairs[i] = backwards[LANE_DIMS - 1 - i];
#else
#pragma unroll
    for (int i = 0; i < LANE_DIMS; i++)
      pairs[i] = pair_codes<KEY_BITS, 2 * LANE_DIMS>(
          look_code<0, KEY_BITS, 2 * LANE_DIMS>(w, 2 * i, bank), 2 * i,
          look_code<0, KEY_BITS, 2 * LANE_DIMS>(w, 2 * i + 1, bank), 2 * i + 1);
#endif
#pragma unroll
    for (int j = 0; j < PRODUCTS; j++) a[j][e] = pairs[2 * j], a[j][2 + e] = pairs[2 * j + 1];
  }
#endif
}

// An eighth of two tokens -> for each dim the pair (first token, second token).  At 2 bits dims come
// in the order 3, 1, 2, 0 of every four, since a register pair that a read fills must stay one.
__device__ __forceinline__ void values(const u32 (&x)[V_WORDS], const u32 (&y)[V_WORDS], u32 (&out)[LANE_DIMS], u32 bank) {
#if VALUE_BITS == 4
#pragma unroll
  for (int i = 0; i < V_WORDS; i++) {
    const u32 odd = blend(0x0F0F0F0Fu, x[i], y[i] << 4), even = blend(0x0F0F0F0Fu, x[i] >> 4, y[i]);
#pragma unroll
    for (int k = 0; k < min(4, LANE_DIMS / 2 - 4 * i); k++) {
      out[8 * i + 2 * k] = look32<V_TABLE>(even, k, bank);
      out[8 * i + 2 * k + 1] = look32<V_TABLE>(odd, k, bank);
    }
  }
#elif VALUE_BITS == 2
#pragma unroll
  for (int i = 0; i < V_WORDS; i++) {
    const u32 odd = blend(0x33333333u, x[i], y[i] << 2);   // nibbles: dims 4k + 3, 4k + 1
    const u32 even = blend(0x33333333u, x[i] >> 2, y[i]);  // dims 4k + 2, 4k
#pragma unroll
    for (int k = 0; k < min(4, LANE_DIMS / 4 - 4 * i); k++) {
      const uint2 a = look64<V_TABLE>(odd, k, bank), b = look64<V_TABLE>(even, k, bank);
      u32* to = out + 16 * i + 4 * k;
      to[0] = a.x, to[1] = a.y, to[2] = b.x, to[3] = b.y;
    }
  }
#elif VALUE_BITS == 3 || PAIRS
  // Even fields of x with the even ones of y, odd with odd.
  u32 even[V_WORDS], odd[V_WORDS];
#pragma unroll
  for (int i = 0; i < V_WORDS; i++) {
    const u32 m = alternate(VALUE_BITS, i);
    const u32 up = i ? __funnelshift_l(y[i ? i - 1 : 0], y[i], VALUE_BITS) : y[i] << VALUE_BITS;
    const u32 down = i + 1 < V_WORDS ? __funnelshift_r(x[i], x[i + 1 < V_WORDS ? i + 1 : i], VALUE_BITS) : x[i] >> VALUE_BITS;
    even[i] = blend(m, x[i], up), odd[i] = blend(m, down, y[i]);
  }
  u32 a[(LANE_DIMS + 7) / 8 * 4], b[(LANE_DIMS + 7) / 8 * 4];  // more than are used if LANE_DIMS is 12
#if PAIRS
  look_tens<LANE_DIMS / 2>(even, a, bank);
  look_tens<LANE_DIMS / 2>(odd, b, bank);
#else
  look_sixes<V_TABLE, (LANE_DIMS + 7) / 8>(even, a, bank);
  look_sixes<V_TABLE, (LANE_DIMS + 7) / 8>(odd, b, bank);
#endif
#pragma unroll
  for (int k = 0; k < LANE_DIMS / 2; k++)
    out[LANE_DIMS - 1 - 2 * k] = a[k], out[LANE_DIMS - 2 - 2 * k] = b[k];
#else
#pragma unroll
  for (int i = 0; i < LANE_DIMS; i++)
    out[i] = pair_codes<VALUE_BITS, LANE_DIMS>(look_code<V_TABLE, VALUE_BITS, LANE_DIMS>(x, i, bank), i,
                                               look_code<V_TABLE, VALUE_BITS, LANE_DIMS>(y, i, bank), i);
#endif
}

// The dim that number i of what `values` gives lane (g, c) belongs to.
__device__ __forceinline__ int dim_of_output(int g, int i) {
  if (SPLIT_EIGHTHS) return i < 8 ? 8 * g + i : 64 + 4 * g + i - 8;
  return LANE_DIMS * g + (VALUE_BITS == 2 ? i & ~3 | 0x0213 >> 4 * (i % 4) & 3 : i);
}

__device__ __forceinline__ void fill_tables(const Args& a, int tid) {
#if PAIRS
#pragma unroll 8
  for (int i = tid; i < TABLE_BYTES / 16; i += 32 * CONSUMERS) {
    const u32 x = pack_half2(a.v_centroids[i >> 3 & 31], a.v_centroids[i >> 8]);
    ((uint4*)dynamic_shared())[i] = make_uint4(x, x, x, x);
  }
#else
  constexpr bool both_halves = !ONE_TABLE || VALUE_BITS == 3;
#pragma unroll 8
  for (int n = tid; n < TABLE_BYTES / (both_halves ? 16 : 32); n += 32 * CONSUMERS) {
    const int i = both_halves ? n : n / 8 * 16 + n % 8, byte = i >> 4 & 255;
    const bool value = ONE_TABLE || i & 8, upper = ONE_TABLE ? i & 8 : i >= 4096;
    const float* c = value ? a.v_centroids : a.k_centroids;
    const int bits = value ? VALUE_BITS : KEY_BITS;
    // K: both codes of one token, the first in the high bits.  V: the first token in the low bits.  A common
    // table is one for V; the query's dims stand in the order that follows from it.
    auto two = [&](int field) {
      const int high = field >> bits, low = field & ((1 << bits) - 1);
      return value ? pack_half2(c[low], c[high]) : pack_half2(c[high], c[low]);
    };
    u32 x, y;
    if (bits == 2) x = two(byte & 15), y = two(byte >> 4);
    else if (bits == 3) x = y = two(upper ? byte >> 2 : byte & 63);
    else if (bits == 4) x = y = two(byte);
    else x = y = pack_half2(c[byte & ((1 << bits) - 1)], c[byte >> (8 - bits)]);
    ((uint4*)dynamic_shared())[i] = make_uint4(x, y, x, y);
  }
#endif
}
