// Decode, one warp at a time over tiles of 32 vectors (fewer where several lanes hold a vector): packed
// rows to shared memory, lookup, inverse rotation and scale in registers, rows out through shared memory.
// While a tile is computed the next one is on its way.
//
// Macros: OUTPUT, HEAD_DIM, LANES, BITS; LOAD and STORE, width in bytes of a load of codes and of a
// store of vectors; WARPS and BLOCKS as in encode.cu.

#include "convert.cuh"
#include "lookup.cuh"
#include "pack.cuh"
#include "rows.cuh"

using L = Layout<HEAD_DIM, LANES>;
constexpr int IN_BYTES = (L::D * BITS + 7) / 8, OUT_BYTES = L::D * sizeof(OUTPUT);
constexpr int IN_TILE = L::ROWS * padded_row(IN_BYTES), OUT_TILE = L::ROWS * padded_row(OUT_BYTES);

extern "C" __global__ void __launch_bounds__(32 * WARPS, BLOCKS)
decode(const u8* __restrict__ packed, const float* __restrict__ scales, u8* __restrict__ out, i64 rows,
       const float* __restrict__ table, const float* __restrict__ signs_in, int rounds, float block_factor) {
  extern __shared__ __align__(16) u8 shared[];
  const int lane = threadIdx.x % 32, t = lane % L::T;
  const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0);  // tells the compiler that it is uniform
  using Table = Lookup<BITS>;
  u8* in_tile = shared + Table::BYTES + warp * (IN_TILE + OUT_TILE);
  u8* out_tile = in_tile + IN_TILE;
  float* signs = reinterpret_cast<float*>(shared + Table::BYTES + WARPS * (IN_TILE + OUT_TILE));
  fill_signs<L>(signs, signs_in, rounds, 32 * WARPS);
  Table::fill(shared, table, 32 * WARPS);
  __syncthreads();

  const i64 stride = i64(gridDim.x) * WARPS * L::ROWS;
  i64 first = (i64(blockIdx.x) * WARPS + warp) * L::ROWS;
  const auto fetch = [&](i64 from) {
    if (from < rows) rows_in<L::ROWS, IN_BYTES, LOAD>(in_tile, packed + from * IN_BYTES, rows - from, lane);
  };
  fetch(first);
#pragma unroll 1
  for (i64 base = i64(blockIdx.x) * WARPS * L::ROWS; base < rows; base += stride, first += stride) {
    const i64 v = first + lane / L::T;
    const float scale = v < rows ? scales[v] : 0.0f;
    wait_for_copies();
    CodeStream<BITS, L::COUNT> codes;
    codes.template load<L>(in_tile + lane / L::T * padded_row(IN_BYTES), t);
    __syncwarp();
    fetch(first + stride);

    float x[L::SLOTS];
#pragma unroll
    for (int j = L::COUNT; j < L::SLOTS; j++) x[j] = 0.0f;
#pragma unroll
    for (int j = 0; j < L::COUNT; j += Table::GROUP) Table::get(shared, codes.get(j, Table::GROUP), x + j);
    rotate_back<L>(x, signs + L::CHUNK * t, rounds, block_factor, scale, t);

    u8* row = out_tile + lane / L::T * padded_row(OUT_BYTES);
    constexpr int PER = PER_16_BYTES<OUTPUT>;
#pragma unroll
    for (int j = 0; j < L::COUNT; j += PER)
      *reinterpret_cast<uint4*>(row + (L::coordinate(j) + L::CHUNK * t) * sizeof(OUTPUT)) = narrow(x + j, OUTPUT{});
    __syncwarp();
    rows_out<L::ROWS, OUT_BYTES, STORE>(out_tile, out + first * OUT_BYTES, rows - first, lane);
    __syncwarp();
  }
}
