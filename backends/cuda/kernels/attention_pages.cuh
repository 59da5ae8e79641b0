// attention_pages: partial attention over token ranges for head_dim 128, codes of 2, 3, 4 or 8 bits
// and pages that are contiguous in memory; compute capability 9.0.
//
//   S^T = K Q^T    (A = dequantised K: 16 tokens x 16 dims,   B = Q: 16 dims x 8 query rows)
//   O^T = V^T P^T  (A = dequantised V^T: 16 dims x 16 tokens, B = P^T: 16 tokens x 8 query rows)
//
// One persistent block an SM serves HEADS kv heads.  A producer warp streams whole pages (16 tokens,
// HEADS heads: K codes, V codes, norms) into a ring in shared memory by bulk copies; CONSUMERS warps
// turn them into fragments.  Warp w has head w / SHARES and pages of its share; a unit, one stage of
// the ring, is SHARES * SUB pages.  Each share writes its own part.
//
// Dequantising is a table read: two codes (four at 2 bits) make a byte, the byte and the lane make
// an address by one PRMT, and the table holds one copy of its float16 pairs for each bank, so reads
// never conflict.  Byte value b: K pairs at 256 b, V pairs at 256 b + 128.
//
// Macros: KEY_BITS, VALUE_BITS, BLOCK_SIZE, HEADS (of a block), SHARES (8 / HEADS), SUB,
// HEAD_MAJOR (a page is [head][token], else [token][head]), UNIT = 16 SUB SHARES, NUM_SMEM (bytes).
#pragma once
#include "attention_common.cuh"

#define CONSUMERS 8
#define PAGES_THREADS (32 * (CONSUMERS + 1))
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
#define RING_AT (BARRIERS_AT + 512)
#define FITTING_STAGES ((NUM_SMEM - RING_AT) / STAGE_BYTES)
#define STAGES (FITTING_STAGES > 24 ? 24 : FITTING_STAGES)
#define VALUES_EARLY (KEY_BITS < 4 && VALUE_BITS < 4)  // read V codes together with K codes
#define K_WORDS (D * KEY_BITS / 128)      // a quarter of a vector
#define V_WORDS (VALUE_BITS == 3 ? 2 : D * VALUE_BITS / 256)  // an eighth
#define LAZY 5.f                          // raise the maximum only if exceeded by 2^5
#define NORM_LIMIT 1024.f                 // 2^5 * 2^10 fits float16

static_assert(D == 128 && HEADS * SHARES == CONSUMERS && STAGES >= 2, "attention_pages");

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

// 32 dims of the tokens of rows g and g + 8 -> A fragments of 8 products.
__device__ __forceinline__ void keys(const u32 (&lower)[K_WORDS], const u32 (&upper)[K_WORDS],
                                     u32 (&a)[8][4], u32 bank) {
#if KEY_BITS == 2
  // A byte holds a nibble of either token, so one read gives both rows.
#pragma unroll
  for (int i = 0; i < 2; i++) {
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
    u32 pairs[16];
    const u32(&w)[K_WORDS] = e ? upper : lower;
#if KEY_BITS == 4
#pragma unroll
    for (int i = 0; i < 16; i++) pairs[i] = look32<0>(w[i / 4], i % 4, bank);
#elif KEY_BITS == 3
    // First dim in the high bits: reverse the bytes, and dims run backwards in little-endian fields.
    const u32 r[3] = {__byte_perm(w[2], 0, 0x0123), __byte_perm(w[1], 0, 0x0123), __byte_perm(w[0], 0, 0x0123)};
    u32 backwards[16];
    look_sixes<0, 4>(r, backwards, bank);
#pragma unroll
    for (int i = 0; i < 16; i++) pairs[i] = backwards[15 - i];
#else
#pragma unroll
    for (int i = 0; i < 16; i++)
      pairs[i] = low_halves(look32<0>(w[i / 2], i % 2 * 2, bank), look32<0>(w[i / 2], i % 2 * 2 + 1, bank));
#endif
#pragma unroll
    for (int j = 0; j < 8; j++) a[j][e] = pairs[2 * j], a[j][2 + e] = pairs[2 * j + 1];
  }
#endif
}

