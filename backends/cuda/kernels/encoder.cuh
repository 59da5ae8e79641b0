// Steps of encoding a vector that lanes hold in registers (lanes.cuh): all but the rotation.

#pragma once
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
  static constexpr int BYTES = BITS > 1 ? TABLE_BYTES : 0;
  const u8* shared;
  u32 copy;
  float scale;

  static DEVICE void fill(u8* shared, const Side& s, int threads) {
    uint2* table = reinterpret_cast<uint2*>(shared);
    for (int i = threadIdx.x; i < BYTES / 8; i += threads) table[i] = s.buckets[i / (ENTRY_BYTES / 8)];
  }
  DEVICE Quantizer(const u8* shared, const Side& s, int lane)
      : shared(shared), copy(lane * 8 % ENTRY_BYTES), scale(s.bucket_scale) {}

  // z of vectors of length D.
  template <int D> DEVICE u32 code(float z) const {
    if constexpr (BITS == 1) return less(0.0f, z);
    else {
      // |z| <= 16 moves the low 14 bits of the sum; they are the offset in the table
      const float near = D <= 256 ? z : fminf(fmaxf(z, -16.0f), 16.0f);
      const u32 place = bits_of(fma_rn(near, scale, 1.0f + 0x1p-10f));
      const uint2 entry = *reinterpret_cast<const uint2*>(shared + (place & (TABLE_BYTES - ENTRY_BYTES) | copy));
      return entry.y + less(float_of(entry.x), z);
    }
  }
};

// Rows first .. first + ROWS to a tile of padded rows in shared memory.
template <int ROWS, int BYTES, int WIDTH, bool CONTIGUOUS> DEVICE void fetch_rows(const Side& s, u8* tile, i64 first, int lane) {
  if constexpr (CONTIGUOUS) {
    if (first < s.rows) rows_in<ROWS, BYTES, WIDTH>(tile, s.vectors + first * BYTES, s.rows - first, lane);
  } else {
    const i64 v = first + lane;
    scattered_rows_in<ROWS, BYTES, WIDTH>(tile, lane < ROWS && v < s.rows ? s.vector(v) : nullptr, lane);
  }
}

// This lane's part of a row in shared memory.
template <class L, class INPUT> DEVICE void read_row(float (&x)[L::SLOTS], const u8* row, int t) {
#pragma unroll
  for (int j = 0; j < L::COUNT; j += PER_16_BYTES<INPUT>)
    widen(*reinterpret_cast<const uint4*>(row + (L::coordinate(j) + L::CHUNK * t) * sizeof(INPUT)), x + j, INPUT{});
}

template <class L> DEVICE float largest_magnitude(const float (&x)[L::SLOTS]) {
  float largest = 0.0f;
#pragma unroll
  for (int j = 0; j < L::COUNT; j++) largest = larger(largest, magnitude(x[j]));
#pragma unroll
  for (int s = 1; s < L::T; s *= 2) largest = larger(largest, __shfl_xor_sync(~0u, largest, s));
  return largest;
}

struct Norm {
  float value;   // of the row as it is now; 0 if it is not finite
  int exponent;  // the input is the row times 2**exponent
  bool finite;

  // What is stored: `scale` of the row, of the input.
  DEVICE float stored(float scale) const { return finite ? mul(scale, power_of_two(exponent)) : float_of(CANONICAL_NAN); }
};

// The norm of x; rows whose sum of squares is not safe are first multiplied by a power of two.
template <class L, class INPUT> DEVICE Norm normalize(float (&x)[L::SLOTS]) {
  constexpr bool NARROW = IS_HALF<INPUT>;  // its squares are exact and cannot leave the safe range
  const auto value = [&](int j) { return x[j]; };
  float sum = fold_sum<L>(product_of<NARROW>(value, value));
  Norm norm{0.0f, 0, bits_of(sum) < INFINITY_BITS};
  if (!NARROW) {
    const bool safe = sum >= float_of(0x21800000u) && sum <= float_of(0x5d800000u);  // 2**-60, 2**60
    if (__any_sync(~0u, !safe)) {
      const float largest = largest_magnitude<L>(x);
      norm.finite = bits_of(largest) < INFINITY_BITS;
      norm.exponent = norm.finite && !safe && bits_of(largest) ? exponent_of(largest) : 0;
      const PowerOfTwo up(-norm.exponent);
#pragma unroll
      for (int j = 0; j < L::COUNT; j++) x[j] = up.scale(x[j]);
      sum = fold_sum<L>(product_of<NARROW>(value, value));  // the same bits for rows that were safe
    }
  }
  if (norm.finite) norm.value = sqrt_rn(sum);
  return norm;
}

// The scale of kind MSE or UNBIASED.
template <class L, int SCALE, class Codes> DEVICE float correct(const float* z, const Codes& codes, const float* centroids, float norm) {
  const auto value = [&](int j) { return z[j]; };
  const auto centroid = [&](int j) { return centroids[codes.get(j)]; };
  const float along = fold_sum<L>(product_of(value, centroid));
  const float ratio = SCALE == MSE ? div(along, fold_sum<L>(product_of(centroid, centroid))) : div(float(L::D), along);
  return norm == 0.0f ? 0.0f : mul(norm, ratio);
}
