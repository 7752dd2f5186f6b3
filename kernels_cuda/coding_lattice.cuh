// Decoding of blocks of 32 rows of the coding "lattice" (qmoe_jax/codec/FORMAT.md).
//
// A block's bit strings lie one after another, so that where one begins is known only when all before it
// have been read. Once after loading, find_lattice_cursors notes where the strings of a block stand at
// every task: up to 256 visited columns that follow one another, all grouped or none. A warp
// decodes a task alone, 128 columns at a time.
//
// A lane takes four codewords that follow one another, whose dictionaries follow from their numbers, and
// looks their entries up in shared memory. A scan of lengths over the lanes gives each entry's place in
// the string, and its ones are or-ed into the string's bits in shared memory; the order of these does not
// matter. Then a lane has a column: a word of 32 rows says which weights are not zero, the number of
// those before it where its bits of the signs and of plane 2 lie, and these are dealt to the word's ones.
#pragma once
#include "common.cuh"

namespace qmoe {

constexpr u32 LATTICE_DICTIONARIES = 16;
constexpr u32 LATTICE_TABLE_WORDS = 2 * 256 * LATTICE_DICTIONARIES;  // the steps lie behind these
constexpr u32 LATTICE_DICTIONARY_BYTES = 4 * LATTICE_TABLE_WORDS;    // of a copy in shared memory
constexpr u32 LATTICE_TASK = 256;   // visited columns
constexpr u32 LATTICE_CHUNK = 128;  // of a task, decoded at a time
// A string in shared memory has a word for each of a chunk's columns, two more that windows reach, one for
// bits that nobody wants, and one for alignment.
constexpr u32 STRING_WORDS = LATTICE_CHUNK + 4;
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

// Dictionaries in device memory, and in shared memory in copies whose entries alternate
// (`Dictionary` of coding_tunstall.cuh). Entries are those of the table: bits 0 to 7 the length, 8 to 15
// the zeros before the first one, 16 + i whether bit i from there is one.
struct LatticeTable {
  const u32* table;

  QMOE_DEVICE_MEMBER Pair32 look_up(u32 entry) const {
    return {__ldg(table + 2 * entry), __ldg(table + 2 * entry + 1)};
  }
};

struct LatticeDictionary {
  u32 address;  // of this lane's copy
  u32 shift;

  QMOE_DEVICE_MEMBER Pair32 look_up(u32 entry) const {
    return shared_load<Pair32>(address + (entry << shift));
  }
};

// All threads of the block; a barrier must follow. `copies` is a power of two up to 16.
QMOE_DEVICE LatticeDictionary stage_lattice(const u32* table, u32 shared, u32 copies) {
  for (u32 entry = threadIdx.x; entry < LATTICE_TABLE_WORDS / 2; entry += blockDim.x) {
    const Pair32 bits = {table[2 * entry], table[2 * entry + 1]};
    for (u32 copy = 0; copy < copies; ++copy)
      shared_store<Pair32>(shared + 8 * (entry * copies + (copy + entry & copies - 1)), bits);
  }
  return {shared + 8 * (threadIdx.x & copies - 1), static_cast<u32>(__ffs(8 * copies) - 1)};
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
  QMOE_DEVICE_MEMBER u32 four(u32 at) const { return bits(at >> 2, 8 * (at & 3)); }
  QMOE_DEVICE_MEMBER u32 byte(u32 at) const {
    return at < 4 * num_words ? __ldg(reinterpret_cast<const u8*>(words) + at) : 0;
  }
  // 32 bits from bit `shift` mod 32 of a word on.
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
// stands behind them; all lanes, with the same arguments. `visit(place, low, high)` is called for entries
// whose 48 bits (low, high) stand at bit `place` of these, which may be negative, and reach
// beyond the last.
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
  u32 next = load(number);
  while (at < stop) {
    const u32 codewords = next;
    next = load(number + PER_LANE * 32);
    u32 numbers[PER_LANE];  // of entries in the table
#pragma unroll
    for (int k = 0; k < PER_LANE; ++k) numbers[k] = dictionary << 8 | (codewords >> 8 * k & 255);
    if (number + PER_LANE > end) {  // seldom
#pragma unroll
      for (int k = 0; k < PER_LANE; ++k) {
        while (number + k >= end && dictionary < LATTICE_DICTIONARIES - 1)
          end = shared_load<u32>(ends + 4 * ++dictionary);
        numbers[k] = dictionary << 8 | (codewords >> 8 * k & 255);
      }
    }
    Pair32 entries[PER_LANE];
    u32 sum = 0;
#pragma unroll
    for (int k = 0; k < PER_LANE; ++k) {
      entries[k] = table.look_up(numbers[k]);
      sum += entries[k].x & 255;
    }
    const u32 through = inclusive_scan<32>(sum);
    const u32 before = through - sum;
    int here = at + static_cast<int>(before);
    u32 inside = 0, inside_bits = 0;  // entries that end within the wanted bits
#pragma unroll
    for (int k = 0; k < PER_LANE; ++k) {
      const u32 low = entries[k].x, high = here < stop ? entries[k].y : 0;
      visit(here + static_cast<int>(low >> 8 & 255),
            here < stop ? __funnelshift_r(low, high, 16) : 0, high >> 16);
      here += static_cast<int>(low & 255);
      if (here <= stop) {
        ++inside;
        inside_bits += low & 255;
      }
    }
    // The first lane with an entry that ends behind the wanted bits has the next codeword.
    const u32 crossing = __ballot_sync(ALL_LANES, inside < PER_LANE);
    const int last = crossing ? __ffs(crossing) - 1 : 31;
    at += static_cast<int>(__shfl_sync(ALL_LANES, before + inside_bits, last));
    cursor.number += __shfl_sync(ALL_LANES, PER_LANE * lane + inside, last);
    number += PER_LANE * 32;
    if (crossing) break;
  }
  cursor.skip = static_cast<u32>(stop - at);
}

// Puts a string's bits into zeroed words at a shared address; what lies outside of them is left out.
struct BitScatter {
  u32 target, num_words;

