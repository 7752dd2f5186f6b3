// Walk over rows of the coding "qmoe" (qmoe_jax/codec/FORMAT.md): a warp a row, a 16-bit codeword a
// lane. The dictionary has 512 KiB and stays in global memory, that is, in the L2 cache.
#pragma once
#include "common.cuh"

namespace qmoe {

// A tensor of all experts of a layer: what every kernel takes first. Fields are those of FORMAT.md but
// for row_block_starts and table.
struct QmoeArrays {
  const u16* codewords;         // uint16 [num_codewords]: all rows, one after another
  const int* expert_offsets;    // int32 [num_experts + 1]: first codeword of each expert
  const void* row_lengths;      // uint8 or uint16 [num_experts, out_features]: codewords of each row
  const int* row_block_starts;  // int32 [num_experts, ceil(out_features / 32)]: where every 32nd row
                                // begins, in codewords from the expert's first
                                // (find_row_block_starts)
  const u32* levels;            // bfloat16 [num_experts, out_features, 2], a row a word: (low, high);
                                // at a multiple of 4 bytes
  const Pair32* table;          // uint32 [65536, 2]: the dictionary (codec/dictionary.py); at a
                                // multiple of 8 bytes
  u32 num_codewords;            // of all experts; nothing beyond is read
  int row_length_bytes;         // of an element of row_lengths: 1 or 2
};

struct QmoeCoding {
  static constexpr int LANES = 32;
  static constexpr u32 SHARED_BYTES = 0;
  static constexpr bool HAS_BASE = false;
  static constexpr float base = 0;

  const QmoeArrays& arrays;

  const u16* own;  // the expert's first codeword
  u32 own_size;
  RowPlaces places;
  float low, high;
  int begin, end;

  QMOE_DEVICE_MEMBER explicit QmoeCoding(const QmoeArrays& given) : arrays(given) {}

  QMOE_DEVICE_MEMBER void open(const Shape&, int expert, u32, u32) {
    const u32 first = min_of(static_cast<u32>(arrays.expert_offsets[expert]), arrays.num_codewords);
    const u32 last = min_of(static_cast<u32>(arrays.expert_offsets[expert + 1]), arrays.num_codewords);
    own = arrays.codewords + first;
    own_size = last > first ? last - first : 0;
  }

  QMOE_DEVICE_MEMBER void seek(const Shape& shape, int expert, int row) {
    places.find(arrays.row_lengths, arrays.row_length_bytes, arrays.row_block_starts, shape, expert,
                0, own_size, row, &begin, &end);
    const int existing = min_of(row, shape.out_features - 1);
    const u32 pair = arrays.levels[static_cast<u64>(expert) * shape.out_features + existing];
    low = from_bf16(pair & 0xffff);
    high = from_bf16(pair >> 16);
  }

  // As walk_tunstall; columns stay below in_features + 28.
  template <bool RELATIVE, class Visitor>
  QMOE_DEVICE_MEMBER void walk(const Shape& shape, Visitor& visitor) const {
    const u32 in4 = 4 * static_cast<u32>(shape.in_features);
    u32 column4 = 0;
    int at = begin;
    bool busy = begin < end;
    u32 next = at + lane_of_warp() < end ? own[at + lane_of_warp()] : 0;
    while (__any_sync(ALL_LANES, busy)) {
      const bool present = at + lane_of_warp() < end;
      Pair32 entry = {0, 0};
      if (present) entry = arrays.table[next];
      at += 32;
      next = at + lane_of_warp() < end ? own[at + lane_of_warp()] : 0;
      const u32 length4 = 8 * (entry.x & 15);  // pairs are two weights
      const u32 through = inclusive_scan<32>(length4);
      const u32 here4 = column4 + through - length4;
      if (here4 < in4) {
        // Codes, two bits each: 0 to 13 of the first word, 14 to 27 of the second.
        visit_word(entry.x >> 4, here4, visitor);
        visit_word(entry.y >> 4, here4 + 56, visitor);
      }
      column4 += __shfl_sync(ALL_LANES, through, 31);
      busy = column4 < in4 && at < end;
      visitor.end_round(column4 / 4);
    }
  }

 private:
  template <class Visitor>
  QMOE_DEVICE_MEMBER void visit_word(u32 codes, u32 column4, Visitor& visitor) const {
    u32 nonzero = (codes | codes >> 1) & 0x5555555u;
    while (nonzero != 0) {
      const int place = __ffs(nonzero) - 1;
      visitor.add(true, visitor.origin + column4 + 2 * place, codes >> place & 1 ? low : high);
      nonzero &= nonzero - 1;
    }
  }
};

}  // namespace qmoe
