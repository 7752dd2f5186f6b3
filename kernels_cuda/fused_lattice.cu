// Compressed experts times their tokens, coding "lattice": one launch for all (expert, tokens) pairs of
// a layer; one expert is the same with all tokens in it. README.md in this folder has launch sizes;
// the arguments are explained at their structs.
//
// A block of threads takes some blocks of 32 rows of one expert. Tokens times the columns' steps lie in
// shared memory, in the order in which columns are visited, each as three bfloat16 numbers whose sum it
// is. The tasks of the rows (coding_lattice.cuh) are dealt to the warps, each a range of those that
// follow one another. A warp makes a matrix of 32 rows and 32 columns at a time and multiplies it by
// tensor cores (lattice_products.cuh). It keeps its sums while it stays in a block of rows; then they are
// added up over warps, in order: no atomics, and one order for a number of threads.
//
// Shared memory, by bytes:
//   32768 * copies                dictionaries
//   448 + 64                      where dictionaries end in strings; rows of the tokens in x and y
//   warps * 4960                  what warps decode
//   (warps + 4) * 128 * tile      sums of warps, of at most 8 tokens
//   (in + 64) * 6 * tile          tokens, likewise
#include "lattice_products.cuh"
#include "multiply.cuh"

using namespace qmoe;

namespace qmoe {

// Blocks of rows whose sums are kept at a time.
constexpr int ROW_BLOCKS = 4;

// Tokens times half their steps, visited columns in order; zeros where 32 at a time are read beyond the
// last.
template <int TOKENS>
QMOE_DEVICE void stage_visited(const LatticeArrays& arrays, const LatticeExpert& expert,
                               const Shape& shape, const u16* const (&own)[TOKENS], u32 x_at) {
  using Panel = LatticePanel<TOKENS>;
  constexpr int AHEAD = TOKENS >= 4 ? 1 : 4 / TOKENS;
  const u32* const visits = expert.visits(arrays, shape) + 1;
  const u32 gap = 31 & -expert.grouped;  // what others begin at is a multiple of 32
  const u32 threads = blockDim.x;
  for (u32 first = threadIdx.x; first < expert.visited; first += AHEAD * threads) {
    float steps[AHEAD];
    u32 bits[AHEAD][TOKENS];
#pragma unroll
    for (int a = 0; a < AHEAD; ++a) {
      const u32 place = first + a * threads;
      const u32 visit = place < expert.visited ? __ldg(visits + place) : 0;
      const u32 column = min_of(visit >> 1 & 0x7fffff, static_cast<u32>(shape.in_features) - 1);
      steps[a] = half_step(arrays, expert, visit);
#pragma unroll
      for (int t = 0; t < TOKENS; ++t) bits[a][t] = own[t] ? own[t][column] : 0;
    }
#pragma unroll
    for (int a = 0; a < AHEAD; ++a) {
      const u32 place = first + a * threads;
      if (place >= expert.visited) break;
      const u32 at = Panel::column(x_at, place + (place < expert.grouped ? 0 : gap));
#pragma unroll
      for (int t = 0; t < TOKENS; ++t) Panel::store(at, t, from_bf16(bits[a][t]) * steps[a]);
    }
  }
  const u32 end = expert.visited + gap, beyond = gap + (31 & -end);
  for (u32 at = threadIdx.x; at < beyond; at += threads)
    for (int t = 0; t < TOKENS; ++t)
      Panel::store(Panel::column(x_at, at < gap ? expert.grouped + at : end + at - gap), t, 0);
}

template <int TOKENS>
QMOE_DEVICE void multiply_lattice_tile(const LatticeArrays& arrays, const Shape& shape,
                                       const ProductArguments& product, const Tile& tile) {
  const int warp = warp_of_block(), warps = warps_of_block();
  const u32 ends = shared_begin() + LATTICE_DICTIONARY_BYTES * product.dictionary_copies;
  const u32 rows_at = ends + LATTICE_ENDS_BYTES;
  const u32 scratch = rows_at + 4 * MAX_TILE_TOKENS;
  const u32 sums_at = scratch + warps * LATTICE_WARP_BYTES;
  const u32 x_at = sums_at + 128 * TOKENS * (warps + ROW_BLOCKS);
  const LatticeExpert expert(arrays, shape, tile.expert);

  const LatticeDictionary dictionary =
      stage_lattice(arrays.table, shared_begin(), product.dictionary_copies);
  stage_lattice_ends(arrays, tile.expert, ends);
  const u16* own[TOKENS];
#pragma unroll
  for (int t = 0; t < TOKENS; ++t) {
    const int row = t < tile.num_tokens ? product.token_order[tile.first_token + t] : -1;
    own[t] = static_cast<u32>(row) < static_cast<u32>(product.num_tokens)
                 ? product.x + static_cast<u64>(row) * shape.in_features
                 : nullptr;
    if (threadIdx.x == t) shared_store<int>(rows_at + 4 * t, own[t] ? row : -1);
  }
  stage_visited<TOKENS>(arrays, expert, shape, own, x_at);
  __syncthreads();

  const u32 own_scratch = scratch + warp * LATTICE_WARP_BYTES;
  LatticeProducts<TOKENS, false> visitor(expert, own_scratch + VISITOR_AT);
  const int of_block = static_cast<int>(expert.tasks());
  // Warp w has the tasks from w * tasks / warps on. It and the block of rows only rise, so that their
  // sum is a place of its own.
  for (int begin = tile.row_begin; begin < tile.row_end; begin += ROW_BLOCKS * ROW_BLOCK) {
    const int blocks =
        min_of((tile.row_end - begin + ROW_BLOCK - 1) / ROW_BLOCK, ROW_BLOCKS);
    const int tasks = blocks * of_block;
    const auto first_of = [&](int w) {
      return static_cast<int>(static_cast<u64>(w) * tasks / warps);
    };
    const int stop = first_of(warp + 1);
    for (int task = first_of(warp); task < stop; ++task) {
      const int block = task / of_block, number = task % of_block;
      const LatticeTask place(expert, number);
      const u32 gap = place.grouped ? 0 : 31 & -expert.grouped;
      visitor.columns = LatticePanel<TOKENS>::column(x_at, place.first + gap);
      decode_task(arrays, expert, shape, dictionary, ends, own_scratch, begin / ROW_BLOCK + block,
                  number, visitor);
      if (task + 1 == stop || number + 1 == of_block)
        visitor.flush(sums_at + 128 * TOKENS * (block + warp));
    }
    __syncthreads();
    for (int at = threadIdx.x; at < ROW_BLOCK * blocks * tile.num_tokens; at += blockDim.x) {
      const int t = at / (ROW_BLOCK * blocks), row = at % (ROW_BLOCK * blocks);
      const int block = row / ROW_BLOCK;
      float sum = 0;
      for (int w = 0; w < warps; ++w) {
        const int first = first_of(w), last = first_of(w + 1);
        if (first < last && first < (block + 1) * of_block && last > block * of_block)
          sum += shared_load<float>(sums_at + 128 * (TOKENS * (block + w) + t) +
                                    4 * (row % ROW_BLOCK));
      }
      const int token = shared_load<int>(rows_at + 4 * t);
      if (token < 0 || begin + row >= tile.row_end) continue;
      if (shape.out_features < shape.in_features && expert.lean(arrays, shape, begin + row))
        sum = -sum;
      store_output(product, static_cast<u64>(token) * shape.out_features + begin + row, sum);
    }
    __syncthreads();
  }
}

// Block (p, chunk), as `multiply` of multiply.cuh, whose machine code is better without a call of its own.
template <int MAX_TOKENS>
QMOE_DEVICE void multiply_lattice(const LatticeArrays& arrays, const ProductArguments& product) {
  const Shape shape = {product.num_experts, product.out_features, product.in_features};
  const int rows = (product.rows_per_block + ROW_BLOCK - 1) / ROW_BLOCK * ROW_BLOCK;
  const int row_begin = blockIdx.y * rows;
  const int row_end = min_of(row_begin + rows, shape.out_features);
  const int place = blockIdx.x;
  if (row_begin >= shape.out_features || place >= product.num_tokens) return;

  const int expert = product.token_experts[place];
  if (static_cast<u32>(expert) >= static_cast<u32>(shape.num_experts)) {
    const int token = product.token_order[place];
    if (static_cast<u32>(token) >= static_cast<u32>(product.num_tokens)) return;
    for (int row = row_begin + threadIdx.x; row < row_end; row += blockDim.x)
      store_output(product, static_cast<u64>(token) * shape.out_features + row, 0);
    return;
  }
  const int start = product.expert_starts[expert];
  const int stop = min_of(product.expert_starts[expert + 1], product.num_tokens);
  if (start < 0 || place < start || (place - start) % product.tile_tokens != 0) return;
  const int count = min_of(min_of(product.tile_tokens, stop - place), MAX_TOKENS);
  if (count <= 0) return;
  const Tile tile = {expert, place, count, row_begin, row_end};
  if (count == 1) {
    multiply_lattice_tile<1>(arrays, shape, product, tile);
  } else if constexpr (MAX_TOKENS == 2) {
    multiply_lattice_tile<2>(arrays, shape, product, tile);
  } else if (count <= 4) {
    multiply_lattice_tile<4>(arrays, shape, product, tile);
  } else {  // sums of more than eight do not fit the registers
    for (int first = 0; first < count; first += 8) {
      const Tile part = {expert, place + first, min_of(count - first, 8), row_begin, row_end};
      multiply_lattice_tile<8>(arrays, shape, product, part);
    }
  }
}

}  // namespace qmoe

// Two blocks on a multiprocessor: said, so that no compiler spills registers for a third.
#define LATTICE_KERNEL(name, max_tokens)                                                          \
  extern "C" __global__ void __launch_bounds__(256, 2)                                            \
      name(const LatticeArrays arrays, const ProductArguments product) {                          \
    multiply_lattice<max_tokens>(arrays, product);                                                \
  }

LATTICE_KERNEL(fused_lattice_t2, 2)
LATTICE_KERNEL(fused_lattice_t16, 16)
