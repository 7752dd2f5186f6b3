// Decode times tokens, for any coding: y[t, row] = sum over columns of W_e[row, column] x[t, column].
//
// A block takes `rows_per_block` rows of one expert and up to 16 of its tokens. The tokens are staged in
// shared memory, column after column; every non-zero weight is decoded once and multiplied with
// all of them, in float32. No atomics: a row's sum has one fixed order.
//
// Shared memory, by bytes:
//   Coding::SHARED_BYTES          dictionary
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

template <class Coding, int TOKENS>
QMOE_DEVICE void multiply_tile(Coding& coding, const Shape& shape, const ProductArguments& product,
                               int expert, int first_token, int num_tokens, int row_begin,
                               int row_end) {
  const u32 x_at = shared_begin() + Coding::SHARED_BYTES;
  const u32 rows_at = x_at + (shape.in_features + COLUMN_PADDING) *
                               (product.tile_tokens > 1 ? 2 * product.tile_tokens : 4);
  const u32 sums_at = rows_at + 4 * MAX_TILE_TOKENS;

  // Stage the tokens, zeros behind the last column and for tokens that are not there.
  const u16* own[TOKENS];
#pragma unroll
  for (int t = 0; t < TOKENS; ++t) {
    const int row = t < num_tokens ? product.token_order[first_token + t] : -1;
    own[t] = static_cast<u32>(row) < static_cast<u32>(product.num_tokens)
                 ? product.x + static_cast<u64>(row) * shape.in_features
                 : nullptr;
    if (threadIdx.x == t) shared_store<int>(rows_at + 4 * t, own[t] ? row : -1);
  }
  float partial[TOKENS] = {};
  for (int column = threadIdx.x; column < shape.in_features + COLUMN_PADDING;
       column += blockDim.x) {
    u32 bits[TOKENS];
#pragma unroll
    for (int t = 0; t < TOKENS; ++t)
      bits[t] = own[t] && column < shape.in_features ? own[t][column] : 0;
    Column<TOKENS> staged;
    if constexpr (TOKENS == 1) {
      staged.value = from_bf16(bits[0]);
    } else {
#pragma unroll
      for (int t = 0; t < TOKENS; t += 2) staged.pairs[t / 2] = bits[t] | bits[t + 1] << 16;
    }
    shared_store<Column<TOKENS>>(x_at + column * Column<TOKENS>::BYTES, staged);
    if (Coding::HAS_BASE) {
#pragma unroll
      for (int t = 0; t < TOKENS; ++t) partial[t] += from_bf16(bits[t]);
    }
  }
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
  const int rows_per_warp = (row_end - row_begin + step - 1) / step * ROWS;
  const int warp_begin = row_begin + warp_of_block() * rows_per_warp;
  const int warp_end = min_of(warp_begin + rows_per_warp, row_end);
  for (int first = warp_begin; first < warp_end; first += ROWS) {
    const int row = first + lane_of_warp() / Coding::LANES;
    coding.seek(shape, expert, row);
    Sums<TOKENS> sums(x_at);
    coding.template walk<true>(shape, sums);
#pragma unroll
    for (int t = 0; t < TOKENS; ++t) {
      float sum = warp_sum<Coding::LANES>(sums.sums[t]);
      if (threadIdx.x % Coding::LANES != t % Coding::LANES || t >= num_tokens || row >= warp_end)
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

  coding.open(shape, expert, shared_begin());
  const auto tile = [&](auto size) {
    multiply_tile<Coding, decltype(size)::value>(coding, shape, product, expert, place, count,
                                                 row_begin, row_end);
  };
  if (count == 1) {
    tile(Number<1>());
  } else if constexpr (MAX_TOKENS == 2) {
    tile(Number<2>());
  } else {
    if (count <= 4) tile(Number<4>());
    else if (count <= 8) tile(Number<8>());
    else tile(Number<16>());
  }
}

}  // namespace qmoe
