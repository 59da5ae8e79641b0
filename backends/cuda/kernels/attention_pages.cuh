// attention_pages: partial attention over token ranges for head_dim 64 and 128, codes of 2, 3, 4 or 8 bits
// and pages that are contiguous in memory; compute capability 9.0, with ROW_TILES 4 9.0a.
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
// Dequantising is a table read: two codes (four at 2 bits) make a byte, the byte and the lane make
// an address by one PRMT, and the table holds one copy of its float16 pairs for each bank, so reads
// never conflict.  Byte value b: K pairs at 256 b, V pairs at 256 b + 128.
//
// Macros: D, KEY_BITS, VALUE_BITS, BLOCK_SIZE, HEADS (of a block), SHARES (8 / HEADS), SUB,
// HEAD_MAJOR (a page is [head][token], else [token][head]), UNIT = 16 SUB SHARES, NUM_SMEM (bytes),
// ROW_TILES (1, 2 or 4), FUSED (up to FEW_SEQUENCES sequences, Hadamard rotations).
#pragma once
#include "attention_merge.cuh"

#define CONSUMERS 8
#define WORKING_THREADS (32 * (CONSUMERS + 1))
#define REGISTERS_MOVED (ROW_TILES > 2)  // from the producer's group of warps to the consumers
#define PAGES_THREADS (REGISTERS_MOVED ? 32 * (CONSUMERS + 4) : WORKING_THREADS)
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
#define BARRIERS_AT TABLE_BYTES
#define PLAN_AT (BARRIERS_AT + 512)
#define PLAN_BYTES (FUSED ? 16 * FEW_SEQUENCES + 128 : 0)
#define ROWS_AT (PLAN_AT + PLAN_BYTES)
#define RING_AT (ROWS_AT + CONSUMERS * (int)sizeof(TileRows))
#define FITTING_STAGES ((NUM_SMEM - RING_AT) / STAGE_BYTES)
#define STAGES (FITTING_STAGES > 24 ? 24 : FITTING_STAGES)
#define VALUES_EARLY (KEY_BITS < 4 && VALUE_BITS < 4)  // read V codes together with K codes
#define PRODUCTS (D / 16)                 // of a tile of keys with a tile of rows; tiles of O
#define LANE_DIMS (D / 8)                 // of a lane, where 8 lanes share a row
#define K_WORDS ((D * KEY_BITS + 127) / 128)    // a quarter of a vector
#define V_WORDS ((D * VALUE_BITS + 255) / 256)  // an eighth
#define LAZY 5.f                          // raise the maximum only if exceeded by 2^5
#define NORM_LIMIT 1024.f                 // 2^5 * 2^10 fits float16

#define QUERY_IN_REGISTERS (ROW_TILES <= 2)  // else read from shared memory each time

// What a consumer warp keeps of the query rows of a tile.
struct TileRows {
  union {
    uint2 query[ROW_TILES][PRODUCTS][32];   // [8 rows][product][lane] fragments
    u16 part[8 * ROW_TILES][D];      // at the end, of a share that is not the first
  };
  float2 scales[8 * ROW_TILES];      // of this part
  float shifts[8 * ROW_TILES];       // what the key offset adds to the scores
  float factors[8];                  // of the scores, for each 4 rows
};

static_assert(sizeof(MergeSpace) <= CONSUMERS * sizeof(TileRows) && RING_AT % 128 == 0, "shared memory");
static_assert(MERGE_WARPS == CONSUMERS, "merge_rows");
static_assert((D == 64 || D == 128) && HEADS * SHARES == CONSUMERS && STAGES >= 2, "attention_pages");

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

// ---- the producer warp

