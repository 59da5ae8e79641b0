// How a vector lies in the registers of a warp, and the rotation on that layout.
//
// T lanes (a power of two) hold one vector.  One lane: coordinates in order, no lane talks to another.
// Several lanes take turns at chunks of consecutive coordinates: register CHUNK k + i of lane t holds
// coordinate CHUNK (T k + t) + i, and only the butterflies of strides CHUNK .. CHUNK T / 2 cross lanes.
// Then halves of a vector are whole turns, if its length is no power of two.

#pragma once
#include "exact.cuh"

constexpr DEVICE int floor_power_of_two(int n) { int p = 1; while (2 * p <= n) p *= 2; return p; }
constexpr DEVICE int ceil_power_of_two(int n) { int p = 1; while (p < n) p *= 2; return p; }

template <int DIM, int LANES_A_VECTOR> struct Layout {
  static constexpr int D = DIM, T = LANES_A_VECTOR;
  static constexpr int COUNT = D / T;                     // registers a lane
  static constexpr int CHUNK = T == 1 ? COUNT : T == 2 && D % 64 == 0 ? 16 : 8;  // consecutive coordinates in a lane
  static constexpr int SLOTS = (COUNT + 7) / 8 * 8;       // COUNT in whole 16-byte words of any type
  static constexpr int ROWS = 32 / T;                     // vectors a warp
  static constexpr int BLOCK = floor_power_of_two(D);     // length of a fast transform
  static constexpr bool IS_POWER_OF_TWO = BLOCK == D;
  static constexpr int TAIL = COUNT - BLOCK / T;          // register where the last block begins
  static constexpr int SIGNS = (D + 3) / 4 * 4;           // a row of signs in shared memory
  // Coordinate of register j in lane 0; lane t adds CHUNK t.
  static constexpr DEVICE int coordinate(int j) { return T == 1 ? j : CHUNK * T * (j / CHUNK) + j % CHUNK; }
};

// Sum of product(j) over the coordinates, folded in halves: s[i] += s[i + size/2], then size/4, ...
// Depth first, so that only a few partial sums are alive.  `product.add_to(sum, j)` adds one more; it
// may fuse where the product is exact.
template <int SIZE, int END, int COUNT, class P> DEVICE float fold_registers(P product, int i) {
  if constexpr (SIZE >= END) return product(i);
  else {
    const float low = fold_registers<2 * SIZE, END, COUNT>(product, i);
    if (i + SIZE >= COUNT) return low;  // zero padding
    if constexpr (2 * SIZE >= END) return product.add_to(low, i + SIZE);
    else return add(low, fold_registers<2 * SIZE, END, COUNT>(product, i + SIZE));
  }
}

// x[j] * y[j]; EXACT says that float32 holds every product.
template <class X, class Y, bool EXACT = false> struct Product {
  X x;
  Y y;
  DEVICE float operator()(int j) const { return mul(x(j), y(j)); }
  DEVICE float add_to(float sum, int j) const { return EXACT ? fma_rn(x(j), y(j), sum) : add(sum, mul(x(j), y(j))); }
};
template <bool EXACT = false, class X, class Y> DEVICE Product<X, Y, EXACT> product_of(X x, Y y) { return {x, y}; }

struct Values {
  const float* values;
  DEVICE float operator()(int i) const { return values[i]; }
  DEVICE float add_to(float sum, int i) const { return add(sum, values[i]); }
};

template <class L, class P> DEVICE float fold_sum(P product) {
  constexpr int END = ceil_power_of_two(L::COUNT);
  if constexpr (L::T == 1) return fold_registers<1, END, L::COUNT>(product, 0);
  else {
    float s[L::CHUNK];
#pragma unroll
    for (int i = 0; i < L::CHUNK; i++) {
      s[i] = fold_registers<L::CHUNK, END, L::COUNT>(product, i);
#pragma unroll
      for (int other = L::T / 2; other > 0; other /= 2) s[i] = add(s[i], __shfl_xor_sync(~0u, s[i], other));
    }
    return fold_registers<1, L::CHUNK, L::CHUNK>(Values{s}, 0);
  }
}

// Unnormalised Walsh-Hadamard transform of registers BEGIN .. END, strides ascending.
// `first` is 1, or 2 where flip_and_pair has done the stride 1 already.
template <class L, int BEGIN, int END, int FIRST_STRIDE> DEVICE void transform(float (&x)[L::SLOTS], int t) {
  constexpr int LENGTH = END - BEGIN;
#pragma unroll
  for (int h = FIRST_STRIDE; h < LENGTH; h *= 2) {
    if (h == L::CHUNK) {
#pragma unroll
      for (int s = 1; s < L::T; s *= 2) {
        const float sign = t & s ? -1.0f : 1.0f;
#pragma unroll
        for (int i = BEGIN; i < END; i++) x[i] = fma_rn(x[i], sign, __shfl_xor_sync(~0u, x[i], s));
      }
    }
#pragma unroll
    for (int i = 0; i < LENGTH; i++) {
      if (i & h) continue;
      const float a = x[BEGIN + i], b = x[BEGIN + i + h];
      x[BEGIN + i] = add(a, b);
      x[BEGIN + i + h] = sub(a, b);
    }
  }
}

