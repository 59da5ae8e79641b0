// Exact products of whole numbers with a matrix of whole numbers, by 8-bit integer tensor cores.
//
// A number n of up to 23 bits is n0 + 256 n1 + 256**2 n2 with limbs in [-128, 127], an entry of the matrix
// likewise with LIMBS of them (backends/cuda/limbs.py).  Products of limbs with the same weight share an
// int32 accumulator: at most 3 * 192 * 2**14.  Everything is exact, so the order does not matter.
//
// A warp takes 16 rows, lane 4 g + t rows g and g + 8 in the layout of four lanes a vector (lanes.cuh),
// for the factor as for the product.

#pragma once
#include "lanes.cuh"

constexpr u32 SIGN_BITS = 0x80808080u;

DEVICE void mma_s8(int (&c)[4], const u32 (&a)[4], uint2 b) {
  asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
               : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b.x), "r"(b.y));
}

// n as limbs in the low three bytes, each plus 128: |n| <= 2**22.
DEVICE u32 biased_limbs(int n) { return u32(n) + 0x808080u; }

// The nearest whole number, ties to even, of x * power, |x * power| <= 2**22 (the product must be exact).
DEVICE int to_whole(float x, float power) { return int(bits_of(fma_rn(x, power, 0x1.8p23f)) - 0x4b400000u); }

template <class L, int LIMBS> struct IntegerProduct {
  static_assert(L::T == 4 && L::CHUNK == 8);
  static constexpr int CHUNKS = L::COUNT / 8;
  static constexpr int CHUNK_WORDS = 4 * CHUNKS * LIMBS * 32;  // of the matrix, 8 bytes each, for one chunk of the product
  static constexpr int MATRIX_BYTES = 8 * CHUNKS * CHUNK_WORDS;
  u32 limbs[3][CHUNKS][4];

  // Chunk k of row r: 8 numbers whose limbs are the low bytes of n.  `bias` is taken off each limb.
  DEVICE void put(int r, int k, const u32 (&n)[8], u32 bias) {
#pragma unroll
    for (int h = 0; h < 2; h++) {
      const u32* m = n + 4 * h;
      const u32 low = __byte_perm(m[0], m[1], 0x5140), high = __byte_perm(m[2], m[3], 0x5140);
      limbs[0][k][2 * h + r] = __byte_perm(low, high, 0x5410) ^ bias;
      limbs[1][k][2 * h + r] = __byte_perm(low, high, 0x7632) ^ bias;
      limbs[2][k][2 * h + r] = __byte_perm(__byte_perm(m[0], m[1], 0x62), __byte_perm(m[2], m[3], 0x62), 0x5410) ^ bias;
    }
  }

  // Chunk k of rows g and g + 8 of the product; `matrix` points at this lane's part of it.
  DEVICE void chunk(i64 (&sums)[2][8], const uint2* matrix, int k) const {
    matrix += k * CHUNK_WORDS;
#pragma unroll
    for (int pair = 0; pair < 4; pair++) {
      int sum[LIMBS + 2][4] = {};
#pragma unroll
      for (int c = 0; c < CHUNKS; c++) {
#pragma unroll
        for (int j = 0; j < LIMBS; j++) {
          const uint2 entries = matrix[((pair * CHUNKS + c) * LIMBS + j) * 32];
#pragma unroll
          for (int i = 0; i < 3; i++) mma_s8(sum[i + j], limbs[i][c], entries);
        }
      }
#pragma unroll
      for (int i = 0; i < 4; i++) {
        const int low = sum[0][i] + (sum[1][i] << 8), middle = sum[2][i] + (sum[3][i] << 8);
        int high = sum[4][i];
        if constexpr (LIMBS == 4) high += sum[5][i] << 8;
        sums[i / 2][2 * pair + i % 2] = i64(low) + i64(middle) * 65536 + (i64(high) << 32);
      }
    }
  }
};
