// Walk over rows of the codings "tunstall" and "tunstall_2bit" (qmoe_jax/codec/FORMAT.md).
//
// A row is walked by LANES neighbouring lanes, 32 / LANES rows by a warp at once. In a round each lane
// takes PER_LANE codewords that follow one another, looks their entries up in shared memory, and a
// scan over the lanes gives the column of its first entry (sum of lengths) and the rank of its first
// non-zero weight (sum of ones). The rank tells where its sign bits lie. Only non-zero weights are
// visited.
#pragma once
#include "common.cuh"

namespace qmoe {

// What a codeword stands for, as kept in shared memory:
// places: byte j is SCALE * position of the non-zero weight number j, j = 0..3, so that one dp4a adds it
//         to SCALE * column, an address: SCALE is 4 where columns are floats, 1 where they are bytes;
// sizes:  bits 0-15 SCALE * length in weights, bits 16-31 number of non-zero weights. Sums of them are
//         sums of both: 128 codewords stay below 2^16.
typedef Pair32 Entry;
constexpr u32 DICTIONARY_BYTES = 256 * sizeof(Entry);  // of a copy
constexpr int NUM_DICTIONARIES = 10;
constexpr u32 FIRST_ESCAPE = 248;

QMOE_DEVICE u64 table_bits(const u32* table, u32 codeword) {
  return table[2 * codeword] | static_cast<u64>(table[2 * codeword + 1]) << 32;
}

// The dictionary in shared memory, in copies whose entries alternate: lanes with different copies
// read different banks. With 16 no lane waits for another.
struct Dictionary {
  u32 address;  // of this lane's copy
  u32 shift;    // from a codeword to its entry's place

  QMOE_DEVICE_MEMBER Entry look_up(u32 codeword) const {
    return shared_load<Entry>(address + (codeword << shift));
  }
};

// Fills it at a shared address. All threads of the block; a barrier must follow. `copies` is a power
// of two up to 16.
template <u32 SCALE>
QMOE_DEVICE Dictionary stage_dictionary(const u32* table, u32 shared, u32 copies) {
  for (u32 codeword = threadIdx.x; codeword < 256; codeword += blockDim.x) {
    const u64 bits = table_bits(table, codeword);
    u64 mask = bits >> 6;
    const u32 ones = __popcll(mask);
    u32 places = 0;
    for (int j = 0; j < 4 && mask != 0; ++j, mask &= mask - 1)
      places |= SCALE * static_cast<u32>(__ffsll(mask) - 1) << 8 * j;
    const u32 length = static_cast<u32>(bits & 63);
    for (u32 copy = 0; copy < copies; ++copy)  // neighbours in different banks
      shared_store<Entry>(
          shared + (codeword * copies + (copy + codeword & copies - 1)) * sizeof(Entry),
          Entry{places, SCALE * length | ones << 16});
  }
  const u32 entry_bytes = copies * sizeof(Entry);
  return {shared + (threadIdx.x & copies - 1) * static_cast<u32>(sizeof(Entry)),
          static_cast<u32>(__ffs(entry_bytes) - 1)};
}

// The codes of one expert.
struct TunstallExpert {
  const u32* words;  // the expert's first
  u32 num_words;     // below 2^26
  const u32* table;  // the expert's dictionary

  // 32 bits of the words `index` and `index` + 1, from bit `shift` mod 32 of the first. What lies
  // outside of the expert is 0.
  QMOE_DEVICE_MEMBER u32 window(int index, int shift) const {
    const u32* const word = words + index;
    const u32 low = static_cast<u32>(index) < num_words ? __ldg(word) : 0;
    const u32 high = static_cast<u32>(index + 1) < num_words ? __ldg(word + 1) : 0;
    return __funnelshift_r(low, high, shift);
  }

