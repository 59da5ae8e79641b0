// How pages lie in the ring of attention_pages, and how their codes become fragments of products.
//
// Dequantising is a table read: two codes (four at 2 bits) make a byte, the byte and the lane make
// an address by one PRMT, and the table holds one copy of its float16 pairs for each bank, so reads
// never conflict.  Byte value b: K pairs at 256 b, V pairs at 256 b + 128, or the same ones.  From 5 bits on a byte
// holds one code, and the two halves of an entry are for one in its low and one in its high bits.
#pragma once
#include "attention_eighths.cuh"

#ifndef WIDE
#define WIDE 0
#endif
#define CONSUMERS (HEADS * SHARES)  // warps
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
#ifndef KEY_REGISTERS
#define KEY_REGISTERS 0                   // words of a quarter of a vector whose codes the registers decode
#endif
#ifndef VALUE_REGISTERS
#define VALUE_REGISTERS 0                 // of the two pairs of tokens
#endif
#define ONE_TABLE (!WIDE && KEY_BITS == VALUE_BITS)  // for keys and values
#define V_TABLE (ONE_TABLE ? 0 : 128)
#define UPPER (ONE_TABLE ? 128 : 65536)   // second table of 3 bits: the upper 6 bits of a byte
#ifndef PAIRS
#define PAIRS 0                           // one table of pairs of 5 bits each, 10 bits of address
#endif
#define TABLE_BYTES (PAIRS || !ONE_TABLE && (KEY_BITS == 3 || VALUE_BITS == 3) ? 131072 : 65536)
static_assert(!PAIRS || ONE_TABLE && KEY_BITS == 5, "tables");
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

// At 2 bits registers can be the table: four codes, a nibble each, select the high bytes of four float16,
// whose low bytes are all the same.
struct Levels {
  u32 high, low;
};
__device__ __forceinline__ Levels load_levels(const float* centroids) {
  const u32 a = pack_half2(centroids[0], centroids[1]), b = pack_half2(centroids[2], centroids[3]);
  return {bytes_of(a, b, 0x7531), bytes_of(a, 0, 0x0000)};
}
// Nibbles of the selector's low half -> the pairs of the first two and of the last two.
__device__ __forceinline__ void select_pairs(const Levels& levels, u32 selector, u32& first, u32& second) {
  const u32 high = bytes_of(levels.high, 0, selector);
  first = bytes_of(high, levels.low, 0x1404), second = bytes_of(high, levels.low, 0x3424);
}

