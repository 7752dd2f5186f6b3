// Products of many tokens by tensor cores, coding "lattice": y[t, row] = sum over columns of
// W_e[row, column] x[t, column].
//
// A block takes as many blocks of 32 rows of one expert as it has warps, and up to 32 of its tokens. Task by
// task (coding_lattice.cuh), all threads put the tokens of its columns into shared memory, and each warp
// decodes its rows and multiplies them (lattice_products.cuh). Sums are float32, in one fixed order.
// A weight 0 is multiplied here: an infinity or a NaN in x reaches all rows.
//
// Shared memory, by bytes:
//   32768 * copies      dictionaries
//   448 + 128           where dictionaries end in strings; rows of the tokens in x and y
//   warps * 4960        what warps decode
//   1536 * tile         tokens of 256 columns
#include "lattice_products.cuh"
#include "matmul.cuh"

using namespace qmoe;

namespace qmoe {

// Tokens of a task's columns times half their steps; zeros behind the last, where 32 at a time are read.
// All threads.
template <int TOKENS>
QMOE_DEVICE void stage_task(const LatticeArrays& arrays, const LatticeExpert& expert,
                            const Shape& shape, const MatmulArguments& product, u32 tokens_at,
                            const LatticeTask& task, u32 panel_at) {
  using Panel = LatticePanel<TOKENS>;
  constexpr u32 AT_ONCE = 8;  // tokens
  const u32* const visits = expert.visits(arrays, shape) + 1 + task.first;
  const u32 groups = (task.columns + 31) / 32;
  for (u32 part = warp_of_block(); part < groups * (TOKENS / AT_ONCE); part += warps_of_block()) {
    const u32 place = 32 * (part % groups) + lane_of_warp();
    const u32 first = AT_ONCE * (part / groups);
    const bool exists = place < task.columns;
    const u32 visit = exists ? __ldg(visits + place) : 0;
    const u32 column = min_of(visit >> 1 & 0x7fffff, static_cast<u32>(shape.in_features) - 1);
    const float step = half_step(arrays, expert, visit);
    u32 bits[AT_ONCE];
#pragma unroll
    for (u32 t = 0; t < AT_ONCE; ++t) {
      const int token = shared_load<int>(tokens_at + 4 * (first + t));
      bits[t] = token >= 0 && exists
                    ? product.x[static_cast<u64>(token) * shape.in_features + column]
                    : 0;
    }
    const u32 at = Panel::column(panel_at, place);
#pragma unroll
    for (u32 t = 0; t < AT_ONCE; ++t) Panel::store(at, first + t, from_bf16(bits[t]) * step);
  }
}

// Block (chunk of rows, tile of tokens).
template <int TOKENS>
QMOE_DEVICE void matmul_lattice(const LatticeArrays& arrays, const MatmulArguments& product) {
#if !defined(QMOE_EMULATION) && __CUDA_ARCH__ < 800
  asm volatile("trap;");  // no bfloat16 in these tensor cores: never launched
#else
  const Shape shape = {product.num_experts, product.out_features, product.in_features};
  const int row_begin = blockIdx.x * ROW_BLOCK * warps_of_block();
  const int index = product.tile_experts[blockIdx.y], first = product.tile_starts[blockIdx.y];
  if (row_begin >= shape.out_features || index < 0 || index > shape.num_experts || first < 0) return;
  const int stop = index < shape.num_experts
                       ? min_of(product.expert_starts[index + 1], product.num_tokens)
                       : product.num_tokens;
  const int count = min_of(TOKENS, stop - first);
  if (count <= 0) return;

  const u32 ends = shared_begin() + LATTICE_DICTIONARY_BYTES * product.dictionary_copies;
  const u32 tokens_at = ends + LATTICE_ENDS_BYTES;
  const u32 scratch = tokens_at + 4 * 32 + warp_of_block() * LATTICE_WARP_BYTES;
  const u32 panel_at = tokens_at + 4 * 32 + warps_of_block() * LATTICE_WARP_BYTES;
  if (threadIdx.x < TOKENS) {
    const int token = threadIdx.x < count ? product.token_order[first + threadIdx.x] : -1;
    const bool exists = static_cast<u32>(token) < static_cast<u32>(product.num_tokens);
    shared_store<int>(tokens_at + 4 * threadIdx.x, exists ? token : -1);
  }
  if (index == shape.num_experts) {
    __syncthreads();
    const int rows = min_of(ROW_BLOCK * warps_of_block(), shape.out_features - row_begin);
    for (int at = threadIdx.x; at < count * rows; at += blockDim.x) {
      const int token = shared_load<int>(tokens_at + 4 * (at / rows));
      if (token >= 0) store_product(product, token, row_begin + at % rows, 0);
    }
    return;
  }
  const LatticeExpert expert(arrays, shape, index);
  const LatticeDictionary dictionary =
      stage_lattice(arrays.table, shared_begin(), product.dictionary_copies);
  stage_lattice_ends(arrays, index, ends);

  const int own_begin = row_begin + ROW_BLOCK * warp_of_block();  // rows
  LatticeProducts<TOKENS, true> visitor(expert, scratch + VISITOR_AT);
  visitor.columns = panel_at;
  __syncthreads();
  for (u32 task = 0; task < expert.tasks(); ++task) {
    stage_task<TOKENS>(arrays, expert, shape, product, tokens_at, LatticeTask(expert, task), panel_at);
    __syncthreads();
    if (own_begin < shape.out_features)
      decode_task(arrays, expert, shape, dictionary, ends, scratch, own_begin / ROW_BLOCK, task,
                  visitor);
    __syncthreads();
  }

  const int g = lane_of_warp() / 4, q = lane_of_warp() % 4;
  const bool by_row = shape.out_features < shape.in_features;
#pragma unroll
  for (int half = 0; half < 2; ++half)
#pragma unroll
    for (int lower = 0; lower < 2; ++lower) {
      const int row = own_begin + 16 * half + 8 * lower + g;
      if (row >= shape.out_features) continue;
      const bool negative = by_row && expert.lean(arrays, shape, row);
#pragma unroll
      for (int tile = 0; tile < TOKENS / 8; ++tile)
#pragma unroll
        for (int odd = 0; odd < 2; ++odd) {
          const int token = shared_load<int>(tokens_at + 4 * (8 * tile + 2 * q + odd));
          const float sum = visitor.sums[half][tile][2 * lower + odd];
          if (token >= 0) store_product(product, token, row, negative ? -sum : sum);
        }
    }
#endif
}

}  // namespace qmoe

#define LATTICE_MATMUL(name, tokens, threads)                                                     \
  extern "C" __global__ void __launch_bounds__(threads)                                           \
      name(const LatticeArrays arrays, const MatmulArguments product) {                           \
    matmul_lattice<tokens>(arrays, product);                                                      \
  }

LATTICE_MATMUL(matmul_lattice_t8, 8, 512)
LATTICE_MATMUL(matmul_lattice_t16, 16, 512)
LATTICE_MATMUL(matmul_lattice_t32, 32, 512)