  QMOE_DEVICE_MEMBER u32 byte(int index) const {
    return static_cast<u32>(index) < 4 * num_words
               ? __ldg(reinterpret_cast<const u8*>(words) + index)
               : 0;
  }
};

// Pending escapes from codewords of earlier lanes, as a mask whose highest bit belongs to the next
// entry's first non-zero weight. `pending` and `open` describe this lane: escapes behind its last
// entry, and whether it has no entry at all, so that earlier ones are pending still. `carried` is
// what is pending before the group's first lane, and becomes what is after its last.
template <int LANES>
QMOE_DEVICE u32 pending_before(u32 pending, bool open, u32* carried) {
  const int lane = threadIdx.x & (LANES - 1);
  u32 is_open = open;
#pragma unroll
  for (int distance = 1; distance < LANES; distance *= 2) {
    const u32 other = __shfl_up_sync(ALL_LANES, pending, distance, LANES);
    const u32 other_open = __shfl_up_sync(ALL_LANES, is_open, distance, LANES);
    if (lane >= distance && is_open) {
      pending |= other;
      is_open = other_open;
    }
  }
  if (is_open) pending |= *carried;
  u32 before = __shfl_up_sync(ALL_LANES, pending, 1, LANES);
  if (lane == 0) before = *carried;
  *carried = __shfl_sync(ALL_LANES, pending, LANES - 1, LANES);
  return before;
}

// Walks the row of bytes [begin, end) of the expert; all lanes of the warp call it. `values` are those
// of symbols 1 to 3. The visitor's add(true, origin + 4 * column, value) is called once for each
// non-zero weight, with columns below in_features + 58 whatever the bytes hold (and add(false, ...),
// to be ignored, at times); its end_round(columns) by all lanes after each round, when all weights
// before `columns` were visited.
template <int LANES, int PER_LANE, bool ESCAPES, class Visitor>
QMOE_DEVICE void walk_tunstall(const TunstallExpert& expert, const Dictionary& dictionary, int begin,
                               int end, u32 in_features, const float (&values)[3], Visitor& visitor) {
  // 1, which the compiler does not know: selectors of dp4a then stay in registers.
  const u32 select = gridDim.z;
  static_assert(PER_LANE == 4 || PER_LANE == 1, "a word or a byte");
  const int lane = threadIdx.x & (LANES - 1);
  u32 column4 = visitor.origin, carried = 0;
  u32 limit4 = begin < end ? column4 + 4 * in_features : 0;  // 0 at the row's end
  u32 rank = 0;
  // This lane's codewords lie at `at`, of words or bytes; at `stop` all of the group's are past the
  // row. A row may begin inside a word.
  const int inside = PER_LANE == 4 ? begin & 3 : 0;
  int at = (begin - inside) / PER_LANE + lane;
  const int stop = (end - inside + PER_LANE - 1) / PER_LANE + lane;
  const auto load = [&]() -> u32 {
    return PER_LANE == 4 ? expert.window(at, 8 * inside) : expert.byte(at);
  };
  u32 next = load();
  while (__any_sync(ALL_LANES, column4 < limit4)) {
    const u32 codewords = next;
    at += LANES;
    next = load();

    Entry entries[PER_LANE];
    u32 sum = 0;
#pragma unroll
    for (int k = 0; k < PER_LANE; ++k) {
      entries[k] = dictionary.look_up(codewords >> 8 * k & 255);
      sum += entries[k].y;
    }
    const u32 through = inclusive_scan<LANES>(sum);
    const u32 round = __shfl_sync(ALL_LANES, through, LANES - 1, LANES);
    const u32 first4 = column4 + (through - sum & 0xffff);
    // Sign r of the row is bit 8 end - 1 - r.
    const int first_bit = 8 * end - 32 - static_cast<int>(rank + (through - sum >> 16));
    const u32 signs = expert.window(first_bit >> 5, first_bit);

    u32 escapes = 0;
    if (ESCAPES) {
      // Bytes of 248 and more have their five highest bits set.
      u32 flags = (codewords & 0x78787878u) + 0x08080808u & codewords & 0x80808080u;
      if (PER_LANE == 1) flags &= 0x80;
      if (__any_sync(ALL_LANES, (flags | carried) != 0)) {
        u32 pending = 0, ones = 0;
        bool open = true;  // no entry yet
        u32 leading = 0;   // escapes before the first entry
#pragma unroll
        for (int k = 0; k < PER_LANE; ++k) {
          if (flags >> (8 * k + 7) & 1) {
            pending |= 0x80000000u >> ((codewords >> 8 * k & 255) - FIRST_ESCAPE);
          } else {
            if (open) leading = pending;
            else escapes |= pending >> ones;
            open = false;
            pending = 0;
            ones += entries[k].y >> 16;
          }
        }
        escapes |= leading | pending_before<LANES>(pending, open, &carried);
      }
    }

    // Visits a non-zero weight if `present`; bit 31 - number of the windows belongs to it.
    const auto visit = [&](bool present, u32 here4, u32 own_signs, u32 own_escapes, int number) {
      const u32 bit = 0x80000000u >> number;
      float value = own_signs & bit ? values[1] : values[0];
      if (ESCAPES && own_escapes & bit) value = values[2];
      visitor.add(present, here4, value);
    };
    // The first three non-zero weights of each entry. Dictionaries 4 to 9 have no more.
    u32 here4 = first4, number = 0, most = 0;
#pragma unroll
    for (int k = 0; k < PER_LANE; ++k) {
      const u32 places = entries[k].x;
      const u32 ones = here4 < limit4 ? entries[k].y >> 16 : 0;
      const u32 own = signs << number, own_escapes = ESCAPES ? escapes << number : 0;
      visit(ones > 0, __dp4a(places, select, here4), own, own_escapes, 0);
      visit(ones > 1, __dp4a(places, select << 8, here4), own, own_escapes, 1);
      visit(ones > 2, __dp4a(places, select << 16, here4), own, own_escapes, 2);
      here4 += entries[k].y & 0xffff;
      number += ones;
      most |= ones;
    }
    if (most > 3) {  // 3 is the largest number without bits above the second
      here4 = first4;
      number = 0;
#pragma unroll
      for (int k = 0; k < PER_LANE; ++k) {
        const u32 ones = here4 < limit4 ? entries[k].y >> 16 : 0;
        visit(ones > 3, here4 + (entries[k].x >> 24), signs << number,
              ESCAPES ? escapes << number : 0, 3);
        here4 += entries[k].y & 0xffff;
        number += ones;
      }
    }
    if (most > 4) {  // the fifth and later: dictionaries 0 to 2, whose entries are found again
      here4 = first4;
      number = 0;
#pragma unroll 1
      for (u32 rest = codewords, k = 0; k < PER_LANE; ++k, rest >>= 8) {
        const u64 bits = table_bits(expert.table, rest & 255);
        u64 mask = bits >> 6;
        const u32 ones = here4 < limit4 ? __popcll(mask) : 0;
#pragma unroll 1
        for (u32 j = 0; j < ones; ++j, ++number, mask &= mask - 1)
          visit(j >= 4, here4 + 4 * (__ffsll(mask) - 1), signs << number,
                ESCAPES ? escapes << number : 0, 0);
        here4 += 4 * static_cast<u32>(bits & 63);
      }
    }
    column4 += round & 0xffff;
    rank += round >> 16;
    if (at >= stop) limit4 = 0;
    visitor.end_round((column4 - visitor.origin) / 4);
  }
}

// A row of "tunstall" that is decoded in pieces; the same in all lanes of its group.
struct TunstallCursor {
  int at, end;  // bytes of the expert: the next codeword, and behind the row
  u32 column;   // where it begins
  u32 rank;     // of its first non-zero weight
};

// Weights as bytes: selectors for byte_select of a bfloat16 value from (low, high), or of zero.
constexpr u32 SELECT_LOW = 0x54, SELECT_HIGH = 0x76;

// Decodes columns [begin, begin + columns) of rows, one each LANES lanes, into bytes at shared address
// `target`, which hold zeros; all lanes of the warp call it. The cursor then stands at the first
// codeword that has weights behind these columns, and part of it may lie before them next time.
template <int LANES>
QMOE_DEVICE void decode_tunstall(const TunstallExpert& expert, const Dictionary& dictionary,
                                 TunstallCursor& cursor, u32 target, int begin, int columns) {
  const u32 select = gridDim.z;  // 1: see walk_tunstall
  const int lane = threadIdx.x & (LANES - 1);
  const u32 group = (threadIdx.x & 31) - lane;
  const auto load = [&](int at) { return expert.window(at >> 2, 8 * (at & 3)); };
  // Columns are counted from `begin`, negative before it.
  int column = static_cast<int>(cursor.column) - begin;
  bool busy = cursor.at < cursor.end && column < columns;
  u32 next = busy ? load(cursor.at + 4 * lane) : 0;
  while (__any_sync(ALL_LANES, busy)) {
    const u32 codewords = next;
    next = busy ? load(cursor.at + 4 * (LANES + lane)) : 0;
    Entry entries[4];
    u32 sum = 0;
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      entries[k] = dictionary.look_up(codewords >> 8 * k & 255);
      sum += entries[k].y;
    }
    const u32 through = inclusive_scan<LANES>(sum);
    const u32 before = through - sum;
    const int first = column + static_cast<int>(before & 0xffff);
    const int first_bit = 8 * cursor.end - 32 - static_cast<int>(cursor.rank + (before >> 16));
    const u32 signs = busy ? expert.window(first_bit >> 5, first_bit) : 0;

    const auto visit = [&](bool present, u32 here, u32 own_signs, int number) {
      if (present && here < static_cast<u32>(columns))
        shared_store<u8>(target + here,
                         static_cast<u8>(SELECT_LOW + (own_signs >> (31 - number) & 1) *
                                                          (SELECT_HIGH - SELECT_LOW)));
    };
    u32 number = 0, most = 0;
    int here = first, inside = 0;  // codewords that end within the columns
    u32 inside_sum = 0;
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const u32 places = entries[k].x, from = static_cast<u32>(here);
      const u32 ones = busy && here < columns ? entries[k].y >> 16 : 0;
      const u32 own = signs << number;
      visit(ones > 0, __dp4a(places, select, from), own, 0);
      visit(ones > 1, __dp4a(places, select << 8, from), own, 1);
      visit(ones > 2, __dp4a(places, select << 16, from), own, 2);
      here += entries[k].y & 0xffff;
      number += ones;
      most |= ones;
      if (here <= columns) {
        ++inside;
        inside_sum += entries[k].y;
      }
    }
    if (most > 3) {  // the fourth and later: dictionaries 0 to 3, whose entries are found again
      here = first;
      number = 0;
#pragma unroll 1
      for (u32 rest = codewords, k = 0; k < 4; ++k, rest >>= 8) {
        const u64 bits = table_bits(expert.table, rest & 255);
        u64 mask = bits >> 6;
        const u32 ones = here < columns ? __popcll(mask) : 0;
#pragma unroll 1
        for (u32 j = 0; j < ones; ++j, ++number, mask &= mask - 1)
          visit(j >= 3, static_cast<u32>(here + __ffsll(mask) - 1), signs << number, 0);
        here += static_cast<int>(bits & 63);
      }
    }
    // The first lane with a codeword that ends behind the columns has the next one to decode.
    const u32 crossing = __ballot_sync(ALL_LANES, inside < 4) >> group & ((1u << LANES) - 1);
    const int last = crossing ? __ffs(crossing) - 1 : LANES - 1;
    const u32 passed = __shfl_sync(ALL_LANES, before + inside_sum, last, LANES);
    const int count = __shfl_sync(ALL_LANES, 4 * lane + inside, last, LANES);
    if (busy) {
      cursor.at += count;
      column += passed & 0xffff;
      cursor.rank += passed >> 16;
    }
    busy = busy && !crossing && cursor.at < cursor.end && column < columns;
  }
  cursor.column = static_cast<u32>(begin + column);
}

