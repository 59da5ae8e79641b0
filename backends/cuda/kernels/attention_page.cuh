// How pages lie in the ring of attention_pages, and how their codes become fragments of products.
//
// Dequantising is a table read: two codes (four at 2 bits) make a byte, the byte and the lane make
// an address by one PRMT, and the table holds one copy of its float16 pairs for each bank, so reads
// never conflict.  Byte value b: K pairs at 256 b, V pairs at 256 b + 128.  From 5 bits on a byte
// holds one code, and the two halves of an entry are for one in its low and one in its high bits.
#pragma once
#include "attention_eighths.cuh"

#ifndef WIDE
#define WIDE 0
#endif
#define CONSUMERS (WIDE ? 16 : 8)  // warps
#define PAGE 16
#define K_VECTOR (D * KEY_BITS / 8)
#define V_VECTOR (D * VALUE_BITS / 8)
#define K_PAGE (PAGE * HEADS * K_VECTOR)
#define V_PAGE (PAGE * HEADS * V_VECTOR)
#define NORM_PAGE (PAGE * HEADS * 4)
#define PAGE_BYTES (K_PAGE + V_PAGE + 2 * NORM_PAGE)
#define STAGE_PAGES (SUB * SHARES)
// Blocks of [head][token] come whole; in the ring are K codes, V codes and norms of all pages of a copy.
#define COPY_PAGES (HEAD_MAJOR ? BLOCK_SIZE / PAGE : 1)
#define AT_V (COPY_PAGES * K_PAGE)
#define AT_KN (COPY_PAGES * (K_PAGE + V_PAGE))
#define AT_VN (AT_KN + COPY_PAGES * NORM_PAGE)
#define PAGE_AT(p, token_bytes) ((p) / COPY_PAGES * COPY_PAGES * PAGE_BYTES + (p) % COPY_PAGES * PAGE * (token_bytes))
#define STAGE_BYTES (PAGE_BYTES * STAGE_PAGES)
#if HEAD_MAJOR
#define K_TOKEN K_VECTOR                  // strides of the ring
#define K_HEAD (COPY_PAGES * PAGE * K_VECTOR)
#define V_TOKEN V_VECTOR
#define V_HEAD (COPY_PAGES * PAGE * V_VECTOR)
#define N_TOKEN 4
#define N_HEAD (COPY_PAGES * PAGE * 4)
#else
#define K_TOKEN (HEADS * K_VECTOR)
#define K_HEAD K_VECTOR
#define V_TOKEN (HEADS * V_VECTOR)
#define V_HEAD V_VECTOR
#define N_TOKEN (HEADS * 4)
#define N_HEAD 4
#endif
#define UPPER 65536                       // second table of 3 bits: the upper 6 bits of a byte
#define TABLE_BYTES (KEY_BITS == 3 || VALUE_BITS == 3 ? 131072 : 65536)
#define PRODUCTS (D / 16)                 // of a tile of keys with a tile of rows; tiles of O
#define K_WORDS ((D * KEY_BITS + 127) / 128)    // a quarter of a vector
#define V_WORDS ((D * VALUE_BITS + 255) / 256)  // an eighth

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

