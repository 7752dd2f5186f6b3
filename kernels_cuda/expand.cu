// Codes of chosen experts to dense bfloat16 [n, out, in]. README.md in this folder has launch
// sizes; the arguments are explained at their structs.
//
// A warp takes a row. In a round its lanes scatter their non-zero weights into a ring of 2048 columns in
// shared memory; then the warp writes the finished columns, 16 bytes a lane, and clears them. Rows as
// they are stored, [out, in], are what this writes without a transposition; matrix products take it
// as well as [in, out] (the contracted axis last on both sides).
//
// Of "lattice" a block of threads takes 32 rows at a time, whose columns lie in any order: their words are
// put into their places for 3072 columns, then written.
#include "coding_lattice.cuh"
#include "coding_packed2.cuh"
#include "coding_qmoe.cuh"
#include "coding_tunstall.cuh"

using namespace qmoe;

namespace qmoe {

// A round of 32 one-byte codewords covers at most 32 * 58 = 1856 columns, and up to 7 wait.
constexpr u32 RING_COLUMNS = 2048;
constexpr u32 RING_BYTES = 2 * RING_COLUMNS;

// What every expansion kernel takes behind its coding's arrays.
struct ExpandArguments {
  const int* expert_ids;  // int32 [num_slots]: which experts; an id that is negative, or num_experts
                          // and more, is skipped
  u16* dense;             // bfloat16 [num_slots, out_features, in_features]; written wholly but for
                          // skipped slots
  int num_slots;          // at most 65535
  int num_experts;        // at least 1
  int out_features;       // at least 1: rows of an expert
  int in_features;        // at least 1: weights in a row
  int rows_per_block;     // at least 1
  int zero_skipped;       // 1: a skipped slot is filled with zeros; 0: it is left as it is
};

// The visitor of a walk.
struct RowWriter {
  static constexpr u32 origin = 0;  // columns are counted from 0
  u32 ring;       // address in shared memory
  u16* row;       // where the row goes
  u32 columns;    // of the row
  u32 written;    // columns that are written and cleared
  u32 fill;       // two weights of what has no code
  bool aligned;   // rows begin at multiples of 16 bytes