// --- What the kernels ask of a coding ---

// A tensor of all experts of a layer, coding "tunstall" or "tunstall_2bit": what every kernel takes
// first. Fields are those of FORMAT.md but for row_block_starts and table.
struct TunstallArrays {
  const u32* words;             // uint32 [num_words]: bytes of rows, each expert from a new word
  const int* expert_offsets;    // int32 [num_experts + 1]: first word of each expert
  const u8* dictionaries;       // uint8 [num_experts]: number of its dictionary, 0 to 9
  const int* shortest_rows;     // int32 [num_experts]: bytes of its shortest row
  const void* row_lengths;      // uint8 or uint16 [num_experts, out_features]: bytes beyond those
  const int* row_block_starts;  // int32 [num_experts, ceil(out_features / 32)]: where every 32nd row
                                // begins, in bytes from the expert's first (find_row_block_starts)
  const u32* levels;            // bfloat16 [num_experts, out_features, 2], a row a word: (low, high)
                                // or (scale, zero); at a multiple of 4 bytes
  const u32* table;             // uint32 [10, 256, 2]: dictionaries (codec/tunstall.py)
  u32 num_words;                // words of all experts; nothing beyond is read
  int row_length_bytes;         // of an element of row_lengths: 1 or 2
};

template <int LANES_, int PER_LANE, bool ESCAPES, u32 SCALE = 4>
struct TunstallCoding {
  static constexpr int LANES = LANES_;
  static constexpr u32 SHARED_BYTES = DICTIONARY_BYTES;  // of a copy
  // 2-bit codes: symbol 0 may have a weight, see base().
  static constexpr bool HAS_BASE = ESCAPES;

