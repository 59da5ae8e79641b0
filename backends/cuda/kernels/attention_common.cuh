// What the kernels of one attention step share: arguments, work list, small helpers.
//
// A step is attention_query (rotate the query, write the work list), attention_split,
// attention_pages or attention_wide (partial results of token ranges) and attention_merge (combine,
// rotate back); or attention_pages or attention_wide alone, compiled to do the work of the others too (FUSED).
//
// Rows: the query tokens of a sequence times the query heads of one kv head, row = token * group +
// head; `tile_rows` of them make a tile.  An item is one tile of one sequence; its context is cut
// into units of UNIT tokens.  The units of all items stand in one list, which is cut into as many
// equal ranges as there are blocks, so ragged batches are balanced without the host knowing the
// lengths.  Range r writes its part of item i to slot r + i; neighbouring ranges and items differ
// in that sum, so no two parts share a slot, and the merge knows from the lengths which slots to
// read.  Only the number of blocks is fixed at launch.
#pragma once
#include "attention_ptx.cuh"

struct Args {
  const u8* query;               // [tokens][query heads][D], element strides below
  const float* rotated_query;    // [tokens * query heads][D], or null: rotate here
  const int* query_start_loc;    // [sequences + 1], or null: query_len tokens each
  const int* block_tables;
  const int* context_lens;
  const int* query_positions;    // [sequences] or null: the query tokens are the last ones
  const u8* k_packed;
  const float* k_norms;
  const u8* v_packed;
  const float* v_norms;
  const float* sinks;            // [query heads] or null
  const float* key_offset;       // [slots][kv heads][D] or null
  const int* offset_slots;       // [sequences] slot of each, or null: slot s
  const u32* k_signs;            // [steps][SIGN_WORDS] bits, set = negative
  const u32* v_signs;
  const float* k_centroids;      // [1 << bits]
  const float* v_centroids;
  u8* out;                       // [tokens][query heads][D]
  float* lse;                    // [tokens][query heads]
  float* merged;                 // [tokens * query heads][D], still rotated; null: rotate back here
  float* other_out;              // [tokens * query heads][D] or null: attention to other tokens,
  float* other_lse;              // to be merged in
  u32* barrier;                  // of all blocks of attention_pages if FUSED
  const u8* full_keys;         // [pages][BLOCK_SIZE][kv heads][D], full precision
  const u8* full_values;
  const int* full_pages;       // [sequences][full_pages_each] numbers of pages
  const int* full_positions;   // [sequences][full_pages_each] of their first tokens; -1: no page
  const int* full_query_positions;  // [sequences] of the first query token
  const int* full_tiles;       // [tiles][2] sequence and first row
  u16* q_rows;                   // [tokens * query heads][Q_PITCH] float16, rotated
  float2* q_factors;             // score = dot * norm * x + y
  i64* plan;                     // [sequences + 1] units and [sequences + 1] items before each
  u16* parts;                    // [slots][kv heads][tile_rows][O_PITCH] float16
  float2* part_scales;           // log2 of the softmax sum; factor of the float16 numbers
  i64 q_token_stride, q_head_stride, q_dim_stride;
  i64 k_block_stride, k_token_stride, k_head_stride;     // bytes
  i64 v_block_stride, v_token_stride, v_head_stride;
  i64 kn_block_stride, kn_token_stride, kn_head_stride;  // elements
  i64 vn_block_stride, vn_token_stride, vn_head_stride;
  i64 table_row_stride;          // in int32; int64 arrays are read at their low words
  int table_step, lens_step, starts_step, positions_step, sinks_step;
  int num_seqs, num_tokens, query_len, num_kv_heads, group, max_blocks, tile_rows, window;
  int query_dtype, k_steps, v_steps, num_ranges, merge_warps, full_pages_each;
  float score_factor;            // scale / sqrt(D), times log2(e), or over the soft cap
  float offset_factor;           // the same without 1 / sqrt(D)
  float soft_cap_log2;           // soft cap * log2(e), or 0
  float value_factor;            // 1 / sqrt(D)
};

#define Q_PITCH ((D + 31) / 32 * 32)
#define O_PITCH ((D + 7) / 8 * 8)
#define SIGN_WORDS ((D + 31) / 32)
#define LOG2_E 1.4426950408889634f
#define LN_2 0.6931471805599453f
#define NEVER -1e30f              // running maximum of a row that has seen nothing

enum { FLOAT16, BFLOAT16, FLOAT32, FLOAT64 };

__device__ __forceinline__ float load_float(const u8* base, i64 index, int dtype) {
  if (dtype == FLOAT16) return half_to_float(((const u16*)base)[index]);
  if (dtype == BFLOAT16) return __uint_as_float((u32)((const u16*)base)[index] << 16);
  if (dtype == FLOAT32) return ((const float*)base)[index];
  return (float)((const double*)base)[index];
}
__device__ __forceinline__ void store_float(u8* base, i64 index, int dtype, float x) {
  if (dtype == FLOAT16) ((u16*)base)[index] = (u16)pack_half2(x, 0.f);
  else if (dtype == BFLOAT16) ((u16*)base)[index] = float_to_bfloat16(x);
  else if (dtype == FLOAT32) ((float*)base)[index] = x;
  else ((double*)base)[index] = (double)x;
}

