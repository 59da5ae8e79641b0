// scores[m, n] = <query m, decoded vector n>: queries are rotated once a block, in its prologue; then
// each lane takes one vector and sums query coordinates times looked-up centroids.
//
// Macros: TYPE, that of the queries; BITS; QUERIES a block serves; LOAD, width in bytes of a load of
// codes (4 divides the bytes of a row; 16 also needs BITS 4 or 8 and d a multiple of 32); DENSE, 1 if the queries come rotated (float64, by matrix product).

#include "team.cuh"
#include "lookup.cuh"

using Team = Block;

constexpr int THREADS = 128;

template <class X> DEVICE double to_double(X x) { double r; store_as(&r, to_float(x)); return r; }
DEVICE double to_double(double x) { return x; }

// The words of a packed row, one after another, most significant byte first.
template <int WIDTH> struct Reader {
  const u8* at;
  const u8* end;
  u32 words[WIDTH >= 4 ? WIDTH / 4 : 1];

  DEVICE u32 next(int i) {
    if constexpr (WIDTH >= 4) {
      constexpr int N = WIDTH / 4;
      if (i % N == 0) {
        if constexpr (N == 4) {
          const uint4 q = __ldg(reinterpret_cast<const uint4*>(at));
          words[0] = q.x; words[1] = q.y; words[2] = q.z; words[3] = q.w;
        } else words[0] = at < end ? __ldg(reinterpret_cast<const u32*>(at)) : 0;
        at += WIDTH;
      }
      return __byte_perm(words[i % N], 0, 0x0123);
    } else {
      u32 word = 0;
      for (int k = 0; k < 4; k++, at++) word = word << 8 | (at < end ? *at : 0);
      return word;
    }
  }
};

extern "C" __global__ void __launch_bounds__(THREADS)
inner_products(const TYPE* __restrict__ query, i64 num_queries, const u8* __restrict__ packed, const float* __restrict__ scales,
               i64 rows, float* __restrict__ scores, const float* __restrict__ table, const float* __restrict__ signs, int rounds,
               float block_factor, double gain, int d, u8* scratch, i64 scratch_bytes) {
  extern __shared__ __align__(16) u8 shared[];
  using Table = Lookup<BITS>;
  __shared__ double powers[QUERIES];
  // rotated queries [QUERIES][columns], padded with zeros to whole groups of 32 codes
  const int columns = (d + 31) / 32 * 32;
  const i64 first_query = i64(blockIdx.y) * QUERIES;
  float* rotated = reinterpret_cast<float*>(scratch ? scratch + (i64(blockIdx.y) * gridDim.x + blockIdx.x) * scratch_bytes : shared + Table::BYTES);
  Table::fill(shared, table, THREADS);
  for (int m = 0; m < QUERIES; m++) {
    Workspace<Team> w(d);
    w.row = rotated + m * columns;
    w.part = rotated + QUERIES * columns;
    const bool real = first_query + m < num_queries;
    const TYPE* q = query + (first_query + m) * d;
    // divided by a power of two first, so that no query is too large or too small for float32
    const auto exponent_field = [&](int i) { return real ? float(__double2hiint(to_double(q[i])) >> 20 & 0x7ff) : 0.0f; };
    const int exponent = min(max(int(team_fold(w, Larger{}, exponent_field)) - 1023, -1000), 1000);
    const double down = __hiloint2double((1023 - exponent) << 20, 0);
    if (threadIdx.x == 0) powers[m] = __hiloint2double((1023 + exponent) << 20, 0) * gain;
    FOR_EACH(i, columns) w.row[i] = real && i < d ? to_float(to_double(q[i]) * down) : 0.0f;
    __syncthreads();
    if (!DENSE) TeamRotation<Team>{signs, rounds, block_factor}.forward(w);
  }
  __syncthreads();

  const int bytes = (d * BITS + 7) / 8;
  for (i64 v = i64(blockIdx.x) * THREADS + threadIdx.x; v < rows; v += i64(gridDim.x) * THREADS) {
    const u8* row = packed + v * bytes;
    Reader<LOAD> reader{row, row + bytes, {}};
    float sums[QUERIES] = {};
    for (int e = 0; e < d; e += 32) {  // 32 codes are BITS words
      u32 words[BITS + 1];
#pragma unroll
      for (int i = 0; i < BITS; i++) words[i] = reader.next(i);
      words[BITS] = 0;
#pragma unroll
      for (int j = 0; j < 32; j += 4) {
        float c[4];
#pragma unroll
        for (int g = 0; g < 4; g += Table::GROUP) {
          constexpr int LENGTH = BITS * Table::GROUP;
          const int at = BITS * (j + g), left = 32 - at % 32 - LENGTH;
          const u32 field = left >= 0 ? words[at / 32] >> left : __funnelshift_r(words[at / 32 + 1], words[at / 32], 32 + left);
          Table::get(shared, field & ((1u << LENGTH) - 1), c + g);
        }
#pragma unroll
        for (int m = 0; m < QUERIES; m++) {
          const float4 q = *reinterpret_cast<const float4*>(rotated + m * columns + e + j);
          sums[m] = fmaf(q.x, c[0], fmaf(q.y, c[1], fmaf(q.z, c[2], fmaf(q.w, c[3], sums[m]))));
        }
      }
    }
    const double scale = to_double(scales[v]);
#pragma unroll
    for (int m = 0; m < QUERIES; m++)
      if (first_query + m < num_queries) scores[(first_query + m) * rows + v] = to_float(to_double(sums[m]) * scale * powers[m]);
  }
}