  QMOE_DEVICE_MEMBER void operator()(int place, u32 low, u32 high) const {
    const int word = place >> 5;
    const u32 shift = place & 31;
    put(word, low << shift);
    put(word + 1, __funnelshift_l(low, high, shift));
    const u32 third = high >> 1 >> (31 - shift);
    if (third != 0) put(word + 2, third);
  }
  // Without a branch, as few are outside: these go to the string's last word, which nobody reads.
  QMOE_DEVICE_MEMBER void put(int word, u32 bits) const {
    const u32 place = static_cast<u32>(word) < num_words ? word : STRING_WORDS - 1;
    shared_or(target + 4 * place, bits);
  }
};

// Counts the ones of a string.
struct BitCounter {
  int stop;
  u32 ones = 0;

  QMOE_DEVICE_MEMBER void operator()(int place, u32 low, u32 high) {
    u64 mask = low | static_cast<u64>(high) << 32;
    if (place < 0) {
      mask = place > -48 ? mask >> -place : 0;
      place = 0;
    }
    const int left = stop - place;
    if (left < 48) mask &= left > 0 ? (1ull << left) - 1 : 0;
    ones += __popcll(mask);
  }
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
  for (; mask != 0; mask &= mask - 1, bits >>= 1)
    if (bits & 1) dealt |= mask & (0u - mask);
  return dealt;
}

// The firsts of a column's groups: flags in bits 0 to 3, the first row of each group that has one in
// the three bits from 4 + 3 * group on.
struct GroupedColumn {
  u32 packed;