  const TunstallArrays& arrays;

  TunstallExpert codes;
  u32 shortest;
  Dictionary dictionary;
  RowPlaces places;
  float values[3], base;
  int begin, end;

  QMOE_DEVICE_MEMBER explicit TunstallCoding(const TunstallArrays& given) : arrays(given) {}

  // Everything that is the same for the block; fills the shared dictionary. A barrier must follow.
  QMOE_DEVICE_MEMBER void open(const Shape&, int expert, u32 shared, u32 copies) {
    const u32 first = min_of(static_cast<u32>(arrays.expert_offsets[expert]), arrays.num_words);
    const u32 last = min_of(static_cast<u32>(arrays.expert_offsets[expert + 1]), arrays.num_words);
    const u32 number = min_of(static_cast<u32>(arrays.dictionaries[expert]), NUM_DICTIONARIES - 1u);
    const int row_bytes = arrays.shortest_rows[expert];
    codes = TunstallExpert{arrays.words + first,
                           min_of(last > first ? last - first : 0, (1u << 26) - 1),
                           arrays.table + 512 * number};
    keep_in_register(codes.words);
    shortest = row_bytes > 0 ? row_bytes : 0;
    dictionary = stage_dictionary<SCALE>(codes.table, shared, copies);
  }

  // Finds a row and its weights. All lanes.
  QMOE_DEVICE_MEMBER void seek(const Shape& shape, int expert, int row) {
    places.find(arrays.row_lengths, arrays.row_length_bytes, arrays.row_block_starts, shape, expert,
                shortest, 4 * codes.num_words, row, &begin, &end);
    const int existing = min_of(row, shape.out_features - 1);
    const u32 pair = arrays.levels[static_cast<u64>(expert) * shape.out_features + existing];
    const float first = from_bf16(pair & 0xffff), second = from_bf16(pair >> 16);
    if (ESCAPES) {
      // Codes of symbols 0 to 3, two bits each, by the row's zero.
      u32 order = 0b11100100;
      if (second == 1) order = 0b11001001;
      if (second == 2) order = 0b00110110;
      if (second == 3) order = 0b00011011;
      base = round_to_bf16(first * (static_cast<float>(order & 3) - second));
#pragma unroll
      for (int symbol = 1; symbol < 4; ++symbol)
        values[symbol - 1] =
            round_to_bf16(first * (static_cast<float>(order >> 2 * symbol & 3) - second));
    } else {
      base = 0;
      values[0] = first;
      values[1] = second;
      values[2] = 0;
    }
  }