// The 10-bit fields of N words, little-endian, least significant first.
template <int N, int WORDS> __device__ __forceinline__ void look_tens(const u32 (&w)[WORDS], u32 (&out)[N], u32 bank) {
#pragma unroll
  for (int k = 0; k < N; k++) {
    const int bit = 10 * k - 7;  // entries are 128 bytes
    const u32 x = bit < 0 ? w[0] << 7
        : bit % 32 + 17 > 32 && bit / 32 + 1 < WORDS ? __funnelshift_r(w[bit / 32], w[bit / 32 + 1 < WORDS ? bit / 32 + 1 : 0], bit % 32)
                                                     : w[bit / 32] >> bit % 32;
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
                                     u32 (&a)[PRODUCTS][4], u32 bank, const Levels& levels) {
#if KEY_BITS == 2
#pragma unroll
  for (int i = 0; i < KEY_REGISTERS; i++)
#pragma unroll
    for (int e = 0; e < 2; e++) {
      const u32 w = e ? upper[i] : lower[i], odd = w & 0x33333333u, even = w >> 2 & 0x33333333u;
#pragma unroll
      for (int k = 0; k < 4; k += 2) {
        select_pairs(levels, odd >> 8 * k, a[4 * i + k][e], a[4 * i + k + 1][e]);
        select_pairs(levels, even >> 8 * k, a[4 * i + k][2 + e], a[4 * i + k + 1][2 + e]);
      }
    }
  // A byte holds a nibble of either token, so one read gives both rows.
#pragma unroll
  for (int i = KEY_REGISTERS; i < K_WORDS; i++) {
    const u32 odd = blend(0x0F0F0F0Fu, lower[i], upper[i] << 4), even = blend(0x0F0F0F0Fu, lower[i] >> 4, upper[i]);
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
#elif PAIRS
    u32 backwards[LANE_DIMS];
    look_tens(w, backwards, bank);
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
template <bool SELECTED>
__device__ __forceinline__ void values(const u32 (&x)[V_WORDS], const u32 (&y)[V_WORDS], u32 (&out)[LANE_DIMS], u32 bank,
                                       const Levels& levels) {
#if VALUE_BITS == 4
#pragma unroll
  for (int i = 0; i < V_WORDS; i++) {
    const u32 odd = blend(0x0F0F0F0Fu, x[i], y[i] << 4), even = blend(0x0F0F0F0Fu, x[i] >> 4, y[i]);
#pragma unroll
    for (int k = 0; k < 4; k++) {
      out[8 * i + 2 * k] = look32<V_TABLE>(even, k, bank);
      out[8 * i + 2 * k + 1] = look32<V_TABLE>(odd, k, bank);
    }
  }
#elif VALUE_BITS == 2
  if (SELECTED) {
#pragma unroll
    for (int i = 0; i < V_WORDS; i++) {
      const u32 xs[2] = {x[i] & 0x33333333u, x[i] >> 2 & 0x33333333u};
      const u32 ys[2] = {y[i] & 0x33333333u, y[i] >> 2 & 0x33333333u};
#pragma unroll
      for (int e = 0; e < 2; e++) {
        const u32 later = blend(0x0F0F0F0Fu, xs[e], ys[e] << 4), earlier = blend(0x0F0F0F0Fu, xs[e] >> 4, ys[e]);
#pragma unroll
        for (int k = 0; k < min(4, LANE_DIMS / 4); k += 2) {
          u32* to = out + 16 * i + 4 * k + 2 * e;
          select_pairs(levels, later >> 8 * k, to[0], to[4]);
          select_pairs(levels, earlier >> 8 * k, to[1], to[5]);
        }
      }
    }
    return;
  }
#pragma unroll
  for (int i = 0; i < V_WORDS; i++) {
    const u32 odd = blend(0x33333333u, x[i], y[i] << 2);   // nibbles: dims 4k + 3, 4k + 1
    const u32 even = blend(0x33333333u, x[i] >> 2, y[i]);  // dims 4k + 2, 4k
#pragma unroll
    for (int k = 0; k < min(4, LANE_DIMS / 4); k++) {
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
  u32 a[LANE_DIMS / 2], b[LANE_DIMS / 2];
#if PAIRS
  look_tens(even, a, bank);
  look_tens(odd, b, bank);
#else
  look_sixes<V_TABLE, LANE_DIMS / 8>(even, a, bank);
  look_sixes<V_TABLE, LANE_DIMS / 8>(odd, b, bank);
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

// The dim of the lane's that number i of what `values` gives belongs to.
__device__ __forceinline__ int dim_of_output(int i) {
  return VALUE_BITS == 2 ? i & ~3 | 0x0213 >> 4 * (i % 4) & 3 : i;
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

// Where lane (g, c) of a warp finds its codes and norms in a stage whose ring begins at `ring`: of keys a
// quarter of the tokens of rows g and g + 8, of values an eighth of those of rows 2c, 2c + 1 and 8 further.
struct Places {
  int token;         // of row g
  u32 keys, norms;   // of row g
  u32 values[2];     // of rows 2c and 2c + 1
  u32 v_shift, k_reversing, v_reversing, k_bank, v_bank;
};
__device__ __forceinline__ Places places_of(u32 ring, int head, int page, int lane) {
  const int g = lane >> 2, c = lane & 3, row_token = token_of_row(g);
  const u32 v_base = ring + PAGE_AT(page, V_TOKEN) + AT_V + head * V_HEAD + (g * VALUE_RUN & ~3);
  const u32 v_shift = g * VALUE_RUN & 3;
  return {row_token,
          ring + PAGE_AT(page, K_TOKEN) + row_token * K_TOKEN + head * K_HEAD + (c * KEY_RUN & ~3),
          ring + PAGE_AT(page, N_TOKEN) + AT_KN + row_token * N_TOKEN + head * N_HEAD,
          {v_base + token_of_row(2 * c) * V_TOKEN, v_base + token_of_row(2 * c + 1) * V_TOKEN},
          v_shift, reversing<KEY_RUN>(c * KEY_RUN & 3), reversing<VALUE_RUN>(v_shift),
          (u32)here(KEY_BITS == 2 ? (lane & 15) * 8 : lane * 4), (u32)here(VALUE_BITS == 2 ? (lane & 15) * 8 : lane * 4)};
}

__device__ __forceinline__ void fill_tables(const Args& a, int tid) {
#if PAIRS
#pragma unroll 8
  for (int i = tid; i < TABLE_BYTES / 16; i += 32 * CONSUMERS) {
    const u32 x = pack_half2(a.v_centroids[i >> 3 & 31], a.v_centroids[i >> 8]);
    ((uint4*)dynamic_shared())[i] = make_uint4(x, x, x, x);
  }
  return;
#endif
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
}