__device__ __forceinline__ float warp_max(float x) {
  for (int k = 16; k; k >>= 1) x = fmaxf(x, __shfl_xor_sync(FULL_WARP, x, k));
  return x;
}
__device__ __forceinline__ float warp_sum(float x) {
  for (int k = 16; k; k >>= 1) x += __shfl_xor_sync(FULL_WARP, x, k);
  return x;
}

// A power of two as two factors, since it may be too large for one.
struct PowerOfTwo {
  float first, second;
  __device__ __forceinline__ float times(float x) const { return x * first * second; }
};
// Brings `largest` into [2^14, 2^15); anything below 2^-100 is as good as zero.
__device__ __forceinline__ PowerOfTwo power_below(float largest) {
  const int exponent = (int)(__float_as_uint(fmaxf(largest, 7.9e-31f)) >> 23) - 127;
  return {__uint_as_float((u32)(127 + 7 - exponent / 2) << 23),
          __uint_as_float((u32)(127 + 7 - (exponent - exponent / 2)) << 23)};
}
__device__ __forceinline__ const float* offset_of(const Args& a, int s, int kv_head) {
  return a.key_offset + ((i64)(a.offset_slots ? a.offset_slots[s] : s) * a.num_kv_heads + kv_head) * D;
}

// ---- softmax weights in float16

// Weights times the norms of values go to float16 as p * (norm * up); `up` begins at 2^100 and is a power of
// two that keeps norm * up below NORM_LIMIT, which leaves 2^5 for p.
#define FIRST_UP 1.2676506e30f
#define NORM_LIMIT 1024.f
// Makes norm * up 8 to 16 if it is above the limit; returns what earlier sums are to be multiplied by.
__device__ __forceinline__ float lower_up(float norm, float& up) {
  if (!(norm * up > NORM_LIMIT)) return 1.f;
  const float next = __uint_as_float((257 - min(__float_as_uint(norm) >> 23, 250u)) << 23), change = next / up;
  up = next;
  return change;
}

// ---- the work list

__device__ __forceinline__ u64 divide(u64 a, u32 b) {  // 32-bit division is several times faster
  return a >> 32 ? a / b : (u32)a / b;
}

struct Sequence {
  int context;                  // cached tokens
  int first_token, query_len;   // where the query tokens begin, how many they are
  int position;                 // of the first one; it sees cached tokens 0 .. position
};
__device__ __forceinline__ Sequence sequence(const Args& a, int s) {
  Sequence r;
  const i64 most = (i64)a.max_blocks * BLOCK_SIZE;
  const int n = a.context_lens[(i64)s * a.lens_step];
  r.context = n < 0 ? 0 : n > most ? (int)most : n;
  if (a.query_start_loc) {
    r.first_token = a.query_start_loc[(i64)s * a.starts_step];
    r.query_len = a.query_start_loc[(i64)(s + 1) * a.starts_step] - r.first_token;
  } else {
    r.first_token = s * a.query_len;
    r.query_len = a.query_len;
  }
  r.position = a.query_positions ? a.query_positions[(i64)s * a.positions_step] : r.context - r.query_len;
  return r;
}
__device__ __forceinline__ int num_tiles(const Args& a, const Sequence& q) {
  return (int)divide((u64)q.query_len * a.group + a.tile_rows - 1, a.tile_rows);
}
// First unit that any query token sees, and how many there are up to the end of the context.
__device__ __forceinline__ int first_unit(const Args& a, const Sequence& q) {
  const int low = a.window ? q.position + 1 - a.window : 0;
  return low > 0 ? low / UNIT : 0;
}
__device__ __forceinline__ int num_units(const Args& a, const Sequence& q) {
  return q.query_len > 0 ? max(0, (q.context + UNIT - 1) / UNIT - first_unit(a, q)) : 0;
}

// The sequence s with before[s] <= x < before[s + 1]; for a whole warp.
__device__ __forceinline__ int find_sequence(const i64* before, int num_seqs, i64 x) {
  int low = 0, high = num_seqs;
  while (high - low > 32) {
    const int middle = (low + high) >> 1;
    if (before[middle] <= x) low = middle;
    else high = middle;
  }
  const int i = low + 1 + (threadIdx.x & 31);
  return low + __popc(__ballot_sync(FULL_WARP, i < high && before[i] <= x));
}
// Sequence of a query token.
__device__ __forceinline__ int sequence_of_token(const Args& a, int token) {
  if (!a.query_start_loc) return token / a.query_len;
  int low = 0, high = a.num_seqs;
  while (high - low > 1) {
    const int middle = (low + high) >> 1;
    if (a.query_start_loc[(i64)middle * a.starts_step] <= token) low = middle;
    else high = middle;
  }
  return low;
}

