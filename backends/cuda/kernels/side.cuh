// What an encode kernel reads and writes.  The host packs it field for field (launch.py).

#pragma once
#include "exact.cuh"

struct Side {
  // of this launch
  const u8* vectors;  // row v is vector (v / inner, v % inner)
  i64 vector_outer, vector_inner;  // bytes
  u8* packed;
  i64 packed_block, packed_slot, packed_inner;  // bytes
  u8* scales;
  i64 scales_block, scales_slot, scales_inner;  // bytes
  const void* slots;  // [rows / inner] int32 or int64, or null: row group i goes to slot i
  i64 num_slots;  // below 2**32
  i64 rows;       // below 2**32
  u32 inner, block_size;
  int slots_are_64_bit, unused;
  // of the quantiser
  const float* signs;  // [steps, head_dim]
  const uint2* buckets;
  const float* thresholds;
  const float* centroids;
  float bucket_scale, gain, block_factor;
  int rounds;

  DEVICE const u8* vector(u32 v) const { return vectors + v / inner * vector_outer + v % inner * vector_inner; }

  // Where row v goes: false if its slot is outside of the cache (as -1 is).
  DEVICE bool place(u32 v, u8*& packed_row, float*& scale) const {
    const u32 group = v / inner, member = v % inner;
    i64 slot = group;
    if (slots) {
      slot = slots_are_64_bit ? static_cast<const i64*>(slots)[group] : static_cast<const int*>(slots)[group];
      if (slot < 0 || slot >= num_slots) return false;
    }
    const u32 block = slots ? u32(slot) / block_size : 0;
    const u32 at = slots ? u32(slot) % block_size : u32(slot);
    packed_row = packed + block * packed_block + at * packed_slot + member * packed_inner;
    scale = reinterpret_cast<float*>(scales + block * scales_block + at * scales_slot + member * scales_inner);
    return true;
  }
};

struct Sides { Side side[2]; };
