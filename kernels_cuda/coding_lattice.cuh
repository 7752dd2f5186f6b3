// Decoding of blocks of 32 rows of the coding "lattice" (qmoe_jax/codec/FORMAT.md).
//
// A block's bit strings lie one after another, so that where one begins is known only when all before it
// have been read. Once after loading, find_lattice_cursors notes where the strings of a block stand at
// every task: up to 256 visited columns that follow one another, all grouped or none. A warp
// decodes a task alone.
//
// A lane takes four codewords that follow one another, whose dictionaries follow from their numbers, and
// looks their entries up in shared memory. A scan of lengths over the lanes gives each entry's place in
// the string, and its ones are or-ed into the string's bits in shared memory; the order of these does not
// matter. What has a bit for each one of another string is dealt to those ones, word by word, until all
// have a bit for each weight that is not zero. Then a lane has a column: a word of 32 rows says which
// weights these are, and the number of those before it where their bits lie.
#pragma once
#include "common.cuh"

namespace qmoe {

constexpr u32 LATTICE_DICTIONARIES = 16;
constexpr u32 LATTICE_TABLE_WORDS = 2 * 256 * LATTICE_DICTIONARIES;  // the steps lie behind these
constexpr u32 LATTICE_DICTIONARY_BYTES = 4 * LATTICE_TABLE_WORDS;    // of a copy in shared memory
constexpr u32 LATTICE_TASK = 256;   // visited columns
// A string in shared memory has room for the weights of so many columns; where a task has more that are
// not zero, half of it is decoded at a time.
constexpr u32 LATTICE_CHUNK = LATTICE_TASK / 2;
// Entries may begin 255 bits before a string and end four entries of 255 bits and two words behind it,
// where nobody looks: words between strings.
constexpr u32 STRING_GAP = 36;
constexpr u32 STRING_WORDS = LATTICE_CHUNK + STRING_GAP;
constexpr u32 ZERO_COLUMN = 255;

// A tensor of all experts of a layer, coding "lattice": what every kernel takes first. Fields are those
// of FORMAT.md but for row_block_starts, visits, cursors and table.
struct LatticeArrays {
  const u32* words;             // uint32 [num_words]: bytes of blocks, each expert from a new word
  const int* expert_offsets;    // int32 [num_experts + 1]: first word of each expert
  const void* block_lengths;    // uint16 or uint32 [num_experts, ceil(out_features / 32)]: bytes
  const int* grouped_columns;   // int32 [num_experts]: so many visited columns are stored by groups
  const u16* schedules;         // uint16 [num_experts, 3, 15]: of flags, plane 1, plane 2: codewords
                                // of the dictionaries 0 to 14
  const u8* dictionaries;       // uint8 [num_experts, 4]: of rests, plane 3, plane 4, signs
  const u8* leans;              // uint8 [num_experts, ceil(min(out_features, in_features) / 8)]
  const u8* columns;            // uint8 [num_experts, in_features]: class and step, or 255
  const u8* bases;              // uint8 [num_experts, 8]: first step of each class
  const float* origins;         // float32 [num_experts]: step of index 0
  const int* row_block_starts;  // int32 [num_experts, ceil(out_features / 32)]: where every block
                                // begins, in bytes from the expert's first
  const u32* visits;            // uint32 [num_experts, 1 + in_features]: number of visited columns, then
                                // these in order: byte << 24 | column << 1 | whether its lean is 1
  const u32* cursors;           // uint32 [num_experts, ceil(out_features / 32), 2 + ceil(in_features /
                                // 256), 8]: of each block starts of strings, then of its tasks
                                // where these stand (find_lattice_cursors)
  const u32* table;             // uint32 [16 * 256 * 2 + 256]: dictionaries (codec/lattice_dictionaries.py),
                                // then bits of the steps, float32, in units of the origin
  u32 num_words;                // words of all experts; nothing beyond is read
  int block_length_bytes;       // of an element of block_lengths: 2 or 4
};

// Bit strings, in the order in which a block has them.
enum LatticeString { FLAGS, RESTS, PLANE_1, PLANE_2, PLANE_3, PLANE_4, SIGNS, LATTICE_STRINGS };
constexpr u32 LATTICE_ENDS_BYTES = 4 * LATTICE_DICTIONARIES * LATTICE_STRINGS;

// What `cursors` has of a block: bytes from the expert's first where its parts begin. The flags begin
// where the block does.
struct LatticeStarts {
  u32 firsts, rests, plane_1, plane_2, plane_3, plane_4, signs, remainders;
};

// And of a task: the next codeword of each string, its number << 8 | how many of its bits are behind;
// of firsts and remainders the number of the next one.
struct LatticeTaskCursors {
  u32 places;  // flags, or plane 1
  u32 firsts, rests, plane_2, plane_3, plane_4, signs, remainders;
};
constexpr u32 CURSOR_WORDS = 8;

struct LatticeCursor {
  u32 number, skip;

