// The warps of attention_prefill that dequantise pages to float16 tiles in shared memory.
#pragma once
#include "attention_codes.cuh"
#include "attention_prefill_layout.cuh"

template <int BITS> __device__ __forceinline__ void fill_prefill_table(u8* table, const float* c, int tid) {
#pragma unroll 4
  for (int i = tid; i < 8 * FIELDS(BITS); i += PREFILL_THREADS) {
    const int field = i / 8;
    const u32 x = BITS <= 4 ? pack_half2(__ldg(c + (field >> BITS)), __ldg(c + (field & ((1 << BITS) - 1)))) : pack_half2(__ldg(c + field), 0.f);
    ((uint4*)table)[i] = make_uint4(x, x, x, x);
  }
}

// Bits [bit, bit + count) of big-endian words as the address of a table entry in this lane's bank.
template <int WORDS> __device__ __forceinline__ u32 entry_address(const u32 (&w)[WORDS], int bit, int count, u32 bank) {
  const int word = bit / 32, right = 64 - bit % 32 - count - 7;  // of two words, to leave the field at bit 7
  const u32 next = word + 1 < WORDS ? w[word + 1 < WORDS ? word + 1 : word] : 0;
  const u32 x = right >= 32 ? w[word] >> (right - 32) : __funnelshift_r(next, w[word], right);
  return (x & (((1u << count) - 1) << 7)) | bank;
}
// Codes 2 i and 2 i + 1 of a run as float16.
template <int BITS, int TABLE, int WORDS> __device__ __forceinline__ u32 look_pair(const u32 (&w)[WORDS], int i, u32 bank) {
  if (BITS <= 4) return table32<TABLE>(entry_address(w, 2 * BITS * i, 2 * BITS, bank));
  const u32 first = table32<TABLE>(entry_address(w, 2 * BITS * i, BITS, bank));
  return __byte_perm(first, table32<TABLE>(entry_address(w, 2 * BITS * i + BITS, BITS, bank)), 0x5410);
}

// Codes of one side: RUN dims of BATCH tokens a lane, every eighth of its warp.
#define BATCH (TOKENS_A_WARP / 16)
template <int BITS, int ALIGN> struct Codes {
  u32 words[BATCH][RUN_WORDS(BITS)];
  __device__ __forceinline__ void load(int i, const u8* from) {
    load_bytes<RUN_BYTES(BITS), ALIGN, RUN_BYTES(BITS)>(words[i], from, 0);
  }
  // to: address of the lane's row of the first token.  Look-ups come before stores, as a look-up would
  // not be moved before a store.
  template <int TABLE> __device__ __forceinline__ void put(u32 to, u32 bank) {
    constexpr int CHUNKS = RUN / 8, AT_ONCE = BITS <= 4 ? CHUNKS : 1;
#pragma unroll
    for (int i = 0; i < BATCH; i++) {
      swap_bytes(words[i]);  // not before: the loads are on their way while others wait
#pragma unroll
      for (int first = 0; first < CHUNKS; first += AT_ONCE) {
        u32 x[4 * AT_ONCE];
#pragma unroll
        for (int k = 0; k < 4 * AT_ONCE; k++) x[k] = look_pair<BITS, TABLE>(words[i], 4 * first + k, bank);
#pragma unroll
        for (int k = 0; k < AT_ONCE; k++)
          store128(to + (first + k) * 16 * TILE_TOKENS + i * 128, make_uint4(x[4 * k], x[4 * k + 1], x[4 * k + 2], x[4 * k + 3]));
      }
    }
  }
};