// 16 dims of two tokens -> for each dim the pair (first token, second token).  At 2 bits dims come
// in the order 3, 1, 2, 0 of every four, since a register pair that a read fills must stay one.
#define V_TABLE 128
__device__ __forceinline__ void values(const u32 (&x)[V_WORDS], const u32 (&y)[V_WORDS], u32 (&out)[16], u32 bank) {
#if VALUE_BITS == 4
#pragma unroll
  for (int i = 0; i < 2; i++) {
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
  for (int k = 0; k < 4; k++) {
    const uint2 a = look64<V_TABLE>(odd, k, bank), b = look64<V_TABLE>(even, k, bank);
    out[4 * k] = a.x, out[4 * k + 1] = a.y, out[4 * k + 2] = b.x, out[4 * k + 3] = b.y;
  }
#elif VALUE_BITS == 3
  // x, y: 48 bits, reversed as in keys.  Even fields of x with the even ones of y, odd with odd.
  const u32 m0 = 0xC71C71C7u, m1 = 0x71C71C71u;
  const u32 even[2] = {(x[0] & m0) | (y[0] << 3 & ~m0), (x[1] & m1) | (__funnelshift_l(y[0], y[1], 3) & ~m1)};
  const u32 odd[2] = {(__funnelshift_r(x[0], x[1], 3) & m0) | (y[0] & ~m0), (x[1] >> 3 & m1) | (y[1] & ~m1)};
  u32 a[8], b[8];
  look_sixes<V_TABLE, 2>(even, a, bank);
  look_sixes<V_TABLE, 2>(odd, b, bank);
#pragma unroll
  for (int k = 0; k < 8; k++) out[15 - 2 * k] = a[k], out[14 - 2 * k] = b[k];
#else
#pragma unroll
  for (int i = 0; i < 16; i++)
    out[i] = low_halves(look32<V_TABLE>(x[i / 4], i % 4, bank), look32<V_TABLE>(y[i / 4], i % 4, bank));
#endif
}

__device__ __forceinline__ void read_keys(u32 (&w)[K_WORDS], u32 at) {
#if KEY_BITS == 2
  const uint2 x = ring64(at);
  w[0] = x.x, w[1] = x.y;
#elif KEY_BITS == 3
  w[0] = ring32(at), w[1] = ring32(at + 4), w[2] = ring32(at + 8);
#else
#pragma unroll
  for (int i = 0; i < K_WORDS; i += 4) {
    const uint4 x = ring128(at + 4 * i);
    w[i] = x.x, w[i + 1] = x.y, w[i + 2] = x.z, w[i + 3] = x.w;
  }
#endif
}
// `at` is the word that holds the first byte; at 3 bits that is its third byte if `odd`.
__device__ __forceinline__ void read_values(u32 (&w)[V_WORDS], u32 at, u32 odd) {
#if VALUE_BITS == 2
  w[0] = ring32(at);
#elif VALUE_BITS == 3  // six bytes from an even address, reversed
  const u32 x = ring32(at), y = ring32(at + 4);
  w[0] = __byte_perm(x, y, odd ? 0x4567 : 0x2345);
  w[1] = __byte_perm(x, y, odd ? 0x0023 : 0x0001);  // the upper half is not used
#elif VALUE_BITS == 4
  const uint2 x = ring64(at);
  w[0] = x.x, w[1] = x.y;
#else
  const uint4 x = ring128(at);
  w[0] = x.x, w[1] = x.y, w[2] = x.z, w[3] = x.w;
#endif
}

// Token of row r of a product, chosen so that reads of V from the ring do not conflict.
__device__ __forceinline__ int token_of_row(int r) {
#if HEAD_MAJOR && VALUE_BITS == 4
  return r ^ (r >> 1 & 1);
#elif HEAD_MAJOR && VALUE_BITS == 2
  return 0x53427160u >> 4 * r & 7;
#else
  return r;
#endif
}

__device__ __forceinline__ void fill_tables(const Args& a, int tid) {
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

__device__ __forceinline__ void produce(const Args& a, u32 smem, int lane) {
  const u32 full = smem + BARRIERS_AT, empty = full + 8 * STAGES;
  const int head = blockIdx.y * HEADS;
  int stage = 0, phase = 1;
  Walk walk = start_walk(a);
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
      barrier_wait(empty + 8 * stage, phase);
      if (lane == 0) barrier_expect(full + 8 * stage, STAGE_BYTES);
      __syncwarp();
#pragma unroll
      for (int i = 0; i < STAGE_PAGES; i++) {
        const int page = u * STAGE_PAGES + i;
        if (page - base == 32) {
          base += 32;
          ids = next;
          next = page_id(base + 32 + lane);
        }
        const i64 id = __shfl_sync(FULL_WARP, ids, page - base);
        const i64 block = id / (BLOCK_SIZE / PAGE), token = id % (BLOCK_SIZE / PAGE) * PAGE;
        const u32 to = smem + RING_AT + stage * STAGE_BYTES + i * PAGE_BYTES, done = full + 8 * stage;
        if (lane == 0)
          bulk_copy(to, a.k_packed + block * a.k_block_stride + token * a.k_token_stride + head * a.k_head_stride, K_PAGE, done);
        if (lane == 1)
          bulk_copy(to + AT_V, a.v_packed + block * a.v_block_stride + token * a.v_token_stride + head * a.v_head_stride, V_PAGE, done);
        if (lane == 2)
          bulk_copy(to + AT_KN, a.k_norms + block * a.kn_block_stride + token * a.kn_token_stride + head * a.kn_head_stride, NORM_PAGE, done);
        if (lane == 3)
          bulk_copy(to + AT_VN, a.v_norms + block * a.vn_block_stride + token * a.vn_token_stride + head * a.vn_head_stride, NORM_PAGE, done);
      }
      if (++stage == STAGES) stage = 0, phase ^= 1;
    }
  }
}