  static QMOE_DEVICE_MEMBER LatticeCursor of(u32 packed) { return {packed >> 8, packed & 255}; }
  QMOE_DEVICE_MEMBER u32 packed() const { return number << 8 | skip; }
  // Codewords up to here, one that is begun among them.
  QMOE_DEVICE_MEMBER u32 used() const { return number + (skip > 0); }
};

QMOE_DEVICE u32 lattice_blocks(const Shape& shape) {
  return static_cast<u32>(shape.out_features + ROW_BLOCK - 1) / ROW_BLOCK;
}

// Tasks of a block at most: the grouped columns end one.
QMOE_DEVICE u32 most_lattice_tasks(const Shape& shape) {
  return (shape.in_features + LATTICE_TASK - 1) / LATTICE_TASK + 1;
}

// What a codeword stands for: zeros, then up to 48 bits that begin with a one.
struct LatticeEntry {
  u32 low;   // the first 32 of these
  u32 rest;  // zeros << 24 | the other 16 << 8 | length of all

  // `x` and `y` are the table's: bits 0 to 7 the length, 8 to 15 the zeros, 16 + i bit i from the one on.
  static QMOE_DEVICE_MEMBER LatticeEntry of(u32 x, u32 y) {
    return {__funnelshift_r(x, y, 16), (x & 0xff00) << 16 | y >> 16 << 8 | (x & 255)};
  }
  QMOE_DEVICE_MEMBER u32 length() const { return rest & 255; }
  QMOE_DEVICE_MEMBER u32 zeros() const { return rest >> 24; }
  QMOE_DEVICE_MEMBER u32 high() const { return byte_select(rest, 0, 0x4421); }
};

// Dictionaries in device memory, and in shared memory in copies whose entries alternate
// (`Dictionary` of coding_tunstall.cuh).
struct LatticeTable {
  const u32* table;

  QMOE_DEVICE_MEMBER u32 begin(u32 dictionary) const { return dictionary << 8; }
  QMOE_DEVICE_MEMBER u32 place(u32 begin, u32 codeword) const { return begin + codeword; }
  QMOE_DEVICE_MEMBER LatticeEntry look_up(u32 place) const {
    const u32* const words = table + 2 * place;
    return LatticeEntry::of(__ldg(words), __ldg(words + 1));
  }
};

struct LatticeDictionary {
  u32 address;  // of this lane's copy
  u32 stride;   // from an entry to the next

  QMOE_DEVICE_MEMBER u32 begin(u32 dictionary) const {
    return address + (dictionary << 8) * stride;
  }
  QMOE_DEVICE_MEMBER u32 place(u32 begin, u32 codeword) const { return begin + codeword * stride; }
  QMOE_DEVICE_MEMBER LatticeEntry look_up(u32 place) const {
    const Pair32 words = shared_load<Pair32>(place);
    return {words.x, words.y};
  }
};

// All threads of the block; a barrier must follow. `copies` is a power of two up to 16.
QMOE_DEVICE LatticeDictionary stage_lattice(const u32* table, u32 shared, u32 copies) {
  for (u32 number = threadIdx.x; number < LATTICE_TABLE_WORDS / 2; number += blockDim.x) {
    const LatticeEntry entry = LatticeEntry::of(table[2 * number], table[2 * number + 1]);
    for (u32 copy = 0; copy < copies; ++copy)
      shared_store<Pair32>(shared + 8 * (number * copies + (copy + number & copies - 1)),
                           Pair32{entry.low, entry.rest});
  }
  return {shared + 8 * (threadIdx.x & copies - 1), 8 * copies};
}

// --- An expert, and what all of its blocks share ---

struct LatticeExpert {
  const u32* words;  // the expert's first
  u32 num_words;     // below 2^26
  u32 visited, grouped;  // columns
  u32 index;

