// The PTX instructions that the attention kernels use, one function each.
#pragma once
typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long i64;

#define FULL_WARP 0xffffffffu

// x, as far as the compiler knows only known here: what is computed with it stays behind this point.
__device__ __forceinline__ int here(int x) {
  asm volatile("" : "+r"(x));
  return x;
}
// The bits of x where the mask has ones, else those of y: one instruction, where & and | take two.
__device__ __forceinline__ u32 blend(u32 mask, u32 x, u32 y) {
  u32 r;
  asm("lop3.b32 %0, %1, %2, %3, 0xCA;" : "=r"(r) : "r"(mask), "r"(x), "r"(y));
  return r;
}
// Two floats to float16, the first in the low half.
__device__ __forceinline__ u32 pack_half2(float lo, float hi) {
  u32 r;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(hi), "f"(lo));
  return r;
}
__device__ __forceinline__ float half_to_float(u16 h) {
  float r;
  asm("cvt.f32.f16 %0, %1;" : "=f"(r) : "h"(h));
  return r;
}
__device__ __forceinline__ u16 float_to_bfloat16(float x) {
  u16 r;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(r) : "f"(x));
  return r;
}
__device__ __forceinline__ float exp2_approx(float x) {
  float r;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
  return r;
}
__device__ __forceinline__ float log2_approx(float x) {
  float r;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
  return r;
}
// d += a b: a is 16x16 (row major), b 16x8 (column major), float16; d is 16x8, float32.
__device__ __forceinline__ void mma(float (&d)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},"
      "{%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
// d = a b
__device__ __forceinline__ void mma_zero(float (&d)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},"
      "{%10,%10,%10,%10};"
      : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1), "f"(0.f));
}
__device__ __forceinline__ void mma(float (&d)[4], const u32 (&a)[4], uint2 b) {
  mma(d, a[0], a[1], a[2], a[3], b.x, b.y);
}
__device__ __forceinline__ void mma_zero(float (&d)[4], const u32 (&a)[4], uint2 b) {
  mma_zero(d, a[0], a[1], a[2], a[3], b.x, b.y);
}
// Of both halves the number of larger magnitude, the signs lost; NaN is the largest.
__device__ __forceinline__ u32 larger_halves(u32 a, u32 b) {
  u32 r;
  asm("max.NaN.xorsign.abs.f16x2 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b));
  return r;
}
// Transpose of an 8x8 matrix of float16 that lies in a warp as mma fragments do.
__device__ __forceinline__ u32 transpose8x8(u32 a) {
  u32 r;
  asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(r) : "r"(a));
  return r;
}

// ---- shared memory by address

// Dynamic shared memory begins at this address if a kernel has no other (1 KB is the system's).
#define SMEM_BASE 1024

extern __shared__ __align__(1024) u8 dynamic_smem[];
__device__ __forceinline__ u8* dynamic_shared() { return dynamic_smem; }
__device__ __forceinline__ u32 shared_address(const void* p) { return (u32)__cvta_generic_to_shared(p); }
__device__ __forceinline__ void trap() { asm volatile("trap;"); }

// Constant tables: loads that the compiler may move.  OFF bytes behind SMEM_BASE + a.
template <int OFF> __device__ __forceinline__ u32 table32(u32 a) {
  u32 r;
  asm("ld.shared.b32 %0, [%1+%2];" : "=r"(r) : "r"(a), "n"(SMEM_BASE + OFF));
  return r;
}
template <int OFF> __device__ __forceinline__ uint2 table64(u32 a) {
  uint2 r;
  asm("ld.shared.v2.b32 {%0,%1}, [%2+%3];" : "=r"(r.x), "=r"(r.y) : "r"(a), "n"(SMEM_BASE + OFF));
  return r;
}
// The ring: loads that stay behind the wait for their stage.
__device__ __forceinline__ u32 ring32(u32 a) {
  u32 r;
  asm volatile("ld.shared.b32 %0, [%1];" : "=r"(r) : "r"(a));
  return r;
}
__device__ __forceinline__ uint2 ring64(u32 a) {
  uint2 r;
  asm volatile("ld.shared.v2.b32 {%0,%1}, [%2];" : "=r"(r.x), "=r"(r.y) : "r"(a));
  return r;
}
__device__ __forceinline__ uint4 ring128(u32 a) {
  uint4 r;
  asm volatile("ld.shared.v4.b32 {%0,%1,%2,%3}, [%4];" : "=r"(r.x), "=r"(r.y), "=r"(r.z), "=r"(r.w) : "r"(a));
  return r;
}
__device__ __forceinline__ void store32(u32 a, u32 x) {
  asm volatile("st.shared.b32 [%0], %1;" ::"r"(a), "r"(x) : "memory");
}
__device__ __forceinline__ void store128(u32 a, uint4 x) {
  asm volatile("st.shared.v4.b32 [%0], {%1,%2,%3,%4};" ::"r"(a), "r"(x.x), "r"(x.y), "r"(x.z), "r"(x.w) : "memory");
}
__device__ __forceinline__ void named_barrier(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

__device__ __forceinline__ void named_barrier_arrive(int id, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// Whether the predicate holds for some thread.
__device__ __forceinline__ bool named_barrier_or(int id, int threads, bool predicate) {
  u32 r;
  asm volatile(
      "{\n.reg .pred p, q;\nsetp.ne.u32 p, %3, 0;\nbarrier.cta.red.or.pred q, %1, %2, p;\nselp.u32 %0, 1, 0, q;\n}"
      : "=r"(r) : "r"(id), "r"(threads), "r"((u32)predicate) : "memory");
  return r;
}

// Registers a thread from here on, for a group of four warps; compute capability 9.0a.
template <int COUNT> __device__ __forceinline__ void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(COUNT));
}
template <int COUNT> __device__ __forceinline__ void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(COUNT));
}

