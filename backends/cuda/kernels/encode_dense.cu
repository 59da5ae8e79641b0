// Encode with a dense rotation, one warp at a time over tiles of 16 vectors, otherwise as encode.cu.  The
// matrix lies in shared memory.
//
// Macros: INPUT, HEAD_DIM, LOAD, CONTIGUOUS, WARPS, BLOCKS as in encode.cu; BITS, SCALE, STORE; LIMBS of
// the matrix.

#include "encoder.cuh"
#include "imma.cuh"

using L = Layout<HEAD_DIM, 4>;
using Integers = IntegerProduct<L, LIMBS>;
constexpr int ROWS = 16, INPUT_BITS = 22, MATRIX_BITS = 24;
constexpr int IN_BYTES = L::D * sizeof(INPUT), OUT_BYTES = L::D * BITS / 8;
constexpr int IN_TILE = ROWS * padded_row(IN_BYTES), OUT_TILE = ROWS * padded_row(OUT_BYTES);
// Codes are kept where the scale depends on them, else stored chunk by chunk.
constexpr bool KEEP = SCALE != NORM;
constexpr int KEPT = KEEP ? L::COUNT : 8;

struct Row {
  Norm norm;
  float factor;  // from sums to z
};

extern "C" __global__ void __launch_bounds__(32 * WARPS, BLOCKS) encode_dense(const __grid_constant__ Side s, const uint4* matrix_in) {
  extern __shared__ __align__(16) u8 shared[];
  const int lane = threadIdx.x % 32, t = lane % 4;
  const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0);  // tells the compiler that it is uniform
  u8* table = shared + Integers::MATRIX_BYTES;
  float* centroids = reinterpret_cast<float*>(table + Quantizer<BITS>::BYTES);
  u8* in_tile = table + Quantizer<BITS>::BYTES + (KEEP ? 1024 : 0) + warp * (IN_TILE + OUT_TILE);
  u8* out_tile = in_tile + IN_TILE;
  for (int i = threadIdx.x; i < Integers::MATRIX_BYTES / 16; i += 32 * WARPS) reinterpret_cast<uint4*>(shared)[i] = matrix_in[i];
  if (KEEP) for (int i = threadIdx.x; i < 1 << BITS; i += 32 * WARPS) centroids[i] = s.centroids[i];
  Quantizer<BITS>::fill(table, s, 32 * WARPS);
  __syncthreads();
  const Quantizer<BITS> quantizer(table, s, lane);
  const uint2* matrix = reinterpret_cast<const uint2*>(shared) + lane;

  const i64 stride = i64(gridDim.x) * WARPS * ROWS;
  i64 first = (i64(blockIdx.x) * WARPS + warp) * ROWS;
  fetch_rows<ROWS, IN_BYTES, LOAD, CONTIGUOUS>(s, in_tile, first, lane);
#pragma unroll 1
  for (; first < s.rows; first += stride) {
    wait_for_copies();
    Integers product;
    Row rows[2];
#pragma unroll
    for (int r = 0; r < 2; r++) {
      float x[L::SLOTS];
      read_row<L, INPUT>(x, in_tile + (lane / 4 + 8 * r) * padded_row(IN_BYTES), t);
      rows[r].norm = normalize<L, INPUT>(x);
      const float largest = largest_magnitude<L>(x);
      const int exponent = bits_of(largest) && rows[r].norm.finite ? exponent_of(largest) : 0;
      const float power = power_of_two(INPUT_BITS - 1 - exponent);
#pragma unroll
      for (int k = 0; k < L::COUNT; k += 8) {
        u32 n[8];
#pragma unroll
        for (int i = 0; i < 8; i++) n[i] = biased_limbs(to_whole(x[k + i], power));
        product.put(r, k / 8, n, SIGN_BITS);
      }
      const float norm = rows[r].norm.value;
      // times a power of two is exact: |sum| is below 2**53, a norm at least 2**exponent
      rows[r].factor = norm > 0.0f ? mul(div(s.gain, norm), power_of_two(exponent - (INPUT_BITS - 1) - MATRIX_BITS)) : 0.0f;
    }
    __syncwarp();
    fetch_rows<ROWS, IN_BYTES, LOAD, CONTIGUOUS>(s, in_tile, first + stride, lane);

    float z[2][KEEP ? L::SLOTS : 8];
    CodeStream<BITS, KEPT> codes[2];
    codes[0].clear();
    codes[1].clear();
#pragma unroll(KEEP ? L::COUNT : 1)
    for (int k = 0; k < L::COUNT; k += 8) {
      i64 sums[2][8];
      product.chunk(sums, matrix, k / 8);
#pragma unroll
      for (int r = 0; r < 2; r++) {
        if (!KEEP) codes[r].clear();
#pragma unroll
        for (int i = 0; i < 8; i++) {
          const int at = KEEP ? k + i : i;
          z[r][at] = mul(to_float(sums[r][i]), rows[r].factor);
          codes[r].put(at, quantizer.template code<L::D>(z[r][at]));
        }
        if (!KEEP) {
          if (!rows[r].norm.finite) codes[r].clear();
          codes[r].template store<L>(out_tile + (lane / 4 + 8 * r) * padded_row(OUT_BYTES) + k / 8 * 4 * BITS, t);
        }
      }
    }
    u8* packed[2] = {};
#pragma unroll
    for (int r = 0; r < 2; r++) {
      const Norm& norm = rows[r].norm;
      float scale = norm.value;
      if constexpr (KEEP) {
        if (!norm.finite) codes[r].clear();
        codes[r].template store<L>(out_tile + (lane / 4 + 8 * r) * padded_row(OUT_BYTES), t);
        scale = correct<L, SCALE>(z[r], codes[r], centroids, scale);
      }
      scale = norm.stored(scale);
      const i64 v = first + lane / 4 + 8 * r;
      float* scale_at = nullptr;
      if constexpr (CONTIGUOUS) scale_at = reinterpret_cast<float*>(s.scales) + v;
      if (v < s.rows && (CONTIGUOUS || s.place(v, packed[r], scale_at)) && t == 0) *scale_at = scale;
    }
    __syncwarp();
    if constexpr (CONTIGUOUS) rows_out<ROWS, OUT_BYTES, STORE>(out_tile, s.packed + first * OUT_BYTES, s.rows - first, lane);
    else {
      u8* const low = shuffle_pointer(packed[0], lane * 4 % 32);
      u8* const high = shuffle_pointer(packed[1], lane * 4 % 32);
      scattered_rows_out<ROWS, OUT_BYTES, STORE>(out_tile, lane < 8 ? low : high, lane);
    }
    __syncwarp();
  }
}
