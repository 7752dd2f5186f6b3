// Walk over rows of the coding "packed2" (qmoe_jax/codec/FORMAT.md): a warp a row. Lane l takes the
// columns l, l + 32, ..., so that neighbouring lanes read neighbouring tokens.
#pragma once
#include "common.cuh"

namespace qmoe {

// A tensor of all experts of a layer: what every kernel takes first.
struct Packed2Arrays {
  const u8* packed;   // uint8 [num_experts, out_features, ceil(in_features / 4)]: four codes a byte
  const u32* levels;  // bfloat16 [num_experts, out_features, 2], a row a word: (scale, zero); at a
                      // multiple of 4 bytes
};

struct Packed2Coding {
  static constexpr int LANES = 32;
  static constexpr u32 SHARED_BYTES = 0;
  static constexpr bool HAS_BASE = false;
  static constexpr float base = 0;
  static constexpr u32 UNROLL = 4;  // bytes a lane loads before it uses them
  static constexpr u32 COLUMNS = 32 * UNROLL;  // of a round

  const Packed2Arrays& arrays;

  const u8* bytes;  // the row's
  bool exists;
  float values[4];

  QMOE_DEVICE_MEMBER explicit Packed2Coding(const Packed2Arrays& given) : arrays(given) {}

  QMOE_DEVICE_MEMBER void open(const Shape&, int, u32, u32) {}

  QMOE_DEVICE_MEMBER void seek(const Shape& shape, int expert, int row) {
    exists = row < shape.out_features;
    const u64 index = static_cast<u64>(expert) * shape.out_features + (exists ? row : 0);
    bytes = arrays.packed + index * ((shape.in_features + 3) / 4);
    const u32 pair = arrays.levels[index];
    const float scale = from_bf16(pair & 0xffff), zero = from_bf16(pair >> 16);
#pragma unroll
    for (int code = 0; code < 4; ++code)
      values[code] = round_to_bf16(scale * (static_cast<float>(code) - zero));
  }

  // Visits every weight of the row.
  template <bool RELATIVE, class Visitor>
  QMOE_DEVICE_MEMBER void walk(const Shape& shape, Visitor& visitor) const {
    const u32 columns = exists ? shape.in_features : 0;
    const u8* source = bytes + lane_of_warp() / 4;
    u32 first = 0;
    for (; first + COLUMNS <= columns; first += COLUMNS, source += COLUMNS / 4)
      round<true>(source, first, columns, visitor);
    if (first < columns) round<false>(source, first, columns, visitor);
  }

 private:
  template <bool WHOLE, class Visitor>
  QMOE_DEVICE_MEMBER void round(const u8* source, u32 first, u32 columns, Visitor& visitor) const {
    const u32 low_bit = 1u << 2 * (lane_of_warp() & 3), high_bit = 2 * low_bit;
    const u32 own = first + lane_of_warp();
    u32 codes[UNROLL];
#pragma unroll
    for (u32 k = 0; k < UNROLL; ++k)
      codes[k] = WHOLE || own + 32 * k < columns ? __ldg(source + 8 * k) : 0;
#pragma unroll
    for (u32 k = 0; k < UNROLL; ++k) {
      const float even = codes[k] & high_bit ? values[2] : values[0];
      const float odd = codes[k] & high_bit ? values[3] : values[1];
      visitor.add(WHOLE || own + 32 * k < columns, visitor.origin + 4 * own + 128 * k,
                  codes[k] & low_bit ? odd : even);
    }
    visitor.end_round(min_of(first + COLUMNS, columns));
  }
};

}  // namespace qmoe
