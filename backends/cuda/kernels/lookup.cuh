// From codes to table values, GROUP neighbouring codes with one load from shared memory.

#pragma once
#include "exact.cuh"

template <int BITS> struct Lookup {
  static constexpr int GROUP = BITS <= 2 ? 4 : BITS <= 4 ? 2 : 1;
  static constexpr int ENTRIES = 1 << (BITS * GROUP);
  static constexpr int BYTES = ENTRIES * GROUP * 4;

  // table: [2**BITS]; called by all `threads` of a block.
  static DEVICE void fill(u8* shared, const float* table, int threads) {
    float* values = reinterpret_cast<float*>(shared);
    for (int i = threadIdx.x; i < ENTRIES * GROUP; i += threads) {
      const int entry = i / GROUP, place = GROUP - 1 - i % GROUP;  // the first code is in the high bits
      values[i] = table[entry >> (BITS * place) & ((1 << BITS) - 1)];
    }
  }
  static DEVICE void get(const u8* shared, u32 codes, float* x) {
    const u8* entry = shared + codes * (4 * GROUP);
    if constexpr (GROUP == 4) {
      const float4 v = *reinterpret_cast<const float4*>(entry);
      x[0] = v.x; x[1] = v.y; x[2] = v.z; x[3] = v.w;
    } else if constexpr (GROUP == 2) {
      const float2 v = *reinterpret_cast<const float2*>(entry);
      x[0] = v.x; x[1] = v.y;
    } else x[0] = *reinterpret_cast<const float*>(entry);
  }
};
