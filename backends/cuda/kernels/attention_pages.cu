// As attention.cu, for a few head_dims and whole pages; see attention_pages.cuh for its macros.
#include "attention_query.cuh"
#include "attention_dense.cuh"
#include "attention_pages.cuh"
#include "attention_merge.cuh"
