// How pages lie in the ring of attention_pages and attention_wide, and how lanes read their codes.
#pragma once
#include "attention_fragments.cuh"

#define PAGE 16
#define K_VECTOR (D * KEY_BITS / 8)
#define V_VECTOR (D * VALUE_BITS / 8)
#define K_PAGE (PAGE * HEADS * K_VECTOR)
#define V_PAGE (PAGE * HEADS * V_VECTOR)
#define NORM_PAGE (PAGE * HEADS * 4)
#define PAGE_BYTES (K_PAGE + V_PAGE + 2 * NORM_PAGE)
#define STAGE_PAGES (SUB * SHARES)
// Blocks of [head][token] come whole; in the ring are K codes, V codes and norms of all pages of a copy.
#define COPY_PAGES (HEAD_MAJOR ? BLOCK_SIZE / PAGE : 1)
#define AT_V (COPY_PAGES * K_PAGE)
#define AT_KN (COPY_PAGES * (K_PAGE + V_PAGE))
#define AT_VN (AT_KN + COPY_PAGES * NORM_PAGE)
#define PAGE_AT(p, token_bytes) ((p) / COPY_PAGES * COPY_PAGES * PAGE_BYTES + (p) % COPY_PAGES * PAGE * (token_bytes))
#define STAGE_BYTES (PAGE_BYTES * STAGE_PAGES)
#if HEAD_MAJOR
#define K_TOKEN K_VECTOR                  // strides of the ring
#define K_HEAD (COPY_PAGES * PAGE * K_VECTOR)
#define V_TOKEN V_VECTOR
#define V_HEAD (COPY_PAGES * PAGE * V_VECTOR)
#define N_TOKEN 4
#define N_HEAD (COPY_PAGES * PAGE * 4)
#else
#define K_TOKEN (HEADS * K_VECTOR)
#define K_HEAD K_VECTOR
#define V_TOKEN (HEADS * V_VECTOR)
#define V_HEAD V_VECTOR
#define N_TOKEN (HEADS * 4)
#define N_HEAD 4
#endif

// The codes of a lane are a run of bytes of a vector: a quarter of keys, an eighth of values.  Those that
// bytes do not hold whole numbers of are read in reverse, so that dims run backwards in little-endian fields.
// A run may begin within a word; `select` is what __byte_perm takes to put that right.  A long run of 4 n + 3
// bytes begins a byte early.  What is read behind a run's end, or before it, is not used.
#define REVERSED(bits) ((bits) == 3 || 4 < (bits) && (bits) < 8)
#define EARLY(run) ((run) % 4 == 3 && (run) > 4)
#define KEY_RUN (K_VECTOR / 4)
#define KEY_BEGIN(c) ((c) * KEY_RUN - EARLY(KEY_RUN))
#define VALUE_RUN ((V_VECTOR + 7) / 8)  // the first or last byte may be half a lane's
#define VALUE_BEGIN(g) (SPLIT_EIGHTHS ? 4 * (g) : (g) * V_VECTOR / 8 - EARLY(VALUE_RUN))

template <bool REVERSE, int RUN> __device__ __forceinline__ u32 selector(int begin) {
  return (REVERSE ? 0x0123 + 0x1111 * ((RUN + EARLY(RUN)) % 4) : 0x3210) + 0x1111 * (begin & 3);
}
template <bool REVERSE, int RUN, bool SHIFTED, int WORDS>
__device__ __forceinline__ void read_run(u32 (&w)[WORDS], u32 at, u32 select) {
  if (REVERSE) {
    constexpr int WHOLE = (RUN + EARLY(RUN)) / 4, READ = WHOLE ? WHOLE + SHIFTED : 2;  // words
    u32 x[READ];
#pragma unroll
    for (int i = 0; i < READ; i++) x[i] = ring32(at + 4 * i);
#pragma unroll
    for (int k = 0; k < WHOLE; k++)
      w[k] = SHIFTED ? __byte_perm(x[WHOLE - 1 - k], x[SHIFTED ? WHOLE - k : 0], select)
                     : __byte_perm(x[WHOLE - 1 - k], 0, 0x0123);
    if (WORDS > WHOLE) w[WHOLE < WORDS ? WHOLE : 0] = __byte_perm(x[0], x[READ > 1 ? 1 : 0], (select ^ 0x4444) & 0x7777);
  } else if (SHIFTED) {
    constexpr int READ = (RUN + 3) / 4 + (RUN % 4 == 3);
    u32 x[READ];
#pragma unroll
    for (int i = 0; i < READ; i++) x[i] = ring32(at + 4 * i);
#pragma unroll
    for (int k = 0; k < WORDS; k++) w[k] = __byte_perm(x[k], k + 1 < READ ? x[k + 1 < READ ? k + 1 : 0] : 0, select);
  } else {
    constexpr int EACH = WORDS % 4 == 0 ? 4 : WORDS % 2 == 0 ? 2 : 1;
#pragma unroll
    for (int i = 0; i < WORDS; i += EACH) {
      if (EACH == 4) {
        const uint4 x = ring128(at + 4 * i);
        w[i] = x.x, w[i + EACH / 4] = x.y, w[i + EACH / 2] = x.z, w[i + EACH - 1] = x.w;
      } else if (EACH == 2) {
        const uint2 x = ring64(at + 4 * i);
        w[i] = x.x, w[i + EACH / 2] = x.y;
      } else {
        w[i] = ring32(at + 4 * i);
      }
    }
  }
}

