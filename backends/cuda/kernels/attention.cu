// One attention step for one configuration, fixed by macros:
// D, KEY_BITS, VALUE_BITS, BLOCK_SIZE, K_ALIGN, V_ALIGN (bytes a load of codes may take at once),
// UNIT (tokens), MIN_BLOCKS (blocks an SM).
#include "attention_query.cuh"
#include "attention_dense.cuh"
#include "attention_split.cuh"
#include "attention_merge.cuh"
