// Products of coding "lattice" by tensor cores: 32 rows times 32 columns at a time, which a warp decodes.
//
// Weights are whole numbers. A digit of base 4 of 32 x 32 of them lies in shared memory as a byte: a
// selector of two nibbles with which one `prmt` makes twice the weight in bfloat16. Nearly all have one
// digit; where there are more, the other digits follow, each with the same tokens and factors 4, 16
// and 64 as great. Tokens times half the steps are float32 numbers, each the sum of three parts in
// bfloat16, which are columns of a product: so all products are exact, and sums are float32.
#pragma once
#include "coding_lattice.cuh"
#include "tensor_cores.cuh"

namespace qmoe {

// Half the step of a visited column, its sign the column's lean.
QMOE_DEVICE float half_step(const LatticeArrays& arrays, const LatticeExpert& expert, u32 visit) {
  const float step = 0.5f * expert.step(arrays, visit >> 24);
  return visit & 1 ? -step : step;
}

// Where tokens lie in shared memory: 32 columns after another, of these the first part of all tokens, the
// second and the third, each bfloat16 [32].
template <int TOKENS>
struct LatticePanel {
  static constexpr u32 ROWS = 3 * TOKENS;
  static constexpr u32 BYTES = 64 * ROWS;  // of 32 columns
  // In products parts lie side by side, of at least two tokens: tiles of eight columns.
  static constexpr int WIDTH = TOKENS < 2 ? 2 : TOKENS;
  static constexpr int TILES = (3 * WIDTH + 7) / 8;
  static_assert((TOKENS & TOKENS - 1) == 0, "parts in whole tiles");

  static QMOE_DEVICE_MEMBER u32 column(u32 address, u32 place) {
    return address + place / 32 * BYTES + 2 * (place & 31);
  }

  // Stores a token of a column, in parts of eight bits, so that nothing is rounded.
  static QMOE_DEVICE_MEMBER void store(u32 column, int token, float value) {
#pragma unroll
    for (int part = 0; part < 3; ++part) {
      const u32 bits = __float_as_uint(value) >> 16;
      shared_store<u16>(column + 64 * (TOKENS * part + token), static_cast<u16>(bits));
      value -= from_bf16(bits);
    }
  }

  // Row of 32 columns that is column g of a tile of the product, or -1: zeros.
  static QMOE_DEVICE_MEMBER int row(int tile, int g) {
    const int token = (8 * tile + g) % WIDTH, part = (8 * tile + g) / WIDTH;
    return part < 3 && token < TOKENS ? TOKENS * part + token : -1;
  }
};

// The visitor of a task: sums over its columns, of 32 rows and all tokens. Those of the three parts are
// kept apart or, of eight tokens and more, ADDED.
template <int TOKENS, bool ADDED>
struct LatticeProducts {
  using Panel = LatticePanel<TOKENS>;
  static constexpr int TILES = ADDED ? TOKENS / 8 : Panel::TILES;  // of sums

  const LatticeExpert& expert;
  u32 digits;   // address of a byte for each of 32 rows and columns
  u32 columns;  // address of the task's first column
  u32 low, a_weight, one;  // constants
  float sums[2][TILES][4];  // of rows 0 to 15, and 16 to 31

  QMOE_DEVICE_MEMBER LatticeProducts(const LatticeExpert& of, u32 address)
      : expert(of), digits(address), columns(0), sums{} {
    low = in_register(0xc0008000u, address);
    a_weight = in_register(0x40, address);
    one = in_register(1, address);
  }

  // With `low` and `high` two nibbles make: none 0, 0x40 one, 0x41 two, 0x43 three, 0x10 more the same
  // with a minus.
  static QMOE_DEVICE_MEMBER u32 selector(u32 digit, u32 negative) {
    return digit == 0 ? 0 : 0x40 | (negative & 1) << 4 | (digit == 1 ? 0 : 2 * digit - 3);
  }

  QMOE_DEVICE_MEMBER void clear() const {
#pragma unroll
    for (u32 half = 0; half < 2; ++half)
      shared_store<Quad32>(digits + 512 * half + 16 * lane_of_warp(), Quad32{0, 0, 0, 0});
    __syncwarp();
  }

  QMOE_DEVICE_MEMBER void visit(const LatticeColumns& found) {
    clear();
    if (found.any_third) deal_digits<true>(found);
    else deal_digits<false>(found);
    u32 higher = found.any_fourth ? put_digits(found, 0) : 0;
    __syncwarp();
    const u32 panel = columns + found.first / 32 * Panel::BYTES;
    multiply(panel, 0);
    if (!found.any_fourth) return;
    for (u32 digit = 1; __any_sync(ALL_LANES, higher != 0); ++digit) {  // up to 3
      __syncwarp();
      clear();
      higher = put_digits(found, digit);
      __syncwarp();
      multiply(panel, 0x0101 * digit);
    }
  }

