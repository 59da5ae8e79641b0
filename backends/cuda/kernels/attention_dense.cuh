// attention_dense: rows times a D x D matrix, for rotations that are no Hadamard rotation.
// inverse 0: rotated_query = query M^T, 1: out = merged M, plus what attention to other tokens
// gave; `matrix` is [input][output].
#pragma once
#include "attention_common.cuh"

#define DENSE_ROWS 8
#define DENSE_THREADS 128

extern "C" __global__ void __launch_bounds__(DENSE_THREADS)
attention_dense(const Args a, const float* matrix, int inverse) {
  __shared__ float x[D][DENSE_ROWS];
  const int heads = a.num_kv_heads * a.group, tid = threadIdx.x;
  const i64 rows = (i64)a.num_tokens * heads, first = (i64)blockIdx.x * DENSE_ROWS;
  for (int i = tid; i < DENSE_ROWS * D; i += DENSE_THREADS) {
    const i64 row = first + i / D;
    float value = 0.f;
    if (row < rows)
      value = inverse ? a.merged[row * D + i % D]
                      : load_float(a.query, row / heads * a.q_token_stride + row % heads * a.q_head_stride +
                                                i % D * a.q_dim_stride, a.query_dtype);
    x[i % D][i / D] = value;
  }
  __syncthreads();
  for (int j = tid; j < D; j += DENSE_THREADS) {
    float y[DENSE_ROWS] = {};
#pragma unroll 4
    for (int i = 0; i < D; i++) {
      const float m = matrix[i * D + j];
#pragma unroll
      for (int r = 0; r < DENSE_ROWS; r++) y[r] = fmaf(x[i][r], m, y[r]);
    }
    for (int r = 0; r < DENSE_ROWS && first + r < rows; r++) {
      if (inverse) {
        if (a.other_out) {  // its share of the softmax; lse is of all tokens already
          const float share = exp2_approx((a.other_lse[first + r] - a.lse[first + r]) * LOG2_E);
          if (share > 0.f) y[r] = fmaf(share, a.other_out[(first + r) * D + j], y[r]);
        }
        store_float(a.out, (first + r) * D + j, a.query_dtype, y[r]);
      }
      else ((float*)a.rotated_query)[(first + r) * D + j] = y[r];
    }
  }
}