__device__ __forceinline__ void produce(const Args& a, const i64* plan, u32 smem, int lane) {
  const u32 full = smem + BARRIERS_AT, empty = full + 8 * STAGES;
  // Four lanes a page: K codes, V codes, norms of K, norms of V.
  const int head = blockIdx.y * HEADS, kind = lane & 3;
  const u8* from = kind == 0 ? a.k_packed + head * a.k_head_stride
      : kind == 1            ? a.v_packed + head * a.v_head_stride
      : kind == 2            ? (const u8*)(a.k_norms + head * a.kn_head_stride)
                             : (const u8*)(a.v_norms + head * a.vn_head_stride);
  const i64 block_stride = kind == 0 ? a.k_block_stride : kind == 1 ? a.v_block_stride
      : kind == 2 ? 4 * a.kn_block_stride : 4 * a.vn_block_stride;
  const i64 token_stride = kind == 0 ? a.k_token_stride : kind == 1 ? a.v_token_stride
      : kind == 2 ? 4 * a.kn_token_stride : 4 * a.vn_token_stride;
  const u32 bytes = kind == 0 ? K_PAGE : kind == 1 ? V_PAGE : NORM_PAGE;
  const u32 at = kind == 0 ? 0 : kind == 1 ? AT_V : kind == 2 ? AT_KN : AT_VN;
  int stage = 0, phase = 1;
  Walk walk = start_walk(a, plan);
  Segment segment;
  while (next_segment(a, walk, segment)) {
    // Pages that some row of the sequence sees; others are neither looked up nor read.
    const int high_page = (segment.q.context - 1) / PAGE;
    const int low = a.window ? segment.q.position + 1 - a.window : 0;
    const int low_page = min(low > 0 ? low / PAGE : 0, high_page);
    const int* table = a.block_tables + segment.s * a.table_row_stride;
    auto page_id = [&](int page) {  // block * (BLOCK_SIZE / PAGE) + page within the block
      page = max(low_page, min(page, high_page));
      const i64 block = table[(i64)(page / (BLOCK_SIZE / PAGE)) * a.table_step];
      return block * (BLOCK_SIZE / PAGE) + page % (BLOCK_SIZE / PAGE);
    };
    int base = segment.begin * STAGE_PAGES;
    i64 ids = page_id(base + lane), next = page_id(base + 32 + lane);
    for (int u = segment.begin; u < segment.begin + segment.count; u++) {
      if (u * STAGE_PAGES - base == 32) {
        base += 32;
        ids = next;
        next = page_id(base + 32 + lane);
      }
      barrier_wait(empty + 8 * stage, phase);
      if (lane == 0) barrier_expect(full + 8 * stage, STAGE_BYTES);
      __syncwarp();
      const u32 to = smem + RING_AT + stage * STAGE_BYTES + at;
#pragma unroll
      for (int first = 0; first < STAGE_PAGES; first += 8) {
        const int i = first + (lane >> 2);
        const i64 id = __shfl_sync(FULL_WARP, ids, u * STAGE_PAGES + i - base);
        const i64 block = id / (BLOCK_SIZE / PAGE), token = id % (BLOCK_SIZE / PAGE) * PAGE;
        if (i < STAGE_PAGES)
          bulk_copy(to + i * PAGE_BYTES, from + block * block_stride + token * token_stride, bytes, full + 8 * stage);
      }
      if (++stage == STAGES) stage = 0, phase ^= 1;
    }
  }
}

// ---- the consumer warps

__device__ __forceinline__ void unpack_halves(uint4 x, float* v) {
  const u32 w[4] = {x.x, x.y, x.z, x.w};
#pragma unroll
  for (int k = 0; k < 8; k++) v[k] = half_to_float((u16)(w[k / 2] >> k % 2 * 16));
}
__device__ __forceinline__ void store_words(uint4* to, const u32 (&w)[PRODUCTS]) {
#pragma unroll
  for (int k = 0; k < PRODUCTS / 4; k++) to[k] = make_uint4(w[4 * k], w[4 * k + 1], w[4 * k + 2], w[4 * k + 3]);
}
#if SHARES > 1
// Combine the part of the first share, in global memory, with those of the others, shares[1 ..].
__device__ __forceinline__ void add_shares(const Args& a, i64 part, int count, const TileRows* shares, int lane) {
  for (int first = 0; first < count; first += 4) {  // 8 lanes a row
    const int r = min(first + (lane >> 3), count - 1);
    const i64 row = part * a.tile_rows + r;
    u16* to = a.parts + row * D + LANE_DIMS * (lane & 7);
    float2 scale[SHARES];
    float top = NEVER, most = 0.f, total = 0.f, v[LANE_DIMS] = {};
#pragma unroll
    for (int s = 0; s < SHARES; s++) {
      scale[s] = s ? shares[s].scales[r] : a.part_scales[row];
      top = fmaxf(top, scale[s].x);
    }
#pragma unroll
    for (int s = 0; s < SHARES; s++)
      if (scale[s].x > NEVER) most = fmaxf(most, scale[s].y);
#pragma unroll
    for (int s = 0; s < SHARES; s++) {
      const float weight = exp2_approx(scale[s].x - top), factor = most > 0.f ? weight * (scale[s].y / most) : 0.f;
      const uint4* from = (const uint4*)(s ? shares[s].part[r] + LANE_DIMS * (lane & 7) : to);
      float x[LANE_DIMS];
#pragma unroll
      for (int k = 0; k < LANE_DIMS / 8; k++) unpack_halves(from[k], x + 8 * k);
#pragma unroll
      for (int k = 0; k < LANE_DIMS; k++) v[k] = fmaf(factor, x[k], v[k]);
      total += weight;
    }
    const float inverse = total > 0.f ? 1.f / total : 0.f;
    u32 w[PRODUCTS];
#pragma unroll
    for (int k = 0; k < PRODUCTS; k++) w[k] = pack_half2(v[2 * k] * inverse, v[2 * k + 1] * inverse);
    __syncwarp();  // all have read what is overwritten
    if (first + (lane >> 3) < count) {
      store_words((uint4*)to, w);
      if ((lane & 7) == 0)
        a.part_scales[row] = make_float2(total > 0.f ? top + log2_approx(total) : __uint_as_float(0xff800000u), most);
    }
  }
}
#endif