  QMOE_DEVICE_MEMBER LatticeExpert(const LatticeArrays& arrays, const Shape& shape, int expert)
      : index(expert) {
    const u32 first = min_of(static_cast<u32>(arrays.expert_offsets[expert]), arrays.num_words);
    const u32 last = min_of(static_cast<u32>(arrays.expert_offsets[expert + 1]), arrays.num_words);
    words = arrays.words + first;
    num_words = min_of(last > first ? last - first : 0, (1u << 26) - 1);
    keep_in_register(words);
    visited = min_of(visits(arrays, shape)[0], static_cast<u32>(shape.in_features));
    const int stored = arrays.grouped_columns[expert];
    grouped = stored > 0 ? min_of(static_cast<u32>(stored), visited) : 0;
  }

  QMOE_DEVICE_MEMBER const u32* visits(const LatticeArrays& arrays, const Shape& shape) const {
    return arrays.visits + static_cast<u64>(index) * (1 + shape.in_features);
  }

  // Four bytes from any on, and one; what lies outside of the expert is 0.
  QMOE_DEVICE_MEMBER u32 four(u32 at) const { return bits(at >> 2, 8 * at); }
  QMOE_DEVICE_MEMBER u32 byte(u32 at) const {
    return at < 4 * num_words ? __ldg(reinterpret_cast<const u8*>(words) + at) : 0;
  }
  // 32 bits from bit `shift` of a word on, modulo 32.
  QMOE_DEVICE_MEMBER u32 bits(u32 word, u32 shift) const {
    const u32 low = word < num_words ? __ldg(words + word) : 0;
    const u32 high = word + 1 < num_words ? __ldg(words + word + 1) : 0;
    return __funnelshift_r(low, high, shift);
  }

  QMOE_DEVICE_MEMBER u32 grouped_tasks() const {
    return (grouped + LATTICE_TASK - 1) / LATTICE_TASK;
  }
  QMOE_DEVICE_MEMBER u32 tasks() const {
    return grouped_tasks() + (visited - grouped + LATTICE_TASK - 1) / LATTICE_TASK;
  }

  // The step of a column with that byte, not 255.
  QMOE_DEVICE_MEMBER float step(const LatticeArrays& arrays, u32 byte) const {
    const u32 number = arrays.bases[8 * static_cast<u64>(index) + (byte >> 5)] + (byte & 31);
    const u32* const steps = arrays.table + LATTICE_TABLE_WORDS;
    return arrays.origins[index] * __uint_as_float(__ldg(steps + min_of(number, 255u)));
  }

