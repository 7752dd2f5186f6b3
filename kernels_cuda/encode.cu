// Codes to stored rows, byte for byte as qmoe_jax.codec.encode, and the starting points of rows and of
// bit strings that the decoders need. README.md in this folder has launch sizes and the order of calls.
#include "coding_lattice.cuh"
#include "common.cuh"

using namespace qmoe;

namespace qmoe {

constexpr int TILE_COLUMNS = 64;
// One word more than the columns, so that 32 rows lie in 32 banks.
constexpr u32 TILE_STRIDE = TILE_COLUMNS + 4;
constexpr int MAX_NODES = 255;
constexpr u32 TRIE_BYTES = 1024;  // int16 [nodes, 2], rounded up

// What both passes of the encoder of "tunstall" and "tunstall_2bit" take first. Codes must be valid.
struct EncodeArguments {
  const u8* codes;         // uint8 [num_experts, out_features, in_features]
  const u32* levels;       // bfloat16 [num_experts, out_features, 2], a row a word
  const u8* dictionaries;  // uint8 [num_experts]: number of each expert's dictionary, 0 to 9
  const short* trie;       // int16 [10, num_nodes, 2]: codec/tunstall.py, TunstallFamily
  int num_experts;         // at least 1
  int out_features;        // at least 1: rows of an expert
  int in_features;         // at least 1: weights in a row
  int num_nodes;           // of a dictionary's trie
  int escapes;             // 0: "tunstall"; 1: "tunstall_2bit"
};

// Parses one row at a time a thread; a block has blockDim.x rows of one expert and walks over their
// columns tile by tile, which all threads load together.
//
// sink.codeword(u32) and sink.sign(u32 bit) are called in the order of the row; sink.end() at its end.
template <class Sink>
QMOE_DEVICE void parse_rows(const EncodeArguments& input, Sink& sink) {
  const int out_features = input.out_features, in_features = input.in_features;
  const u32 trie_at = shared_begin(), tile_at = trie_at + TRIE_BYTES;
  const int expert = blockIdx.y;
  const int first_row = blockIdx.x * blockDim.x;
  const int row = first_row + threadIdx.x;
  const u64 first = static_cast<u64>(expert) * out_features + first_row;
  const u32 number = min_of<u32>(input.dictionaries[expert], 9);
  for (int i = threadIdx.x; i < 2 * input.num_nodes; i += blockDim.x)
    shared_store<short>(trie_at + 2 * i, input.trie[2 * input.num_nodes * number + i]);

  u32 symbols = 0b11100100;  // symbol of code c in bits 2c, 2c + 1
  if (input.escapes && row < out_features) {
    const float zero = from_bf16(input.levels[first + threadIdx.x] >> 16);
    if (zero == 1) symbols = 0b11010010;
    if (zero == 2) symbols = 0b10000111;
    if (zero == 3) symbols = 0b00011011;
  }
  int node = 0;
  u32 ones = 0, escaped = 0;  // of the entry so far
  for (int begin = 0; begin < in_features; begin += TILE_COLUMNS) {
    const int columns = min_of(TILE_COLUMNS, in_features - begin);
    __syncthreads();
    for (int at = threadIdx.x; at < static_cast<int>(blockDim.x) * TILE_COLUMNS;
         at += blockDim.x) {
      const int tile_row = at / TILE_COLUMNS, column = at % TILE_COLUMNS;
      if (first_row + tile_row < out_features && column < columns)
        shared_store<u8>(tile_at + tile_row * TILE_STRIDE + column,
                         input.codes[(first + tile_row) * in_features + begin + column]);
    }
    __syncthreads();
    if (row >= out_features) continue;
    for (int column = 0; column < columns; ++column) {
      const u32 code = shared_load<u8>(tile_at + threadIdx.x * TILE_STRIDE + column);
      const u32 symbol = symbols >> 2 * (code & 3) & 3;
      if (symbol != 0) {
        sink.sign(symbol == 2);
        if (symbol == 3) escaped |= 1u << ones;
        ++ones;
      }
      node = shared_load<short>(trie_at + 2 * (2 * node + (symbol != 0)));
      if (begin + column == in_features - 1)
        while (node > 0) node = shared_load<short>(trie_at + 2 * (2 * node));
      if (node < 0) {
        for (u32 place = 0; escaped >> place != 0; ++place)
          if (escaped >> place & 1) sink.codeword(248 + place);
        sink.codeword(-1 - node);
        node = 0;
        ones = escaped = 0;
      }
    }
  }
  if (row < out_features) sink.end();
}

struct RowCounter {
  int* num_bytes;
  int* num_codewords;
  int codewords, signs;
  QMOE_DEVICE_MEMBER void codeword(u32) { ++codewords; }
  QMOE_DEVICE_MEMBER void sign(u32) { ++signs; }
  QMOE_DEVICE_MEMBER void end() {
    *num_bytes = codewords + (signs + 7) / 8;
    *num_codewords = codewords;
  }
};

// Codewords go forwards from the row's begin, sign bytes backwards from its end.
struct ByteWriter {
  u8* front;
  u8* back;
  u8* limit;  // damaged bounds must not be left: both pointers stay within [front, limit)
  u32 pending, signs;
  QMOE_DEVICE_MEMBER void codeword(u32 value) {
    if (front < limit) *front++ = static_cast<u8>(value);
  }
  QMOE_DEVICE_MEMBER void sign(u32 bit) {
    pending |= bit << (7 - (signs & 7));
    if ((++signs & 7) == 0) put();
  }
  QMOE_DEVICE_MEMBER void end() {
    if (signs & 7) put();
  }
  QMOE_DEVICE_MEMBER void put() {
    if (back > front) *--back = static_cast<u8>(pending);
    pending = 0;
  }
};

}  // namespace qmoe

