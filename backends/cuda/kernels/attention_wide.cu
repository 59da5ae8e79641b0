// As attention_pages.cu, for more than 8 query rows a kv head; see attention_wide.cuh.
#include "attention_query.cuh"
#include "attention_dense.cuh"
#include "attention_wide.cuh"
#include "attention_merge.cuh"
