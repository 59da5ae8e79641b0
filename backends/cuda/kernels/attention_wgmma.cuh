// Products of four warps (wgmma) of the sizes that attention_prefill takes; compute capability 9.0a.
#pragma once
#include "attention_ptx.cuh"

#define FLOATS_8(x, i) "+f"(x[i]), "+f"(x[i + 1]), "+f"(x[i + 2]), "+f"(x[i + 3]), "+f"(x[i + 4]), "+f"(x[i + 5]), "+f"(x[i + 6]), "+f"(x[i + 7])
#define FLOATS_32(x, i) FLOATS_8(x, i), FLOATS_8(x, i + 8), FLOATS_8(x, i + 16), FLOATS_8(x, i + 24)
#define NAMES_32 \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
// d += a b, or d = a b: a is 64x16, b 16x64, both float16 in shared memory as wgmma_matrix says, with
// the 16 summed numbers of a row or column of either side by side.
__device__ __forceinline__ void wgmma_64(float (&d)[32], u64 a, u64 b, bool add) {
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.b32 p, %34, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n64k16.f32.f16.f16 {" NAMES_32 "}, %32, %33, p, 1, 1, 0, 0;\n}"
      : FLOATS_32(d, 0)
      : "l"(a), "l"(b), "r"((u32)add));
}
// d += a b: a is 64x16 in registers, b 16x64 or 16x32 in shared memory, neighbours across side by side.
__device__ __forceinline__ void wgmma_across(float (&d)[32], const u32 (&a)[4], u64 b) {
  asm volatile(
      "wgmma.mma_async.sync.aligned.m64n64k16.f32.f16.f16 {" NAMES_32 "}, {%32, %33, %34, %35}, %36, 1, 1, 1, 1;"
      : FLOATS_32(d, 0)
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}
__device__ __forceinline__ void wgmma_across(float (&d)[16], const u32 (&a)[4], u64 b) { wgmma<true>(d, a, b, true); }

// Sums that products have left, as the compiler may use them from here on.
template <int COUNT> __device__ __forceinline__ void settle_sums(float (&x)[COUNT]) {
#pragma unroll
  for (int i = 0; i < COUNT; i++) asm volatile("" : "+f"(x[i])::"memory");
}