  // The lean of a row or, where there are no fewer, of a column: 0 or 1.
  QMOE_DEVICE_MEMBER u32 lean(const LatticeArrays& arrays, const Shape& shape, u32 number) const {
    const u64 bytes = (min_of(shape.out_features, shape.in_features) + 7) / 8;
    return arrays.leans[index * bytes + (number >> 3)] >> (number & 7) & 1;
  }
};

// Codewords of each string from which on a dictionary no longer counts, uint32 [strings][16]. All
// threads of the block; a barrier must follow.
QMOE_DEVICE void stage_lattice_ends(const LatticeArrays& arrays, int expert, u32 shared) {
  for (u32 string = threadIdx.x; string < LATTICE_STRINGS; string += blockDim.x) {
    const int scheduled = string == FLAGS ? 0 : string == PLANE_1 ? 1 : string == PLANE_2 ? 2 : -1;
    const int plain = string == RESTS ? 0 : string == PLANE_3 ? 1 : string == PLANE_4 ? 2 : 3;
    const u32 number = arrays.dictionaries[4 * static_cast<u64>(expert) + plain];
    u32 end = 0;
    for (u32 d = 0; d < LATTICE_DICTIONARIES; ++d) {
      if (d == LATTICE_DICTIONARIES - 1) end = ~0u;
      else if (scheduled >= 0)
        end += arrays.schedules[(3 * static_cast<u64>(expert) + scheduled) * 15 + d];
      else if (d >= number) end = ~0u;
      shared_store<u32>(shared + 4 * (LATTICE_DICTIONARIES * string + d), end);
    }
  }
}

// --- Bit strings ---

// Reads `wanted` bits of a string whose codewords begin at byte `begin`, from the cursor on, which then
// stands behind them; all lanes, with the same arguments. `visit(place, low, high)` is called for
// entries whose 48 bits (low, high) stand at bit `place` of these: from -255 on, and up to 1020 bits behind
// the last. Where any of a lane returns what is not 0, visit.rest is called for all of these.
template <int PER_LANE, class Table, class Visit>
QMOE_DEVICE void read_string(const LatticeExpert& expert, const Table& table, u32 ends, u32 begin,
                             LatticeCursor& cursor, u32 wanted, Visit& visit) {
  static_assert(PER_LANE == 4 || PER_LANE == 1, "a word or a byte");
  if (wanted == 0) return;
  const int lane = lane_of_warp(), stop = static_cast<int>(wanted);
  int at = -static_cast<int>(cursor.skip);  // where the next codeword begins
  // The dictionary of the first codeword; those of a lane only rise.
  const u32 past = __ballot_sync(ALL_LANES, shared_load<u32>(ends + 4 * (lane & 15)) <= cursor.number);
  u32 dictionary = __popc(past & 0x7fff);
  u32 end = shared_load<u32>(ends + 4 * dictionary);
  u32 number = cursor.number + PER_LANE * lane;
  const auto load = [&](u32 from) {
    return PER_LANE == 4 ? expert.four(begin + from) : expert.byte(begin + from);
  };
  u32 next = load(number), dictionary_begin = table.begin(dictionary);
  while (true) {
    const u32 codewords = next;
    next = load(number + PER_LANE * 32);
    u32 found[PER_LANE];  // places in the table
#pragma unroll
    for (int k = 0; k < PER_LANE; ++k)
      found[k] = table.place(dictionary_begin, byte_select(codewords, 0, 0x4440 + k));
    if (number + PER_LANE > end) {  // seldom
#pragma unroll
      for (int k = 0; k < PER_LANE; ++k) {
        while (number + k >= end && dictionary < LATTICE_DICTIONARIES - 1)
          end = shared_load<u32>(ends + 4 * ++dictionary);
        dictionary_begin = table.begin(dictionary);
        found[k] = table.place(dictionary_begin, byte_select(codewords, 0, 0x4440 + k));
      }
    }
    LatticeEntry entries[PER_LANE];
    u32 sum = 0;
#pragma unroll
    for (int k = 0; k < PER_LANE; ++k) {
      entries[k] = table.look_up(found[k]);
      sum += entries[k].length();
    }
    int places[PER_LANE + 1];  // where codewords begin
    places[0] = at + static_cast<int>(inclusive_scan<32>(sum) - sum);
#pragma unroll
    for (int k = 0; k < PER_LANE; ++k)
      places[k + 1] = places[k] + static_cast<int>(entries[k].length());
    if (places[0] < stop) {
      u32 left = 0;
#pragma unroll
      for (int k = 0; k < PER_LANE; ++k)
        left |= visit(places[k] + static_cast<int>(entries[k].zeros()), entries[k].low,
                      entries[k].high());
      if (left != 0) {
#pragma unroll
        for (int k = 0; k < PER_LANE; ++k)
          visit.rest(places[k] + static_cast<int>(entries[k].zeros()), entries[k].high());
      }
    }
    const u32 through = __ballot_sync(ALL_LANES, places[PER_LANE] >= stop);
    if (through == 0) {
      at = __shfl_sync(ALL_LANES, places[PER_LANE], 31);
      number += PER_LANE * 32;
      continue;
    }
    // The first of these lanes has the last codeword that ends within the wanted bits.
    int reached = places[0];
    u32 inside = number;
#pragma unroll
    for (int k = 0; k < PER_LANE; ++k)
      if (places[k + 1] <= stop) {
        ++inside;
        reached = places[k + 1];
      }
    const int last = __ffs(through) - 1;
    cursor.number = __shfl_sync(ALL_LANES, inside, last);
    cursor.skip = static_cast<u32>(stop - __shfl_sync(ALL_LANES, reached, last));
    break;
  }
}

// The dictionary whose entries are all sequences of eight bits, so that codewords are the bits, the first
// one highest.
constexpr u32 RAW_DICTIONARY = 14;

// The same of a string that is in that dictionary alone: puts the bits into words at a shared address.
QMOE_DEVICE void read_raw(const LatticeExpert& expert, u32 begin, LatticeCursor& cursor, u32 wanted,
                          u32 target) {
  const auto load = [&](u32 from) { return byte_select(__brev(expert.four(from)), 0, 0x0123); };
  const u32 from = begin + cursor.number + (cursor.skip >> 3);
  for (u32 word = lane_of_warp(); 32 * word < wanted; word += 32)
    shared_store<u32>(target + 4 * word, __funnelshift_r(load(from + 4 * word),
                                                         load(from + 4 * word + 4), cursor.skip & 7));
  const u32 through = cursor.skip + wanted;
  cursor = {cursor.number + (through >> 3), through & 7};
}

// Puts a string's bits into zeroed words at a shared address, with a gap before and behind.
struct BitScatter {
  u32 target;

