// attention_prefill: partial attention for many query rows of a kv head, as prefill has them; any bits,
// block size and strides, head_dim a multiple of 32 up to 128; compute capability 9.0a.
//
//   S = Q K^T   (A = 64 query rows x 16 dims in shared memory, B = dequantised K: 16 dims x 64 tokens)
//   O = P V     (A = 64 query rows x 16 tokens in registers,   B = dequantised V: 16 tokens x D dims)
//
// A block has TILE_ROWS query rows of one kv head and one split of the tokens that they see.  Four
// warps dequantise tiles of TILE_TOKENS tokens from global memory into rings of float16 tiles in shared
// memory, which three groups of four warps with 64 rows each multiply with: a code is looked up once for
// all rows of the block.  The scales of the vectors stay apart: those of keys multiply the scores, those
// of values the softmax weights.
//
// A matrix in shared memory is made of 8x8 tiles, 8 rows of 16 bytes: [dims / 8][rows / 8][row][dim].
//
// Macros: D, KEY_BITS, VALUE_BITS, BLOCK_SIZE, K_ALIGN, V_ALIGN (bytes a load of codes may take at
// once), UNIT (tokens of a tile), PREFILL.
#pragma once
#include "attention_prefill_multiply.cuh"
#include "attention_prefill_tiles.cuh"

extern "C" __global__ void __launch_bounds__(PREFILL_THREADS, 1) attention_prefill(const Args a) {
  const u32 smem = shared_address(dynamic_shared());
  if (smem != SMEM_BASE) trap();  // table32 has it as a constant
  const int tid = threadIdx.x, group = tid / 128;
  Share share;
  if (!find_share(a, share)) return;
  fill_prefill_table<KEY_BITS>(dynamic_shared() + K_TABLE, a.k_centroids, tid);
  fill_prefill_table<VALUE_BITS>(dynamic_shared() + V_TABLE, a.v_centroids, tid);
  if (tid == 0) {
    for (u32 i = 0; i < STAGES; i++) {
      barrier_init(prefill_barrier(smem, KEY_FULL, i), 4);
      barrier_init(prefill_barrier(smem, VALUE_FULL, i), 4);
      barrier_init(prefill_barrier(smem, KEY_EMPTY, i), 4 * GROUPS);
      barrier_init(prefill_barrier(smem, VALUE_EMPTY, i), 4 * GROUPS);
    }
    fence_barrier_init();
  }
  const float factor = largest_factor(a, share, (float*)(dynamic_shared() + FACTORS_AT), tid);
  if (group == GROUPS) {
    give_registers<PRODUCER_REGISTERS>();
    dequantise(a, share, smem, tid - 128 * GROUPS, factor);
  } else {
    take_registers<CONSUMER_REGISTERS>();
    multiply(a, share, smem, here(group), tid % 128, factor);  // else group is computed again and again
  }
}