  QMOE_DEVICE_MEMBER void clear_all() {
    for (u32 at = 16 * lane_of_warp(); at < RING_BYTES; at += 16 * 32)
      shared_store<Quad32>(ring + at, Quad32{fill, fill, fill, fill});
    __syncwarp();
  }
  QMOE_DEVICE_MEMBER void add(bool present, u32 column4, float weight) {
    if (present && column4 < 4 * columns)
      shared_store<u16>(ring + (column4 / 2 & RING_BYTES - 1), static_cast<u16>(to_bf16(weight)));
  }
  QMOE_DEVICE_MEMBER void end_round(u32 done) {
    __syncwarp();
    flush(done < columns ? done & ~7u : columns);
    __syncwarp();
  }
  // Writes and clears the columns before `stop`; behind what was visited there is only fill.
  QMOE_DEVICE_MEMBER void flush(u32 stop) {
    if (aligned) {
      for (u32 column = written + 8 * lane_of_warp(); column < stop; column += 8 * 32) {
        const u32 at = ring + (2 * column & RING_BYTES - 1);
        *reinterpret_cast<Quad32*>(row + column) = shared_load<Quad32>(at);
        shared_store<Quad32>(at, Quad32{fill, fill, fill, fill});
      }
    } else {
      for (u32 column = written + lane_of_warp(); column < stop; column += 32) {
        const u32 at = ring + (2 * column & RING_BYTES - 1);
        row[column] = shared_load<u16>(at);
        shared_store<u16>(at, static_cast<u16>(fill));
      }
    }
    written = stop > written ? stop : written;
  }
};

// Block (chunk, slot): rows of the chunk of expert expert_ids[slot].
template <class Coding>
QMOE_DEVICE void expand(Coding coding, const ExpandArguments& expansion) {
  const Shape shape = {expansion.num_experts, expansion.out_features, expansion.in_features};
  const int row_begin = blockIdx.x * expansion.rows_per_block;
  const int row_end = min_of(row_begin + expansion.rows_per_block, shape.out_features);
  const int slot = blockIdx.y;
  if (row_begin >= shape.out_features || slot >= expansion.num_slots) return;
  const u64 in_features = shape.in_features;
  u16* const matrix =
      expansion.dense + static_cast<u64>(slot) * shape.out_features * in_features;

  const int expert = expansion.expert_ids[slot];
  if (static_cast<u32>(expert) >= static_cast<u32>(shape.num_experts)) {
    if (!expansion.zero_skipped) return;
    for (u64 at = row_begin * in_features + threadIdx.x; at < row_end * in_features;
         at += blockDim.x)
      matrix[at] = 0;
    return;
  }
  coding.open(shape, expert, shared_begin(), 1);
  RowWriter writer;
  writer.ring = shared_begin() + Coding::SHARED_BYTES + RING_BYTES * warp_of_block();
  writer.columns = shape.in_features;
  writer.aligned = in_features % 8 == 0 && reinterpret_cast<u64>(expansion.dense) % 16 == 0;
  writer.fill = 0;
  writer.clear_all();
  __syncthreads();

  for (int row = row_begin + warp_of_block(); row < row_end; row += warps_of_block()) {
    coding.seek(shape, expert, row);
    const u32 fill = to_bf16(coding.base) * 0x10001u;
    writer.row = matrix + row * in_features;
    writer.written = 0;
    if (fill != writer.fill) {
      writer.fill = fill;
      writer.clear_all();
    }
    coding.template walk<false>(shape, writer);
    writer.flush(writer.columns);  // what a damaged row leaves out
    __syncwarp();
  }
}

// --- "lattice" ---

// Columns whose words lie in shared memory at a time; those behind are decoded again.
constexpr u32 SEGMENT_COLUMNS = 3072;
constexpr u32 SEGMENT_BYTES = 3 * 4 * SEGMENT_COLUMNS;

// The visitor of a task that puts words into their columns' places.
struct WordPlacer {
  const u32* visits;  // the task's first
  u32 segment;        // address
  u32 begin, end;     // columns of the segment
  bool any_third;

  QMOE_DEVICE_MEMBER void visit(const LatticeColumns& found) {
    const u32 lane = lane_of_warp();
    any_third |= found.any_third;
    if (lane >= found.count) return;
    const u32 column = __ldg(visits + found.first + lane) >> 1 & 0x7fffff;
    if (column < begin || column >= end) return;
    const u32 at = segment + 4 * (column - begin);
    shared_store<u32>(at, found.nonzero);
    shared_store<u32>(at + 4 * SEGMENT_COLUMNS, deal(found.nonzero, found.signs));
    shared_store<u32>(at + 8 * SEGMENT_COLUMNS, deal(found.nonzero, found.large));
  }
};

// What leans make of the sign of a weight.
QMOE_DEVICE u32 lattice_lean(const LatticeArrays& arrays, const LatticeExpert& expert,
                             const Shape& shape, u32 row, u32 column) {
  return expert.lean(arrays, shape, shape.out_features < shape.in_features ? row : column);
}

// The visitor that writes weights of magnitude 3 and more over what is there.
struct ThirdWriter {
  const LatticeArrays& arrays;
  const LatticeExpert& expert;
  const Shape& shape;
  const u32* visits;
  u16* matrix;
  u32 row;            // of this lane
  u32 begin, end;     // columns of the segment

