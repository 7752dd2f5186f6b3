// Codes of chosen experts to dense bfloat16 [n, out, in]. README.md in this folder has launch
// sizes; the arguments are explained at their structs.
//
// A warp takes a row. In a round its lanes scatter their non-zero weights into a ring of 2048 columns in
// shared memory; then the warp writes the finished columns, 16 bytes a lane, and clears them. Rows as
// they are stored, [out, in], are what this writes without a transposition; matrix products take it
// as well as [in, out] (the contracted axis last on both sides).
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
