// Decode with a dense rotation, one warp at a time over tiles of 16 vectors, otherwise as decode.cu.  The
// matrix lies in shared memory.
//
// Macros: OUTPUT, HEAD_DIM, BITS, LOAD, WARPS, BLOCKS as in decode.cu; LIMBS of the matrix.

#include "convert.cuh"
#include "imma.cuh"
#include "pack.cuh"
#include "rows.cuh"

using L = Layout<HEAD_DIM, 4>;
using Integers = IntegerProduct<L, LIMBS>;
constexpr int ROWS = 16;
constexpr int IN_BYTES = L::D * BITS / 8, OUT_BYTES = L::D * sizeof(OUTPUT), IN_TILE = ROWS * padded_row(IN_BYTES);

// centroids: [2**BITS], the limbs of whole numbers in bytes.
extern "C" __global__ void __launch_bounds__(32 * WARPS, BLOCKS)
decode_dense(const u8* __restrict__ packed, const float* __restrict__ scales, u8* __restrict__ out, i64 rows,
             const u32* __restrict__ centroids, const uint4* __restrict__ matrix_in, double gain) {
  extern __shared__ __align__(16) u8 shared[];
  const int lane = threadIdx.x % 32, t = lane % 4;
  const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0);  // tells the compiler that it is uniform
  u32* table = reinterpret_cast<u32*>(shared + Integers::MATRIX_BYTES);
  u8* in_tile = shared + Integers::MATRIX_BYTES + 1024 + warp * IN_TILE;
  for (int i = threadIdx.x; i < Integers::MATRIX_BYTES / 16; i += 32 * WARPS) reinterpret_cast<uint4*>(shared)[i] = matrix_in[i];
  for (int i = threadIdx.x; i < 1 << BITS; i += 32 * WARPS) table[i] = centroids[i];
  __syncthreads();
  const uint2* matrix = reinterpret_cast<const uint2*>(shared) + lane;

  const i64 stride = i64(gridDim.x) * WARPS * ROWS;
  i64 first = (i64(blockIdx.x) * WARPS + warp) * ROWS;
  const auto fetch = [&](i64 from) {
    if (from < rows) rows_in<ROWS, IN_BYTES, LOAD>(in_tile, packed + from * IN_BYTES, rows - from, lane);
  };
  fetch(first);
#pragma unroll 1
  for (; first < rows; first += stride) {
    wait_for_copies();
    Integers product;
    float scale[2];
    i64 v[2];
#pragma unroll
    for (int r = 0; r < 2; r++) {
      v[r] = first + lane / 4 + 8 * r;
      scale[r] = v[r] < rows ? scales[v[r]] : 0.0f;
      CodeStream<BITS, L::COUNT> codes;
      codes.template load<L>(in_tile + (lane / 4 + 8 * r) * padded_row(IN_BYTES), t);
#pragma unroll
      for (int k = 0; k < L::COUNT; k += 8) {
        u32 n[8];
#pragma unroll
        for (int i = 0; i < 8; i++) n[i] = table[codes.get(k + i)];
        product.put(r, k / 8, n, 0);
      }
    }
    __syncwarp();
    fetch(first + stride);
#pragma unroll 1
    for (int k = 0; k < L::COUNT; k += 8) {
      i64 sums[2][8];
      product.chunk(sums, matrix, k / 8);
#pragma unroll
      for (int r = 0; r < 2; r++) {
        float x[8];
#pragma unroll
        for (int i = 0; i < 8; i++) x[i] = mul(to_float(mul(whole_to_double(sums[r][i]), gain)), scale[r]);
        if (v[r] < rows) {
          u8* at = out + v[r] * OUT_BYTES + (4 * k + 8 * t) * sizeof(OUTPUT);
          constexpr int PER = PER_16_BYTES<OUTPUT>;
#pragma unroll
          for (int i = 0; i < 8; i += PER) reinterpret_cast<uint4*>(at)[i / PER] = narrow(x + i, OUTPUT{});
        }
      }
    }
  }
}
