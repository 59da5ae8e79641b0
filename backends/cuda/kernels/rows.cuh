// Rows of bytes between global and shared memory, a warp at a time, neighbouring lanes on
// neighbouring words.  In shared memory rows are padded to an odd number of 16-byte units, so that
// lanes that each read their own row meet no bank conflict.

#pragma once
#include "exact.cuh"

constexpr DEVICE int padded_row(int bytes) { return ((bytes + 15) / 16 | 1) * 16; }

template <int WIDTH> struct WordOf;
template <> struct WordOf<1> { using Type = u8; };
template <> struct WordOf<2> { using Type = u16; };
template <> struct WordOf<4> { using Type = u32; };
template <> struct WordOf<8> { using Type = uint2; };
template <> struct WordOf<16> { using Type = uint4; };

template <int WIDTH> DEVICE void copy_async(u8* shared, const u8* global) {
  if constexpr (WIDTH >= 4) {
    const u32 to = u32(__cvta_generic_to_shared(shared));
    if constexpr (WIDTH == 16) asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(global));
    else asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(to), "l"(global), "n"(WIDTH));
  } else {
    using Word = typename WordOf<WIDTH>::Type;
    *reinterpret_cast<Word*>(shared) = *reinterpret_cast<const Word*>(global);
  }
}
DEVICE void wait_for_copies() {
  asm volatile("cp.async.wait_all;" ::: "memory");
  __syncwarp();
}

template <class T> DEVICE T* shuffle_pointer(T* p, int lane) {
  return reinterpret_cast<T*>(__shfl_sync(~0u, reinterpret_cast<u64>(p), lane));
}

// Copies between a tile and rows that follow each other in global memory, `count` of them (more than
// ROWS is allowed).
template <int ROWS, int BYTES, int WIDTH> DEVICE void rows_in(u8* tile, const u8* first, i64 count, int lane) {
  constexpr int WORDS = BYTES / WIDTH, TOTAL = ROWS * WORDS;
  const int limit = int(min(count, i64(ROWS))) * WORDS;
#pragma unroll 4
  for (int k = 0; k < TOTAL; k += 32) {
    const int q = k + lane;
    if (q < limit) copy_async<WIDTH>(tile + q / WORDS * padded_row(BYTES) + q % WORDS * WIDTH, first + q * WIDTH);
  }
}
template <int ROWS, int BYTES, int WIDTH> DEVICE void rows_out(const u8* tile, u8* first, i64 count, int lane) {
  constexpr int WORDS = BYTES / WIDTH, TOTAL = ROWS * WORDS;
  using Word = typename WordOf<WIDTH>::Type;
  const int limit = int(min(count, i64(ROWS))) * WORDS;
#pragma unroll 4
  for (int k = 0; k < TOTAL; k += 32) {
    const int q = k + lane;
    if (q < limit)
      *reinterpret_cast<Word*>(first + q * WIDTH) =
          *reinterpret_cast<const Word*>(tile + q / WORDS * padded_row(BYTES) + q % WORDS * WIDTH);
  }
}

// The same for rows anywhere: row r of the tile is at `mine` of lane r; null skips it.
template <int ROWS, int BYTES, int WIDTH> DEVICE void scattered_rows_in(u8* tile, const u8* mine, int lane) {
  constexpr int WORDS = BYTES / WIDTH, TOTAL = ROWS * WORDS;
#pragma unroll 4
  for (int k = 0; k < TOTAL; k += 32) {
    const int q = k + lane, row = q / WORDS, at = q % WORDS * WIDTH;
    const u8* from = shuffle_pointer(mine, row % ROWS);
    if (from && (TOTAL % 32 == 0 || q < TOTAL)) copy_async<WIDTH>(tile + row * padded_row(BYTES) + at, from + at);
  }
}

template <int ROWS, int BYTES, int WIDTH> DEVICE void scattered_rows_out(const u8* tile, u8* mine, int lane) {
  constexpr int WORDS = BYTES / WIDTH, TOTAL = ROWS * WORDS;
  using Word = typename WordOf<WIDTH>::Type;
#pragma unroll 4
  for (int k = 0; k < TOTAL; k += 32) {
    const int q = k + lane, row = q / WORDS, at = q % WORDS * WIDTH;
    u8* to = shuffle_pointer(mine, row % ROWS);
    if (to && (TOTAL % 32 == 0 || q < TOTAL))
      *reinterpret_cast<Word*>(to + at) = *reinterpret_cast<const Word*>(tile + row * padded_row(BYTES) + at);
  }
}