// Token of row r of a product, chosen so that reads of V from the ring do not conflict.
__device__ __forceinline__ int token_of_row(int r) {
#if HEAD_MAJOR && VALUE_BITS == 4 && D == 128
  return r ^ (r >> 1 & 1);
#elif HEAD_MAJOR && (VALUE_BITS == 4 && D != 96 || VALUE_BITS == 8 && D == 96)
  return r >> 1 | (r & 1) << 2;
#elif HEAD_MAJOR && VALUE_BITS == 2 && D == 128
  return 0x53427160u >> 4 * r & 7;
#else
  return r;
#endif
}

// Where lane (g, c) of a warp finds its codes and norms in a stage whose ring begins at `ring`: of keys a
// quarter of the tokens of rows g and g + 8, of values an eighth of those of rows 2c, 2c + 1 and 8 further.
struct Places {
  int token;         // of row g
  u32 keys, norms;   // of row g
  u32 values[2];     // of rows 2c and 2c + 1
  u32 k_select, v_select;
  u32 v_second, v_low;  // head_dim 96: where an eighth goes on; its lowest bit
  u32 k_bank, v_bank;
};
template <int BITS> __device__ __forceinline__ u32 bank_of(int lane) {
  return here(BITS == 2 ? (lane & 15) * 8 : lane * 4);
}
__device__ __forceinline__ Places places_of(u32 ring, int head, int page, int lane) {
  const int g = lane >> 2, c = lane & 3, row_token = token_of_row(g);
  const u32 v_base = ring + PAGE_AT(page, V_TOKEN) + AT_V + head * V_HEAD + (VALUE_BEGIN(g) & ~3);
  const u32 k_bank = bank_of<KEY_BITS>(lane);
  return {row_token,
          ring + PAGE_AT(page, K_TOKEN) + row_token * K_TOKEN + head * K_HEAD + (KEY_BEGIN(c) & ~3),
          ring + PAGE_AT(page, N_TOKEN) + AT_KN + row_token * N_TOKEN + head * N_HEAD,
          {v_base + token_of_row(2 * c) * V_TOKEN, v_base + token_of_row(2 * c + 1) * V_TOKEN},
          selector<REVERSED(KEY_BITS), KEY_RUN>(KEY_BEGIN(c)),
          selector<REVERSED(VALUE_BITS), VALUE_RUN>(VALUE_BEGIN(g)),
          (u32)(32 + 4 * (g >> 1) - 4 * g), (u32)(SPLIT_EIGHTHS ? 16 * (g & 1) : 4 * (~g & 1)),
          k_bank, (KEY_BITS == 2) == (VALUE_BITS == 2) ? k_bank : bank_of<VALUE_BITS>(lane)};
}

__device__ __forceinline__ void read_keys(u32 (&w)[K_WORDS], u32 at, u32 select) {
  read_run<REVERSED(KEY_BITS), KEY_RUN, KEY_RUN % 4 != 0>(w, at, select);
}
__device__ __forceinline__ void read_values(u32 (&w)[V_WORDS], u32 at, const Places& my) {
#if SPLIT_EIGHTHS
  w[0] = ring32(at), w[1] = ring32(at + my.v_second) >> my.v_low;
#else
  read_run<REVERSED(VALUE_BITS), VALUE_RUN, V_VECTOR % 32 != 0>(w, at, my.v_select);
  if (V_VECTOR % 8) {  // whole bytes hold no eighth
#pragma unroll
    for (int i = 0; i < V_WORDS; i++)
      w[i] = i + 1 < V_WORDS ? __funnelshift_r(w[i], w[i + 1 < V_WORDS ? i + 1 : i], my.v_low) : w[i] >> my.v_low;
  }
#endif
}