// ---- all blocks of a launch, which run at the same time

// One thread of each block, between two barriers of its block: what any block wrote before, all may
// read behind it.  The top bit of
// the counter changes when the last block comes; its other bits are zero then.
__device__ __forceinline__ void grid_barrier(u32* counter, u32 block, u32 blocks) {
  u32 before, now;
  asm volatile("atom.add.release.gpu.u32 %0, [%1], %2;"
               : "=r"(before) : "l"(counter), "r"(block ? 1 : 0x80000000u - (blocks - 1)) : "memory");
  do {
    asm volatile("ld.acquire.gpu.u32 %0, [%1];" : "=r"(now) : "l"(counter) : "memory");
  } while (!((before ^ now) & 0x80000000u));
}
// A load that does not look into the L1 cache.
__device__ __forceinline__ uint2 load_shared_by_blocks(const uint2* p) {
  uint2 r;
  asm volatile("ld.global.cg.v2.u32 {%0,%1}, [%2];" : "=r"(r.x), "=r"(r.y) : "l"(p) : "memory");
  return r;
}
__device__ __forceinline__ uint4 load_shared_by_blocks(const uint4* p) {
  uint4 r;
  asm volatile("ld.global.cg.v4.u32 {%0,%1,%2,%3}, [%4];"
               : "=r"(r.x), "=r"(r.y), "=r"(r.z), "=r"(r.w) : "l"(p) : "memory");
  return r;
}

// ---- mbarriers and bulk copies (compute capability 9.0)

__device__ __forceinline__ void barrier_init(u32 barrier, u32 arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals));
}
__device__ __forceinline__ void fence_barrier_init() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}
__device__ __forceinline__ void barrier_expect(u32 barrier, u32 bytes) {  // and arrive
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}
__device__ __forceinline__ void barrier_arrive(u32 barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
__device__ __forceinline__ void barrier_wait(u32 barrier, u32 phase) {
  asm volatile(
      "{\n.reg .pred p;\nagain:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1;\n"
      "@p bra done;\nbra again;\ndone:\n}" ::"r"(barrier), "r"(phase) : "memory");
}
// Copy to shared memory; the lines are the first to leave the L2 cache.
__device__ __forceinline__ void bulk_copy(u32 to, const void* from, u32 bytes, u32 barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint"
      " [%0], [%1], %2, [%3], %4;" ::"r"(to), "l"(from), "r"(bytes), "r"(barrier),
      "l"(0x12F0000000000000ull)  // createpolicy.fractional.L2::evict_first
      : "memory");
}

// ---- products of four warps (compute capability 9.0a)

// d += a b, or d = a b: a is 64x16, 16 rows of each warp as in mma; b is 16xN float16 in shared memory,
// where N neighbours lie together if TRANSPOSED, else 16.  Runs on; see wgmma_wait.
template <bool TRANSPOSED> __device__ __forceinline__ void wgmma(float (&d)[8], const u32 (&a)[4], u64 b, bool add) {
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.b32 p, %13, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n16k16.f32.f16.f16 {%0, %1, %2, %3, %4, %5, %6, %7}, {%8, %9, %10, %11}, %12, p, 1, 1, %14;\n}"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"((u32)add), "n"(TRANSPOSED));
}
template <bool TRANSPOSED> __device__ __forceinline__ void wgmma(float (&d)[16], const u32 (&a)[4], u64 b, bool add) {
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.b32 p, %21, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n32k16.f32.f16.f16 {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15}, {%16, %17, %18, %19}, %20, p, 1, 1, %22;\n}"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]), "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"((u32)add), "n"(TRANSPOSED));
}
// How a matrix lies in shared memory: 8x8 tiles of 128 bytes; `along` bytes to the next one along the
// 16 dims that are summed, `across` to the next one across.
__device__ __forceinline__ u64 wgmma_matrix(u32 address, u32 along, u32 across) {
  return (u64)(address >> 4) | (u64)(along >> 4) << 16 | (u64)(across >> 4) << 32;
}
__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_wait() { asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory"); }
// The compiler has these ready before what follows.
__device__ __forceinline__ void settle(u32 (&a)[4]) {
  asm volatile("" : "+r"(a[0]), "+r"(a[1]), "+r"(a[2]), "+r"(a[3])::"memory");
}
template <typename Array, int COUNT> __device__ __forceinline__ void settle(Array (&a)[COUNT]) {
#pragma unroll
  for (int i = 0; i < COUNT; i++) settle(a[i]);
}
// What this thread has written to shared memory is seen by wgmma of threads that it meets at a barrier.
__device__ __forceinline__ void fence_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
// Four 8x8 matrices of float16 that lie in the warp as mma fragments; rows of 16 bytes at the lanes' addresses.
__device__ __forceinline__ void store_matrices(u32 at, u32 a, u32 b, u32 c, u32 d) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(at), "r"(a), "r"(b), "r"(c), "r"(d)
               : "memory");
}
// Four 8x8 matrices of 16 bits, rows of 16 bytes at the lanes' addresses, transposed: lane (g, c) gets
// column g of rows 2c and 2c + 1 of each.
__device__ __forceinline__ uint4 ring_matrices(u32 at) {
  uint4 r;
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r.x), "=r"(r.y), "=r"(r.z), "=r"(r.w) : "r"(at) : "memory");
  return r;
}