// Dims of a row, from LANE_DIMS (lane % 8) on, to the fragments of row r of 8.
__device__ __forceinline__ void put_fragments(uint2 (&query)[PRODUCTS][32], const float (&v)[LANE_DIMS], int r, int lane) {
  const int c = (lane & 7) >> 1, product = (lane & 1) * (LANE_DIMS / 4);
#pragma unroll
  for (int k = 0; k < LANE_DIMS / 4; k++)
    query[product + k][4 * r + c] =
        make_uint2(pack_half2(v[4 * k], v[4 * k + 1]), pack_half2(v[4 * k + 2], v[4 * k + 3]));
}

#if FUSED
// Dims of a row of the query, 16 bytes at a time.
__device__ __forceinline__ void load_dims(const Args& a, i64 at, float (&v)[LANE_DIMS]) {
  if (a.query_dtype == FLOAT32) {
#pragma unroll
    for (int i = 0; i < LANE_DIMS / 4; i++) {
      const uint4 x = ((const uint4*)((const float*)a.query + at))[i];
      v[4 * i] = __uint_as_float(x.x), v[4 * i + 1] = __uint_as_float(x.y);
      v[4 * i + 2] = __uint_as_float(x.z), v[4 * i + 3] = __uint_as_float(x.w);
    }
    return;
  }
#pragma unroll
  for (int i = 0; i < LANE_DIMS / 8; i++) {
    const uint4 x = ((const uint4*)((const u16*)a.query + at))[i];
    if (a.query_dtype == FLOAT16) {
      unpack_halves(x, v + 8 * i);
    } else {
      const u32 w[4] = {x.x, x.y, x.z, x.w};
#pragma unroll
      for (int k = 0; k < 8; k++) v[8 * i + k] = __uint_as_float(k % 2 ? w[k / 2] & 0xffff0000u : w[k / 2] << 16);
    }
  }
}
// Signs of LANE_DIMS dims in a step of the keys' rotation, set = negative.
__device__ __forceinline__ u32 key_signs(const Args& a, int step, int part) {
  return a.k_signs[step * SIGN_WORDS + LANE_DIMS * part / 32] >> LANE_DIMS * part % 32 & ((1u << LANE_DIMS) - 1);
}
__device__ __forceinline__ u64 early_key_signs(const Args& a, int part) {
  u64 early = 0;  // LANE_DIMS bits a step
#pragma unroll
  for (int k = 0; k < EARLY_STEPS; k++)
    if (k < a.k_steps) early |= (u64)key_signs(a, k, part) << LANE_DIMS * k;
  return early;
}
// Rotate four rows from row `first` of a tile on, 8 lanes each.
__device__ __forceinline__ void rotate_rows(const Args& a, const Segment& segment, const Rows& rows, int kv_head,
                                            TileRows& to, int first, int lane, u64 early) {
  const int part = lane & 7, r = first + (lane >> 3), heads = a.num_kv_heads * a.group;
  const u32 row = (u32)query_row(a, segment, rows, r < rows.count ? r : 0, kv_head);
  float v[LANE_DIMS];
  load_dims(a, row / heads * a.q_token_stride + row % heads * a.q_head_stride + LANE_DIMS * part, v);
  float shift = 0.f;
  if (a.key_offset) {
    const float* o = offset_of(a, segment.s, kv_head) + LANE_DIMS * part;
#pragma unroll
    for (int i = 0; i < LANE_DIMS; i++) shift = fmaf(v[i], o[i], shift);
  }
#pragma unroll
  for (int k = 1; k < 8; k <<= 1) shift += __shfl_xor_sync(FULL_WARP, shift, k);
  if (part == 0) to.shifts[r] = shift * a.offset_factor;
  const float gain = rsqrtf((float)D);
#pragma unroll 1
  for (int step = 0; step < a.k_steps; step++) {
    const u32 bits = step < EARLY_STEPS ? (u32)(early >> LANE_DIMS * step) : key_signs(a, step, part);
#pragma unroll
    for (int i = 0; i < LANE_DIMS; i++) v[i] *= bits >> i & 1 ? -gain : gain;
#pragma unroll
    for (int h = 1; h < LANE_DIMS; h *= 2)
#pragma unroll
      for (int i = 0; i < LANE_DIMS; i++)
        if (!(i & h)) {
          const float y = v[i], z = v[i + h];
          v[i] = y + z;
          v[i + h] = y - z;
        }
#pragma unroll
    for (int h = 1; h < 8; h *= 2) {
      const float sign = part & h ? -1.f : 1.f;
#pragma unroll
      for (int i = 0; i < LANE_DIMS; i++) v[i] = fmaf(v[i], sign, __shfl_xor_sync(FULL_WARP, v[i], h));
    }
  }
  float largest = 0.f;
#pragma unroll
  for (int i = 0; i < LANE_DIMS; i++) largest = fmaxf(largest, fabsf(v[i]));
  const PowerOfTwo up = power_below(warp_max(r < rows.count ? largest : 0.f));
  if (lane == 0) to.factors[first / 4] = a.score_factor / up.first / up.second;
#pragma unroll
  for (int i = 0; i < LANE_DIMS; i++) v[i] = r < rows.count ? up.times(v[i]) : 0.f;
  put_fragments(to.query[first / 8], v, r & 7, lane);
}
#endif
// Four rows that attention_query has rotated, brought to a common factor.
__device__ __forceinline__ void load_rows(const Args& a, const Segment& segment, const Rows& rows, int kv_head,
                                          TileRows& to, int first, int lane) {
  const int r = first + (lane >> 3);
  const i64 row = query_row(a, segment, rows, r < rows.count ? r : 0, kv_head);
  const float2 factor = r < rows.count ? a.q_factors[row] : make_float2(0.f, 0.f);
  if ((lane & 7) == 0) to.shifts[r] = factor.y;
  const float largest = warp_max(factor.x);  // powers of two times a constant: the ratio is exact
  if (lane == 0) to.factors[first / 4] = largest;
  const float ratio = largest > 0.f ? factor.x / largest : 0.f;
  const uint4* from = (const uint4*)(a.q_rows + row * Q_PITCH + LANE_DIMS * (lane & 7));
  float v[LANE_DIMS];
#pragma unroll
  for (int i = 0; i < LANE_DIMS / 8; i++) unpack_halves(from[i], v + 8 * i);
#pragma unroll
  for (int i = 0; i < LANE_DIMS; i++) v[i] *= ratio;
  put_fragments(to.query[first / 8], v, r & 7, lane);
}
// All rows of a tile to shared memory, with one factor of the scores, which is returned.
__device__ __forceinline__ float stage_rows(const Args& a, const Segment& segment, const Rows& rows, int kv_head,
                                            TileRows& to, int lane, u64 early) {
  __syncwarp();  // those of the segment before are read
#pragma unroll 1
  for (int first = 0; first < 8 * ROW_TILES; first += 4) {
    if (first < rows.count) {
#if FUSED
      rotate_rows(a, segment, rows, kv_head, to, first, lane, early);
#else
      load_rows(a, segment, rows, kv_head, to, first, lane);
#endif
    } else {
      const float zeros[LANE_DIMS] = {};
      put_fragments(to.query[first / 8], zeros, (first & 7) + (lane >> 3), lane);
      if (lane == 0) to.factors[first / 4] = 0.f;
    }
  }
  __syncwarp();
  float factor = 0.f;
#pragma unroll
  for (int i = 0; i < 2 * ROW_TILES; i++) factor = fmaxf(factor, to.factors[i]);
#pragma unroll 1
  for (int tile = 0; tile < ROW_TILES; tile++) {
    const float own = to.factors[2 * tile + (lane >> 4)], ratio = own > 0.f ? own / factor : 1.f;
    if (!__any_sync(FULL_WARP, ratio != 1.f)) continue;
#pragma unroll
    for (int j = 0; j < PRODUCTS; j++) {
      uint2& x = to.query[tile][j][lane];
      x = make_uint2(pack_half2(half_to_float((u16)x.x) * ratio, half_to_float((u16)(x.x >> 16)) * ratio),
                     pack_half2(half_to_float((u16)x.y) * ratio, half_to_float((u16)(x.y >> 16)) * ratio));
    }
  }
  __syncwarp();
  return factor;
}