  QMOE_DEVICE_MEMBER u32 word(int place) const {
    return target + static_cast<u32>(place >> 3 & ~3);
  }
  QMOE_DEVICE_MEMBER u32 operator()(int place, u32 low, u32 high) const {
    shared_or(word(place), __funnelshift_l(0, low, place));
    shared_or(word(place) + 4, __funnelshift_l(low, high, place));
    return __funnelshift_l(high, 0, place);
  }
  // Bits in a third word: seldom.
  QMOE_DEVICE_MEMBER void rest(int place, u32 high) const {
    const u32 bits = __funnelshift_l(high, 0, place);
    if (bits != 0) shared_or(word(place) + 8, bits);
  }
};

// Counts the ones of a string.
struct BitCounter {
  int stop;
  u32 ones = 0;

  QMOE_DEVICE_MEMBER u32 operator()(int place, u32 low, u32 high) {
    u64 mask = low | static_cast<u64>(high) << 32;
    if (place < 0) {
      mask = place > -48 ? mask >> -place : 0;
      place = 0;
    }
    const int left = stop - place;
    if (left < 48) mask &= left > 0 ? (1ull << left) - 1 : 0;
    ones += __popcll(mask);
    return 0;
  }
  QMOE_DEVICE_MEMBER void rest(int, u32) {}
};

QMOE_DEVICE u32 warp_total(u32 value) {
  return __shfl_sync(ALL_LANES, inclusive_scan<32>(value), 31);
}

// Ones among the first bits of words in shared memory. All lanes.
QMOE_DEVICE u32 count_ones(u32 address, u32 bits) {
  u32 ones = 0;
  for (u32 word = lane_of_warp(); 32 * word < bits; word += 32) {
    const u32 left = bits - 32 * word, own = shared_load<u32>(address + 4 * word);
    ones += __popc(left < 32 ? own & ((1u << left) - 1) : own);
  }
  return warp_total(ones);
}

// 32 bits from a bit on of words in shared memory.
QMOE_DEVICE u32 window_at(u32 address, u32 bit) {
  const u32 word = address + 4 * (bit >> 5);
  return __funnelshift_r(shared_load<u32>(word), shared_load<u32>(word + 4), bit);
}

// Deals bits, the lowest first, to the ones of a mask.
QMOE_DEVICE u32 deal(u32 mask, u32 bits) {
  u32 dealt = 0;
  while (mask != 0 && bits != 0) {
    const u32 others = mask & mask - 1;
    if (bits & 1) dealt |= mask ^ others;
    mask = others;
    bits >>= 1;
  }
  return dealt;
}

// A column that is stored by groups of 8 rows.
struct GroupedColumn {
  u32 packed;  // flags; from bit 4 on, three for each of these that is 1, the group's first row; from
               // bit 16 on the number of rests

