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
#include "attention_codes.cuh"
#include "attention_common.cuh"
#include "attention_eighths.cuh"
#include "attention_wgmma.cuh"

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
#define NORM_LIMIT 1024.f
#define WEIGHT_LIMIT 0x7800            // 2^15 as float16

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

template <int BITS> __device__ __forceinline__ void fill_prefill_table(u8* table, const float* c, int tid) {
#pragma unroll 4
  for (int i = tid; i < 8 * FIELDS(BITS); i += PREFILL_THREADS) {
    const int field = i / 8;
    const u32 x = BITS <= 4 ? pack_half2(__ldg(c + (field >> BITS)), __ldg(c + (field & ((1 << BITS) - 1)))) : pack_half2(__ldg(c + field), 0.f);
    ((uint4*)table)[i] = make_uint4(x, x, x, x);
  }
}

// ---- the warps that dequantise

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

// ---- the warps that multiply

// The largest factor of the scores of a block's rows; for all threads, with a barrier.
__device__ __forceinline__ float largest_factor(const Args& a, const Share& share, float* factors, int tid) {
  if (tid < TILE_ROWS) {
    const float own = tid < share.rows.count ? a.q_factors[query_row(a, share.segment, share.rows, tid, share.kv_head)].x : 0.f;
    const float most = warp_max(own);
    if (tid % 32 == 0) factors[tid / 32] = most;
  }
  __syncthreads();
  float most = factors[0];
#pragma unroll
  for (int i = 1; i < TILE_ROWS / 32; i++) most = fmaxf(most, factors[i]);
  return most;
}
// The query rows of a group, brought to one factor of the scores.
__device__ __forceinline__ void stage_query(const Args& a, const Share& share, u32 to, int group, int thread, float factor) {
  const int row = thread % 8 + thread / 32 * 8, chunk = thread / 8 % 4;  // and 32 rows, 4 chunks further
  uint4 x[D / 16];
  float ratio[2];
#pragma unroll
  for (int h = 0; h < 2; h++) {
    const int r = group * GROUP_ROWS + row + 32 * h;
    const bool exists = r < share.rows.count;
    const i64 from = query_row(a, share.segment, share.rows, exists ? r : 0, share.kv_head);
    ratio[h] = exists ? a.q_factors[from].x / factor : 0.f;  // a power of two: exact
#pragma unroll
    for (int k = 0; k < D / 32; k++) x[2 * k + h] = ((const uint4*)(a.q_rows + from * Q_PITCH))[chunk + 4 * k];
  }
#pragma unroll
  for (int k = 0; k < D / 16; k++) {
    float v[8];
    unpack_halves(x[k], v);
    u32 w[4];
#pragma unroll
    for (int i = 0; i < 4; i++) w[i] = pack_half2(v[2 * i] * ratio[k % 2], v[2 * i + 1] * ratio[k % 2]);
    store128(to + ((chunk + k / 2 * 4) * GROUP_ROWS + row + k % 2 * 32) * 16, make_uint4(w[0], w[1], w[2], w[3]));
  }
}