// Pass 1: bytes and codewords of each row.
extern "C" __global__ void __launch_bounds__(128)
    encode_tunstall_sizes(const EncodeArguments input,
                          int* num_bytes,       // int32 [num_experts, out_features]
                          int* num_codewords) { // int32 [num_experts, out_features]
  const u64 row = static_cast<u64>(blockIdx.y) * input.out_features + blockIdx.x * blockDim.x +
                  threadIdx.x;
  RowCounter counter = {num_bytes + row, num_codewords + row, 0, 0};
  parse_rows(input, counter);
}

// Pass 2: the rows' bytes, and zeros after an expert's last row to the end of its last word.
extern "C" __global__ void __launch_bounds__(128)
    encode_tunstall_rows(const EncodeArguments input,
                         const int* expert_offsets,  // int32 [num_experts + 1]: first word of each
                         const int* row_ends,        // int32 [num_experts, out_features]: inclusive
                                                     // scan of num_bytes within each expert
                         u8* bytes) {                // uint8 [4 * words]; every byte is written
  const int out_features = input.out_features;
  const int row = blockIdx.x * blockDim.x + threadIdx.x;
  ByteWriter writer = {nullptr, nullptr, nullptr, 0, 0};
  if (row < out_features) {
    const u64 index = static_cast<u64>(blockIdx.y) * out_features + row;
    u8* const first = bytes + 4 * static_cast<u64>(expert_offsets[blockIdx.y]);
    u8* const stop = bytes + 4 * static_cast<u64>(expert_offsets[blockIdx.y + 1]);
    writer.front = first + (row > 0 ? row_ends[index - 1] : 0);
    writer.back = writer.limit = first + row_ends[index];
    if (row == out_features - 1)
      for (u8* filler = writer.limit; filler < stop; ++filler) *filler = 0;
  }
  parse_rows(input, writer);
}

// Four 2-bit codes a byte. One thread a byte.
extern "C" __global__ void __launch_bounds__(256)
    encode_packed2(const u8* codes,    // uint8 [num_rows, in_features], valid
                   u8* packed,         // uint8 [num_rows, ceil(in_features / 4)]
                   u64 num_rows,       // of all experts
                   int in_features) {  // at least 1
  const u64 row_bytes = (in_features + 3) / 4;
  const u64 at = static_cast<u64>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (at >= num_rows * row_bytes) return;
  const u64 row = at / row_bytes;
  const int first = static_cast<int>(at % row_bytes) * 4;
  u32 value = 0;
  for (int j = 0; j < 4 && first + j < in_features; ++j)
    value |= (codes[row * in_features + first + j] & 3u) << 2 * j;
  packed[at] = static_cast<u8>(value);
}

// Once after loading: where row 32 b of each expert begins, in units (bytes of tunstall, codewords of
// qmoe) from the expert's first. A warp an expert.
extern "C" __global__ void __launch_bounds__(32)
    find_row_block_starts(const void* row_lengths,   // uint8 or uint16 [num_experts, out_features]
                          const int* shortest_rows,  // int32 [num_experts]; null for qmoe
                          int* row_block_starts,     // int32 [num_experts, ceil(out_features / 32)]
                          int out_features,          // at least 1
                          int row_length_bytes) {    // of an element of row_lengths: 1 or 2
  const int expert = blockIdx.x;
  const int blocks = (out_features + ROW_BLOCK - 1) / ROW_BLOCK;
  const int stored = shortest_rows ? shortest_rows[expert] : 0;
  const u32 shortest = stored > 0 ? stored : 0;
  u32 start = 0;
  for (int block = 0; block < blocks; ++block) {
    const int row = block * ROW_BLOCK + lane_of_warp();
    if (lane_of_warp() == 0)
      row_block_starts[static_cast<u64>(expert) * blocks + block] = static_cast<int>(start);
    const u32 length =
        row < out_features
            ? row_length(row_lengths, row_length_bytes,
                         static_cast<u64>(expert) * out_features + row, shortest)
            : 0;
    // Damaged lengths stop at 2^28, which no expert reaches (codewords: 2^31 - 1).
    start = min_of(start + __shfl_sync(ALL_LANES, inclusive_scan<32>(length), 31), 0x7fffffffu);
  }
}

