// A vector of any length, one team of threads for each: the steps of the codec on a row of floats in
// shared memory (or, where that is too small, in a scratch row in global memory).

#pragma once
#include "convert.cuh"

// Tells the compiler that all lanes have the same number, without which shuffles are slow.
DEVICE int uniform(int number) { return __shfl_sync(~0u, number, 0); }

// A warp where rows are short, else a block; one whose rows are in scratch memory where they are long.
struct Warp {
  static constexpr bool IN_SCRATCH = false;
  static constexpr int MAX_THREADS = 128, BLOCKS = 6;
  static DEVICE int rank() { return threadIdx.x % 32; }
  static DEVICE int size() { return 32; }
  static DEVICE int in_block() { return uniform(threadIdx.x / 32); }
  static DEVICE int in_a_block() { return blockDim.x / 32; }
  static DEVICE void sync() { __syncwarp(); }
};
struct Block {
  static constexpr bool IN_SCRATCH = false;
  static constexpr int MAX_THREADS = 512, BLOCKS = 2;
  static DEVICE int rank() { return threadIdx.x; }
  static DEVICE int size() { return blockDim.x; }
  static DEVICE int in_block() { return 0; }
  static DEVICE int in_a_block() { return 1; }
  static DEVICE void sync() { __syncthreads(); }
};
struct ScratchBlock : Block { static constexpr bool IN_SCRATCH = true; };

#define TEAM_BOUNDS __launch_bounds__(Team::MAX_THREADS, Team::BLOCKS)

// Numbers of this team in the grid, and of all teams.
template <class Team> DEVICE u32 team() { return blockIdx.x * Team::in_a_block() + Team::in_block(); }
template <class Team> DEVICE u32 teams() { return gridDim.x * Team::in_a_block(); }

// The memory of one team.  `part` holds ceil_power_of_two(d) / 2 floats.
template <class Team> struct Workspace {
  float* row;
  float* part;
  u8* codes;
  int d, padded;  // padded: d rounded up to a power of two

  DEVICE explicit Workspace(int d) : row(nullptr), part(nullptr), codes(nullptr), d(d), padded(2) {
    while (padded < d) padded *= 2;
  }
  // `bytes` a team, in shared memory or in scratch memory of the grid.
  DEVICE Workspace(u8* shared, u8* scratch, i64 bytes, int d) : Workspace(d) {
    u8* base = Team::IN_SCRATCH ? scratch + team<Team>() * bytes : shared + Team::in_block() * int(bytes);
    row = reinterpret_cast<float*>(base);
    part = row + d;
    codes = reinterpret_cast<u8*>(part + padded / 2);
  }
};

#define FOR_EACH(i, count) for (int i = Team::rank(); i < (count); i += Team::size())

struct Add { DEVICE float operator()(float a, float b) const { return add(a, b); } };
struct Larger { DEVICE float operator()(float a, float b) const { return larger(a, b); } };

// Fold value(0 .. d - 1), zero-padded to a power of two, in halves.  All threads get the result.
template <class Team, class Op, class F> DEVICE float team_fold(const Workspace<Team>& w, Op op, F value) {
  int half = w.padded / 2;
  FOR_EACH(i, half) w.part[i] = op(value(i), i + half < w.d ? value(i + half) : 0.0f);
  Team::sync();
  for (half /= 2; half >= 32; half /= 2) {
    FOR_EACH(i, half) w.part[i] = op(w.part[i], w.part[i + half]);
    Team::sync();
  }
  float result = w.part[threadIdx.x % 32 & max(2 * half - 1, 0)];  // each warp for itself
  for (; half > 0; half /= 2) result = op(result, __shfl_xor_sync(~0u, result, half));
  Team::sync();
  return result;
}

struct Norm {
  float value;   // of the row as it is now; 0 if it is not finite
  int exponent;  // the input is the row times 2**exponent
  bool finite;
};

// Steps 1 to 3 of the format: read a row, bring it into the safe range, take its norm.
template <class Team, class X> DEVICE Norm load_row(const Workspace<Team>& w, const X* x) {
  FOR_EACH(i, w.d) w.row[i] = to_float(x[i]);
  Team::sync();
  const auto square = [&](int i) { return mul(w.row[i], w.row[i]); };
  float sum = team_fold(w, Add{}, square);
  Norm norm{0.0f, 0, bits_of(sum) < INFINITY_BITS};
  const bool safe = sum >= float_of(0x21800000u) && sum <= float_of(0x5d800000u);  // 2**-60, 2**60
  if (uniform(!safe)) {
    const float largest = team_fold(w, Larger{}, [&](int i) { return magnitude(w.row[i]); });
    norm.finite = bits_of(largest) < INFINITY_BITS;
    if (norm.finite && bits_of(largest)) norm.exponent = exponent_of(largest);
    const PowerOfTwo up(-norm.exponent);
    FOR_EACH(i, w.d) w.row[i] = norm.finite ? up.scale(w.row[i]) : 0.0f;
    Team::sync();
    sum = team_fold(w, Add{}, square);
  }
  if (norm.finite) norm.value = sqrt_rn(sum);
  return norm;
}

