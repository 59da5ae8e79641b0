// As attention.cu, for many query rows a kv head; see attention_prefill.cuh for its macros.
#include "attention_query.cuh"
#include "attention_dense.cuh"
#include "attention_prefill.cuh"
#include "attention_merge.cuh"
#include "attention_many.cuh"