// A quarter of the tokens of rows g and g + 8 -> A fragments of all products.
__device__ __forceinline__ void keys(const u32 (&lower)[K_WORDS], const u32 (&upper)[K_WORDS],
                                     u32 (&a)[PRODUCTS][4], u32 bank) {
#if KEY_BITS == 2
  // A byte holds a nibble of either token, so one read gives both rows.
#pragma unroll
  for (int i = 0; i < K_WORDS; i++) {
    const u32 odd = (lower[i] & 0x0F0F0F0Fu) | (upper[i] << 4 & 0xF0F0F0F0u);
    const u32 even = (lower[i] >> 4 & 0x0F0F0F0Fu) | (upper[i] & 0xF0F0F0F0u);
#pragma unroll
    for (int k = 0; k < 4; k++) {
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
#define V_TABLE 128
__device__ __forceinline__ void values(const u32 (&x)[V_WORDS], const u32 (&y)[V_WORDS], u32 (&out)[LANE_DIMS], u32 bank) {
#if VALUE_BITS == 4
#pragma unroll
  for (int i = 0; i < V_WORDS; i++) {
    const u32 odd = (x[i] & 0x0F0F0F0Fu) | (y[i] << 4 & 0xF0F0F0F0u);
    const u32 even = (x[i] >> 4 & 0x0F0F0F0Fu) | (y[i] & 0xF0F0F0F0u);
#pragma unroll
    for (int k = 0; k < 4; k++) {
      out[8 * i + 2 * k] = look32<V_TABLE>(even, k, bank);
      out[8 * i + 2 * k + 1] = look32<V_TABLE>(odd, k, bank);
    }
  }
#elif VALUE_BITS == 2
#pragma unroll
  for (int i = 0; i < V_WORDS; i++) {
    const u32 odd = (x[i] & 0x33333333u) | (y[i] & 0x33333333u) << 2;   // nibbles: dims 4k + 3, 4k + 1
    const u32 even = (x[i] >> 2 & 0x33333333u) | (y[i] & 0xCCCCCCCCu);  // dims 4k + 2, 4k
#pragma unroll
    for (int k = 0; k < min(4, LANE_DIMS / 4); k++) {
      const uint2 a = look64<V_TABLE>(odd, k, bank), b = look64<V_TABLE>(even, k, bank);
      u32* to = out + 16 * i + 4 * k;
      to[0] = a.x, to[1] = a.y, to[2] = b.x, to[3] = b.y;
    }
  }
#elif VALUE_BITS == 3
  // Even fields of x with the even ones of y, odd with odd.
  u32 even[V_WORDS], odd[V_WORDS];
#pragma unroll
  for (int i = 0; i < V_WORDS; i++) {
    const u32 m = i == 0 ? 0xC71C71C7u : i == 1 ? 0x71C71C71u : 0x1C71C71Cu;
    const u32 up = i ? __funnelshift_l(y[i ? i - 1 : 0], y[i], 3) : y[i] << 3;
    const u32 down = i + 1 < V_WORDS ? __funnelshift_r(x[i], x[i + 1 < V_WORDS ? i + 1 : i], 3) : x[i] >> 3;
    even[i] = (x[i] & m) | (up & ~m);
    odd[i] = (down & m) | (y[i] & ~m);
  }
  u32 a[LANE_DIMS / 2], b[LANE_DIMS / 2];
  look_sixes<V_TABLE, LANE_DIMS / 8>(even, a, bank);
  look_sixes<V_TABLE, LANE_DIMS / 8>(odd, b, bank);
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

template <int WORDS> __device__ __forceinline__ void read_words(u32 (&w)[WORDS], u32 at) {
  if (WORDS == 1) {
    w[0] = ring32(at);
  } else if (WORDS == 2) {
    const uint2 x = ring64(at);
    w[0] = x.x, w[WORDS > 1] = x.y;
  } else {
#pragma unroll
    for (int i = 0; i + 3 < WORDS; i += 4) {
      const uint4 x = ring128(at + 4 * i);
      w[i] = x.x, w[i + 1] = x.y, w[i + 2] = x.z, w[i + 3] = x.w;
    }
  }
}
// Codes that bytes do not hold whole numbers of: the RUN bytes of a run in reverse, so that its dims
// run backwards in little-endian fields.  The run begins at byte `shift` of the word at `at`; what is
// behind its end is not used.  `reversing` is what __byte_perm takes for that shift.
#define KEY_RUN (K_VECTOR / 4)  // bytes
#define VALUE_RUN (V_VECTOR / 8)
#define REVERSED(bits) ((bits) == 3 || 4 < (bits) && (bits) < 8)
template <int RUN> __device__ __forceinline__ u32 reversing(u32 shift) { return 0x0123 + 0x1111 * (RUN % 4 + shift); }
template <int RUN, int WORDS> __device__ __forceinline__ void read_reversed(u32 (&w)[WORDS], u32 at, u32 reversing) {
  constexpr int WHOLE = RUN / 4, READ = RUN % 4 ? WHOLE + 1 + (RUN % 4 == 3) : WHOLE;  // words
  u32 x[READ];
#pragma unroll
  for (int i = 0; i < READ; i++) x[i] = ring32(at + 4 * i);
#pragma unroll
  for (int k = 0; k < WHOLE; k++)
    w[k] = RUN % 4 ? __byte_perm(x[WHOLE - 1 - k], x[RUN % 4 ? WHOLE - k : 0], reversing)
                   : __byte_perm(x[WHOLE - 1 - k], 0, 0x0123);
  if (WORDS > WHOLE) w[WHOLE < WORDS ? WHOLE : 0] = __byte_perm(x[0], x[READ > 1 ? 1 : 0], (reversing ^ 0x4444) & 0x7777);
}
__device__ __forceinline__ void read_keys(u32 (&w)[K_WORDS], u32 at, u32 reversing) {
  if (REVERSED(KEY_BITS)) read_reversed<KEY_RUN>(w, at, reversing);
  else read_words(w, at);
}
__device__ __forceinline__ void read_values(u32 (&w)[V_WORDS], u32 at, u32 shift, u32 reversing) {
  if (REVERSED(VALUE_BITS)) read_reversed<VALUE_RUN>(w, at, reversing);
  else read_words(w, at);
  if (VALUE_RUN == 2) w[0] >>= 8 * shift;
}

// Token of row r of a product, chosen so that reads of V from the ring do not conflict.
__device__ __forceinline__ int token_of_row(int r) {
#if HEAD_MAJOR && VALUE_BITS == 4 && D == 128
  return r ^ (r >> 1 & 1);
#elif HEAD_MAJOR && VALUE_BITS == 4
  return r >> 1 | (r & 1) << 2;
#elif HEAD_MAJOR && VALUE_BITS == 2 && D == 128
  return 0x53427160u >> 4 * r & 7;
#else
  return r;
#endif
}

__device__ __forceinline__ void fill_tables(const Args& a, int tid) {
#pragma unroll 8
  for (int i = tid; i < TABLE_BYTES / 16; i += 32 * CONSUMERS) {
    const int byte = i >> 4 & 255;
    const bool value = i & 8, upper = i >= 4096;
    const float* c = value ? a.v_centroids : a.k_centroids;
    const int bits = value ? VALUE_BITS : KEY_BITS;
    // K: both codes of one token, the first in the high bits.  V: the first token in the low bits.
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
}