// ---- the consumer warps

__device__ __forceinline__ void consume(const Args& a, u32 smem, int lane, int warp) {
  const u32 full = smem + BARRIERS_AT, empty = full + 8 * STAGES;
  const int g = lane >> 2, c = lane & 3, head = warp / SHARES, share = warp % SHARES;
  const int kv_head = blockIdx.y * HEADS + head;
  const u32 k_bank = KEY_BITS == 2 ? (lane & 15) * 8 : lane * 4;
  const u32 v_bank = VALUE_BITS == 2 ? (lane & 15) * 8 : lane * 4;
  const int row_token = token_of_row(g);
  const u32 ring = smem + RING_AT + share * SUB * PAGE_BYTES;
  const u32 k_at = ring + row_token * K_TOKEN + head * K_HEAD + c * (K_VECTOR / 4);
  const u32 n_at = ring + AT_KN + row_token * N_TOKEN + head * N_HEAD;
  const u32 v_base = ring + AT_V + head * V_HEAD + (g * (V_VECTOR / 8) & ~3);
  const u32 v_at[2] = {v_base + token_of_row(2 * c) * V_TOKEN, v_base + token_of_row(2 * c + 1) * V_TOKEN};
  const u32 odd = g & 1;

  u32 stage = 0, phase = 0;
  Walk walk = start_walk(a);
  Segment segment;
#pragma unroll 1
  while (next_segment(a, walk, segment)) {
    const Rows rows = rows_of(a, segment);
    // Rows of the scores (2c, 2c + 1) and row of the query (g) of this lane.
    int low[2], high[2];
#pragma unroll
    for (int e = 0; e < 2; e++) row_limits(a, segment, rows, 2 * c + e, low[e], high[e]);
    u32 qb[8][2];
    float q_factor, shift[2];
#pragma unroll
    for (int e = 0; e < 2; e++)
      shift[e] = a.q_factors[query_row(a, segment, rows, 2 * c + e < rows.count ? 2 * c + e : 0, kv_head)].y;
    {
      const i64 row = query_row(a, segment, rows, g < rows.count ? g : 0, kv_head);
      const float factor = g < rows.count ? a.q_factors[row].x : 0.f;
      q_factor = warp_max(factor);  // powers of two times a constant: the ratio is exact
      const float ratio = q_factor > 0.f ? factor / q_factor : 0.f;
      const uint4* from = (const uint4*)(a.q_rows + row * Q_PITCH + 32 * c);
#pragma unroll
      for (int i = 0; i < 4; i++) {
        const uint4 x = from[i];
        const u32 w[4] = {x.x, x.y, x.z, x.w};
#pragma unroll
        for (int k = 0; k < 4; k++)
          qb[2 * i + k / 2][k % 2] =
              pack_half2(half_to_float((u16)w[k]) * ratio, half_to_float((u16)(w[k] >> 16)) * ratio);
      }
    }
    float o[8][4], top[2] = {NEVER, NEVER}, sum[2] = {0.f, 0.f};
    float up = 1.2676506e30f;  // 2^100; see NORM_LIMIT below
#pragma unroll
    for (int i = 0; i < 8; i++) o[i][0] = o[i][1] = o[i][2] = o[i][3] = 0.f;

#pragma unroll 1
    for (int u = segment.begin; u < segment.begin + segment.count; u++) {
    const u32 at = stage * STAGE_BYTES;
    barrier_wait(full + 8 * stage, phase);
    __syncwarp();
    u32 kw[SUB][2][K_WORDS], vw[SUB][4][V_WORDS];
    float kn[SUB][2], vn[SUB][2], x[SUB][4];
    auto read_v = [&](int p) {
      const u32 page = at + p * PAGE_BYTES;
#pragma unroll
      for (int e = 0; e < 4; e++) read_values(vw[p][e], v_at[e & 1] + page + (e >> 1) * 8 * V_TOKEN, odd);
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
        read_keys(kw[p][e], k_at + page + e * 8 * K_TOKEN);
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
      u32 f[8][4];
      keys(kw[p][0], kw[p][1], f, k_bank);
      float z[4];  // two chains of products
      mma_zero(x[p], f[0][0], f[0][1], f[0][2], f[0][3], qb[0][0], qb[0][1]);
      mma_zero(z, f[1][0], f[1][1], f[1][2], f[1][3], qb[1][0], qb[1][1]);
#pragma unroll
      for (int j = 2; j < 8; j += 2) {
        mma(x[p], f[j][0], f[j][1], f[j][2], f[j][3], qb[j][0], qb[j][1]);
        mma(z, f[j + 1][0], f[j + 1][1], f[j + 1][2], f[j + 1][3], qb[j + 1][0], qb[j + 1][1]);
      }
#pragma unroll
      for (int k = 0; k < 4; k++) x[p][k] += z[k];
    }
    // x: [token row g: 0, 1; g + 8: 2, 3][query row 2c, 2c + 1].  Masked scores become -inf.
    const int first_token = (u * STAGE_PAGES + share * SUB) * PAGE;
#pragma unroll
    for (int p = 0; p < SUB; p++) kn[p][0] *= q_factor, kn[p][1] *= q_factor;
    if (first_token + SUB * PAGE - 1 > rows.all_high || first_token < rows.all_low) {
#pragma unroll
      for (int p = 0; p < SUB; p++)
#pragma unroll
        for (int e = 0; e < 2; e++) {
          const int t = first_token + p * PAGE + row_token + 8 * e;
          const bool outside = t > rows.high || t < rows.low;
#pragma unroll
          for (int k = 0; k < 2; k++) {
            const float score = x[p][2 * e + k] * kn[p][e];
            x[p][2 * e + k] = t > high[k] || t < low[k] ? __uint_as_float(0xff800000u) : score;
          }
          kn[p][e] = 1.f;
          if (outside) vn[p][e] = 0.f;
        }
    }
    // Exponents relative to a lazy running maximum.  Weights p * norm go to float16 as
    // p * (norm * up), p <= 2^5; `up` is a power of two that keeps norm * up below 2^10.
    float y[SUB][4], above = NEVER, norm = 0.f;
    auto subtract_top = [&] {
#pragma unroll
      for (int p = 0; p < SUB; p++)
#pragma unroll
        for (int k = 0; k < 4; k++) y[p][k] = fmaf(x[p][k], kn[p][k / 2], -top[k % 2]);
    };
    subtract_top();
#pragma unroll
    for (int p = 0; p < SUB; p++) {
      above = fmaxf(above, fmaxf(fmaxf(y[p][0], y[p][1]), fmaxf(y[p][2], y[p][3])));
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
      for (int e = 0; e < 2; e++) {
        float now = top[e];
#pragma unroll
        for (int p = 0; p < SUB; p++)
          now = fmaxf(now, fmaxf(x[p][e] * kn[p][0], x[p][2 + e] * kn[p][1]));
#pragma unroll
        for (int k = 4; k < 32; k <<= 1) now = fmaxf(now, __shfl_xor_sync(FULL_WARP, now, k));
        const float down = exp2_approx(top[e] - now);
        top[e] = now;
        sum[e] *= down;
#pragma unroll
        for (int i = 0; i < 8; i++) {
          o[i][e] *= down * change;
          o[i][2 + e] *= down * change;
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
      u32 b[2];
#pragma unroll
      for (int e = 0; e < 2; e++) {
        const float w0 = exp2_approx(y[p][2 * e]), w1 = exp2_approx(y[p][2 * e + 1]);
        sum[0] += w0;
        sum[1] += w1;
        const float weight = vn[p][e] * up;
        b[e] = transpose8x8(pack_half2(w0 * weight, w1 * weight));
      }
      u32 lower[16], upper[16];
      values(vw[p][0], vw[p][1], lower, v_bank);
      values(vw[p][2], vw[p][3], upper, v_bank);
#pragma unroll
      for (int i = 0; i < 8; i++)
        mma(o[i], lower[2 * i], lower[2 * i + 1], upper[2 * i], upper[2 * i + 1], b[0], b[1]);
    }
    if (++stage == STAGES) stage = 0, phase ^= 1;
    }

    const i64 part = (segment.slot * SHARES + share) * a.num_kv_heads + kv_head;
#pragma unroll
    for (int e = 0; e < 2; e++) {
      for (int k = 4; k < 32; k <<= 1) sum[e] += __shfl_xor_sync(FULL_WARP, sum[e], k);
      const int r = 2 * c + e;
      if (r < rows.count) {  // lane g holds dims 16 g .. 16 g + 15 of row r
        const float inverse = sum[e] > 0.f ? __fdividef(1.f, sum[e]) : 0.f;
        uint4* to = (uint4*)(a.parts + (part * a.tile_rows + r) * D + 16 * g);
        u32 w[8];
#pragma unroll
        for (int i = 0; i < 8; i++) {
#if VALUE_BITS == 2
          const float first = i % 2 ? o[i][e] : o[i + 1][2 + e], second = i % 2 ? o[i - 1][e] : o[i][2 + e];
#else
          const float first = o[i][e], second = o[i][2 + e];
#endif
          w[i] = pack_half2(first * inverse, second * inverse);
        }
        to[0] = make_uint4(w[0], w[1], w[2], w[3]);
        to[1] = make_uint4(w[4], w[5], w[6], w[7]);
        if (g == 0)
          a.part_scales[part * a.tile_rows + r] = make_float2(
              sum[e] > 0.f ? top[e] + log2_approx(sum[e]) + shift[e] : __uint_as_float(0xff800000u),
              1.f / up);
      }
    }
  }
}

extern "C" __global__ void __launch_bounds__(PAGES_THREADS, 1) attention_pages(const Args a) {
  const u32 smem = shared_address(dynamic_shared());
  if (smem != SMEM_BASE) trap();  // table32 has it as a constant
  const int tid = threadIdx.x, lane = tid & 31, warp = tid >> 5;
  if (tid == 32 * CONSUMERS) {
    for (int i = 0; i < STAGES; i++) {
      barrier_init(smem + BARRIERS_AT + 8 * i, 1);
      barrier_init(smem + BARRIERS_AT + 8 * (STAGES + i), CONSUMERS);
    }
    fence_barrier_init();
  }
  __syncthreads();
  if (warp == CONSUMERS) {
    produce(a, smem, lane);
  } else {
    fill_tables(a, tid);
    named_barrier(1, 32 * CONSUMERS);
    consume(a, smem, lane, warp);
  }
}