__device__ __forceinline__ void dequantise(const Args& a, const Share& share, u32 smem, int tid, float factor) {
  const int lane = tid & 31, warp = tid >> 5, quarter = lane >> 3, first = warp * TOKENS_A_WARP + (lane & 7);
  const int* table = a.block_tables + share.segment.s * a.table_row_stride;
  const u8* keys = a.k_packed + share.kv_head * a.k_head_stride + quarter * RUN_BYTES(KEY_BITS);
  const u8* values = a.v_packed + share.kv_head * a.v_head_stride + quarter * RUN_BYTES(VALUE_BITS);
  const float* key_norms = a.k_norms + share.kv_head * a.kn_head_stride;
  const float* value_norms = a.v_norms + share.kv_head * a.vn_head_stride;
  const u32 bank = 4 * lane, to = smem + KEYS_AT + quarter * (RUN / 8) * 16 * TILE_TOKENS + first * 16;
  const int high = share.rows.high, low = share.rows.low;

  auto clamp = [&](int t) { return max(low, min(t, high)); };  // tokens that no row sees are not looked up
  // Blocks of the tokens of a lane in a tile.
  auto locate = [&](int u, int (&blocks)[2 * BATCH]) {
#pragma unroll
    for (int i = 0; i < 2 * BATCH; i++) blocks[i] = table[(i64)(clamp(u * TILE_TOKENS + first + 8 * i) / BLOCK_SIZE) * a.table_step];
  };
  Codes<KEY_BITS, K_ALIGN> k[2];
  Codes<VALUE_BITS, V_ALIGN> v[2];
  auto place_in_block = [&](int u, int i) { return clamp(u * TILE_TOKENS + first + 8 * i) % BLOCK_SIZE; };
  auto load_keys = [&](int u, const int (&blocks)[2 * BATCH], int half) {
#pragma unroll
    for (int i = half * BATCH; i < (half + 1) * BATCH; i++)
      k[half].load(i % BATCH, keys + blocks[i] * a.k_block_stride + place_in_block(u, i) * a.k_token_stride);
  };
  auto load_values = [&](int u, const int (&blocks)[2 * BATCH], int half) {
#pragma unroll
    for (int i = half * BATCH; i < (half + 1) * BATCH; i++)
      v[half].load(i % BATCH, values + blocks[i] * a.v_block_stride + place_in_block(u, i) * a.v_token_stride);
  };
  // Half of the threads have norms of keys, half those of values, one token of a tile each.
  const int side = tid / TILE_TOKENS, own = tid % TILE_TOKENS;
  const float* norms = side ? value_norms : key_norms;
  const i64 norm_block_stride = side ? a.vn_block_stride : a.kn_block_stride;
  const i64 norm_token_stride = side ? a.vn_token_stride : a.kn_token_stride;
  auto block_of_norm = [&](int u) { return table[(i64)(clamp(u * TILE_TOKENS + own) / BLOCK_SIZE) * a.table_step]; };
  auto load_norm = [&](int u, i64 block) {
    return norms[block * norm_block_stride + clamp(u * TILE_TOKENS + own) % BLOCK_SIZE * norm_token_stride];
  };
  auto put_norm = [&](int u, u32 stage, float norm) {
    const int t = u * TILE_TOKENS + own;
    const float x = t < low || t > high ? 0.f : side ? norm : norm * factor;
    store32(smem + NORMS_AT + stage * NORM_BYTES + own / 2 * 16 + side * 8 + own % 2 * 4, __float_as_uint(x));
  };
  auto hand_over = [&](int kind, u32 stage) {
    fence_async();
    __syncwarp();
    if (lane == 0) barrier_arrive(prefill_barrier(smem, kind, stage));
  };

  // What has been put is loaded for the next tile at once, so that loads have the time of a tile.  Of
  // tiles behind the last one they are loads of its tokens.
  int blocks[2 * BATCH], next[2 * BATCH], norm_block, next_norm_block;
  float norm;
  u32 stage = 0, phase = 1;
  if (share.begin < share.end) {
    locate(share.begin, blocks);
    norm_block = block_of_norm(share.begin);
    load_keys(share.begin, blocks, 0), load_keys(share.begin, blocks, 1);
    load_values(share.begin, blocks, 0), load_values(share.begin, blocks, 1);
    norm = load_norm(share.begin, norm_block);
    locate(share.begin + 1, blocks);
    norm_block = block_of_norm(share.begin + 1);
  }
#pragma unroll 1
  for (int u = share.begin; u < share.end; u++) {
    const u32 keys_to = to + stage * TILE_BYTES, values_to = keys_to + VALUES_AT - KEYS_AT, second = BATCH * 128;
    locate(u + 2, next);
    next_norm_block = block_of_norm(u + 2);
    barrier_wait(prefill_barrier(smem, KEY_EMPTY, stage), phase);
    if (side == 0) put_norm(u, stage, norm);
    k[0].template put<K_TABLE>(keys_to, bank);
    load_keys(u + 1, blocks, 0);
    k[1].template put<K_TABLE>(keys_to + second, bank);
    load_keys(u + 1, blocks, 1);
    hand_over(KEY_FULL, stage);
    barrier_wait(prefill_barrier(smem, VALUE_EMPTY, stage), phase);
    if (side == 1) put_norm(u, stage, norm);
    norm = load_norm(u + 1, norm_block);
    v[0].template put<V_TABLE>(values_to, bank);
    load_values(u + 1, blocks, 0);
    v[1].template put<V_TABLE>(values_to + second, bank);
    load_values(u + 1, blocks, 1);
    hand_over(VALUE_FULL, stage);
#pragma unroll
    for (int i = 0; i < 2 * BATCH; i++) blocks[i] = next[i];
    norm_block = next_norm_block;
    if (++stage == STAGES) stage = 0, phase ^= 1;
  }
}
