// A vector of any length, one block of threads for each: the steps of the codec on a row of floats in
// shared memory (or, where that is too small, in a scratch row in global memory).

#pragma once
#include "convert.cuh"

// The memory of one block.  `part` holds ceil_power_of_two(d) / 2 floats.
struct Workspace {
  float* row;
  float* part;
  u8* codes;
  int d, padded;  // padded: d rounded up to a power of two

  DEVICE Workspace(u8* shared, u8* scratch, i64 scratch_bytes, int d_) : d(d_), padded(2) {
    while (padded < d) padded *= 2;
    u8* base = scratch ? scratch + blockIdx.x * scratch_bytes : shared;
    row = reinterpret_cast<float*>(base);
    part = row + d;
    codes = reinterpret_cast<u8*>(part + padded / 2);
  }
};

#define FOR_EACH(i, count) for (int i = threadIdx.x; i < (count); i += blockDim.x)

struct Add { DEVICE float operator()(float a, float b) const { return add(a, b); } };
struct Larger { DEVICE float operator()(float a, float b) const { return larger(a, b); } };

// Fold value(0 .. d - 1), zero-padded to a power of two, in halves.  All threads get the result.
template <class Op, class F> DEVICE float block_fold(const Workspace& w, Op op, F value) {
  int half = w.padded / 2;
  FOR_EACH(i, half) w.part[i] = op(value(i), i + half < w.d ? value(i + half) : 0.0f);
  __syncthreads();
  for (half /= 2; half > 0; half /= 2) {
    FOR_EACH(i, half) w.part[i] = op(w.part[i], w.part[i + half]);
    __syncthreads();
  }
  const float result = w.part[0];
  __syncthreads();
  return result;
}

struct Norm {
  float value;   // of the row as it is now; 0 if it is not finite
  int exponent;  // the input is the row times 2**exponent
  bool finite;
};

// Steps 1 to 3 of the format: read a row, bring it into the safe range, take its norm.
template <class X> DEVICE Norm load_row(const Workspace& w, const X* x) {
  FOR_EACH(i, w.d) w.row[i] = to_float(x[i]);
  __syncthreads();
  const auto square = [&](int i) { return mul(w.row[i], w.row[i]); };
  float sum = block_fold(w, Add{}, square);
  Norm norm{0.0f, 0, bits_of(sum) < INFINITY_BITS};
  if (!(sum >= float_of(0x21800000u) && sum <= float_of(0x5d800000u))) {  // 2**-60, 2**60
    const float largest = block_fold(w, Larger{}, [&](int i) { return magnitude(w.row[i]); });
    norm.finite = bits_of(largest) < INFINITY_BITS;
    if (norm.finite && bits_of(largest)) norm.exponent = exponent_of(largest);
    const PowerOfTwo up(-norm.exponent);
    FOR_EACH(i, w.d) w.row[i] = norm.finite ? up.scale(w.row[i]) : 0.0f;
    __syncthreads();
    sum = block_fold(w, Add{}, square);
  }
  if (norm.finite) norm.value = sqrt_rn(sum);
  return norm;
}

// The rotation of any length, step by step as in docs/format.md.
struct BlockRotation {
  const float* signs;  // [steps, d]
  int rounds;
  float block_factor;

  DEVICE void forward(const Workspace& w) const {
    const int block = block_of(w);
    for (int step = 0; step < steps(w); step++) {
      flip(w, step);
      transform(w, block, step % 2 ? w.d - block : 0);
      if (block < w.d) mix_halves(w);
    }
  }
  DEVICE void backward(const Workspace& w) const {
    const int block = block_of(w);
    for (int step = steps(w) - 1; step >= 0; step--) {
      if (block < w.d) mix_halves(w);
      transform(w, block, step % 2 ? w.d - block : 0);
      flip(w, step);
    }
  }

 private:
  static DEVICE int block_of(const Workspace& w) { return w.padded == w.d ? w.d : w.padded / 2; }
  DEVICE int steps(const Workspace& w) const { return w.padded == w.d ? rounds : 2 * rounds; }
  DEVICE void flip(const Workspace& w, int step) const {
    FOR_EACH(i, w.d) w.row[i] = mul(w.row[i], signs[i64(step) * w.d + i]);
    __syncthreads();
  }
  // Of `length` coordinates from `begin` on; times 1 / sqrt(length) unless that is the whole row.
  DEVICE void transform(const Workspace& w, int length, int begin) const {
    float* x = w.row + (length < w.d ? begin : 0);
    for (int h = 1; h < length; h *= 2) {
      FOR_EACH(p, length / 2) {
        const int i = 2 * p - (p & (h - 1));
        const float a = x[i], b = x[i + h];
        x[i] = add(a, b);
        x[i + h] = sub(a, b);
      }
      __syncthreads();
    }
    if (length < w.d) FOR_EACH(i, length) x[i] = mul(x[i], block_factor);
    __syncthreads();
  }
  static DEVICE void mix_halves(const Workspace& w) {
    const float half_sqrt = float_of(0x3f3504f3u);  // float32 of sqrt(1/2)
    const int half = w.d / 2, second = w.d - half;
    FOR_EACH(i, half) {
      const float a = w.row[i], b = w.row[second + i];
      w.row[i] = mul(add(a, b), half_sqrt);
      w.row[second + i] = mul(sub(a, b), half_sqrt);
    }
    __syncthreads();
  }
};
