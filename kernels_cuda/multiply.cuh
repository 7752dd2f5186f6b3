// Decode times tokens, for any coding: y[t, row] = sum over columns of W_e[row, column] x[t, column].
//
// A block takes `rows_per_block` rows of one expert and up to 16 of its tokens. The tokens are staged in
// shared memory, column after column; every non-zero weight is decoded once and multiplied with
// all of them, in float32. No atomics: a row's sum has one fixed order.
//
// Shared memory, by bytes:
//   Coding::SHARED_BYTES * copies dictionary
//   (in + 64) * max(4, 2 tile)    tokens: [column][token] bfloat16; of a single token float32
//   4 * 16 + 4 * (warps + 1) * 16 rows of the tokens in x and y; sums of the tokens
#pragma once
#include "common.cuh"

namespace qmoe {

// What every product kernel takes behind its coding's arrays.
struct ProductArguments {
  const u16* x;              // bfloat16 [num_tokens, in_features]
  const int* token_order;    // int32 [num_tokens]: row in x and y of each token, sorted by expert
  const int* token_experts;  // int32 [num_tokens]: expert of each sorted token; negative, or
                             // num_experts and more: none
  const int* expert_starts;  // int32 [num_experts + 1]: first sorted token of each expert
  void* y;                   // bfloat16 or float32 [num_tokens, out_features]; written wholly, zeros
                             // for tokens without an expert
  int num_experts;           // at least 1
  int out_features;          // at least 1: rows of an expert
  int in_features;           // at least 1: weights in a row
  int num_tokens;            // at least 1
  int tile_tokens;           // tokens of an expert that share a decode: 1 or 2 (kernels t2); 1, 2, 4,
                             // 8 or 16 (t16)
  int rows_per_block;        // at least 1
  int dictionary_copies;     // 1, 2, 4, 8 or 16: in shared memory, where the coding has one there
  int y_is_float32;          // 0 or 1
};

QMOE_DEVICE void store_output(const ProductArguments& product, u64 index, float value) {
  if (product.y_is_float32) static_cast<float*>(product.y)[index] = value;
  else static_cast<u16*>(product.y)[index] = static_cast<u16>(to_bf16(value));
}

// The tokens of one column.
template <int TOKENS>
struct alignas(TOKENS >= 8 ? 16 : 2 * TOKENS) Column {
  static constexpr u32 BYTES = 2 * TOKENS;
  u32 pairs[TOKENS / 2];
  QMOE_DEVICE_MEMBER float get(int token) const {
    return token % 2 ? __uint_as_float(pairs[token / 2] & 0xffff0000u)
                     : from_bf16(pairs[token / 2]);
  }
};
template <>
struct Column<1> {
  static constexpr u32 BYTES = 4;
  float value;
  QMOE_DEVICE_MEMBER float get(int) const { return value; }
};

// Sums of weights times tokens; the visitor of a walk.
template <int TOKENS>
struct Sums {
  static constexpr u32 SCALE = Column<TOKENS>::BYTES / 4;
  u32 columns;  // address of the tokens in shared memory
  u32 origin;   // columns of 4 bytes are counted from there, so that 4 * column is an address
  float sums[TOKENS];

  QMOE_DEVICE_MEMBER explicit Sums(u32 address)
      : columns(address), origin(SCALE == 1 ? address : 0), sums{} {}