__device__ __forceinline__ void consume(const Args& a, const i64* plan, u32 smem, int lane, int warp, u64 early) {
  const u32 full = smem + BARRIERS_AT, empty = full + 8 * STAGES;
  const int g = lane >> 2, c = lane & 3, head = warp / SHARES, share = warp % SHARES;
  const int kv_head = blockIdx.y * HEADS + head;
  const u32 k_bank = KEY_BITS == 2 ? (lane & 15) * 8 : lane * 4;
  const u32 v_bank = VALUE_BITS == 2 ? (lane & 15) * 8 : lane * 4;
  const int row_token = token_of_row(g);
  const u32 ring = smem + RING_AT + share * SUB * PAGE_BYTES;
  const u32 k_at = ring + row_token * K_TOKEN + head * K_HEAD + (c * KEY_RUN & ~3);
  const u32 n_at = ring + AT_KN + row_token * N_TOKEN + head * N_HEAD;
  const u32 v_base = ring + AT_V + head * V_HEAD + (g * VALUE_RUN & ~3);
  const u32 v_at[2] = {v_base + token_of_row(2 * c) * V_TOKEN, v_base + token_of_row(2 * c + 1) * V_TOKEN};
  const u32 k_shift = c * KEY_RUN & 3, v_shift = g * VALUE_RUN & 3;
  TileRows& mine = ((TileRows*)(dynamic_shared() + ROWS_AT))[warp];

  u32 stage = 0, phase = 0;
  Walk walk = start_walk(a, plan);
  Segment segment;
#pragma unroll 1
  while (next_segment(a, walk, segment)) {
    const Rows rows = rows_of(a, segment);
    const float q_factor = stage_rows(a, segment, rows, kv_head, mine, lane, early);
#if QUERY_IN_REGISTERS
    uint2 qb[ROW_TILES][PRODUCTS];
#pragma unroll
    for (int n = 0; n < ROW_TILES; n++)
#pragma unroll
      for (int j = 0; j < PRODUCTS; j++) qb[n][j] = mine.query[n][j][lane];
#endif
    float o[ROW_TILES][PRODUCTS][4], top[ROW_TILES][2], sum[ROW_TILES][2];
#pragma unroll
    for (int n = 0; n < ROW_TILES; n++)
#pragma unroll
      for (int e = 0; e < 2; e++) top[n][e] = NEVER, sum[n][e] = 0.f;
    float up = 1.2676506e30f;  // 2^100; see NORM_LIMIT below
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
      const u32 page = at + p * PAGE_BYTES;
#pragma unroll
      for (int e = 0; e < 4; e++) read_values(vw[p][e], v_at[e & 1] + page + (e >> 1) * 8 * V_TOKEN, v_shift);
    };
    auto release = [&] {  // all reads of this stage are done
      __syncwarp();
      if (lane == 0) barrier_arrive(empty + 8 * stage);
    };
#pragma unroll
    for (int p = 0; p < SUB; p++) {
      const u32 page = at + p * PAGE_BYTES;
#pragma unroll
      for (int e = 0; e < 2; e++) {
        read_keys(kw[p][e], k_at + page + e * 8 * K_TOKEN, k_shift);
        kn[p][e] = __uint_as_float(ring32(n_at + page + e * 8 * N_TOKEN));
        vn[p][e] = __uint_as_float(ring32(n_at + page + e * 8 * N_TOKEN + NORM_PAGE));
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
      keys(kw[p][0], kw[p][1], f, k_bank);
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
          const uint2 q = mine.query[n][j][lane];
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
            const int t = first_token + p * PAGE + row_token + 8 * e;
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
          const int t = first_token + p * PAGE + row_token + 8 * e;
          kn[p][e] = 1.f;
          if (t > rows.high || t < rows.low) vn[p][e] = 0.f;
        }
    }
    // Exponents relative to a lazy running maximum.  Weights p * norm go to float16 as
    // p * (norm * up), p <= 2^5; `up` is a power of two that keeps norm * up below 2^10.
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
      float change = 1.f;
      norm = warp_max(norm);
      if (norm * up > NORM_LIMIT) {  // norm * up becomes 8 to 16
        const u32 exponent = __float_as_uint(norm) >> 23;
        const float next = __uint_as_float((257 - min(exponent, 250u)) << 23);
        change = next / up;
        up = next;
      }
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
      values(vw[p][0], vw[p][1], lower, v_bank);
      values(vw[p][2], vw[p][3], upper, v_bank);
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
            sum[n][e] > 0.f ? top[n][e] + log2_approx(sum[n][e]) + mine.shifts[r] : __uint_as_float(0xff800000u),
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
          store_words((uint4*)((here ? mine.part[r] : a.parts + row * D) + LANE_DIMS * g), w);
          if (g == 0) *(here ? mine.scales + r : a.part_scales + row) = scale;
        }
      }