  // `fields`: the firsts from the column's on.
  static QMOE_DEVICE_MEMBER GroupedColumn of(u32 flags, u32 fields) {
    const u32 count = __popc(flags);
    fields &= (1u << 3 * count) - 1;
    const u32 sum =
        __popc(fields & 01111) + 2 * __popc(fields & 02222) + 4 * __popc(fields & 04444);
    return {flags | fields << 4 | (7 * count - sum) << 16};
  }
  QMOE_DEVICE_MEMBER u32 rests() const { return packed >> 16; }
  // Which of 32 rows are not zero. `bits`: the rests from the column's on.
  QMOE_DEVICE_MEMBER u32 rows(u32 bits) const {
    u32 word = 0, fields = packed >> 4;
#pragma unroll
    for (int group = 0; group < 4; ++group)
      if (packed >> group & 1) {
        const u32 first = fields & 7;
        // The first one, the rests, and what is behind these and leaves the group.
        word |= ((1 | bits << 1) << first & 255) << 8 * group;
        bits >>= 7 - first;
        fields >>= 3;
      }
    return word;
  }
};

// Bits of the firsts, at least 25, from field `number` on.
QMOE_DEVICE u32 firsts_from(const LatticeExpert& expert, u32 begin, u32 number) {
  return expert.four(begin + (3 * number >> 3)) >> (3 * number & 7);
}

// Deals a string's bits to the ones among the first `num_bits` bits of another one: a bit for each of
// these, and zeros behind them as far as windows reach. All lanes; a barrier must follow.
QMOE_DEVICE void deal_string(u32 mask_at, u32 num_bits, u32 bits_at, u32 target) {
  u32 before = 0;
  for (u32 first = 0; first < num_bits / 32 + 2; first += 32) {
    const u32 word = first + lane_of_warp();
    u32 mask = 32 * word < num_bits ? shared_load<u32>(mask_at + 4 * word) : 0;
    if (num_bits < 32 * word + 32) mask &= (1u << (num_bits & 31)) - 1;
    const u32 count = __popc(mask), through = inclusive_scan<32>(count);
    const u32 bits = window_at(bits_at, before + through - count);
    if (word < STRING_WORDS) shared_store<u32>(target + 4 * word, deal(mask, bits));
    before += __shfl_sync(ALL_LANES, through, 31);
  }
}

// --- A task ---

// Shared memory of a warp, by words: a gap, which weights are not zero, a gap, four strings and their
// gaps, and what a visitor may have; it also takes strings that are dealt.
constexpr u32 STRING_BYTES = 4 * STRING_WORDS;
constexpr u32 NONZERO_AT = 4 * STRING_GAP;
constexpr u32 STRINGS_AT = NONZERO_AT + 4 * (LATTICE_TASK + STRING_GAP);
constexpr u32 VISITOR_AT = STRINGS_AT + 4 * STRING_BYTES;
constexpr u32 VISITOR_BYTES = 1024;
constexpr u32 LATTICE_WARP_BYTES = VISITOR_AT + VISITOR_BYTES;
static_assert(VISITOR_BYTES >= STRING_BYTES && LATTICE_WARP_BYTES % 16 == 0, "zeroed by 16 bytes");

// A block's part of 32 columns, one a lane.
struct LatticeColumns {
  u32 first;       // number of lane 0's column in the task; a multiple of 32
  u32 count;       // how many of the 32 there are
  u32 nonzero;     // which of 32 rows are not zero
  // A bit for each of these, the lowest first; what follows in `signs` and `large` means nothing.
  u32 signs;       // whether it is negative, before leans
  u32 large;       // of magnitude 2 and more
  u32 third;       // of 3 and more
  u32 fourth;      // of 4 and more
  u32 remainder;   // byte of the expert with the first one's magnitude less 4
  bool any_third, any_fourth;  // in any lane
};

// Where a task lies among the visited columns.
struct LatticeTask {
  u32 first, columns;
  bool grouped;

