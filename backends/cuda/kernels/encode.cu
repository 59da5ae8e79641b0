// Encode, one warp at a time over tiles of 32 vectors (fewer where several lanes hold a vector): copy rows
// to shared memory, norm, rotation, codes and scale in registers, packed rows through shared memory to
// their places.  While a tile is computed the next one is on its way.
//
// One launch encodes one array (gridDim.y = 1) or keys and values (gridDim.y = 2).
//
// Macros: INPUT, HEAD_DIM, LANES; LOAD, width in bytes of a load of vectors; CONTIGUOUS, 1 if rows follow
// each other on both sides, without slots; BITS_0, SCALE_0, STORE_0 and BITS_1, SCALE_1, STORE_1 for the
// two sides (STORE: width in bytes of a store of codes); WARPS a block has; BLOCKS a multiprocessor
// should hold.

#include "encoder.cuh"
#include "lanes.cuh"
#include "rows.cuh"

template <class L, int BITS, int SCALE, int STORE> struct Encoder {
  static constexpr int IN_BYTES = L::D * sizeof(INPUT);
  static constexpr int OUT_BYTES = (L::D * BITS + 7) / 8;
  static constexpr int IN_TILE = L::ROWS * padded_row(IN_BYTES), OUT_TILE = L::ROWS * padded_row(OUT_BYTES);

  static DEVICE void run(const Side& s, u8* shared) {
    const int lane = threadIdx.x % 32, t = lane % L::T;
    const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0);  // tells the compiler that it is uniform
    constexpr int CENTROID_BYTES = SCALE == NORM ? 0 : 1024;
    float* centroids = reinterpret_cast<float*>(shared + Quantizer<BITS>::BYTES);
    u8* tiles = shared + Quantizer<BITS>::BYTES + CENTROID_BYTES;
    u8* in_tile = tiles + warp * (IN_TILE + OUT_TILE);
    u8* out_tile = in_tile + IN_TILE;
    float* signs = reinterpret_cast<float*>(tiles + WARPS * (IN_TILE + OUT_TILE));
    fill_signs<L>(signs, s.signs, s.rounds, 32 * WARPS);
    if (SCALE != NORM) for (int i = threadIdx.x; i < 1 << BITS; i += 32 * WARPS) centroids[i] = s.centroids[i];
    Quantizer<BITS>::fill(shared, s, 32 * WARPS);
    __syncthreads();
    const Quantizer<BITS> quantizer(shared, s, lane);

    const i64 stride = i64(gridDim.x) * WARPS * L::ROWS;
    i64 first = (i64(blockIdx.x) * WARPS + warp) * L::ROWS;
    fetch(s, in_tile, first, lane);
#pragma unroll 1
    for (i64 base = i64(blockIdx.x) * WARPS * L::ROWS; base < s.rows; base += stride, first += stride) {
      wait_for_copies();
      float x[L::SLOTS];
      read_row<L, INPUT>(x, in_tile + lane / L::T * padded_row(IN_BYTES), t);
      __syncwarp();
      fetch(s, in_tile, first + stride, lane);

      const Norm norm = normalize<L, INPUT>(x);
      const float factor = norm.value > 0.0f ? div(s.gain, norm.value) : 0.0f;
      rotate<L>(x, signs + L::CHUNK * t, s.rounds, s.block_factor, t);

      CodeStream<BITS, L::COUNT> codes;
      codes.clear();
#pragma unroll
      for (int j = 0; j < L::COUNT; j++) {
        const float z = mul(x[j], factor);
        if (SCALE != NORM) x[j] = z;
        codes.put(j, quantizer.template code<L::D>(z));
      }
      if (!norm.finite) codes.clear();
      codes.template store<L>(out_tile + lane / L::T * padded_row(OUT_BYTES), t);

      float scale = norm.value;
      if constexpr (SCALE != NORM) scale = correct<L, SCALE>(x, codes, centroids, scale);
      scale = norm.stored(scale);

      const i64 v = first + lane / L::T;
      if constexpr (CONTIGUOUS) {
        if (v < s.rows && t == 0) reinterpret_cast<float*>(s.scales)[v] = scale;
        __syncwarp();
        if (first < s.rows) rows_out<L::ROWS, OUT_BYTES, STORE>(out_tile, s.packed + first * OUT_BYTES, s.rows - first, lane);
      } else {
        u8* packed_row = nullptr;
        float* scale_at = nullptr;
        if (v < s.rows && s.place(v, packed_row, scale_at) && t == 0) *scale_at = scale;
        __syncwarp();
        scattered_rows_out<L::ROWS, OUT_BYTES, STORE>(out_tile, shuffle_pointer(packed_row, lane * L::T % 32), lane);
      }
      __syncwarp();
    }
  }

  static DEVICE void fetch(const Side& s, u8* tile, i64 first, int lane) {
    fetch_rows<L::ROWS, IN_BYTES, LOAD, CONTIGUOUS>(s, tile, first, lane);
  }
};

using Shape = Layout<HEAD_DIM, LANES>;
using First = Encoder<Shape, BITS_0, SCALE_0, STORE_0>;
using Second = Encoder<Shape, BITS_1, SCALE_1, STORE_1>;

extern "C" __global__ void __launch_bounds__(32 * WARPS, BLOCKS) encode(const __grid_constant__ Sides sides) {
  extern __shared__ __align__(16) u8 shared[];
  if constexpr (BITS_0 == BITS_1 && SCALE_0 == SCALE_1 && STORE_0 == STORE_1) First::run(sides.side[blockIdx.y], shared);
  else if (blockIdx.y == 0) First::run(sides.side[0], shared);
  else Second::run(sides.side[1], shared);
}
