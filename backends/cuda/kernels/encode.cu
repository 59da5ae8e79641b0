// Encode, one warp at a time over tiles of 32 vectors (16 where two lanes hold a vector): copy rows to shared memory, norm,
// rotation, codes and scale in registers, packed rows through shared memory to their places.  While a
// tile is computed the next one is on its way.
//
// One launch encodes one array (gridDim.y = 1) or keys and values (gridDim.y = 2).
//
// Macros: INPUT, HEAD_DIM, LANES; CONTIGUOUS, 1 if rows follow each other on both sides, without slots; BITS_0, SCALE_0, STORE_0 and BITS_1, SCALE_1, STORE_1 for the two
// sides (STORE: width in bytes of a store of codes); WARPS a block has; BLOCKS a multiprocessor should
// hold.

#include "convert.cuh"
#include "pack.cuh"
#include "rows.cuh"
#include "side.cuh"

enum Scale { NORM, MSE, UNBIASED };

// The number of thresholds below z.  A table of buckets finds the only threshold that z can be near
// and the number of those below that one; the map from z to buckets is monotone, so this is exact.
// The table has copies for lanes to be on different banks: 16 kB in all.
constexpr int TABLE_BYTES = 16384;

template <int BITS> struct Quantizer {
  static constexpr int BUCKETS = BITS <= 4 ? 128 : 8 << BITS, ENTRY_BYTES = TABLE_BYTES / BUCKETS;
  const u8* shared;
  u32 copy;
  float scale;

  static DEVICE void fill(u8* shared, const Side& s) {
    if constexpr (BITS > 1) {
      uint2* table = reinterpret_cast<uint2*>(shared);
      for (int i = threadIdx.x; i < TABLE_BYTES / 8; i += 32 * WARPS) table[i] = s.buckets[i / (ENTRY_BYTES / 8)];
    }
  }
  DEVICE Quantizer(const u8* shared, const Side& s, int lane)
      : shared(shared), copy(lane * 8 % ENTRY_BYTES), scale(s.bucket_scale) {}
  DEVICE u32 code(float z) const {
    if constexpr (BITS == 1) return less(0.0f, z);
    else {
      // |z| <= sqrt(HEAD_DIM) moves the low 14 bits of the sum; they are the offset in the table
      const u32 place = bits_of(fma_rn(z, scale, 1.0f + 0x1p-10f));
      const uint2 entry = *reinterpret_cast<const uint2*>(shared + (place & (TABLE_BYTES - ENTRY_BYTES) | copy));
      return entry.y + less(float_of(entry.x), z);
    }
  }
};

