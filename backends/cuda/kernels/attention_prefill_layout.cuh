// What the warps of attention_prefill share: sizes, places in shared memory, which part of the work.
#pragma once
#include "attention_common.cuh"

#define TILE_TOKENS UNIT
#define GROUPS 3                       // of four warps that multiply
#define GROUP_ROWS 64
#define TILE_ROWS (GROUPS * GROUP_ROWS)
#define PREFILL_THREADS (128 * (GROUPS + 1))
#define STAGES 3
#define TURN (1 + GROUPS)              // first of the groups' second named barriers
#define FEW_BITS (KEY_BITS <= 4 && VALUE_BITS <= 4)
#define PRODUCER_REGISTERS (FEW_BITS ? 56 : 80)  // codes that wait take them; as many as 128 for all
#define CONSUMER_REGISTERS (FEW_BITS ? 152 : 144)

// Tables: entry i of a side lies in all banks.  Up to 4 bits it is a pair of codes, else one code.
#define FIELDS(bits) (1 << ((bits) <= 4 ? 2 * (bits) : (bits)))
#define K_TABLE 0
#define V_TABLE (128 * FIELDS(KEY_BITS))
#define KEYS_AT (V_TABLE + 128 * FIELDS(VALUE_BITS))
#define TILE_BYTES (TILE_TOKENS * D * 2)
#define VALUES_AT (KEYS_AT + STAGES * TILE_BYTES)
#define QUERY_AT (VALUES_AT + STAGES * TILE_BYTES)
#define GROUP_BYTES (GROUP_ROWS * D * 2)
#define NORMS_AT (QUERY_AT + GROUPS * GROUP_BYTES)     // [stage][pair of tokens][side][token]
#define NORM_BYTES (2 * TILE_TOKENS * 4)               // of a stage
#define BARRIERS_AT (NORMS_AT + STAGES * NORM_BYTES)
#define FACTORS_AT (BARRIERS_AT + 4 * STAGES * 8)
#define PREFILL_BYTES (FACTORS_AT + 4 * TILE_ROWS / 32)

#define RUN (D / 4)                    // dims of a vector that a lane dequantises
#define RUN_BYTES(bits) (RUN * (bits) / 8)
#define RUN_WORDS(bits) ((RUN_BYTES(bits) + 3) / 4)
#define TOKENS_A_WARP (TILE_TOKENS / 4)
#define SUMS (D % 64 ? 16 : 32)        // registers of a lane for 32 or 64 dims of output
#define OUT_DIMS (2 * SUMS)

static_assert(2 * TILE_TOKENS == 128, "a norm for each thread that dequantises");
static_assert(PREFILL && D % 32 == 0 && D <= 128 && TILE_TOKENS == 64, "attention_prefill");

enum { KEY_FULL, KEY_EMPTY, VALUE_FULL, VALUE_EMPTY };
__device__ __forceinline__ u32 prefill_barrier(u32 smem, int kind, u32 stage) {
  return smem + BARRIERS_AT + 8 * (STAGES * kind + stage);
}

// What a block does: one tile of rows of a sequence, tokens of tiles begin .. end - 1.
struct Share {
  Segment segment;  // but for begin and count
  Rows rows;
  int begin, end, kv_head;
};
// False if there is no such share.  The latest query rows of a batch, which see most, come first.
__device__ __forceinline__ bool find_share(const Args& a, Share& share) {
  const i64* items_before = a.plan + a.num_seqs + 1;
  const i64 item = items_before[a.num_seqs] - 1 - blockIdx.x / a.num_kv_heads;
  if (item < 0) return false;
  share.kv_head = blockIdx.x % a.num_kv_heads;
  Segment& g = share.segment;
  g.s = find_sequence(items_before, a.num_seqs, item);
  g.q = sequence(a, g.s);
  g.tile = (int)(item - items_before[g.s]);
  g.begin = g.count = 0;
  g.slot = item * gridDim.y + blockIdx.y;
  share.rows = rows_of(a, g);
  const int first = share.rows.low / TILE_TOKENS;
  const int count = max(0, share.rows.high >= share.rows.low ? share.rows.high / TILE_TOKENS + 1 - first : 0);
  share.begin = first + (int)((i64)count * blockIdx.y / gridDim.y);
  share.end = first + (int)((i64)count * (blockIdx.y + 1) / gridDim.y);
  return true;
}