  QMOE_DEVICE_MEMBER LatticeTask(const LatticeExpert& expert, u32 number) {
    const u32 before = expert.grouped_tasks();
    grouped = number < before;
    first = grouped ? number * LATTICE_TASK : expert.grouped + (number - before) * LATTICE_TASK;
    columns = min_of((grouped ? expert.grouped : expert.visited) - first, LATTICE_TASK);
  }
};

// Decodes a task of a block: visitor.visit(LatticeColumns) for every 32 of its columns, in order, with a
// __syncwarp after each. All lanes of a warp; `scratch` is its own, whose VISITOR_BYTES from VISITOR_AT on
// are the visitor's within a visit.
template <class Table, class Visitor>
QMOE_DEVICE void decode_task(const LatticeArrays& arrays, const LatticeExpert& expert,
                             const Shape& shape, const Table& table, u32 ends, u32 scratch,
                             u32 block, u32 number, Visitor& visitor) {
  const u32 lane = lane_of_warp();
  const u32 nonzero_at = scratch + NONZERO_AT, signs_at = scratch + STRINGS_AT;
  const u32 large_at = signs_at + STRING_BYTES, third_at = large_at + STRING_BYTES;
  const u32 fourth_at = third_at + STRING_BYTES, dealt_at = scratch + VISITOR_AT;
  const LatticeTask task(expert, number);
  const u32 columns = task.columns;
  const u64 own = (static_cast<u64>(expert.index) * lattice_blocks(shape) + block);
  const u32* const of_block = arrays.cursors + own * (1 + most_lattice_tasks(shape)) * CURSOR_WORDS;
  const LatticeStarts starts = *reinterpret_cast<const LatticeStarts*>(of_block);
  const LatticeTaskCursors stored =
      *reinterpret_cast<const LatticeTaskCursors*>(of_block + (1 + number) * CURSOR_WORDS);
  const u32 flags_begin = static_cast<u32>(arrays.row_block_starts[own]);
  LatticeCursor places = LatticeCursor::of(stored.places), rests = LatticeCursor::of(stored.rests);
  LatticeCursor second = LatticeCursor::of(stored.plane_2), signs = LatticeCursor::of(stored.signs);
  LatticeCursor third = LatticeCursor::of(stored.plane_3), fourth = LatticeCursor::of(stored.plane_4);
  u32 remainder = starts.remainders + stored.remainders;
  const bool raw_signs = arrays.dictionaries[4 * static_cast<u64>(expert.index) + 3] == RAW_DICTIONARY;
  const auto ends_of = [&](u32 string) { return ends + 4 * LATTICE_DICTIONARIES * string; };
  const auto clear = [&](u32 address, u32 bytes) {
    for (u32 at = 16 * lane; at < bytes; at += 16 * 32)
      shared_store<Quad32>(address + at, Quad32{0, 0, 0, 0});
  };

  clear(scratch, LATTICE_WARP_BYTES);
  __syncwarp();
  if (task.grouped) {
    u32 firsts = stored.firsts;
    BitScatter flags = {third_at};
    read_string<4>(expert, table, ends_of(FLAGS), flags_begin, places, 4 * columns, flags);
    __syncwarp();
    u32 num_rests = 0;
    for (u32 first = 0; first < columns; first += 32) {
      const u32 column = first + lane;
      u32 own_flags = shared_load<u32>(third_at + column / 8 * 4) >> 4 * (column & 7) & 15;
      if (column >= columns) own_flags = 0;
      const u32 count = __popc(own_flags), through = inclusive_scan<32>(count);
      const GroupedColumn found = GroupedColumn::of(
          own_flags, firsts_from(expert, starts.firsts, firsts + through - count));
      shared_store<u32>(nonzero_at + 4 * column, found.packed);
      num_rests += found.rests();
      firsts += __shfl_sync(ALL_LANES, through, 31);
    }
    num_rests = warp_total(num_rests);
    // As many as 28 a column: over two strings.
    BitScatter bits = {signs_at};
    read_string<4>(expert, table, ends_of(RESTS), starts.rests, rests, num_rests, bits);
    __syncwarp();
    u32 before = 0;
    for (u32 first = 0; first < columns; first += 32) {
      const u32 column = nonzero_at + 4 * (first + lane);
      const GroupedColumn found = {shared_load<u32>(column)};
      const u32 count = found.rests(), through = inclusive_scan<32>(count);
      shared_store<u32>(column, found.rows(window_at(signs_at, before + through - count)));
      before += __shfl_sync(ALL_LANES, through, 31);
    }
  } else {
    BitScatter bits = {nonzero_at};
    read_string<4>(expert, table, ends_of(PLANE_1), starts.plane_1, places, 32 * columns, bits);
  }
  __syncwarp();

  u32 ones = count_ones(nonzero_at, 32 * columns);
  const u32 step = ones > 32 * LATTICE_CHUNK ? LATTICE_CHUNK : LATTICE_TASK;
  for (u32 begin = 0; begin < columns; begin += step) {
    if (step < LATTICE_TASK)
      ones = count_ones(nonzero_at + 4 * begin, 32 * min_of(columns - begin, step));
    if (task.grouped || begin > 0) {
      clear(signs_at, 2 * STRING_BYTES);
      if (begin > 0) clear(dealt_at, STRING_BYTES);
      __syncwarp();
    }
    BitScatter sign_bits = {signs_at}, large_bits = {large_at};
    if (raw_signs) read_raw(expert, starts.signs, signs, ones, signs_at);
    else read_string<4>(expert, table, ends_of(SIGNS), starts.signs, signs, ones, sign_bits);
    read_string<4>(expert, table, ends_of(PLANE_2), starts.plane_2, second, ones, large_bits);
    __syncwarp();
    const u32 num_large = count_ones(large_at, ones);
    u32 num_third = 0, num_fourth = 0;
    if (num_large != 0) {
      BitScatter bits = {dealt_at};
      read_string<1>(expert, table, ends_of(PLANE_3), starts.plane_3, third, num_large, bits);
      __syncwarp();
      num_third = count_ones(dealt_at, num_large);
      if (num_third != 0) {
        deal_string(large_at, ones, dealt_at, third_at);
        __syncwarp();
        clear(dealt_at, STRING_BYTES);
        __syncwarp();
        BitScatter more = {dealt_at};
        read_string<1>(expert, table, ends_of(PLANE_4), starts.plane_4, fourth, num_third, more);
        __syncwarp();
        num_fourth = count_ones(dealt_at, num_third);
        if (num_fourth != 0) deal_string(third_at, ones, dealt_at, fourth_at);
      }
      __syncwarp();
    }

    u32 rank = 0;  // of the next 32 columns' first weight
    const u32 end = min_of(columns, begin + step);
    for (u32 first = begin; first < end; first += 32) {
      LatticeColumns found;
      found.first = first;
      found.count = min_of(end - first, 32u);
      // What follows the last column is the end of an entry.
      found.nonzero = lane < found.count ? shared_load<u32>(nonzero_at + 4 * (first + lane)) : 0;
      const u32 count = __popc(found.nonzero), through = inclusive_scan<32>(count);
      const u32 before = rank + through - count;
      rank += __shfl_sync(ALL_LANES, through, 31);
      found.signs = window_at(signs_at, before);
      found.large = window_at(large_at, before);
      found.third = found.fourth = 0;
      found.any_third = found.any_fourth = false;
      const auto own_bits = [&](u32 address) {
        return window_at(address, before) & (count < 32 ? (1u << count) - 1 : ~0u);
      };
      if (num_third != 0) {
        found.third = own_bits(third_at);
        found.any_third = __any_sync(ALL_LANES, found.third != 0);
      }
      if (num_fourth != 0) {
        found.fourth = own_bits(fourth_at);
        found.any_fourth = __any_sync(ALL_LANES, found.fourth != 0);
      }
      if (found.any_fourth) {
        const u32 own_remainders = __popc(found.fourth);
        const u32 remainders = inclusive_scan<32>(own_remainders);
        found.remainder = remainder + remainders - own_remainders;
        remainder += __shfl_sync(ALL_LANES, remainders, 31);
      }
      visitor.visit(found);
      __syncwarp();
    }
  }
}

// Calls visit(column, negative, magnitude) in all lanes, a lane a row, for every column that has a weight
// of magnitude 3 and more; a magnitude is 0 in rows that have none. These are rare.
template <class Visit>
QMOE_DEVICE void visit_thirds(const LatticeExpert& expert, const LatticeColumns& found, Visit visit) {
  if (!found.any_third) return;
  const u32 lane = lane_of_warp();
  const u32 thirds = deal(found.nonzero, found.third), signs = deal(found.nonzero, found.signs);
  const u32 fourths = found.any_fourth ? deal(found.nonzero, found.fourth) : 0;
  const u32 first_remainder = found.any_fourth ? found.remainder : 0;
  u32 left = __ballot_sync(ALL_LANES, thirds != 0);
  for (; left != 0; left &= left - 1) {
    const int column = __ffs(left) - 1;
    const u32 third = __shfl_sync(ALL_LANES, thirds, column);
    const u32 fourth = __shfl_sync(ALL_LANES, fourths, column);
    const u32 negative = __shfl_sync(ALL_LANES, signs, column);
    const u32 remainder = __shfl_sync(ALL_LANES, first_remainder, column);
    u32 magnitude = third >> lane & 1 ? 3 : 0;
    if (fourth >> lane & 1)
      magnitude = 4 + expert.byte(remainder + __popc(fourth & ((1u << lane) - 1)));
    visit(column, negative >> lane & 1, magnitude);
  }
}

}  // namespace qmoe