// signs: [steps, D] -> rows of SIGNS in shared memory.
template <class L> DEVICE void fill_signs(float* shared, const float* signs, int rounds, int threads) {
  const int steps = L::IS_POWER_OF_TWO ? rounds : 2 * rounds;
  for (int i = threadIdx.x; i < steps * L::D; i += threads) shared[i / L::D * L::SIGNS + i % L::D] = signs[i];
}

// x * signs, then the butterflies of stride 1 on registers BEGIN .. END: 3 operations for 2 values.
template <class L, int BEGIN, int END> DEVICE void flip_and_pair(float (&x)[L::SLOTS], const float* signs) {
#pragma unroll
  for (int j = 0; j < L::COUNT; j += 4) {
    const float4 quad = *reinterpret_cast<const float4*>(signs + L::coordinate(j));
    const float sign[4] = {quad.x, quad.y, quad.z, quad.w};
#pragma unroll
    for (int i = j; i < j + 4 && i < L::COUNT; i++) {
      if (BEGIN < i && i < END && (i - BEGIN) % 2) {  // x[i - 1] has its sign
        const float a = x[i - 1], b = x[i];
        x[i - 1] = fma_rn(b, sign[i - j], a);
        x[i] = fma_rn(b, -sign[i - j], a);
      } else x[i] = mul(x[i], sign[i - j]);
    }
  }
}

template <class L, int BEGIN, int END> DEVICE void normalize_block(float (&x)[L::SLOTS], float factor) {
#pragma unroll
  for (int j = BEGIN; j < END; j++) x[j] = mul(x[j], factor);
}

// First and last half of the coordinates become (a + b) / sqrt(2), (a - b) / sqrt(2).
template <class L> DEVICE void mix_halves(float (&x)[L::SLOTS]) {
  constexpr int HALF = L::COUNT / 2, SECOND = L::COUNT - HALF;
  const float half_sqrt = float_of(0x3f3504f3u);  // float32 of sqrt(1/2)
#pragma unroll
  for (int j = 0; j < HALF; j++) {
    const float a = x[j], b = x[SECOND + j];
    x[j] = mul(add(a, b), half_sqrt);
    x[SECOND + j] = mul(sub(a, b), half_sqrt);
  }
}

// The rotation times its growth.  `signs` points at this lane's first coordinate: [steps, SIGNS].
template <class L> DEVICE void rotate(float (&x)[L::SLOTS], const float* signs, int rounds, float block_factor, int t) {
#pragma unroll 1
  for (int r = 0; r < rounds; r++) {
    if constexpr (L::IS_POWER_OF_TWO) {
      flip_and_pair<L, 0, L::COUNT>(x, signs + r * L::SIGNS);
      transform<L, 0, L::COUNT, 2>(x, t);
    } else {
      flip_and_pair<L, 0, L::COUNT - L::TAIL>(x, signs + 2 * r * L::SIGNS);
      transform<L, 0, L::COUNT - L::TAIL, 2>(x, t);
      normalize_block<L, 0, L::COUNT - L::TAIL>(x, block_factor);
      mix_halves<L>(x);
      flip_and_pair<L, L::TAIL, L::COUNT>(x, signs + (2 * r + 1) * L::SIGNS);
      transform<L, L::TAIL, L::COUNT, 2>(x, t);
      normalize_block<L, L::TAIL, L::COUNT>(x, block_factor);
      mix_halves<L>(x);
    }
  }
}

template <class L> DEVICE void flip(float (&x)[L::SLOTS], const float* signs, float factor) {
#pragma unroll
  for (int j = 0; j < L::COUNT; j += 4) {
    const float4 quad = *reinterpret_cast<const float4*>(signs + L::coordinate(j));
    const float sign[4] = {quad.x, quad.y, quad.z, quad.w};
#pragma unroll
    for (int i = j; i < j + 4 && i < L::COUNT; i++) x[i] = mul(x[i], mul(sign[i - j], factor));  // a sign times the factor is exact
  }
}

// The inverse rotation times its growth, times `scale`.
template <class L> DEVICE void rotate_back(float (&x)[L::SLOTS], const float* signs, int rounds, float block_factor, float scale, int t) {
  if constexpr (L::IS_POWER_OF_TWO) {
    transform<L, 0, L::COUNT, 1>(x, t);
#pragma unroll 1
    for (int r = rounds - 1; r > 0; r--) {
      flip_and_pair<L, 0, L::COUNT>(x, signs + r * L::SIGNS);
      transform<L, 0, L::COUNT, 2>(x, t);
    }
  } else {
#pragma unroll 1
    for (int r = rounds - 1; r >= 0; r--) {
      mix_halves<L>(x);
      transform<L, L::TAIL, L::COUNT, 1>(x, t);
      normalize_block<L, L::TAIL, L::COUNT>(x, block_factor);
      flip<L>(x, signs + (2 * r + 1) * L::SIGNS, 1.0f);
      mix_halves<L>(x);
      transform<L, 0, L::COUNT - L::TAIL, 1>(x, t);
      normalize_block<L, 0, L::COUNT - L::TAIL>(x, block_factor);
      if (r > 0) flip<L>(x, signs + 2 * r * L::SIGNS, 1.0f);
    }
  }
  flip<L>(x, signs, scale);
}