__device__ __forceinline__ void multiply(const Args& a, const Share& share, u32 smem, int group, int thread, float factor) {
  const int lane = thread & 31, warp = thread >> 5, g = lane >> 2, c = lane & 3;
  const u32 query_at = smem + QUERY_AT + group * GROUP_BYTES;
  stage_query(a, share, query_at, group, thread, factor);
  // Rows g and g + 8 of the 16 of this warp: what they see, and what their scores are shifted by.
  int row[2], low[2], high[2];
  float shift[2];
#pragma unroll
  for (int e = 0; e < 2; e++) {
    row[e] = group * GROUP_ROWS + 16 * warp + g + 8 * e;
    row_limits(a, share.segment, share.rows, row[e], low[e], high[e]);
    shift[e] = row[e] < share.rows.count
        ? a.q_factors[query_row(a, share.segment, share.rows, row[e], share.kv_head)].y : 0.f;
  }
  const bool capped = a.soft_cap_log2 != 0.f;
  fence_async();
  named_barrier(1 + group, 128);
  const u64 query = wgmma_matrix(query_at, 16 * GROUP_ROWS, 128);
  const u64 keys = wgmma_matrix(smem + KEYS_AT, 16 * TILE_TOKENS, 128);
  const u64 values = wgmma_matrix(smem + VALUES_AT, 128, 16 * TILE_TOKENS);

  // x: [tokens 8 j + 2 c, + 1][row g: 0, 1; g + 8: 2, 3]; o likewise with dims.
  float x[TILE_TOKENS / 2], o[D / OUT_DIMS][SUMS], top[2] = {NEVER, NEVER}, sum[2] = {0.f, 0.f};
  float up = 1.2676506e30f;  // 2^100; value norms are multiplied by it, see NORM_LIMIT
#pragma unroll
  for (int b = 0; b < D / OUT_DIMS; b++)
#pragma unroll
    for (int i = 0; i < SUMS; i++) o[b][i] = 0.f;

  u32 stage = 0, phase = 0;
  auto start_scores = [&](u32 at) {
#pragma unroll
    for (int k = 0; k < D / 16; k++)
      wgmma_64(x, query + k * (2 * 16 * GROUP_ROWS >> 4), keys + ((at * TILE_BYTES + k * 2 * 16 * TILE_TOKENS) >> 4), k > 0);
    wgmma_commit();
  };
  // The groups take turns at the tensor cores: one computes weights while the other multiplies.
  auto take_turn = [&] { named_barrier(TURN + group, 256); };
  auto give_turn = [&](bool last) {
    if (!last || group + 1 < GROUPS) named_barrier_arrive(TURN + (group + 1) % GROUPS, 256);
  };
  if (share.begin < share.end) {
    if (group + 1 == GROUPS) give_turn(false);
    barrier_wait(prefill_barrier(smem, KEY_FULL, 0), 0);
    take_turn();
    wgmma_fence();
    start_scores(0);
    give_turn(false);
    wgmma_wait();
    settle_sums(x);
  }
#pragma unroll 1
  for (int u = share.begin; u < share.end; u++) {
    const u32 norms = smem + NORMS_AT + stage * NORM_BYTES + 16 * c;  // a pair of tokens: of keys, of values
    barrier_wait(prefill_barrier(smem, VALUE_FULL, stage), phase);
    // Weights relative to a running maximum, times the norms of the values and `up`, a power of two, go
    // to float16.  The maximum of an earlier tile is tried first, and kept if nothing exceeds 2^15.
    u32 p[TILE_TOKENS / 16][4];
    float more[2];
    auto weigh = [&](bool scores_lack_norms) {
      u32 largest[2] = {0, 0};
      uint4 ahead = ring128(norms);
#pragma unroll
      for (int j = 0; j < TILE_TOKENS / 8; j++) {
        const uint4 n = ahead;
        if (j + 1 < TILE_TOKENS / 8) ahead = ring128(norms + 64 * (j + 1));
        const float weight[2] = {__uint_as_float(n.z) * up, __uint_as_float(n.w) * up};
#pragma unroll
        for (int e = 0; e < 2; e++) {
          const float y0 = x[4 * j + 2 * e], y1 = x[4 * j + 2 * e + 1];
          const float w0 = exp2_approx(scores_lack_norms ? fmaf(y0, __uint_as_float(n.x), -top[e]) : y0 - top[e]);
          const float w1 = exp2_approx(scores_lack_norms ? fmaf(y1, __uint_as_float(n.y), -top[e]) : y1 - top[e]);
          more[e] = j ? more[e] + (w0 + w1) : w0 + w1;
          const u32 both = pack_half2(w0 * weight[0], w1 * weight[1]);
          p[j / 2][j % 2 * 2 + e] = both;
          largest[e] = larger_halves(largest[e], both);
        }
      }
      largest[0] = larger_halves(largest[0], largest[1]);
      return (largest[0] & 0x7fff) > WEIGHT_LIMIT || (largest[0] >> 16 & 0x7fff) > WEIGHT_LIMIT || !(more[0] + more[1] < 1e30f);
    };
    const int first_token = u * TILE_TOKENS;
    const bool masked = first_token + TILE_TOKENS - 1 > share.rows.all_high || first_token < share.rows.all_low;
    if (masked || capped || __any_sync(FULL_WARP, weigh(true))) {
      float most[2] = {__uint_as_float(0xff800000u), __uint_as_float(0xff800000u)}, norm = 0.f;
#pragma unroll
      for (int j = 0; j < TILE_TOKENS / 8; j++) {
        const uint4 n = ring128(norms + 64 * j);
        norm = fmaxf(norm, fmaxf(fabsf(__uint_as_float(n.z)), fabsf(__uint_as_float(n.w))));
        x[4 * j] *= __uint_as_float(n.x), x[4 * j + 2] *= __uint_as_float(n.x);
        x[4 * j + 1] *= __uint_as_float(n.y), x[4 * j + 3] *= __uint_as_float(n.y);
      }
      if (capped) {  // c tanh(x), exact to float32 rounding of c
#pragma unroll
        for (int i = 0; i < TILE_TOKENS / 2; i++)
          x[i] = a.soft_cap_log2 - 2.f * a.soft_cap_log2 * __fdividef(1.f, 1.f + exp2_approx(2.f * LOG2_E * (x[i] + shift[i / 2 % 2])));
      }
      if (masked) {
#pragma unroll
        for (int i = 0; i < TILE_TOKENS / 2; i++) {
          const int t = first_token + i / 4 * 8 + 2 * c + i % 2, e = i / 2 % 2;
          if (t > high[e] || t < low[e]) x[i] = __uint_as_float(0xff800000u);
        }
      }
#pragma unroll
      for (int i = 0; i < TILE_TOKENS / 2; i++) most[i / 2 % 2] = fmaxf(most[i / 2 % 2], x[i]);
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
        float now = fmaxf(most[e], __shfl_xor_sync(FULL_WARP, most[e], 1));
        now = fmaxf(top[e], fmaxf(now, __shfl_xor_sync(FULL_WARP, now, 2)));
        const float down = exp2_approx(top[e] - now);
        top[e] = now;
        sum[e] *= down;
#pragma unroll
        for (int b = 0; b < D / OUT_DIMS; b++)
#pragma unroll
          for (int i = 0; i < SUMS; i += 4) o[b][i + 2 * e] *= down * change, o[b][i + 2 * e + 1] *= down * change;
      }
      weigh(false);
    }
    __syncwarp();
    if (lane == 0) barrier_arrive(prefill_barrier(smem, KEY_EMPTY, stage));
    sum[0] += more[0], sum[1] += more[1];
    const bool last = u + 1 == share.end;
    const u32 at = stage;
    if (++stage == STAGES) stage = 0, phase ^= 1;
    if (!last) barrier_wait(prefill_barrier(smem, KEY_FULL, stage), phase);
    take_turn();
    settle(p);
    settle_sums(x);
#pragma unroll
    for (int b = 0; b < D / OUT_DIMS; b++) settle_sums(o[b]);
    wgmma_fence();
#pragma unroll
    for (int j = 0; j < TILE_TOKENS / 16; j++)
#pragma unroll
      for (int b = 0; b < D / OUT_DIMS; b++)
        wgmma_across(o[b], p[j], values + ((at * TILE_BYTES + j * 2 * 128 + b * OUT_DIMS / 8 * 16 * TILE_TOKENS) >> 4));
    wgmma_commit();
    start_scores(stage);  // behind the last tile for nothing: a branch here would part the products
    give_turn(last);
    wgmma_wait();
#pragma unroll
    for (int b = 0; b < D / OUT_DIMS; b++) settle_sums(o[b]);
    settle_sums(x);
    if (lane == 0) barrier_arrive(prefill_barrier(smem, VALUE_EMPTY, at));
  }

  // Write the part, by way of the query's place in shared memory: 16 rows of this warp, chunks of 8 dims,
  // turned around so that neither writing nor reading meets a bank twice.
  const i64 part = (share.segment.slot * a.num_kv_heads + share.kv_head) * a.tile_rows;
  const u32 rows_at = query_at + warp * 16 * 2 * D;
  auto chunk_at = [&](int r, int chunk) { return rows_at + r * 2 * D + (chunk ^ r & (D % 64 ? 3 : 7)) * 16; };
  named_barrier(1 + group, 128);  // the last products have read the query
