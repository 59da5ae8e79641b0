// The bit stream of codes: first code in the high bits, as numpy.packbits.  A lane keeps its codes in
// registers as big-endian words, so that every shift is a constant; bytes are swapped on the way to
// and from memory.

#pragma once
#include "lanes.cuh"
#include "rows.cuh"

DEVICE u32 swap_bytes(u32 w) { return __byte_perm(w, 0, 0x0123); }

template <int BITS, int COUNT> struct CodeStream {
  static constexpr int WORDS = (BITS * COUNT + 31) / 32;
  u32 words[WORDS];

  DEVICE void clear() {
#pragma unroll
    for (int w = 0; w < WORDS; w++) words[w] = 0;
  }
  DEVICE void put(int j, u32 code) {
    const int at = BITS * j, w = at / 32, left = 32 - at % 32 - BITS;
    if (left >= 0) words[w] += code << left;
    else {
      words[w] += code >> -left;
      words[w + 1] += code << (32 + left);
    }
  }
  // `count` codes from number j on, as one number of count * BITS bits
  DEVICE u32 get(int j, int count = 1) const {
    const int at = BITS * j, w = at / 32, length = BITS * count, left = 32 - at % 32 - length;
    const u32 field = left >= 0 ? words[w] >> left : __funnelshift_r(words[w + 1 < WORDS ? w + 1 : w], words[w], 32 + left);
    return length == 32 ? field : field & ((1u << length) - 1);
  }

  // To and from one packed row in shared memory (16-byte aligned, padded to whole words).
  template <class L> DEVICE void store(u8* row, int t) const {
    if constexpr (L::T == 1) {
#pragma unroll
      for (int w = 0; w + 4 <= WORDS; w += 4)
        reinterpret_cast<uint4*>(row)[w / 4] = make_uint4(swap_bytes(words[w]), swap_bytes(words[w + 1]), swap_bytes(words[w + 2]), swap_bytes(words[w + 3]));
#pragma unroll
      for (int w = WORDS / 4 * 4; w < WORDS; w++) reinterpret_cast<u32*>(row)[w] = swap_bytes(words[w]);
    } else {
      using P = Pieces<L>;
#pragma unroll
      for (int w = 0; w < WORDS; w++) {
        const u32 bytes = swap_bytes(words[w]);
#pragma unroll
        for (int k = 0; k < 4 && 4 * w + k < P::BYTES; k += P::SIZE)
          *reinterpret_cast<typename P::Type*>(row + P::place(4 * w + k, t)) = typename P::Type(bytes >> (8 * k));
      }
    }
  }
  template <class L> DEVICE void load(const u8* row, int t) {
    if constexpr (L::T == 1) {
#pragma unroll
      for (int w = 0; w + 4 <= WORDS; w += 4) {
        const uint4 q = reinterpret_cast<const uint4*>(row)[w / 4];
        words[w] = swap_bytes(q.x); words[w + 1] = swap_bytes(q.y); words[w + 2] = swap_bytes(q.z); words[w + 3] = swap_bytes(q.w);
      }
#pragma unroll
      for (int w = WORDS / 4 * 4; w < WORDS; w++) words[w] = swap_bytes(reinterpret_cast<const u32*>(row)[w]);
    } else {
      using P = Pieces<L>;
#pragma unroll
      for (int w = 0; w < WORDS; w++) {
        u32 bytes = 0;
#pragma unroll
        for (int k = 0; k < 4 && 4 * w + k < P::BYTES; k += P::SIZE)
          bytes |= u32(*reinterpret_cast<const typename P::Type*>(row + P::place(4 * w + k, t))) << (8 * k);
        words[w] = swap_bytes(bytes);
      }
    }
  }

 private:
  // Where lanes alternate, a chunk's codes take CHUNK_BYTES, moved in pieces that divide them.
  template <class L> struct Pieces {
    static constexpr int CHUNK_BYTES = L::CHUNK * BITS / 8, BYTES = COUNT * BITS / 8;
    static constexpr int SIZE = CHUNK_BYTES % 4 == 0 ? 4 : CHUNK_BYTES % 2 == 0 ? 2 : 1;
    using Type = typename WordOf<SIZE>::Type;
    static DEVICE int place(int byte, int t) { return (byte / CHUNK_BYTES * L::T + t) * CHUNK_BYTES + byte % CHUNK_BYTES; }
  };
};
