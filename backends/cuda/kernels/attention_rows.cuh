// Rotations of one row of D floats in shared memory by one warp.  Every step is normalised, so the
// rotation is orthogonal.  The last bits differ from the codec's: attention is not bit-exact.
//
// Where D is a power of two from 32 on, a lane takes D / 32 neighbours to registers meanwhile.
#pragma once
#include "attention_common.cuh"

#define EARLY_STEPS 4  // of a rotation, whose signs are loaded before anything waits

#if (D & (D - 1)) == 0
#define POWER_OF_TWO 1
#define TRANSFORM D
#else
#define POWER_OF_TWO 0
// The largest power of two below D, as docs/format.md has it.
#define TRANSFORM (D > 512 ? 512 : D > 256 ? 256 : D > 128 ? 128 : D > 64 ? 64 : D > 32 ? 32 : 16)
#endif

// Walsh-Hadamard transform of COUNT numbers of each of LANES neighbouring lanes, not normalised.
template <int LANES, int COUNT> __device__ __forceinline__ void transform_lanes(float (&v)[COUNT], int lane) {
#pragma unroll
  for (int h = 1; h < COUNT; h *= 2)
#pragma unroll
    for (int i = 0; i < COUNT; i++)
      if (!(i & h)) {
        const float x = v[i], y = v[i + h];
        v[i] = x + y;
        v[i + h] = x - y;
      }
#pragma unroll
  for (int h = 1; h < LANES; h *= 2) {
    const float sign = lane & h ? -1.f : 1.f;
#pragma unroll
    for (int i = 0; i < COUNT; i++) v[i] = fmaf(v[i], sign, __shfl_xor_sync(FULL_WARP, v[i], h));
  }
}
__device__ __forceinline__ void flip_signs(float* x, const u32* signs, int lane) {
  for (int i = lane; i < D; i += 32) x[i] = signs[i >> 5] >> (i & 31) & 1 ? -x[i] : x[i];
  __syncwarp();
}
// Walsh-Hadamard transform of TRANSFORM floats, times 1 / sqrt(TRANSFORM).
__device__ __forceinline__ void transform(float* x, int lane) {
  for (int stride = 1; stride < TRANSFORM; stride *= 2) {
    const float gain = stride == 1 ? rsqrtf((float)TRANSFORM) : 1.f;
    for (int i = lane; i < TRANSFORM / 2; i += 32) {
      const int at = (i & ~(stride - 1)) * 2 + (i & (stride - 1));
      const float a = x[at] * gain, b = x[at + stride] * gain;
      x[at] = a + b;
      x[at + stride] = a - b;
    }
    __syncwarp();
  }
}
__device__ __forceinline__ void mix_halves(float* x, int lane) {
  const float half_sqrt = 0.70710678118654752f;
  for (int i = lane; i < D / 2; i += 32) {
    const float a = x[i], b = x[D - D / 2 + i];
    x[i] = (a + b) * half_sqrt;
    x[D - D / 2 + i] = (a - b) * half_sqrt;
  }
  __syncwarp();
}
#if POWER_OF_TWO && D >= 32
#define PER_LANE (D / 32)

struct Signs {
  u32 early;  // PER_LANE bits a step of this lane's neighbours, set = negative
};
__device__ __forceinline__ u32 lane_signs(const u32* signs, int step, int lane) {
  return signs[step * SIGN_WORDS + PER_LANE * lane / 32] >> PER_LANE * lane % 32;
}
__device__ __forceinline__ Signs load_signs(const u32* signs, int steps, int lane) {
  Signs r = {0};
#pragma unroll
  for (int k = 0; k < EARLY_STEPS; k++)
    if (k < steps) r.early |= (lane_signs(signs, k, lane) & ((1u << PER_LANE) - 1)) << PER_LANE * k;
  return r;
}
__device__ __forceinline__ u32 signs_of_step(const Signs& known, const u32* signs, int step, int lane) {
  return step < EARLY_STEPS ? known.early >> PER_LANE * step : lane_signs(signs, step, lane);
}
__device__ __forceinline__ void flip(float (&v)[PER_LANE], u32 bits) {
  const float gain = rsqrtf((float)D);
#pragma unroll
  for (int i = 0; i < PER_LANE; i++) v[i] *= bits >> i & 1 ? -gain : gain;
}
__device__ __forceinline__ void rotate_row(float* x, const Signs& known, const u32* signs, int steps, int lane) {
  float v[PER_LANE];
#pragma unroll
  for (int i = 0; i < PER_LANE; i++) v[i] = x[PER_LANE * lane + i];
#pragma unroll 1
  for (int step = 0; step < steps; step++) {
    flip(v, signs_of_step(known, signs, step, lane));
    transform_lanes<32>(v, lane);
  }
#pragma unroll
  for (int i = 0; i < PER_LANE; i++) x[PER_LANE * lane + i] = v[i];
  __syncwarp();
}
__device__ __forceinline__ void rotate_row_back(float* x, const Signs& known, const u32* signs, int steps, int lane) {
  float v[PER_LANE];
#pragma unroll
  for (int i = 0; i < PER_LANE; i++) v[i] = x[PER_LANE * lane + i];
#pragma unroll 1
  for (int step = steps - 1; step >= 0; step--) {
    transform_lanes<32>(v, lane);
    flip(v, signs_of_step(known, signs, step, lane));
  }
#pragma unroll
  for (int i = 0; i < PER_LANE; i++) x[PER_LANE * lane + i] = v[i];
  __syncwarp();
}
#else
struct Signs {};
__device__ __forceinline__ Signs load_signs(const u32*, int, int) { return {}; }
__device__ __forceinline__ void rotate_row(float* x, const Signs&, const u32* signs, int steps, int lane) {
  for (int step = 0; step < steps; step++) {
    flip_signs(x, signs + step * SIGN_WORDS, lane);
    transform(POWER_OF_TWO || step % 2 == 0 ? x : x + D - TRANSFORM, lane);
    if (!POWER_OF_TWO) mix_halves(x, lane);
  }
}
__device__ __forceinline__ void rotate_row_back(float* x, const Signs&, const u32* signs, int steps, int lane) {
  for (int step = steps - 1; step >= 0; step--) {
    if (!POWER_OF_TWO) mix_halves(x, lane);
    transform(POWER_OF_TWO || step % 2 == 0 ? x : x + D - TRANSFORM, lane);
    flip_signs(x, signs + step * SIGN_WORDS, lane);
  }
}
#endif