  // The only digits of weights below 4; of others, some. THIRD: there are weights of 3.
  template <bool THIRD>
  QMOE_DEVICE_MEMBER void deal_digits(const LatticeColumns& found) const {
    const u32 own = digits + lane_of_warp();
    // From the last row on, its bits at 4, 0 and 1.
    const u32 count = __popc(found.nonzero);
    u32 signs = __funnelshift_r(found.signs, found.signs, count + 27);
    u32 large = __funnelshift_r(found.large, found.large, count + 31);
    u32 third = __funnelshift_r(found.third, found.third, count + 30);
    for (u32 rows = found.nonzero; rows != 0;) {
      const u32 row = 31 - __clz(rows);
      u32 bits = merge(signs, 0x10, merge(large, 1, a_weight));
      if (THIRD) bits = merge(third, 2, bits);
      shared_store<u8>(own + 32 * row, static_cast<u8>(bits));
      rows &= ~(one << row);
      signs = __funnelshift_l(signs, signs, 1);
      large = __funnelshift_l(large, large, 1);
      if (THIRD) third = __funnelshift_l(third, third, 1);
    }
  }

  // A digit of the weights of 4 and more. Returns the digits above it, of all of a lane's.
  QMOE_DEVICE_MEMBER u32 put_digits(const LatticeColumns& found, u32 digit) const {
    u32 at = found.remainder, higher = 0;
    for (u32 left = found.fourth; left != 0; left &= left - 1, ++at) {
      const u32 number = __ffs(left) - 1;  // among the column's weights
      u32 rows = found.nonzero;
      for (u32 before = 0; before < number; ++before) rows &= rows - 1;
      const u32 magnitude = min_of(4 + expert.byte(at), 127u) >> 2 * digit;
      const u32 bits = selector(magnitude & 3, found.signs >> number);
      shared_store<u8>(digits + lane_of_warp() + 32 * (__ffs(rows) - 1), static_cast<u8>(bits));
      higher |= magnitude >> 2;
    }
    return higher;
  }

  // Lane 4 g + q has columns 8 q to 8 q + 7 of rows g, g + 8, ... and the same columns of token g: the
  // order of products makes no difference.
  QMOE_DEVICE_MEMBER void multiply(u32 panel, u32 exponents) {
    const u32 g = lane_of_warp() / 4, q = lane_of_warp() % 4;
    const u32 high = 0xc040 + exponents;
    Pair32 bytes[4];
#pragma unroll
    for (u32 k = 0; k < 4; ++k) bytes[k] = shared_load<Pair32>(digits + 32 * (8 * k + g) + 8 * q);
    u32 weights[2][2][4];  // of rows, and of columns
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const Pair32 upper = bytes[2 * half], lower = bytes[2 * half + 1];
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        const u32 above = k == 0 ? upper.x : upper.y, below = k == 0 ? lower.x : lower.y;
        weights[half][k][0] = select_bytes(low, high, above);
        weights[half][k][1] = select_bytes(low, high, below);
        weights[half][k][2] = select_bytes(low, high, above >> 16);
        weights[half][k][3] = select_bytes(low, high, below >> 16);
      }
    }
#pragma unroll
    for (int tile = 0; tile < Panel::TILES; ++tile) {
      const int row = Panel::row(tile, g);
      const Quad32 four = shared_load_if<Quad32>(row >= 0, panel + 64 * row + 16 * q);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        auto& own = sums[half][tile % TILES];
        const auto& first = weights[half][0];
        const auto& second = weights[half][1];
        multiply_16x8x16(own, first[0], first[1], first[2], first[3], four.x, four.y);
        multiply_16x8x16(own, second[0], second[1], second[2], second[3], four.z, four.w);
      }
    }
  }

  // Stores sums of tokens, float32 [tokens][32 rows], at an address, and begins anew.
  QMOE_DEVICE_MEMBER void flush(u32 address) {
    static_assert(!ADDED, "sums of parts");
    const int g = lane_of_warp() / 4, q = lane_of_warp() % 4;
#pragma unroll
    for (int half = 0; half < 2; ++half)
#pragma unroll
      for (int place = 0; place < 4; ++place) {
        const auto put = [&](int token, float high, float middle, float low) {
          const int row = 16 * half + g + 8 * (place >> 1);
          shared_store<float>(address + 128 * token + 4 * row, high + (middle + low));
        };
        if constexpr (Panel::WIDTH == 8) {
          put(2 * q + (place & 1), sums[half][0][place], sums[half][1][place],
              sums[half][2][place]);
        } else {  // parts are other lanes'
          const auto from = [&](int part) {
            const int column = Panel::WIDTH * part + 2 * (q % (Panel::WIDTH / 2));
            const int lane = 4 * g + column % 8 / 2;
            return __shfl_sync(ALL_LANES, sums[half][Panel::WIDTH * part / 8][place], lane);
          };
          const float high = from(0), middle = from(1), low = from(2);
          const int token = 2 * q + (place & 1);
          if (token < TOKENS) put(token, high, middle, low);
        }
      }
#pragma unroll
    for (int half = 0; half < 2; ++half)
#pragma unroll
      for (int tile = 0; tile < TILES; ++tile)
#pragma unroll
        for (int place = 0; place < 4; ++place) sums[half][tile][place] = 0;
  }
};

}  // namespace qmoe
