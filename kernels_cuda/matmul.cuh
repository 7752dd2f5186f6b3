// Decode times many tokens, for codings with a Cursor: y[t, row] = sum over columns of
// W_e[row, column] x[t, column], by tensor cores.
//
// A block takes 64 rows of one expert and up to 64 of its tokens. Chunk by chunk of 1024 columns, the
// rows are decoded into shared memory, one byte a weight, and multiplied there; tokens are read as
// they lie. Sums are float32, in one fixed order. A weight 0 is multiplied here: an infinity or a NaN
// in x reaches all rows.
//
// Shared memory, by bytes:
//   Coding::SHARED_BYTES * copies   dictionary
//   64 * (1024 + 64)       a chunk: [row][column], what Coding::weights makes of a byte; then sums
//   4 * 64                 what Coding::weights needs of each row
//   4 * 64                 rows of the tokens in x and y
#pragma once
#include "common.cuh"
#include "tensor_cores.cuh"

namespace qmoe {

constexpr int MATMUL_ROWS = 64;
constexpr int MATMUL_THREADS = 512;
constexpr int MATMUL_WARPS = MATMUL_THREADS / 32;
constexpr int CHUNK_COLUMNS = 1024;
// Half the banks further, so that 16-byte loads of two rows at once lie in different ones.
constexpr int CHUNK_STRIDE = CHUNK_COLUMNS + 64;
// Floats of a token's sums: 4 banks further for each token.
constexpr int SUMS_STRIDE = MATMUL_ROWS + 4;

// What every matmul kernel takes behind its coding's arrays.
struct MatmulArguments {
  const u16* x;               // bfloat16 [num_tokens, in_features]; at a multiple of 16 bytes
  const int* token_order;     // int32 [num_tokens]: row in x and y of each token, sorted by expert,
                              // those without an expert last
  const int* expert_starts;   // int32 [num_experts + 1]: first sorted token of each expert
  const int* tile_experts;    // int32 [num_tiles]: the expert of each tile; num_experts: tokens without
                              // one, which get zeros; negative: no tile
  const int* tile_starts;     // int32 [num_tiles]: its first sorted token
  void* y;                    // bfloat16 or float32 [num_tokens, out_features]; written where tiles are
  int num_experts;            // at least 1
  int out_features;           // at least 1: rows of an expert
  int in_features;            // weights in a row: a multiple of 16
  int num_tokens;             // at least 1
  int dictionary_copies;      // 1, 2, 4, 8 or 16: in shared memory
  int y_is_float32;           // 0 or 1
};

QMOE_DEVICE void store_product(const MatmulArguments& product, int token, int row, float value) {
  const u64 index = static_cast<u64>(token) * product.out_features + row;
  if (product.y_is_float32) static_cast<float*>(product.y)[index] = value;
  else static_cast<u16*>(product.y)[index] = static_cast<u16>(to_bf16(value));
}

// Block (chunk of rows, tile of tokens). TILES: eight tokens each.
template <int TILES, class Coding>
QMOE_DEVICE void matmul(Coding coding, const MatmulArguments& product) {
#if !defined(QMOE_EMULATION) && __CUDA_ARCH__ < 800
  asm volatile("trap;");  // no bfloat16 in these tensor cores: never launched
#else
  constexpr int TOKENS = 8 * TILES;
  constexpr int GROUPS = 32 / Coding::LANES;  // rows that a warp decodes at a time
  constexpr int PASSES = MATMUL_ROWS / MATMUL_WARPS / GROUPS;
  // Four warps have the rows, 16 each; the others have other tokens, or other columns.
  constexpr int TOKEN_PARTS = TILES >= 4 ? 2 : 1;
  constexpr int OWN_TILES = TILES / TOKEN_PARTS;
  constexpr int COLUMN_PARTS = MATMUL_WARPS / 4 / TOKEN_PARTS;
  const Shape shape = {product.num_experts, product.out_features, product.in_features};
  const int row_begin = blockIdx.x * MATMUL_ROWS;
  const int rows = min_of(MATMUL_ROWS, shape.out_features - row_begin);
  const int expert = product.tile_experts[blockIdx.y];
  const int first = product.tile_starts[blockIdx.y];
  if (rows <= 0 || expert < 0 || expert > shape.num_experts || first < 0) return;
  const int stop = expert < shape.num_experts
                       ? min_of(product.expert_starts[expert + 1], product.num_tokens)
                       : product.num_tokens;
  const int count = min_of(TOKENS, stop - first);
  if (count <= 0) return;

  const u32 chunk_at = shared_begin() + Coding::SHARED_BYTES * product.dictionary_copies;
  const u32 levels_at = chunk_at + MATMUL_ROWS * CHUNK_STRIDE;
  const u32 tokens_at = levels_at + 4 * MATMUL_ROWS;
  if (threadIdx.x < TOKENS) {
    const int token = threadIdx.x < count ? product.token_order[first + threadIdx.x] : -1;
    const bool exists = static_cast<u32>(token) < static_cast<u32>(product.num_tokens);
    shared_store<int>(tokens_at + 4 * threadIdx.x, exists ? token : -1);
  }
  if (expert == shape.num_experts) {
    __syncthreads();
    for (int at = threadIdx.x; at < count * MATMUL_ROWS; at += MATMUL_THREADS) {
      const int token = shared_load<int>(tokens_at + 4 * (at / MATMUL_ROWS));
      if (token >= 0 && at % MATMUL_ROWS < rows)
        store_product(product, token, row_begin + at % MATMUL_ROWS, 0);
    }
    return;
  }
  coding.open(shape, expert, shared_begin(), product.dictionary_copies);
  if (threadIdx.x < MATMUL_ROWS)
    shared_store<u32>(levels_at + 4 * threadIdx.x,
                      coding.row_factor(shape, expert, row_begin + static_cast<int>(threadIdx.x)));
  // A warp decodes rows that follow one another, GROUPS at a time.
  const int own_row = warp_of_block() * (PASSES * GROUPS) + lane_of_warp() / Coding::LANES;
  typename Coding::Cursor cursors[PASSES];
#pragma unroll
  for (int pass = 0; pass < PASSES; ++pass)
    cursors[pass] = coding.start(shape, expert, row_begin + own_row + pass * GROUPS);
  __syncthreads();

  // Then it multiplies 16 of the rows with some tokens: every COLUMN_PARTS-th block of 64 columns.
  const int g = lane_of_warp() / 4, q = lane_of_warp() % 4;
  const int upper_row = 16 * (warp_of_block() % 4) + g;
  const int first_tile = OWN_TILES * (warp_of_block() / 4 % TOKEN_PARTS);
  const int part = warp_of_block() / 4 / TOKEN_PARTS;
  const u32 upper_factor = shared_load<u32>(levels_at + 4 * upper_row);
  const u32 lower_factor = shared_load<u32>(levels_at + 4 * (upper_row + 8));
  // What a token that is not there would get is not stored: any other may stand in for it.
  const u16* own[OWN_TILES];
#pragma unroll
  for (int tile = 0; tile < OWN_TILES; ++tile) {
    const int token = shared_load<int>(tokens_at + 4 * (8 * (first_tile + tile) + g));
    own[tile] = product.x + static_cast<u64>(token < 0 ? 0 : token) * shape.in_features;
  }
  float sums[OWN_TILES][4] = {};
  for (int begin = 0; begin < shape.in_features; begin += CHUNK_COLUMNS) {
    const int columns = min_of(CHUNK_COLUMNS, shape.in_features - begin);
    for (u32 at = 16 * threadIdx.x; at < MATMUL_ROWS * CHUNK_STRIDE; at += 16 * MATMUL_THREADS)
      shared_store<Quad32>(chunk_at + at, Quad32{0, 0, 0, 0});
    __syncthreads();
#pragma unroll
    for (int pass = 0; pass < PASSES; ++pass)
      coding.decode_until(cursors[pass], chunk_at + (own_row + pass * GROUPS) * CHUNK_STRIDE, begin,
                          columns);
    __syncthreads();
    // Lane q of a group takes 16 columns that follow one another, of rows and of tokens alike: the
    // order of products makes no difference, and a load has 16 bytes.
    for (int block = 64 * part; block < columns; block += 64 * COLUMN_PARTS) {
      const u32 upper_at = chunk_at + upper_row * CHUNK_STRIDE + block + 16 * q;
      const Quad32 upper = shared_load<Quad32>(upper_at);
      const Quad32 lower = shared_load<Quad32>(upper_at + 8 * CHUNK_STRIDE);
      const u32 uppers[4] = {upper.x, upper.y, upper.z, upper.w};
      const u32 lowers[4] = {lower.x, lower.y, lower.z, lower.w};
      // Behind the last column there are zeros to multiply with.
      const int column = begin + block + 16 * q < shape.in_features ? begin + block + 16 * q : 0;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        Quad32 eight[OWN_TILES];
#pragma unroll
        for (int tile = 0; tile < OWN_TILES; ++tile)
          eight[tile] = reinterpret_cast<const Quad32*>(own[tile] + column)[half];
#pragma unroll
        for (int k = 0; k < 2; ++k) {
          const u32 above = uppers[2 * half + k], below = lowers[2 * half + k];
          const u32 a0 = Coding::weights(upper_factor, above);
          const u32 a1 = Coding::weights(lower_factor, below);
          const u32 a2 = Coding::weights(upper_factor, above >> 16);
          const u32 a3 = Coding::weights(lower_factor, below >> 16);
#pragma unroll
          for (int tile = 0; tile < OWN_TILES; ++tile)
            multiply_16x8x16(sums[tile], a0, a1, a2, a3, k ? eight[tile].z : eight[tile].x,
                             k ? eight[tile].w : eight[tile].y);
        }
      }
    }
    __syncthreads();
  }