// Once after loading, for "lattice": where the bit strings of a block of 32 rows begin, and where they
// stand at each of its tasks. A warp a block of rows; grid (blocks of rows, experts). Shared memory:
// LATTICE_ENDS_BYTES, and 16 bytes for each task that there may be.
extern "C" __global__ void __launch_bounds__(32)
    find_lattice_cursors(const LatticeArrays arrays,  // whose `cursors` are not read
                         u32* cursors,                // as there; every element is written
                         int num_experts,             // at least 1
                         int out_features,            // at least 1
                         int in_features) {           // at least 1
  const Shape shape = {num_experts, out_features, in_features};
  const u32 block = blockIdx.x, lane = lane_of_warp();
  const LatticeExpert expert(arrays, shape, blockIdx.y);
  const LatticeTable table = {arrays.table};
  const u32 ends = shared_begin(), tasks = expert.tasks(), most = most_lattice_tasks(shape);
  // What each task has of: flags that are 1; weights that are not 0; those of 2 and 3 and more; remainders.
  const u32 flags_at = ends + LATTICE_ENDS_BYTES, ones_at = flags_at + 4 * most;
  const u32 large_at = ones_at + 4 * most, third_at = large_at + 4 * most;
  const u32 fourth_at = flags_at;
  const u64 own = static_cast<u64>(expert.index) * lattice_blocks(shape) + block;
  u32* const of_block = cursors + own * (1 + most) * CURSOR_WORDS;
  for (u32 at = lane; at < (1 + most) * CURSOR_WORDS; at += 32) of_block[at] = 0;
  stage_lattice_ends(arrays, blockIdx.y, ends);
  __syncwarp();

  const auto put = [&](u32 entry, u32 field, u32 value) {
    if (lane == field) of_block[entry * CURSOR_WORDS + field] = value;
  };
  u32 at = static_cast<u32>(arrays.row_block_starts[own]);  // the next byte
  LatticeCursor cursor = {0, 0};
  // Reads what a task has of a string, and counts the ones.
  const auto read = [&](u32 string, u32 task, u32 field, u32 wanted) {
    put(1 + task, field, cursor.packed());
    BitCounter counter = {static_cast<int>(wanted)};
    read_string<1>(expert, table, ends + 4 * LATTICE_DICTIONARIES * string, at, cursor, wanted,
                   counter);
    return warp_total(counter.ones);
  };
  const auto keep = [&](u32 address, u32 task, u32 value) {
    if (lane == 0) shared_store<u32>(address + 4 * task, value);
  };
  // The next string: it begins behind the codewords of this one.
  const auto begin_next = [&](u32 field) {
    at += cursor.used();
    cursor = {0, 0};
    put(0, field, at);
    __syncwarp();
  };

  u32 flags = 0;  // ones among them
  for (u32 task = 0; task < expert.grouped_tasks(); ++task) {
    put(1 + task, 1, flags);
    const u32 ones = read(FLAGS, task, 0, 4 * LatticeTask(expert, task).columns);
    keep(flags_at, task, ones);
    flags += ones;
  }
  begin_next(0);
  const u32 firsts = at;
  at += (3 * flags + 7) / 8;
  put(0, 1, at);
  flags = 0;
  for (u32 task = 0; task < expert.grouped_tasks(); ++task) {
    const u32 count = shared_load<u32>(flags_at + 4 * task);
    u32 rests = 0;
    for (u32 first = lane; first < count; first += 32)
      rests += 7 - (firsts_from(expert, firsts, flags + first) & 7);
    flags += count;
    keep(ones_at, task, count + read(RESTS, task, 2, warp_total(rests)));
  }
  begin_next(2);
  for (u32 task = expert.grouped_tasks(); task < tasks; ++task)
    keep(ones_at, task, read(PLANE_1, task, 0, 32 * LatticeTask(expert, task).columns));
  begin_next(3);
  for (u32 task = 0; task < tasks; ++task)
    keep(large_at, task, read(PLANE_2, task, 3, shared_load<u32>(ones_at + 4 * task)));
  begin_next(4);
  for (u32 task = 0; task < tasks; ++task)
    keep(third_at, task, read(PLANE_3, task, 4, shared_load<u32>(large_at + 4 * task)));
  begin_next(5);
  for (u32 task = 0; task < tasks; ++task)
    keep(fourth_at, task, read(PLANE_4, task, 5, shared_load<u32>(third_at + 4 * task)));
  begin_next(6);
  for (u32 task = 0; task < tasks; ++task)
    read(SIGNS, task, 6, shared_load<u32>(ones_at + 4 * task));
  begin_next(7);
  u32 remainders = 0;
  for (u32 task = 0; task < tasks; ++task) {
    put(1 + task, 7, remainders);
    remainders += shared_load<u32>(fourth_at + 4 * task);
  }
}
