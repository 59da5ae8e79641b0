// The query rows of a tile in attention_pages: rotated or loaded, made into fragments; and what the
// warps that share a head make of their partial results.
#pragma once
#include "attention_page.cuh"

#define QUERY_IN_REGISTERS (ROW_TILES <= 2 && ROW_TILES * D <= 256)  // else read from shared memory each time

// What a consumer warp keeps of the query rows of a tile; the rows themselves are with the first warp of
// a head.
struct TileRows {
  union {
    uint2 query[ROW_TILES][PRODUCTS][32];   // [8 rows][product][lane] fragments
    u16 part[8 * ROW_TILES][D];      // at the end, of a share that is not the first
  };
  float2 scales[8 * ROW_TILES];      // of this part
  float shifts[8 * ROW_TILES];       // what the key offset adds to the scores
  float factors[8];                  // of the scores, for each 4 rows
};

// What the four warps of a head share in attention_wide.
struct WideRows {
  u16 query[D / 8][ROW_TILES][8][8];  // [8 dims][8 rows][row][dim], as wgmma takes it
  u16 weights[8][ROW_TILES][8][8];    // [8 tokens][8 rows][token][row]
  float2 totals[4][8 * ROW_TILES];    // of each warp, by row: maximum, softmax sum
  float norms[4];
  float shifts[8 * ROW_TILES], factors[8];  // as TileRows
  u64 weights_free;                   // barrier: products with the weights are done
  u64 padding;
};

// Float16 of LANE_DIMS dims of a row, 16 bytes at a time or 8.
__device__ __forceinline__ void load_halves(const u16* from, float (&v)[LANE_DIMS]) {
#if LANE_DIMS % 8 == 0
#pragma unroll
  for (int k = 0; k < LANE_DIMS / 8; k++) unpack_halves(((const uint4*)from)[k], v + 8 * k);
#else
#pragma unroll
  for (int k = 0; k < LANE_DIMS / 4; k++) {
    const uint2 x = ((const uint2*)from)[k];
    const u32 w[2] = {x.x, x.y};
#pragma unroll
    for (int i = 0; i < 4; i++) v[4 * k + i] = half_to_float((u16)(w[i / 2] >> i % 2 * 16));
  }
#endif
}
__device__ __forceinline__ void store_halves(u16* to, const u32 (&w)[PRODUCTS]) {
#if LANE_DIMS % 8 == 0
#pragma unroll
  for (int k = 0; k < PRODUCTS / 4; k++) ((uint4*)to)[k] = make_uint4(w[4 * k], w[4 * k + 1], w[4 * k + 2], w[4 * k + 3]);
#else
#pragma unroll
  for (int k = 0; k < PRODUCTS / 2; k++) ((uint2*)to)[k] = make_uint2(w[2 * k], w[2 * k + 1]);
#endif
}
// The dims of a row of O that `values` gives lanes (g, c).
__device__ __forceinline__ void store_words(u16* row, int g, const u32 (&w)[PRODUCTS]) {
#if SPLIT_EIGHTHS
  *(uint4*)(row + 8 * g) = make_uint4(w[0], w[1], w[2], w[3]);
  *(uint2*)(row + 64 + 4 * g) = make_uint2(w[4], w[5]);
#else
  store_halves(row + LANE_DIMS * g, w);
#endif
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
      float x[LANE_DIMS];
      load_halves(s ? shares[s].part[r] + LANE_DIMS * (lane & 7) : to, x);
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
      store_halves(to, w);
      if ((lane & 7) == 0)
        a.part_scales[row] = make_float2(total > 0.f ? top + log2_approx(total) : __uint_as_float(0xff800000u), most);
    }
  }
}
#endif

#define SWAPPED (ONE_TABLE && (KEY_BITS <= 4 || PAIRS))  // the dims of a pair

// Dims of a row, from LANE_DIMS (lane % 8) on, to the fragments of row r of 8, in the order in which `keys`
// gives those of K.
__device__ __forceinline__ void put_fragments(uint2 (&query)[PRODUCTS][32], const float (&v)[LANE_DIMS], int r, int lane) {
  const int c = (lane & 7) >> 1, product = (lane & 1) * (LANE_DIMS / 4);
#pragma unroll
  for (int k = 0; k < LANE_DIMS / 4; k++) {
    const float* x = v + 4 * k;
    query[product + k][4 * r + c] =
        SWAPPED ? make_uint2(pack_half2(x[1], x[0]), pack_half2(x[3], x[2]))
                : make_uint2(pack_half2(x[0], x[1]), pack_half2(x[2], x[3]));
  }
}
// Where it puts dim i of row r.
__device__ __forceinline__ u16* fragment_of(u16* query, int r, int i) {
  const int part = i / LANE_DIMS, of_part = i % LANE_DIMS;
  const int product = (part & 1) * (LANE_DIMS / 4) + of_part / 4;
  return query + 4 * (32 * product + 4 * r + (part >> 1)) + (of_part % 4 ^ SWAPPED);
}