  // Parts of the columns together, one after another, over the chunk: token by token.
  const auto sum_at = [&](int tile, int place) {
    const int token = 8 * (first_tile + tile) + 2 * q + (place & 1);
    return chunk_at + 4 * (token * SUMS_STRIDE + upper_row + (place & 2 ? 8 : 0));
  };
  for (int turn = 0; turn < COLUMN_PARTS; ++turn) {
    if (part == turn) {
#pragma unroll
      for (int tile = 0; tile < OWN_TILES; ++tile)
#pragma unroll
        for (int place = 0; place < 4; ++place) {
          const u32 at = sum_at(tile, place);
          const float before = turn == 0 ? 0.0f : shared_load<float>(at);
          shared_store<float>(at, before + sums[tile][place]);
        }
    }
    __syncthreads();
  }
  for (int at = threadIdx.x; at < count * MATMUL_ROWS; at += MATMUL_THREADS) {
    const int row = at % MATMUL_ROWS, token = shared_load<int>(tokens_at + 4 * (at / MATMUL_ROWS));
    if (token >= 0 && row < rows)
      store_product(product, token, row_begin + row,
                    shared_load<float>(chunk_at + 4 * (at / MATMUL_ROWS * SUMS_STRIDE + row)));
  }
#endif
}

}  // namespace qmoe