  QMOE_DEVICE_MEMBER void add(bool present, u32 column4, float weight) {
    const u32 address = SCALE == 1 ? column4 : columns + column4 * SCALE;
    if constexpr (TOKENS == 1) {
      sums[0] = add_product_if(present, address, weight, sums[0]);
    } else {
      const auto column = shared_load_if<Column<TOKENS>>(present, address);
#pragma unroll
      for (int t = 0; t < TOKENS; ++t) sums[t] = fmaf(weight, column.get(t), sums[t]);
    }
  }
  QMOE_DEVICE_MEMBER void end_round(u32) {}
};

// What a block computes.
struct Tile {
  int expert;
  int first_token;  // among the sorted
  int num_tokens;
  int row_begin, row_end;
};

// Copies columns of the tokens to shared memory, zeros behind the last and for tokens that are not
// there (null), and adds up what this thread copies, if SUMS. Loads of a thread do not wait for one
// another: a block with one token has nothing else to do meanwhile.
template <int TOKENS, bool SUMS>
QMOE_DEVICE void stage_tokens(const u16* const (&own)[TOKENS], const ProductArguments& product,
                              u32 x_at, float (&partial)[TOKENS]) {
  const int columns = product.in_features, threads = blockDim.x;
  int staged = 0;  // columns
  if constexpr (TOKENS <= 2 && !SUMS) {
    // Eight columns a load. More tokens would then be stored 64 bytes and more apart: the same banks.
    // With sums the order of columns is that of all tiles, so that a tile makes no difference.
    constexpr int AHEAD = 4 / TOKENS;
    const bool aligned = columns % 8 == 0 && reinterpret_cast<u64>(product.x) % 16 == 0;
    const int vectors = aligned ? columns / 8 : 0;
    for (int first = threadIdx.x; first < vectors; first += AHEAD * threads) {
      Quad32 loaded[AHEAD][TOKENS];
#pragma unroll
      for (int a = 0; a < AHEAD; ++a)
#pragma unroll
        for (int t = 0; t < TOKENS; ++t)
          loaded[a][t] = own[t] && first + a * threads < vectors
                             ? reinterpret_cast<const Quad32*>(own[t])[first + a * threads]
                             : Quad32{0, 0, 0, 0};
#pragma unroll
      for (int a = 0; a < AHEAD; ++a) {
        if (first + a * threads >= vectors) break;
        u32 words[8];
#pragma unroll
        for (int pair = 0; pair < 4; ++pair) {
          u32 both[TOKENS];
#pragma unroll
          for (int t = 0; t < TOKENS; ++t) {
            const Quad32& four = loaded[a][t];
            both[t] = pair == 0 ? four.x : pair == 1 ? four.y : pair == 2 ? four.z : four.w;
          }
          if constexpr (TOKENS == 1) {
            words[2 * pair] = both[0] << 16;
            words[2 * pair + 1] = both[0] & 0xffff0000u;
          } else {
            words[2 * pair] = both[0] & 0xffffu | both[1] << 16;
            words[2 * pair + 1] = both[0] >> 16 | both[1] & 0xffff0000u;
          }
        }
        const u32 at = x_at + 32 * (first + a * threads);
        shared_store<Quad32>(at, Quad32{words[0], words[1], words[2], words[3]});
        shared_store<Quad32>(at + 16, Quad32{words[4], words[5], words[6], words[7]});
      }
    }
    staged = 8 * vectors;
  }
  constexpr int AHEAD = TOKENS >= 16 ? 1 : 16 / TOKENS;
  for (int first = staged + threadIdx.x; first < columns + COLUMN_PADDING;
       first += AHEAD * threads) {
    u32 bits[AHEAD][TOKENS];
#pragma unroll
    for (int a = 0; a < AHEAD; ++a)
#pragma unroll
      for (int t = 0; t < TOKENS; ++t)
        bits[a][t] = own[t] && first + a * threads < columns ? own[t][first + a * threads] : 0;
#pragma unroll
    for (int a = 0; a < AHEAD; ++a) {
      const int column = first + a * threads;
      if (column >= columns + COLUMN_PADDING) break;
      Column<TOKENS> ready;
      if constexpr (TOKENS == 1) {
        ready.value = from_bf16(bits[a][0]);
      } else {
#pragma unroll
        for (int t = 0; t < TOKENS; t += 2) ready.pairs[t / 2] = bits[a][t] | bits[a][t + 1] << 16;
      }
      shared_store<Column<TOKENS>>(x_at + column * Column<TOKENS>::BYTES, ready);
      if (SUMS) {
#pragma unroll
        for (int t = 0; t < TOKENS; ++t) partial[t] += from_bf16(bits[a][t]);
      }
    }
  }
}

template <class Coding, int TOKENS>
QMOE_DEVICE void multiply_tile(Coding& coding, const Shape& shape, const ProductArguments& product,
                               const Tile& tile) {
  const u32 x_at = shared_begin() + Coding::SHARED_BYTES * product.dictionary_copies;
  const u32 rows_at = x_at + (shape.in_features + COLUMN_PADDING) *
                               (product.tile_tokens > 1 ? 2 * product.tile_tokens : 4);
  const u32 sums_at = rows_at + 4 * MAX_TILE_TOKENS;

  // Stage the tokens, zeros behind the last column and for tokens that are not there.
  const u16* own[TOKENS];
#pragma unroll
  for (int t = 0; t < TOKENS; ++t) {
    const int row = t < tile.num_tokens ? product.token_order[tile.first_token + t] : -1;
    own[t] = static_cast<u32>(row) < static_cast<u32>(product.num_tokens)
                 ? product.x + static_cast<u64>(row) * shape.in_features
                 : nullptr;
    if (threadIdx.x == t) shared_store<int>(rows_at + 4 * t, own[t] ? row : -1);
  }
  float partial[TOKENS] = {};
  stage_tokens<TOKENS, Coding::HAS_BASE>(own, product, x_at, partial);
  // Sums of the tokens, for weights that are `base` where the code has nothing.
  if (Coding::HAS_BASE) {
#pragma unroll
    for (int t = 0; t < TOKENS; ++t) {
      const float sum = warp_sum<32>(partial[t]);
      if (lane_of_warp() == 0)
        shared_store<float>(sums_at + 4 * (MAX_TILE_TOKENS * (1 + warp_of_block()) + t), sum);
    }
  }
  __syncthreads();
  if (Coding::HAS_BASE) {
    if (threadIdx.x < TOKENS) {
      float sum = 0;
      for (int warp = 0; warp < warps_of_block(); ++warp)
        sum += shared_load<float>(sums_at + 4 * (MAX_TILE_TOKENS * (1 + warp) + threadIdx.x));
      shared_store<float>(sums_at + 4 * threadIdx.x, sum);
    }
    __syncthreads();
  }

  // Rows: each warp takes neighbouring ones, ROWS at a time.
  constexpr int ROWS = 32 / Coding::LANES;
  const int step = ROWS * warps_of_block();
  const int rows_per_warp = (tile.row_end - tile.row_begin + step - 1) / step * ROWS;
  const int warp_begin = tile.row_begin + warp_of_block() * rows_per_warp;
  const int warp_end = min_of(warp_begin + rows_per_warp, tile.row_end);
  for (int first = warp_begin; first < warp_end; first += ROWS) {
    const int row = first + lane_of_warp() / Coding::LANES;
    coding.seek(shape, tile.expert, row);
    Sums<TOKENS> sums(x_at);
    coding.template walk<true>(shape, sums);
#pragma unroll
    for (int t = 0; t < TOKENS; ++t) {
      float sum = warp_sum<Coding::LANES>(sums.sums[t]);
      if (threadIdx.x % Coding::LANES != t % Coding::LANES || t >= tile.num_tokens ||
          row >= warp_end)
        continue;
      if (Coding::HAS_BASE && coding.base != 0)
        sum = fmaf(coding.base, shared_load<float>(sums_at + 4 * t), sum);
      const int token = shared_load<int>(rows_at + 4 * t);
      if (token >= 0)
        store_output(product, static_cast<u64>(token) * shape.out_features + row, sum);
    }
  }
}

// Block (p, chunk): if a tile of tokens begins at sorted token p, the tile times the chunk's rows.
// A kernel for small tiles has room for more warps: a tile of 16 tokens needs twice the registers.
template <int MAX_TOKENS, class Coding>
QMOE_DEVICE void multiply(Coding coding, const ProductArguments& product) {
  constexpr int ROWS = 32 / Coding::LANES;
  const Shape shape = {product.num_experts, product.out_features, product.in_features};
  const int rows = (product.rows_per_block + ROWS - 1) / ROWS * ROWS;
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

  coding.open(shape, expert, shared_begin(), product.dictionary_copies);
  const Tile tile = {expert, place, count, row_begin, row_end};
  if (count == 1) {
    multiply_tile<Coding, 1>(coding, shape, product, tile);
  } else if constexpr (MAX_TOKENS == 2) {
    multiply_tile<Coding, 2>(coding, shape, product, tile);
  } else {
    if (count <= 4) multiply_tile<Coding, 4>(coding, shape, product, tile);
    else if (count <= 8) multiply_tile<Coding, 8>(coding, shape, product, tile);
    else multiply_tile<Coding, 16>(coding, shape, product, tile);
  }
}

}  // namespace qmoe