#if FUSED && D == 96
// Four rows from row `first` of a tile on, rotated and brought to one factor of the scores; a lane has dims
// lane, lane + 32 and lane + 64 of each, of which a step transforms the first or the last 64.
__device__ __forceinline__ u32 strided_signs(const u32* signs, int step, int lane) {  // 3 bits, set = negative
  u32 bits = 0;
#pragma unroll
  for (int k = 0; k < 3; k++) bits |= (signs[step * SIGN_WORDS + k] >> lane & 1) << k;
  return bits;
}
__device__ __forceinline__ u64 query_signs(const Args& a, int lane) {
  u64 early = 0;
#pragma unroll
  for (int step = 0; step < EARLY_STEPS; step++)
    if (step < a.k_steps) early |= (u64)strided_signs(a.k_signs, step, lane) << 3 * step;
  return early;
}
__device__ __forceinline__ void rotate_strided(float (&v)[4][3], u32 signs, bool last, int lane) {
  const bool low = lane < 16;
#pragma unroll
  for (int r = 0; r < 4; r++) {
    float(&x)[3] = v[r];
#pragma unroll
    for (int k = 0; k < 3; k++) x[k] = signs >> k & 1 ? -x[k] : x[k];
    const float gain = rsqrtf((float)TRANSFORM);
    const float first = (last ? x[1] : x[0]) * gain, second = (last ? x[2] : x[1]) * gain;
    float y = first + second, z = first - second;
#pragma unroll
    for (int h = 1; h < 32; h *= 2) {
      const float sign = lane & h ? -1.f : 1.f;
      y = fmaf(y, sign, __shfl_xor_sync(FULL_WARP, y, h));
      z = fmaf(z, sign, __shfl_xor_sync(FULL_WARP, z, h));
    }
    if (last) x[1] = y, x[2] = z;
    else x[0] = y, x[1] = z;
    // Dim i < 48 and dim i + 48 become their sum and difference.
    float other[3];
#pragma unroll
    for (int k = 0; k < 3; k++) other[k] = __shfl_xor_sync(FULL_WARP, low ? x[(k + 2) % 3] : x[(k + 1) % 3], 16);
#pragma unroll
    for (int k = 0; k < 3; k++) x[k] = ((k == 0 || k == 1 && low ? x[k] : -x[k]) + other[k]) * 0.70710678118654752f;
  }
}
__device__ __forceinline__ void stage_four(const Args& a, const Segment& segment, const Rows& rows, int kv_head,
                                           TileRows& to, int first, int lane, u64 early) {
  const int heads = a.num_kv_heads * a.group;
  float v[4][3], shift[4] = {};
#pragma unroll
  for (int r = 0; r < 4; r++) {
    const u32 row = (u32)query_row(a, segment, rows, first + r < rows.count ? first + r : 0, kv_head);
    const i64 at = row / heads * a.q_token_stride + row % heads * a.q_head_stride;
#pragma unroll
    for (int k = 0; k < 3; k++) v[r][k] = load_float(a.query, at + (lane + 32 * k) * a.q_dim_stride, a.query_dtype);
  }
  if (a.key_offset) {
    const float* o = offset_of(a, segment.s, kv_head) + lane;
#pragma unroll
    for (int r = 0; r < 4; r++)
      shift[r] = a.offset_factor * warp_sum(fmaf(v[r][0], o[0], fmaf(v[r][1], o[32], v[r][2] * o[64])));
  }
#pragma unroll 1
  for (int step = 0; step < a.k_steps; step++)
    rotate_strided(v, step < EARLY_STEPS ? (u32)(early >> 3 * step) : strided_signs(a.k_signs, step, lane), step % 2, lane);
  float largest = 0.f;
#pragma unroll
  for (int r = 0; r < 4; r++)
#pragma unroll
    for (int k = 0; k < 3; k++) largest = first + r < rows.count ? fmaxf(largest, fabsf(v[r][k])) : largest;
  const PowerOfTwo up = power_below(warp_max(largest));
#pragma unroll
  for (int r = 0; r < 4; r++) {
#pragma unroll
    for (int k = 0; k < 3; k++)  // where put_fragments would put it
      *fragment_of((u16*)to.query[first / 8], (first & 7) + r, lane + 32 * k) =
          (u16)pack_half2(first + r < rows.count ? up.times(v[r][k]) : 0.f, 0.f);
    if (lane == 0) to.shifts[first + r] = shift[r];
  }
  if (lane == 0) to.factors[first / 4] = a.score_factor / up.first / up.second;
}
#elif FUSED
__device__ __forceinline__ u64 query_signs(const Args& a, int lane) { return early_signs(a.k_signs, a.k_steps, lane & 7); }
// Four rows from row `first` of a tile on, 8 lanes each, rotated and brought to one factor of the
// scores, which is returned; `shift` is what the key offset adds to them.
__device__ __forceinline__ float rotate_rows(const Args& a, const Segment& segment, const Rows& rows, int kv_head, int first,
                                             int lane, u64 early, float (&v)[LANE_DIMS], float& shift) {
  const int part = lane & 7, r = first + (lane >> 3), heads = a.num_kv_heads * a.group;
  const u32 row = (u32)query_row(a, segment, rows, r < rows.count ? r : 0, kv_head);
  load_dims(a, row / heads * a.q_token_stride + row % heads * a.q_head_stride + LANE_DIMS * part, v);
  shift = 0.f;
  if (a.key_offset) {
    const float* o = offset_of(a, segment.s, kv_head) + LANE_DIMS * part;
#pragma unroll
    for (int i = 0; i < LANE_DIMS; i++) shift = fmaf(v[i], o[i], shift);
  }
#pragma unroll
  for (int k = 1; k < 8; k <<= 1) shift += __shfl_xor_sync(FULL_WARP, shift, k);
  shift *= a.offset_factor;
#pragma unroll 1
  for (int step = 0; step < a.k_steps; step++) {
    flip_eighth(v, early, a.k_signs, step, part);
    transform_lanes<8>(v, part);
  }
  float largest = 0.f;
#pragma unroll
  for (int i = 0; i < LANE_DIMS; i++) largest = fmaxf(largest, fabsf(v[i]));
  const PowerOfTwo up = power_below(warp_max(r < rows.count ? largest : 0.f));
#pragma unroll
  for (int i = 0; i < LANE_DIMS; i++) v[i] = r < rows.count ? up.times(v[i]) : 0.f;
  return a.score_factor / up.first / up.second;
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
  float v[LANE_DIMS];
  load_halves(a.q_rows + row * Q_PITCH + LANE_DIMS * (lane & 7), v);
#pragma unroll
  for (int i = 0; i < LANE_DIMS; i++) v[i] *= ratio;
  put_fragments(to.query[first / 8], v, r & 7, lane);
}
// The warps that share a head meet.
__device__ __forceinline__ void meet(int head) {
  if (SHARES > 1) named_barrier(2 + head, 32 * SHARES);
  else __syncwarp();
}
// All rows of a tile to shared memory, with one factor of the scores, which is returned; by all warps
// of the head.
__device__ __forceinline__ float stage_rows(const Args& a, const Segment& segment, const Rows& rows, int kv_head,
                                            TileRows& to, int lane, int head, int share, u64 early) {
  __syncwarp();  // those of the segment before are read
#pragma unroll 1
  for (int first = 4 * share; first < 8 * ROW_TILES; first += 4 * SHARES) {
    if (first < rows.count) {
#if FUSED && D == 96
      stage_four(a, segment, rows, kv_head, to, first, lane, early);
#elif FUSED
      float v[LANE_DIMS], shift;
      const float factor = rotate_rows(a, segment, rows, kv_head, first, lane, early, v, shift);
      if ((lane & 7) == 0) to.shifts[first + (lane >> 3)] = shift;
      if (lane == 0) to.factors[first / 4] = factor;
      put_fragments(to.query[first / 8], v, (first & 7) + (lane >> 3), lane);
#else
      load_rows(a, segment, rows, kv_head, to, first, lane);
#endif
    } else {
      const float zeros[LANE_DIMS] = {};
      put_fragments(to.query[first / 8], zeros, (first & 7) + (lane >> 3), lane);
      if (lane == 0) to.factors[first / 4] = 0.f;
    }
  }
  meet(head);
  float factor = 0.f;
#pragma unroll
  for (int i = 0; i < 2 * ROW_TILES; i++) factor = fmaxf(factor, to.factors[i]);
#pragma unroll 1
  for (int tile = share; tile < ROW_TILES; tile += SHARES) {
    const float own = to.factors[2 * tile + (lane >> 4)], ratio = own > 0.f ? own / factor : 1.f;
    if (!__any_sync(FULL_WARP, ratio != 1.f)) continue;
#pragma unroll
    for (int j = 0; j < PRODUCTS; j++) {
      uint2& x = to.query[tile][j][lane];
      x = make_uint2(pack_half2(half_to_float((u16)x.x) * ratio, half_to_float((u16)(x.x >> 16)) * ratio),
                     pack_half2(half_to_float((u16)x.y) * ratio, half_to_float((u16)(x.y >> 16)) * ratio));
    }
  }
  meet(head);
  return factor;
}
