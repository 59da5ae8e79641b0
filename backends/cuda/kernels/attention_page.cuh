// How pages lie in the ring of attention_pages, and how their codes become fragments of products.
//
// Dequantising is a table read: two codes (four at 2 bits) make a byte, the byte and the lane make
// an address by one PRMT, and the table holds one copy of its float16 pairs for each bank, so reads
// never conflict.  Byte value b: K pairs at 256 b, V pairs at 256 b + 128.
#pragma once
#include "attention_common.cuh"

#define CONSUMERS 8
#define PAGE 16
#define K_VECTOR (D * KEY_BITS / 8)
#define V_VECTOR (D * VALUE_BITS / 8)
#define K_PAGE (PAGE * HEADS * K_VECTOR)
#define V_PAGE (PAGE * HEADS * V_VECTOR)
#define NORM_PAGE (PAGE * HEADS * 4)
#define AT_V K_PAGE                       // within a page of the ring
#define AT_KN (K_PAGE + V_PAGE)
#define AT_VN (AT_KN + NORM_PAGE)
#define PAGE_BYTES (AT_VN + NORM_PAGE)
#define STAGE_PAGES (SUB * SHARES)
#define STAGE_BYTES (PAGE_BYTES * STAGE_PAGES)
#if HEAD_MAJOR
#define K_TOKEN K_VECTOR                  // strides of the ring
#define K_HEAD (PAGE * K_VECTOR)
#define V_TOKEN V_VECTOR
#define V_HEAD (PAGE * V_VECTOR)
#define N_TOKEN 4
#define N_HEAD (PAGE * 4)
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
#define LANE_DIMS (D / 8)                 // of a lane, where 8 lanes share a row
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
      pairs[i] = low_halves(look32<0>(w[i / 2], i % 2 * 2, bank), look32<0>(w[i / 2], i % 2 * 2 + 1, bank));
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
  const u32 odd = (x[0] & 0x33333333u) | (y[0] & 0x33333333u) << 2;   // nibbles: dims 4k + 3, 4k + 1
  const u32 even = (x[0] >> 2 & 0x33333333u) | (y[0] & 0xCCCCCCCCu);  // dims 4k + 2, 4k
#pragma unroll
  for (int k = 0; k < LANE_DIMS / 4; k++) {
    const uint2 a = look64<V_TABLE>(odd, k, bank), b = look64<V_TABLE>(even, k, bank);
    out[4 * k] = a.x, out[4 * k + 1] = a.y, out[4 * k + 2] = b.x, out[4 * k + 3] = b.y;
  }
#elif VALUE_BITS == 3
  // Even fields of x with the even ones of y, odd with odd.
  const u32 m0 = 0xC71C71C7u, m1 = 0x71C71C71u;
#if V_WORDS == 2
  const u32 even[2] = {(x[0] & m0) | (y[0] << 3 & ~m0), (x[1] & m1) | (__funnelshift_l(y[0], y[1], 3) & ~m1)};
  const u32 odd[2] = {(__funnelshift_r(x[0], x[1], 3) & m0) | (y[0] & ~m0), (x[1] >> 3 & m1) | (y[1] & ~m1)};
#else
  const u32 even[1] = {(x[0] & m0) | (y[0] << 3 & ~m0)}, odd[1] = {(x[0] >> 3 & m0) | (y[0] & ~m0)};
#endif
  u32 a[LANE_DIMS / 2], b[LANE_DIMS / 2];
  look_sixes<V_TABLE, LANE_DIMS / 8>(even, a, bank);
  look_sixes<V_TABLE, LANE_DIMS / 8>(odd, b, bank);
#pragma unroll
  for (int k = 0; k < LANE_DIMS / 2; k++)
    out[LANE_DIMS - 1 - 2 * k] = a[k], out[LANE_DIMS - 2 - 2 * k] = b[k];
#else
#pragma unroll
  for (int i = 0; i < LANE_DIMS; i++)
    out[i] = low_halves(look32<V_TABLE>(x[i / 4], i % 4, bank), look32<V_TABLE>(y[i / 4], i % 4, bank));
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
// At 3 bits the bytes are reversed: dims then run backwards in little-endian fields of 3 bits.  A
// run of 3, 6 or 12 bytes begins at byte `shift` of the word at `at`; what is behind it is not used.
template <int WORDS> __device__ __forceinline__ void read_threes(u32 (&w)[WORDS], u32 at, u32 shift) {
  if (WORDS == 3) {
    w[0] = __byte_perm(ring32(at + 8), 0, 0x0123);
    w[WORDS > 1] = __byte_perm(ring32(at + 4), 0, 0x0123);
    w[WORDS > 2 ? 2 : 0] = __byte_perm(ring32(at), 0, 0x0123);
  } else {
    const u32 x = ring32(at), y = ring32(at + 4);
    if (WORDS == 2) {  // from an even byte
      w[0] = __byte_perm(x, y, shift ? 0x4567 : 0x2345);
      w[WORDS > 1] = __byte_perm(x, y, shift ? 0x0023 : 0x0001);
    } else {
      w[0] = __byte_perm(x, y, 0x0012 + 0x0111 * shift);
    }
  }
}
#define KEY_RUN (K_VECTOR / 4)  // bytes
#define VALUE_RUN (V_VECTOR / 8)
__device__ __forceinline__ void read_keys(u32 (&w)[K_WORDS], u32 at, u32 shift) {
  if (KEY_BITS == 3) read_threes(w, at, shift);
  else read_words(w, at);
}
__device__ __forceinline__ void read_values(u32 (&w)[V_WORDS], u32 at, u32 shift) {
  if (VALUE_BITS == 3) read_threes(w, at, shift);
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
    else x = y = pack_half2(c[byte], 0.f);
    ((uint4*)dynamic_shared())[i] = make_uint4(x, y, x, y);
  }
}
