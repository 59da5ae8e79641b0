// The ring of pages in shared memory of attention_pages and attention_wide, and the warp that fills it.
#pragma once
#include "attention_tile.cuh"

#define WORKING_THREADS (32 * (CONSUMERS + 1))
// From the producer's group of warps to the consumers.
#define REGISTERS_MOVED (WIDE || D > 128 || ROW_TILES > 2)
#define PAGES_THREADS (REGISTERS_MOVED ? 32 * (CONSUMERS + 4) : WORKING_THREADS)
#define BARRIERS_AT TABLE_BYTES
#define PLAN_AT (BARRIERS_AT + 512)
#define PLAN_BYTES (FUSED ? 16 * FEW_SEQUENCES + 128 : 0)
#define ROWS_AT (PLAN_AT + PLAN_BYTES)
#define ROWS_BYTES (WIDE ? HEADS * (int)sizeof(WideRows) : CONSUMERS * (int)sizeof(TileRows))
#define RING_AT (ROWS_AT + ROWS_BYTES)
#define FITTING_STAGES ((NUM_SMEM - RING_AT) / STAGE_BYTES)
#define STAGES (FITTING_STAGES > 24 ? 24 : FITTING_STAGES)
#define LAZY 5.f           // raise the maximum only if exceeded by 2^5

#define COPY_TOKENS (PAGE * COPY_PAGES)
#define STAGE_COPIES (STAGE_PAGES / COPY_PAGES)
#define BLOCK_COPIES (BLOCK_SIZE / COPY_TOKENS)

static_assert(RING_AT % 128 == 0 && STAGES >= 2, "shared memory");
static_assert(STAGE_PAGES % COPY_PAGES == 0 && 32 % STAGE_COPIES == 0, "a stage is whole copies");

__device__ __forceinline__ void produce(const Args& a, const i64* plan, u32 smem, int lane) {
  const u32 full = smem + BARRIERS_AT, empty = full + 8 * STAGES;
  // Four lanes a copy: K codes, V codes, norms of K, norms of V.
  const int head = blockIdx.y * HEADS, kind = lane & 3;
  const u8* from = kind == 0 ? a.k_packed + head * a.k_head_stride
      : kind == 1            ? a.v_packed + head * a.v_head_stride
      : kind == 2            ? (const u8*)(a.k_norms + head * a.kn_head_stride)
                             : (const u8*)(a.v_norms + head * a.vn_head_stride);
  const i64 block_stride = kind == 0 ? a.k_block_stride : kind == 1 ? a.v_block_stride
      : kind == 2 ? 4 * a.kn_block_stride : 4 * a.vn_block_stride;
  const i64 token_stride = kind == 0 ? a.k_token_stride : kind == 1 ? a.v_token_stride
      : kind == 2 ? 4 * a.kn_token_stride : 4 * a.vn_token_stride;
  const u32 bytes = COPY_PAGES * (kind == 0 ? K_PAGE : kind == 1 ? V_PAGE : NORM_PAGE);
  const u32 at = kind == 0 ? 0 : kind == 1 ? AT_V : kind == 2 ? AT_KN : AT_VN;
  int stage = 0, phase = 1;
  Walk walk = start_walk(a, plan);
  Segment segment;
  while (next_segment(a, walk, segment)) {
    // Copies that some row of the sequence sees; others are neither looked up nor made.
    const int last_copy = (segment.q.context - 1) / COPY_TOKENS;
    const int low = a.window ? segment.q.position + 1 - a.window : 0;
    const int first_copy = min(low > 0 ? low / COPY_TOKENS : 0, last_copy);
    const int* table = a.block_tables + segment.s * a.table_row_stride;
    auto place_of = [&](int copy) {  // block * BLOCK_COPIES + copy within the block
      copy = max(first_copy, min(copy, last_copy));
      const i64 block = table[(i64)(copy / BLOCK_COPIES) * a.table_step];
      return block * BLOCK_COPIES + copy % BLOCK_COPIES;
    };
    int base = segment.begin * STAGE_COPIES;
    i64 places = place_of(base + lane), next = place_of(base + 32 + lane);
    for (int u = segment.begin; u < segment.begin + segment.count; u++) {
      if (u * STAGE_COPIES - base == 32) {
        base += 32;
        places = next;
        next = place_of(base + 32 + lane);
      }
      barrier_wait(empty + 8 * stage, phase);
      if (lane == 0) barrier_expect(full + 8 * stage, STAGE_BYTES);
      __syncwarp();
      const u32 to = smem + RING_AT + stage * STAGE_BYTES + at;
#pragma unroll
      for (int first = 0; first < STAGE_COPIES; first += 8) {
        const int i = first + (lane >> 2);
        const i64 place = __shfl_sync(FULL_WARP, places, u * STAGE_COPIES + i - base);
        const i64 block = place / BLOCK_COPIES, token = place % BLOCK_COPIES * COPY_TOKENS;
        if (i < STAGE_COPIES)
          bulk_copy(to + i * COPY_PAGES * PAGE_BYTES, from + block * block_stride + token * token_stride, bytes, full + 8 * stage);
      }
      if (++stage == STAGES) stage = 0, phase ^= 1;
    }
  }
}

// By one thread, before all others use them.
__device__ __forceinline__ void init_ring(u32 smem) {
  for (int i = 0; i < STAGES; i++) {
    barrier_init(smem + BARRIERS_AT + 8 * i, 1);
    barrier_init(smem + BARRIERS_AT + 8 * (STAGES + i), CONSUMERS);
  }
}