  // --- For matmul.cuh: rows in pieces, without escapes. ---

  typedef TunstallCursor Cursor;

  // The row's two values, as stored.
  QMOE_DEVICE_MEMBER u32 row_factor(const Shape& shape, int expert, int row) const {
    const u64 first = static_cast<u64>(expert) * shape.out_features;
    return arrays.levels[first + min_of(row, shape.out_features - 1)];
  }

  // Two weights, bfloat16, of two bytes of a chunk.
  static QMOE_DEVICE_MEMBER u32 weights(u32 factor, u32 bytes) {
    return byte_select(0, factor, bytes);
  }

  // All lanes; rows of a warp lie within one block of 32.
  QMOE_DEVICE_MEMBER Cursor start(const Shape& shape, int expert, int row) {
    Cursor cursor = {0, 0, 0, 0};
    places.find(arrays.row_lengths, arrays.row_length_bytes, arrays.row_block_starts, shape, expert,
                shortest, 4 * codes.num_words, row, &cursor.at, &cursor.end);
    return cursor;
  }

  QMOE_DEVICE_MEMBER void decode_until(Cursor& cursor, u32 target, int begin, int columns) const {
    static_assert(!ESCAPES && PER_LANE == 4 && SCALE == 1, "rows in pieces, a byte a column");
    decode_tunstall<LANES>(codes, dictionary, cursor, target, begin, columns);
  }

  // Visits weights other than `base`; with RELATIVE, their differences from it.
  template <bool RELATIVE, class Visitor>
  QMOE_DEVICE_MEMBER void walk(const Shape& shape, Visitor& visitor) const {
    static_assert(SCALE == 4, "a float a column");
    const float offset = RELATIVE ? base : 0.0f;
    const float weights[3] = {ESCAPES && RELATIVE ? values[0] - offset : values[0],
                              ESCAPES && RELATIVE ? values[1] - offset : values[1],
                              ESCAPES && RELATIVE ? values[2] - offset : values[2]};
    walk_tunstall<LANES, PER_LANE, ESCAPES>(codes, dictionary, begin, end, shape.in_features,
                                            weights, visitor);
  }
};

}  // namespace qmoe