#pragma unroll
  for (int e = 0; e < 2; e++) {
    sum[e] += __shfl_xor_sync(FULL_WARP, sum[e], 1);
    sum[e] += __shfl_xor_sync(FULL_WARP, sum[e], 2);
    const float inverse = sum[e] > 0.f ? __fdividef(1.f, sum[e]) : 0.f;
#pragma unroll
    for (int i = 0; i < D / 8; i++) {
      const float* pair = o[8 * i / OUT_DIMS] + 4 * (i % (OUT_DIMS / 8)) + 2 * e;
      store32(chunk_at(g + 8 * e, i) + 4 * c, pack_half2(pair[0] * inverse, pair[1] * inverse));
    }
    if (c == 0 && row[e] < share.rows.count)
      a.part_scales[part + row[e]] = make_float2(
          sum[e] > 0.f ? top[e] + log2_approx(sum[e]) + (capped ? 0.f : shift[e]) : __uint_as_float(0xff800000u), 1.f / up);
  }
  __syncwarp();
#pragma unroll
  for (int i = lane; i < 16 * D / 8; i += 32) {
    const int r = i / (D / 8), chunk = i % (D / 8), at = group * GROUP_ROWS + 16 * warp + r;
    if (at < share.rows.count) *(uint4*)(a.parts + (part + at) * O_PITCH + 8 * chunk) = ring128(chunk_at(r, chunk));
  }
}

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