#if SHARES > 1
    // The first share adds the others to its part.  It has just written what it reads of it.
    named_barrier(2 + head, 32 * SHARES);
    if (share == 0) add_shares(a, part, rows.count, &mine, lane);
    named_barrier(2 + head, 32 * SHARES);
#endif
  }
}

extern "C" __global__ void __launch_bounds__(PAGES_THREADS, 1) attention_pages(const Args a) {
  const u32 smem = shared_address(dynamic_shared());
  if (smem != SMEM_BASE) trap();  // table32 has it as a constant
  const int tid = threadIdx.x, lane = tid & 31, warp = tid >> 5;
  i64* plan = FUSED ? (i64*)(dynamic_shared() + PLAN_AT) : a.plan;
  if (warp >= CONSUMERS) {
    if (REGISTERS_MOVED) give_registers<56>();
    if (warp > CONSUMERS) return;
    if (lane == 0) {
      for (int i = 0; i < STAGES; i++) {
        barrier_init(smem + BARRIERS_AT + 8 * i, 1);
        barrier_init(smem + BARRIERS_AT + 8 * (STAGES + i), CONSUMERS);
      }
      fence_barrier_init();
    }
    if (FUSED) write_short_plan(a, plan, lane);
    __syncwarp();
    named_barrier_arrive(MERGE_BARRIER, WORKING_THREADS);
    produce(a, plan, smem, lane);
  } else {
    if (REGISTERS_MOVED) take_registers<224>();  // with 4 warps of 56 as many as 12 warps of 168
#if FUSED
    const u64 early = early_key_signs(a, lane & 7);
#else
    const u64 early = 0;
#endif
    fill_tables(a, tid);
    named_barrier(MERGE_BARRIER, WORKING_THREADS);
    consume(a, plan, smem, lane, warp, early);
#if FUSED
    const Signs signs = load_signs(a.v_signs, a.v_steps, lane);
    const u32 block = blockIdx.y * gridDim.x + blockIdx.x, blocks = gridDim.x * gridDim.y;
    const i64 all = (i64)a.num_tokens * a.num_kv_heads * a.group;
    const int at_once = MERGE_WARPS / a.merge_warps;
    i64 row = (i64)block * at_once;
    PartsOfRow parts = parts_of_row(a, plan, row + warp / a.merge_warps);
    named_barrier(MERGE_BARRIER, 32 * CONSUMERS);
    if (tid == 0) grid_barrier(a.barrier, block, blocks);
    named_barrier(MERGE_BARRIER, 32 * CONSUMERS);
    MergeSpace& space = *(MergeSpace*)(dynamic_shared() + ROWS_AT);
    while (row < all) {
      merge_rows(a, parts, signs, space, warp, lane);
      row += (i64)blocks * at_once;
      parts = parts_of_row(a, plan, row + warp / a.merge_warps);
    }
#endif
  }
}