  QMOE_DEVICE_MEMBER void visit(const LatticeColumns& found) {
    visit_thirds(expert, found, [&](int number, u32 is_negative, u32 magnitude) {
      const u32 visit = __ldg(visits + found.first + number), column = visit >> 1 & 0x7fffff;
      if (magnitude == 0 || row >= static_cast<u32>(shape.out_features)) return;
      if (column < begin || column >= end) return;
      const u32 is_minus = is_negative ^ lattice_lean(arrays, expert, shape, row, column);
      const float multiple = static_cast<float>(magnitude);
      matrix[static_cast<u64>(row) * shape.in_features + column] = static_cast<u16>(
          to_bf16((is_minus ? -multiple : multiple) * expert.step(arrays, visit >> 24)));
    });
  }
};

// Writes eight columns, or what there is of them, of 32 rows.
QMOE_DEVICE void write_columns(const LatticeArrays& arrays, const LatticeExpert& expert,
                               const Shape& shape, u32 segment, u32 begin, u32 column, u32 end,
                               u32 first_row, u32 last_row, u16* matrix, bool aligned) {
  u32 nonzero[8], negative[8], large[8];
  float steps[8];
  const bool by_row = shape.out_features < shape.in_features;
#pragma unroll
  for (u32 k = 0; k < 8; ++k) {
    const bool present = column + k < end;
    const u32 at = segment + 4 * (column + k - begin);
    nonzero[k] = present ? shared_load<u32>(at) : 0;
    negative[k] = present ? shared_load<u32>(at + 4 * SEGMENT_COLUMNS) : 0;
    large[k] = present ? shared_load<u32>(at + 8 * SEGMENT_COLUMNS) : 0;
    const u64 first = static_cast<u64>(expert.index) * shape.in_features;
    const u32 byte = present ? arrays.columns[first + column + k] : ZERO_COLUMN;
    steps[k] = expert.step(arrays, byte);
    if (present && !by_row && expert.lean(arrays, shape, column + k)) negative[k] = ~negative[k];
  }
  for (u32 row = first_row; row < last_row; ++row) {
    const u32 bit = row & 31;
    const u32 lean = by_row ? expert.lean(arrays, shape, row) : 0;
    u32 weights[8];
#pragma unroll
    for (u32 k = 0; k < 8; ++k) {
      const u32 multiple = 0x3f800000u + ((large[k] >> bit & 1) << 23) |
                           (negative[k] >> bit & 1 ^ lean) << 31;
      weights[k] =
          nonzero[k] >> bit & 1 ? to_bf16(__uint_as_float(multiple) * steps[k]) : 0;
    }
    u16* const target = matrix + static_cast<u64>(row) * shape.in_features + column;
    if (aligned) {
      *reinterpret_cast<Quad32*>(target) =
          Quad32{weights[0] | weights[1] << 16, weights[2] | weights[3] << 16,
                 weights[4] | weights[5] << 16, weights[6] | weights[7] << 16};
    } else {
#pragma unroll
      for (u32 k = 0; k < 8; ++k)
        if (column + k < end) target[k] = static_cast<u16>(weights[k]);
    }
  }
}

QMOE_DEVICE void expand_blocks(const LatticeArrays& arrays, const ExpandArguments& expansion) {
  const Shape shape = {expansion.num_experts, expansion.out_features, expansion.in_features};
  const int rows = (expansion.rows_per_block + ROW_BLOCK - 1) / ROW_BLOCK * ROW_BLOCK;
  const int row_begin = blockIdx.x * rows;
  const int row_end = min_of(row_begin + rows, shape.out_features);
  const int slot = blockIdx.y;
  if (row_begin >= shape.out_features || slot >= expansion.num_slots) return;
  const u64 in_features = shape.in_features;
  u16* const matrix =
      expansion.dense + static_cast<u64>(slot) * shape.out_features * in_features;
  const int index = expansion.expert_ids[slot];
  if (static_cast<u32>(index) >= static_cast<u32>(shape.num_experts)) {
    if (!expansion.zero_skipped) return;
    for (u64 at = row_begin * in_features + threadIdx.x; at < row_end * in_features;
         at += blockDim.x)
      matrix[at] = 0;
    return;
  }
  const LatticeExpert expert(arrays, shape, index);
  const LatticeDictionary dictionary = stage_lattice(arrays.table, shared_begin(), 1);
  const u32 ends = shared_begin() + LATTICE_DICTIONARY_BYTES;
  stage_lattice_ends(arrays, index, ends);
  const u32 segment = ends + LATTICE_ENDS_BYTES;
  const u32 scratch = segment + SEGMENT_BYTES + warp_of_block() * LATTICE_WARP_BYTES;
  const bool aligned = in_features % 8 == 0 && reinterpret_cast<u64>(expansion.dense) % 16 == 0;
  const u32* const visits = expert.visits(arrays, shape) + 1;
  const u32 tasks = expert.tasks();

  for (int first_row = row_begin; first_row < row_end; first_row += ROW_BLOCK) {
    const int last_row = min_of(first_row + ROW_BLOCK, row_end);
    for (u32 begin = 0; begin < in_features; begin += SEGMENT_COLUMNS) {
      const u32 end = min_of(begin + SEGMENT_COLUMNS, static_cast<u32>(in_features));
      for (u32 at = 16 * threadIdx.x; at < SEGMENT_BYTES; at += 16 * blockDim.x)
        shared_store<Quad32>(segment + at, Quad32{0, 0, 0, 0});
      __syncthreads();
      WordPlacer placer = {visits, segment, begin, end, false};
      for (u32 task = warp_of_block(); task < tasks; task += warps_of_block()) {
        placer.visits = visits + LatticeTask(expert, task).first;
        decode_task(arrays, expert, shape, dictionary, ends, scratch, first_row / ROW_BLOCK, task,
                    placer);
      }
      __syncthreads();
      // Eight columns a lane, a quarter of the rows a warp at a time.
      const u32 parts = 4 * ((end - begin + 255) / 256);
      for (u32 part = warp_of_block(); part < parts; part += warps_of_block()) {
        const u32 column = begin + 256 * (part / 4) + 8 * lane_of_warp();
        const u32 row = first_row + 8 * (part % 4);
        if (column < end)
          write_columns(arrays, expert, shape, segment, begin, column, end, row,
                        min_of(row + 8, static_cast<u32>(last_row)), matrix, aligned);
      }
      __syncthreads();
      if (!placer.any_third) continue;
      ThirdWriter writer = {arrays, expert, shape, visits, matrix,
                            static_cast<u32>(first_row + lane_of_warp()), begin, end};
      for (u32 task = warp_of_block(); task < tasks; task += warps_of_block()) {
        writer.visits = visits + LatticeTask(expert, task).first;
        decode_task(arrays, expert, shape, dictionary, ends, scratch, first_row / ROW_BLOCK, task,
                    writer);
      }
    }
  }
}

}  // namespace qmoe

extern "C" __global__ void __launch_bounds__(256)
    expand_tunstall(const TunstallArrays arrays, const ExpandArguments expansion) {
  expand(TunstallCoding<32, 1, false>(arrays), expansion);
}

extern "C" __global__ void __launch_bounds__(256)
    expand_tunstall_2bit(const TunstallArrays arrays, const ExpandArguments expansion) {
  expand(TunstallCoding<32, 1, true>(arrays), expansion);
}

extern "C" __global__ void __launch_bounds__(256)
    expand_qmoe(const QmoeArrays arrays, const ExpandArguments expansion) {
  expand(QmoeCoding(arrays), expansion);
}

extern "C" __global__ void __launch_bounds__(256)
    expand_packed2(const Packed2Arrays arrays, const ExpandArguments expansion) {
  expand(Packed2Coding(arrays), expansion);
}

extern "C" __global__ void __launch_bounds__(256)
    expand_lattice(const LatticeArrays arrays, const ExpandArguments expansion) {
  expand_blocks(arrays, expansion);
}