  // `fields`: the firsts from the column's on.
  static QMOE_DEVICE_MEMBER GroupedColumn of(u32 flags, u32 fields) {
    u32 packed = flags;
#pragma unroll
    for (int group = 0; group < 4; ++group)
      if (flags >> group & 1) {
        packed |= (fields & 7) << (4 + 3 * group);
        fields >>= 3;
      }
    return {packed};
  }
  QMOE_DEVICE_MEMBER u32 rests() const {
    u32 sum = 0;
#pragma unroll
    for (int group = 0; group < 4; ++group)
      if (packed >> group & 1) sum += 7 - (packed >> (4 + 3 * group) & 7);
    return sum;
  }
  // Which of 32 rows are not zero. `bits`: the rests from the column's on.
  QMOE_DEVICE_MEMBER u32 rows(u32 bits) const {
    u32 word = 0;
#pragma unroll
    for (int group = 0; group < 4; ++group)
      if (packed >> group & 1) {
        const u32 first = packed >> (4 + 3 * group) & 7;
        const u32 rest = bits & ((1u << (7 - first)) - 1);
        word |= (1 | rest << 1) << (first + 8 * group);
        bits >>= 7 - first;
      }
    return word;
  }
};

// 32 bits of the firsts, from field `number` on.
QMOE_DEVICE u32 firsts_from(const LatticeExpert& expert, u32 begin, u32 number) {
  const u64 bit = 8ull * begin + 3ull * number;
  return expert.bits(static_cast<u32>(bit >> 5), static_cast<u32>(bit));
}

// --- A task ---

// Shared memory of a warp: five strings, and 64 words for a visitor.
constexpr u32 STRING_BYTES = 4 * STRING_WORDS;
constexpr u32 LATTICE_WARP_BYTES = 5 * STRING_BYTES + 4 * 64;

// A block's part of 32 columns, one a lane; words have a bit for each row.
struct LatticeColumns {
  u32 first;       // number of lane 0's column in the task; a multiple of 32
  u32 count;       // how many of the 32 there are
  u32 nonzero_at;  // shared address of the words `nonzero` of all 32
  u32 nonzero;
  u32 negative;    // among these, before leans
  u32 large;       // of magnitude 2 and more
  u32 third;       // of 3 and more
  u32 fourth;      // of 4 and more
  u32 remainder;   // byte of the expert with the first one's magnitude less 4
  bool any_third;  // in any lane
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
// __syncwarp after each. All lanes of a warp; `scratch` is its own.
template <class Table, class Visitor>
QMOE_DEVICE void decode_task(const LatticeArrays& arrays, const LatticeExpert& expert,
                             const Shape& shape, const Table& table, u32 ends, u32 scratch,
                             u32 block, u32 number, Visitor& visitor) {
  const u32 lane = lane_of_warp();
  const u32 nonzero_at = scratch, signs_at = nonzero_at + STRING_BYTES;
  const u32 large_at = signs_at + STRING_BYTES, third_at = large_at + STRING_BYTES;
  const u32 fourth_at = third_at + STRING_BYTES;
  const LatticeTask task(expert, number);
  const u64 own = (static_cast<u64>(expert.index) * lattice_blocks(shape) + block);
  const u32* const of_block = arrays.cursors + own * (1 + most_lattice_tasks(shape)) * CURSOR_WORDS;
  const LatticeStarts starts = *reinterpret_cast<const LatticeStarts*>(of_block);
  const LatticeTaskCursors stored =
      *reinterpret_cast<const LatticeTaskCursors*>(of_block + (1 + number) * CURSOR_WORDS);
  const u32 flags_begin = static_cast<u32>(arrays.row_block_starts[own]);
  LatticeCursor places = LatticeCursor::of(stored.places), rests = LatticeCursor::of(stored.rests);
  LatticeCursor second = LatticeCursor::of(stored.plane_2), signs = LatticeCursor::of(stored.signs);
  LatticeCursor third = LatticeCursor::of(stored.plane_3), fourth = LatticeCursor::of(stored.plane_4);
  u32 firsts = stored.firsts, remainder = starts.remainders + stored.remainders;
  const auto ends_of = [&](u32 string) { return ends + 4 * LATTICE_DICTIONARIES * string; };
  const auto clear = [&](u32 address, u32 bytes) {
    for (u32 at = 16 * lane; at < bytes; at += 16 * 32)
      shared_store<Quad32>(address + at, Quad32{0, 0, 0, 0});
  };

  for (u32 begin = 0; begin < task.columns; begin += LATTICE_CHUNK) {
    const u32 columns = min_of(task.columns - begin, LATTICE_CHUNK);
    clear(scratch, 5 * STRING_BYTES);
    __syncwarp();
    if (task.grouped) {
      BitScatter flags = {large_at, (columns + 7) / 8};
      read_string<1>(expert, table, ends_of(FLAGS), flags_begin, places, 4 * columns, flags);
      __syncwarp();
      u32 num_rests = 0;
      for (u32 first = 0; first < columns; first += 32) {
        const u32 column = first + lane;
        u32 own_flags = shared_load<u32>(large_at + column / 8 * 4) >> 4 * (column & 7) & 15;
        if (column >= columns) own_flags = 0;
        const u32 count = __popc(own_flags), through = inclusive_scan<32>(count);
        const GroupedColumn found = GroupedColumn::of(
            own_flags, firsts_from(expert, starts.firsts, firsts + through - count));
        shared_store<u32>(nonzero_at + 4 * column, found.packed);
        num_rests += found.rests();
        firsts += __shfl_sync(ALL_LANES, through, 31);
      }
      num_rests = warp_total(num_rests);
      BitScatter bits = {signs_at, (num_rests + 31) / 32};
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
      __syncwarp();
      clear(signs_at, 2 * STRING_BYTES);
    } else {
      BitScatter bits = {nonzero_at, columns};
      read_string<4>(expert, table, ends_of(PLANE_1), starts.plane_1, places, 32 * columns, bits);
    }
    __syncwarp();
    const u32 ones = count_ones(nonzero_at, 32 * columns);
    BitScatter sign_bits = {signs_at, (ones + 31) / 32}, large_bits = {large_at, (ones + 31) / 32};
    read_string<4>(expert, table, ends_of(SIGNS), starts.signs, signs, ones, sign_bits);
    read_string<1>(expert, table, ends_of(PLANE_2), starts.plane_2, second, ones, large_bits);
    __syncwarp();
    const u32 num_large = count_ones(large_at, ones);
    u32 num_third = 0;
    if (num_large != 0) {
      BitScatter bits = {third_at, (num_large + 31) / 32};
      read_string<1>(expert, table, ends_of(PLANE_3), starts.plane_3, third, num_large, bits);
      __syncwarp();
      num_third = count_ones(third_at, num_large);
      if (num_third != 0) {
        BitScatter more = {fourth_at, (num_third + 31) / 32};
        read_string<1>(expert, table, ends_of(PLANE_4), starts.plane_4, fourth, num_third, more);
        __syncwarp();
      }
    }

    u32 rank = 0, large_rank = 0, third_rank = 0;  // of the next 32 columns' first weights
    for (u32 first = 0; first < columns; first += 32) {
      LatticeColumns found;
      found.first = begin + first;
      found.count = min_of(columns - first, 32u);
      found.nonzero_at = nonzero_at + 4 * first;
      found.nonzero = shared_load<u32>(found.nonzero_at + 4 * lane);
      u32 count = __popc(found.nonzero), through = inclusive_scan<32>(count);
      u32 sign_window = window_at(signs_at, rank + through - count);
      u32 large_window = window_at(large_at, rank + through - count);
      rank += __shfl_sync(ALL_LANES, through, 31);
      found.negative = found.large = found.third = found.fourth = 0;
      for (u32 mask = found.nonzero; mask != 0; mask &= mask - 1) {
        const u32 lowest = mask & (0u - mask);
        if (sign_window & 1) found.negative |= lowest;
        if (large_window & 1) found.large |= lowest;
        sign_window >>= 1;
        large_window >>= 1;
      }
      found.remainder = remainder;
      found.any_third = false;
      if (num_third != 0) {
        count = __popc(found.large);
        through = inclusive_scan<32>(count);
        found.third = deal(found.large, window_at(third_at, large_rank + through - count));
        large_rank += __shfl_sync(ALL_LANES, through, 31);
        found.any_third = __any_sync(ALL_LANES, found.third != 0);
        if (found.any_third) {
          count = __popc(found.third);
          through = inclusive_scan<32>(count);
          found.fourth = deal(found.third, window_at(fourth_at, third_rank + through - count));
          third_rank += __shfl_sync(ALL_LANES, through, 31);
          count = __popc(found.fourth);
          through = inclusive_scan<32>(count);
          found.remainder = remainder + through - count;
          remainder += __shfl_sync(ALL_LANES, through, 31);
        }
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
  u32 left = __ballot_sync(ALL_LANES, found.third != 0);
  for (; left != 0; left &= left - 1) {
    const int column = __ffs(left) - 1;
    const u32 third = __shfl_sync(ALL_LANES, found.third, column);
    const u32 fourth = __shfl_sync(ALL_LANES, found.fourth, column);
    const u32 negative = __shfl_sync(ALL_LANES, found.negative, column);
    const u32 remainder = __shfl_sync(ALL_LANES, found.remainder, column);
    u32 magnitude = third >> lane & 1 ? 3 : 0;
    if (fourth >> lane & 1)
      magnitude = 4 + expert.byte(remainder + __popc(fourth & ((1u << lane) - 1)));
    visit(column, negative >> lane & 1, magnitude);
  }
}

}  // namespace qmoe
