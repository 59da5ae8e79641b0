// Packed codes of a vector from global memory, whatever its address.
#pragma once
#include "attention_ptx.cuh"

// BYTES bytes of a packed vector from byte `begin`, in the order of memory; zero behind its end.
template <int BYTES, int ALIGN, int PACKED, int WORDS>
__device__ __forceinline__ void load_bytes(u32 (&w)[WORDS], const u8* p, int begin) {
  constexpr bool WHOLE = PACKED % BYTES == 0;
#pragma unroll
  for (int i = 0; i < WORDS; i++) w[i] = 0;
#pragma unroll
  for (int i = 0; i < BYTES; i += ALIGN) {
    if (!(WHOLE ? begin < PACKED : begin + i < PACKED)) continue;
    if (ALIGN == 16) {
      const uint4 x = *(const uint4*)(p + begin + i);
      w[i / 4] = x.x, w[i / 4 + 1] = x.y, w[i / 4 + 2] = x.z, w[i / 4 + 3] = x.w;
    } else if (ALIGN == 8) {
      const uint2 x = *(const uint2*)(p + begin + i);
      w[i / 4] = x.x, w[i / 4 + 1] = x.y;
    } else if (ALIGN == 4) {
      w[i / 4] = *(const u32*)(p + begin + i);
    } else if (ALIGN == 2) {
      w[i / 4] |= (u32)*(const u16*)(p + begin + i) << 8 * (i % 4);
    } else {
      w[i / 4] |= (u32)p[begin + i] << 8 * (i % 4);
    }
  }
}
// The same as big-endian words, in which the first code has the highest bits.
template <int WORDS> __device__ __forceinline__ void swap_bytes(u32 (&w)[WORDS]) {
#pragma unroll
  for (int i = 0; i < WORDS; i++) w[i] = __byte_perm(w[i], 0, 0x0123);
}
template <int BYTES, int ALIGN, int PACKED, int WORDS>
__device__ __forceinline__ void load_codes(u32 (&w)[WORDS], const u8* p, int begin) {
  load_bytes<BYTES, ALIGN, PACKED>(w, p, begin);
  swap_bytes(w);
}