// The work list of up to FEW_SEQUENCES sequences, written by a warp; fewer than 2^31 units in all.
#define FEW_SEQUENCES 128
__device__ __forceinline__ void write_short_plan(const Args& a, i64* plan, int lane) {
  const int each = (a.num_seqs + 31) / 32;  // consecutive sequences of a lane
  const int first = min(lane * each, a.num_seqs), last = min(first + each, a.num_seqs);
  int units = 0, items = 0;
#pragma unroll 1
  for (int s = first; s < last; s++) {  // what lies before s within this lane
    const Sequence q = sequence(a, s);
    const int tiles = num_tiles(a, q);
    plan[s] = units;
    plan[a.num_seqs + 1 + s] = items;
    units += tiles * num_units(a, q);
    items += tiles;
  }
  int units_before = units, items_before = items;
#pragma unroll 1
  for (int k = 1; k < a.num_seqs && k < 32; k <<= 1) {
    const int u = __shfl_up_sync(FULL_WARP, units_before, k), i = __shfl_up_sync(FULL_WARP, items_before, k);
    if (lane >= k) {
      units_before += u;
      items_before += i;
    }
  }
  units_before -= units;
  items_before -= items;
  if (last == a.num_seqs && first < last) {  // the lane with the last sequence
    plan[a.num_seqs] = units_before + units;
    plan[2 * a.num_seqs + 1] = items_before + items;
  }
#pragma unroll 1
  for (int s = first; s < last; s++) {
    plan[s] += units_before;
    plan[a.num_seqs + 1 + s] += items_before;
  }
  __syncwarp();
}

// What a block has to do: `count` units from `begin` of a tile of a sequence, to be put in `slot`.
struct Segment {
  Sequence q;
  int s, tile, begin, count;
  i64 slot;
};
struct Walk {
  const i64* plan;
  i64 work, end;
  int s;
};
__device__ __forceinline__ Walk start_walk(const Args& a, const i64* plan) {
  const i64 total = plan[a.num_seqs];
  const u32 ranges = (u32)(total < a.num_ranges ? total : a.num_ranges);
  if (blockIdx.x >= ranges) return {plan, 0, 0, 0};
  const i64 begin = divide((u64)total * blockIdx.x, ranges);
  return {plan, begin, (i64)divide((u64)total * (blockIdx.x + 1), ranges),
          find_sequence(plan, a.num_seqs, begin)};
}
__device__ __forceinline__ bool next_segment(const Args& a, Walk& walk, Segment& g) {
  if (walk.work >= walk.end) return false;
  while (walk.work >= walk.plan[walk.s + 1]) walk.s++;  // sequences without work lie between
  g.s = walk.s;
  g.q = sequence(a, g.s);
  const u64 done = walk.work - walk.plan[g.s];
  const u32 units = num_units(a, g.q);
  g.tile = (int)divide(done, units);
  const u32 at = (u32)(done - (u64)g.tile * units);
  g.begin = first_unit(a, g.q) + at;
  g.count = walk.end - walk.work < units - at ? (int)(walk.end - walk.work) : (int)(units - at);
  g.slot = blockIdx.x + walk.plan[a.num_seqs + 1 + g.s] + g.tile;
  walk.work += g.count;
  return true;
}

// ---- what the rows of a tile see

struct Rows {
  int first, count;  // rows of the sequence in this tile
  int low, high;     // tokens that some row sees
  int all_low, all_high;  // tokens that all rows see
};
__device__ __forceinline__ Rows rows_of(const Args& a, const Segment& g) {
  Rows r;
  r.first = g.tile * a.tile_rows;
  r.count = min(g.q.query_len * a.group - r.first, a.tile_rows);
  const int first = g.q.position + r.first / a.group;
  const int last = g.q.position + (r.first + r.count - 1) / a.group;
  r.high = min(last, g.q.context - 1);
  r.all_high = min(first, g.q.context - 1);
  r.low = a.window ? max(0, first - a.window + 1) : 0;
  r.all_low = a.window ? last - a.window + 1 : 0;
  return r;
}
// Tokens low .. high that row r of the tile sees; none if there is no such row.
__device__ __forceinline__ void row_limits(const Args& a, const Segment& g, const Rows& rows, int r,
                                           int& low, int& high) {
  const int position = g.q.position + (rows.first + r) / a.group;
  low = a.window ? position - a.window + 1 : 0;
  high = r < rows.count ? min(position, g.q.context - 1) : -1;
}
// Row of the query, and so of the output, of row r of the tile.
__device__ __forceinline__ i64 query_row(const Args& a, const Segment& g, const Rows& rows, int r, int kv_head) {
  const int token = (rows.first + r) / a.group, head = (rows.first + r) % a.group;
  return ((i64)(g.q.first_token + token) * a.num_kv_heads + kv_head) * a.group + head;
}
