// The codec for any head_dim, one team of threads a vector, and the steps before and behind the matrix
// product of dense rotations.  `bits` and `scale_kind` are arguments here.
//
// Macros: TYPE, that of the input vectors (encode) or of the output (decode); TEAM (team.cuh).

#include "team.cuh"
#include "side.cuh"

using Team = TEAM;

enum Scale { NORM, MSE, UNBIASED };

// Fixed point of dense products: rows have INPUT_BITS bits, centroids CENTROID_BITS and the matrix
// MATRIX_BITS behind the point.
constexpr int INPUT_BITS = 22, MATRIX_BITS = 24, CENTROID_BITS = 19;

struct DenseRow {  // what encoding keeps of a row while it is rotated
  Norm norm;
  int exponent;  // the largest magnitude lies in [2**exponent, 2**(exponent + 1))
};

DEVICE double power_of_two_double(int e) { return __hiloint2double((e + 1023) << 20, 0); }

// Steps 5 to 7: quantise w.row (rotated), pack and store codes and scale of row v.
DEVICE void finish_row(const Workspace<Team>& w, const Side& s, const Norm& norm, u32 v, int bits, int scale_kind) {
  const float factor = norm.value > 0.0f ? div(s.gain, norm.value) : 0.0f;
  FOR_EACH(i, w.d) {
    const float z = mul(w.row[i], factor);
    u32 code = 0;
    for (u32 bit = 1u << (bits - 1); bit; bit >>= 1)
      if (less(s.thresholds[code + bit - 1], z)) code += bit;
    w.row[i] = z;
    w.codes[i] = norm.finite ? u8(code) : 0;
  }
  Team::sync();
  u8* packed_row;
  float* scale_at;
  if (uniform(s.place(v, packed_row, scale_at))) {
    float scale = norm.value;
    if (scale_kind != NORM) {
      const float along = team_fold(w, Add{}, [&](int i) { return mul(w.row[i], s.centroids[w.codes[i]]); });
      const float energy = team_fold(w, Add{}, [&](int i) { const float c = s.centroids[w.codes[i]]; return mul(c, c); });
      const float ratio = scale_kind == MSE ? div(along, energy) : div(float(w.d), along);
      scale = norm.value == 0.0f ? 0.0f : mul(norm.value, ratio);
    }
    scale = mul(scale, power_of_two(norm.exponent));
    if (Team::rank() == 0) *scale_at = norm.finite ? scale : float_of(CANONICAL_NAN);
    const int bytes = (w.d * bits + 7) / 8;
    FOR_EACH(g, (w.d + 7) / 8) {  // 8 codes take `bits` bytes
      u64 stream = 0;
      for (int i = 8 * g; i < 8 * g + 8; i++) stream = stream << bits | (i < w.d ? w.codes[i] : 0);
      for (int k = 0; k < bits; k++)
        if (g * bits + k < bytes) packed_row[g * bits + k] = u8(stream >> (8 * (bits - 1 - k)));
    }
  }
  Team::sync();
}

DEVICE u32 code_at(const u8* row, int i, int bits) {
  const int at = i * bits, byte = at / 8, left = 16 - at % 8 - bits;
  const u32 two = u32(row[byte]) << 8 | (left < 8 ? row[byte + 1] : 0);
  return two >> left & ((1u << bits) - 1);
}

extern "C" __global__ void TEAM_BOUNDS encode_any(const __grid_constant__ Side s, int d, int bits, int scale_kind, u8* scratch, i64 scratch_bytes) {
  extern __shared__ __align__(16) u8 shared[];
  const Workspace<Team> w(shared, scratch, scratch_bytes, d);
  const TeamRotation<Team> rotation{s.signs, s.rounds, s.block_factor};
  for (u32 v = team<Team>(); v < s.rows; v += teams<Team>()) {
    const Norm norm = load_row(w, reinterpret_cast<const TYPE*>(s.vector(v)));
    rotation.forward(w);
    finish_row(w, s, norm, v, bits, scale_kind);
  }
}