template <class L, int BITS, int SCALE, int STORE> struct Encoder {
  static constexpr int IN_BYTES = L::D * sizeof(INPUT);
  static constexpr int OUT_BYTES = (L::D * BITS + 7) / 8;
  static constexpr int IN_TILE = L::ROWS * padded_row(IN_BYTES), OUT_TILE = L::ROWS * padded_row(OUT_BYTES);
  // float16 squares cannot leave the safe range
  static constexpr bool NARROW = IS_HALF<INPUT>;

  static DEVICE void run(const Side& s, u8* shared) {
    const int lane = threadIdx.x % 32, t = lane % L::T;
    const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0);  // tells the compiler that it is uniform
    const int tables = BITS > 1 ? TABLE_BYTES : 0;
    float* centroids = reinterpret_cast<float*>(shared + tables);
    u8* in_tile = shared + tables + (SCALE == NORM ? 0 : 1024) + warp * (IN_TILE + OUT_TILE);
    u8* out_tile = in_tile + IN_TILE;
    float* signs = reinterpret_cast<float*>(shared + tables + (SCALE == NORM ? 0 : 1024) + WARPS * (IN_TILE + OUT_TILE));
    const int steps = L::IS_POWER_OF_TWO ? s.rounds : 2 * s.rounds;
    for (int i = threadIdx.x; i < steps * L::D; i += 32 * WARPS) signs[i] = s.signs[i];
    if (SCALE != NORM) for (int i = threadIdx.x; i < 1 << BITS; i += 32 * WARPS) centroids[i] = s.centroids[i];
    Quantizer<BITS>::fill(shared, s);
    __syncthreads();
    const Quantizer<BITS> quantizer(shared, s, lane);

    const i64 stride = i64(gridDim.x) * WARPS * L::ROWS;
    i64 first = (i64(blockIdx.x) * WARPS + warp) * L::ROWS;
    fetch(s, in_tile, first, lane);
#pragma unroll 1
    for (i64 base = i64(blockIdx.x) * WARPS * L::ROWS; base < s.rows; base += stride, first += stride) {
      wait_for_copies();
      float x[L::COUNT];
      read(x, in_tile + lane / L::T * padded_row(IN_BYTES), t);
      __syncwarp();
      fetch(s, in_tile, first + stride, lane);

      float norm;
      int exponent = 0;
      bool finite;
      normalize(x, norm, exponent, finite);
      const float factor = norm > 0.0f ? div(s.gain, norm) : 0.0f;
      rotate<L>(x, signs + L::CHUNK * t, s.rounds, s.block_factor, t);

      CodeStream<BITS, L::COUNT> codes;
      codes.clear();
#pragma unroll
      for (int j = 0; j < L::COUNT; j++) {
        const float z = mul(x[j], factor);
        if (SCALE != NORM) x[j] = z;
        codes.put(j, quantizer.code(z));
      }
      if (!finite) codes.clear();
      codes.template store<L>(out_tile + lane / L::T * padded_row(OUT_BYTES), t);

      float scale = norm;
      if (SCALE != NORM) scale = correct(x, codes, centroids, norm);
      if (!NARROW) scale = mul(scale, power_of_two(exponent));
      if (!finite) scale = float_of(CANONICAL_NAN);

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
    if constexpr (CONTIGUOUS) {
      if (first < s.rows) rows_in<L::ROWS, IN_BYTES, 16>(tile, s.vectors + first * IN_BYTES, s.rows - first, lane);
    } else {
      const i64 v = first + lane;
      scattered_rows_in<L::ROWS, IN_BYTES, 16>(tile, lane < L::ROWS && v < s.rows ? s.vector(v) : nullptr, lane);
    }
  }

  static DEVICE void read(float (&x)[L::COUNT], const u8* row, int t) {
    constexpr int PER = PER_16_BYTES<INPUT>;
#pragma unroll
    for (int j = 0; j < L::COUNT; j += PER)
      widen(*reinterpret_cast<const uint4*>(row + (L::coordinate(j) + L::CHUNK * t) * sizeof(INPUT)), x + j, INPUT{});
  }

  static DEVICE float sum_of_squares(const float (&x)[L::COUNT]) {
    const auto value = [&](int j) { return x[j]; };
    return fold_sum<L>(product_of<NARROW>(value, value));  // squares of float16 are exact
  }

  // The norm of x; rows whose sum of squares is not safe are first multiplied by a power of two.
  static DEVICE void normalize(float (&x)[L::COUNT], float& norm, int& exponent, bool& finite) {
    float sum = sum_of_squares(x);
    finite = bits_of(sum) < INFINITY_BITS;
    if (!NARROW) {
      const bool safe = sum >= float_of(0x21800000u) && sum <= float_of(0x5d800000u);  // 2**-60, 2**60
      if (__any_sync(~0u, !safe)) {
        float largest = 0.0f;
#pragma unroll
        for (int j = 0; j < L::COUNT; j++) largest = larger(largest, magnitude(x[j]));
#pragma unroll
        for (int s = 1; s < L::T; s *= 2) largest = larger(largest, __shfl_xor_sync(~0u, largest, s));
        finite = bits_of(largest) < INFINITY_BITS;
        exponent = finite && !safe && bits_of(largest) ? exponent_of(largest) : 0;
        const PowerOfTwo up(-exponent);
#pragma unroll
        for (int j = 0; j < L::COUNT; j++) x[j] = up.scale(x[j]);
        sum = sum_of_squares(x);  // the same bits for rows that were safe
      }
    }
    norm = finite ? sqrt_rn(sum) : 0.0f;
  }

  static DEVICE float correct(const float (&z)[L::COUNT], const CodeStream<BITS, L::COUNT>& codes, const float* centroids, float norm) {
    const auto value = [&](int j) { return z[j]; };
    const auto centroid = [&](int j) { return centroids[codes.get(j)]; };
    const float along = fold_sum<L>(product_of(value, centroid));
    const float ratio = SCALE == MSE ? div(along, fold_sum<L>(product_of(centroid, centroid))) : div(float(L::D), along);
    return norm == 0.0f ? 0.0f : mul(norm, ratio);
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