// The rotation of any length, step by step as in docs/format.md.
template <class Team> struct TeamRotation {
  const float* signs;  // [steps, d]
  int rounds;
  float block_factor;

  DEVICE void forward(const Workspace<Team>& w) const {
    const int length = block_of(w);
    for (int step = 0; step < steps(w); step++) {
      const int begin = step % 2 ? w.d - length : 0;
      const float* row = signs + i64(step) * w.d;
      FOR_EACH(i, w.d - length) {
        const int j = i < begin ? i : i + length;
        w.row[j] = mul(w.row[j], row[j]);
      }
      transform(w, row + begin, length, begin);
      if (length < w.d) mix_halves(w);
    }
  }
  DEVICE void backward(const Workspace<Team>& w) const {
    const int length = block_of(w);
    for (int step = steps(w) - 1; step >= 0; step--) {
      if (length < w.d) mix_halves(w);
      transform(w, nullptr, length, step % 2 ? w.d - length : 0);
      FOR_EACH(i, w.d) w.row[i] = mul(w.row[i], signs[i64(step) * w.d + i]);
      Team::sync();
    }
  }

 private:
  static DEVICE int block_of(const Workspace<Team>& w) { return w.padded == w.d ? w.d : w.padded / 2; }
  DEVICE int steps(const Workspace<Team>& w) const { return w.padded == w.d ? rounds : 2 * rounds; }

  // Of `length` coordinates from `begin` on, first times `flips` if they are given; times
  // 1 / sqrt(length) unless that is the whole row.
  DEVICE void transform(const Workspace<Team>& w, const float* flips, int length, int begin) const {
    if (length == w.d) begin = 0;
    float* x = w.row + begin;
    const float factor = length < w.d ? block_factor : 1.0f;
    const int lane = threadIdx.x % 32;
    for (int base = uniform(Team::rank() - lane); base < length; base += Team::size()) {
      const bool inside = base + lane < length;
      float value = inside ? x[base + lane] : 0.0f;
      if (flips && inside) value = mul(value, flips[base + lane]);
#pragma unroll
      for (int h = 1; h < 32; h *= 2)
        if (h < length) value = fma_rn(value, lane & h ? -1.0f : 1.0f, __shfl_xor_sync(~0u, value, h));
      if (inside) x[base + lane] = length <= 32 ? mul(value, factor) : value;
    }
    Team::sync();
    for (int h = 32; h < length;) {
      const int left = length / h;
      if (left >= 8) butterflies<8>(x, length, h, left == 8 ? factor : 1.0f);
      else if (left == 4) butterflies<4>(x, length, h, factor);
      else butterflies<2>(x, length, h, factor);
      h *= min(left, 8);
    }
  }
  // The strides h, 2 h .. RADIX / 2 h, then times `factor`.
  template <int RADIX> static DEVICE void butterflies(float* x, int length, int h, float factor) {
    FOR_EACH(p, length / RADIX) {
      float* at = x + (p & -h) * RADIX + (p & (h - 1));
      float value[RADIX];
#pragma unroll
      for (int k = 0; k < RADIX; k++) value[k] = at[k * h];
#pragma unroll
      for (int s = 1; s < RADIX; s *= 2) {
#pragma unroll
        for (int k = 0; k < RADIX; k++) {
          if (k & s) continue;
          const float a = value[k], b = value[k + s];
          value[k] = add(a, b);
          value[k + s] = sub(a, b);
        }
      }
#pragma unroll
      for (int k = 0; k < RADIX; k++) at[k * h] = mul(value[k], factor);
    }
    Team::sync();
  }
  static DEVICE void mix_halves(const Workspace<Team>& w) {
    const float half_sqrt = float_of(0x3f3504f3u);  // float32 of sqrt(1/2)
    const int half = w.d / 2, second = w.d - half;
    FOR_EACH(i, half) {
      const float a = w.row[i], b = w.row[second + i];
      w.row[i] = mul(add(a, b), half_sqrt);
      w.row[second + i] = mul(sub(a, b), half_sqrt);
    }
    Team::sync();
  }
};