extern "C" __global__ void TEAM_BOUNDS decode_any(const u8* packed, const float* scales, TYPE* out, i64 rows, const float* table, const float* signs, int rounds, float block_factor, int d, int bits, u8* scratch, i64 scratch_bytes) {
  extern __shared__ __align__(16) u8 shared[];
  const Workspace<Team> w(shared, scratch, scratch_bytes, d);
  const TeamRotation<Team> rotation{signs, rounds, block_factor};
  const int bytes = (d * bits + 7) / 8;
  for (i64 v = team<Team>(); v < rows; v += teams<Team>()) {
    FOR_EACH(i, d) w.row[i] = table[code_at(packed + v * bytes, i, bits)];
    Team::sync();
    rotation.backward(w);
    const float scale = scales[v];
    FOR_EACH(i, d) store_as(out + v * d + i, mul(w.row[i], scale));
    Team::sync();
  }
}

// Dense, before the product: rows first .. first + count as whole numbers.
extern "C" __global__ void TEAM_BOUNDS encode_dense_before(const __grid_constant__ Side s, u32 first, u32 count, int d, double* fixed, DenseRow* kept, u8* scratch, i64 scratch_bytes) {
  extern __shared__ __align__(16) u8 shared[];
  const Workspace<Team> w(shared, scratch, scratch_bytes, d);
  for (u32 v = team<Team>(); v < count; v += teams<Team>()) {
    const Norm norm = load_row(w, reinterpret_cast<const TYPE*>(s.vector(first + v)));
    const float largest = norm.finite ? team_fold(w, Larger{}, [&](int i) { return magnitude(w.row[i]); }) : 0.0f;
    const int exponent = bits_of(largest) ? exponent_of(largest) : -1;
    if (Team::rank() == 0) kept[v] = DenseRow{norm, exponent};
    const double to_fixed = power_of_two_double(INPUT_BITS - 1 - exponent);
    FOR_EACH(i, d) {
      double x;
      store_as(&x, norm.finite ? w.row[i] : 0.0f);
      fixed[i64(v) * d + i] = rint(mul(x, to_fixed));
    }
    Team::sync();
  }
}

// Dense, behind the product.
extern "C" __global__ void TEAM_BOUNDS encode_dense_behind(const __grid_constant__ Side s, u32 first, u32 count, int d, int bits, int scale_kind, const double* product, const DenseRow* kept, u8* scratch, i64 scratch_bytes) {
  extern __shared__ __align__(16) u8 shared[];
  const Workspace<Team> w(shared, scratch, scratch_bytes, d);
  for (u32 v = team<Team>(); v < count; v += teams<Team>()) {
    const DenseRow row = kept[v];
    const double from_fixed = power_of_two_double(row.exponent - (INPUT_BITS - 1) - MATRIX_BITS);
    FOR_EACH(i, d) w.row[i] = to_float(mul(product[i64(v) * d + i], from_fixed));
    Team::sync();
    finish_row(w, s, row.norm, first + v, bits, scale_kind);
  }
}

// Dense decoding: codes as whole numbers, and products as vectors; one thread a coordinate.
extern "C" __global__ void decode_dense_before(const u8* packed, double* fixed, i64 rows, const float* centroids, int d, int bits) {
  const int bytes = (d * bits + 7) / 8;
  for (i64 i = i64(blockIdx.x) * blockDim.x + threadIdx.x; i < rows * d; i += i64(gridDim.x) * blockDim.x) {
    double c;
    store_as(&c, centroids[code_at(packed + i / d * bytes, int(i % d), bits)]);
    fixed[i] = rint(mul(c, power_of_two_double(CENTROID_BITS)));
  }
}

extern "C" __global__ void decode_dense_behind(const double* product, const float* scales, TYPE* out, i64 rows, double factor, int d) {
  for (i64 i = i64(blockIdx.x) * blockDim.x + threadIdx.x; i < rows * d; i += i64(gridDim.x) * blockDim.x)
    store_as(out + i, mul(to_float(mul(product[i], factor)), scales[i / d]));
}
