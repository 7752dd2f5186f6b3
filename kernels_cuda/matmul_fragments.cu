// Products with codes that lie as tensor cores take them: "fragments", made once after loading
// (qmoe_jax/ops/cuda/fragments.py), two bits a weight. Of the lattice y[t, row] = scale[t] * sum over
// places k of m_e[row, k] x[t, k], m of -2, 0 and 2, x a token's features times steps, float16, at the
// places of its expert. Of ternary codes y[t, row] = sum over columns k of W_e[row, k] x[t, k], bfloat16.
//
// A chunk is 32 rows of 64 places, 512 bytes: each lane loads 16 bytes, which are its part of eight
// products of 16x8x16. A warp takes 32 rows, and of their chunks every so many-th (`row_parts`). Behind
// them come the extra chunks of the rows: what weights have beyond the digits of their column, whose places are
// stored. Sums are float32, in one order for a number of `row_parts`. A weight 0 is multiplied: an
// infinity or a NaN in x reaches all rows.
//
// Fragments: word 2 h + s of lane 4 g + q has eight pairs i of weights: row 16 h + g (i even) or
// 16 h + g + 8, place 32 s + 8 q + 4 (i / 4) + 2 (i / 2 % 2) and the next one. Of the lattice a pair's first
// weight is bits 2 i and 2 i + 1, its second 16 bits further: the lower bit says that it is not zero, the other
// that it is negative. Of ternary codes the first is bits 16 (i / 4) + 2 (i % 4) and the next, its second 8
// bits further: 0, 1 for the high level or 2 for the low one.
//
// Shared memory, by bytes: warps * 128 * tokens of a tile, sums, if row_parts > 1; else none.
#include "tensor_cores.cuh"

using namespace qmoe;

namespace qmoe {

constexpr int CHUNK_ROWS = 32, CHUNK_PLACES = 64;
// Places of a row of x that lie together: a lane's load, and eight rows' loads follow one another.
constexpr u32 ROW_PLACES = 8;
// The bits of two weights of 2 or -2, as float16.
constexpr u32 BOTH_WEIGHTS = 0xc000c000u;

// Codes of all experts as fragments.
struct FragmentArrays {
  const u32* fragments;        // uint32 [num_chunks + 64, 32, 4]: those of an expert's first 32 rows, then
                               // of the next; the last are read for nothing
  const int* fragment_starts;  // int32 [num_experts + 1]: first chunk of each expert
  const u32* extra_fragments;  // uint32 [num_extras, 32, 4]
  const u16* extra_places;     // uint16 [num_extras, 64]: in x
  const int* extra_starts;     // int32 [num_experts * ceil(out_features / 32) + 1]: first of each 32 rows
  const u32* levels;           // bfloat16 [num_experts, out_features, 2], (low, high), of ternary codes, which
                               // have no extras
  int num_chunks;              // at least 0
  int num_extras;              // at least 0
};

// What every product with fragments takes behind them.
struct FragmentProductArguments {
  const u16* x;               // float16 or bfloat16 [places / 8, num_tokens + 64, 8]: tokens sorted by
                              // expert, those without one last, then 64 that are read for nothing
  const float* scales;        // float32 [num_tokens]: of the sums of each; of the lattice only
  const int* token_order;     // int32 [num_tokens]: row in y of each
  const int* expert_starts;   // int32 [num_experts + 1]: first sorted token of each expert
  const int* tile_experts;    // int32 [num_tiles]: the expert of each tile; num_experts: tokens without
                              // one, which get zeros; negative: no tile
  const int* tile_starts;     // int32 [num_tiles]: its first sorted token
  void* y;                    // bfloat16 or float32 [num_tokens, out_features]; written where tiles are
  int num_experts;            // at least 1
  int out_features;           // at least 1
  int places;                 // of a token: a multiple of 64, at most 65,536
  int num_tokens;             // at least 1
  int row_parts;              // 1, 2, 4, 8 or 16, dividing warps: that share 32 rows
  int y_is_float32;           // 0 or 1
};

// Codes are read once: they should not push tokens out of the cache.
QMOE_DEVICE Quad32 load_fragments(const Quad32* address) {
#ifdef QMOE_EMULATION
  return *address;
#else
  Quad32 loaded;
  asm("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
      : "=r"(loaded.x), "=r"(loaded.y), "=r"(loaded.z), "=r"(loaded.w)
      : "l"(address));
  return loaded;
#endif
}

// A start, within bounds whatever it is.
QMOE_DEVICE int start_at(const int* starts, u64 index, int most) {
  const int start = starts[index];
  return start < 0 ? 0 : min_of(start, most);
}

// Two weights of a word as the tensor cores take them: pair i.
struct LatticePairs {
  static constexpr bool HAS_EXTRAS = true;

  QMOE_DEVICE_MEMBER void open(const FragmentArrays&, int, int, int) {}

  QMOE_DEVICE_MEMBER u32 get(u32 word, int, int i) const { return word << (14 - 2 * i) & BOTH_WEIGHTS; }

  QMOE_DEVICE_MEMBER void multiply(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) const {
    multiply_16x8x16_f16(c, a[0], a[1], a[2], a[3], b0, b1);
  }
};

struct TernaryPairs {
  static constexpr bool HAS_EXTRAS = false;
  u32 levels[2][2];  // of rows 16 h + g, + 8: low, high

  QMOE_DEVICE_MEMBER void open(const FragmentArrays& arrays, int expert, int rows, int row) {
#pragma unroll
    for (int i = 0; i < 4; ++i)
      levels[i / 2][i % 2] =
          arrays.levels[static_cast<u64>(expert) * rows + min_of(row + 8 * i, rows - 1)];
  }

  QMOE_DEVICE_MEMBER u32 get(u32 word, int half, int i) const {
    // Bytes 4 and 5 are zeros, 3 and 2 the high level, 1 and 0 the low one.
    const u32 pair = word >> (16 * (i / 4) + 2 * (i % 4)) & 0x0303u;
    return select_bytes(levels[half][i % 2], 0, 0x5454u - 0x22u * pair);
  }

  QMOE_DEVICE_MEMBER void multiply(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) const {
    multiply_16x8x16(c, a[0], a[1], a[2], a[3], b0, b1);
  }
};

// Sums of a warp's 32 rows, and how codes add to them. TILES: eight tokens each.
template <int TILES, class Pairs>
struct FragmentSums {
  Pairs pairs;
  float sums[2][TILES][4] = {};  // rows 16 h + g, + 8; tokens 8 tile + 2 q, + 1

  // Words of 32 places, those of rows 0 to 15 and of 16 to 31; `tokens`: eight places of each of the tiles
  // FIRST to FIRST + COUNT - 1.
  template <int FIRST, int COUNT>
  QMOE_DEVICE_MEMBER void add(u32 upper, u32 lower, const Quad32 (&tokens)[COUNT]) {
    const u32 words[2] = {upper, lower};
#pragma unroll
    for (int step = 0; step < 2; ++step)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        u32 a[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) a[i] = pairs.get(words[half], half, 4 * step + i);
#pragma unroll
        for (int tile = 0; tile < COUNT; ++tile) {
          const Quad32& own = tokens[tile];
          pairs.multiply(sums[half][FIRST + tile], a, step ? own.z : own.x, step ? own.w : own.y);
        }
      }
  }

  // An extra chunk's words for one tile after another. `row`: x of the lane's token of the first tile;
  // `offsets`: of eight places from it.
  template <int TILE>
  QMOE_DEVICE_MEMBER void add_extra(u32 upper, u32 lower, const u16* row, const u32 (&offsets)[8]) {
    const u16* const own = row + 8 * ROW_PLACES * TILE;
    u32 both[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) both[i] = own[offsets[2 * i]] | own[offsets[2 * i + 1]] << 16;
    const Quad32 tokens[1] = {{both[0], both[1], both[2], both[3]}};
    add<TILE, 1>(upper, lower, tokens);
    if constexpr (TILE + 1 < TILES) add_extra<TILE + 1>(upper, lower, row, offsets);
  }
};

// Block (rows, tile of tokens).
template <int TILES, int CHUNKS_AHEAD, class Pairs>
QMOE_DEVICE void matmul_fragments(const FragmentArrays& arrays,
                                  const FragmentProductArguments& product) {
#if !defined(QMOE_EMULATION) && __CUDA_ARCH__ < 800
  if constexpr (!Pairs::HAS_EXTRAS) {
    asm volatile("trap;");  // no bfloat16 in these tensor cores: never launched
    return;
  }
#endif
  const int row_parts = product.row_parts;
  const int strips = (product.out_features + CHUNK_ROWS - 1) / CHUNK_ROWS;
  const int strip = blockIdx.x * (warps_of_block() / row_parts) + warp_of_block() / row_parts;
  const int row_part = warp_of_block() % row_parts;
  const int expert = product.tile_experts[blockIdx.y], first = product.tile_starts[blockIdx.y];
  if (expert < 0 || expert > product.num_experts || first < 0) return;
  const int stop = expert < product.num_experts
                       ? min_of(product.expert_starts[expert + 1], product.num_tokens)
                       : product.num_tokens;
  const int count = min_of(8 * TILES, stop - first);
  if (count <= 0) return;

  const int g = lane_of_warp() / 4, q = lane_of_warp() % 4;
  FragmentSums<TILES, Pairs> own;
  if (expert < product.num_experts && strip < strips) {
    own.pairs.open(arrays, expert, product.out_features, CHUNK_ROWS * strip + g);
    const int begin = start_at(arrays.fragment_starts, expert, arrays.num_chunks);
    const int end = start_at(arrays.fragment_starts, expert + 1, arrays.num_chunks);
    const int chunks =
        end > begin ? min_of((end - begin) / strips, product.places / CHUNK_PLACES) : 0;
    const u32 num_rows = product.num_tokens + 64;
    // Where a tile has no token another stands for it: its last one, or, where a block has several
    // tiles, the next ones and what is behind. No sum of theirs is stored.
    const int token = TILES == 1 ? min_of(g, count - 1) : g;
    const u16* const row = product.x + static_cast<u64>(ROW_PLACES) * (first + token);
    const auto* fragment = reinterpret_cast<const Quad32*>(arrays.fragments) +
                           32 * (static_cast<u64>(begin) + static_cast<u64>(strip) * chunks + row_part) +
                           lane_of_warp();
    const auto* tokens =
        reinterpret_cast<const Quad32*>(row) + static_cast<u64>(8 * row_part + q) * num_rows;
    Quad32 ahead[CHUNKS_AHEAD];
#pragma unroll
    for (int i = 0; i < CHUNKS_AHEAD; ++i) ahead[i] = load_fragments(fragment + 32 * i * row_parts);
    fragment += 32 * CHUNKS_AHEAD * row_parts;
    const auto add_next = [&](const Quad32& codes) {
#pragma unroll
      for (int side = 0; side < 2; ++side) {
        Quad32 eight[TILES];
#pragma unroll
        for (int tile = 0; tile < TILES; ++tile) eight[tile] = tokens[8 * tile + 4 * side * num_rows];
        own.template add<0, TILES>(side ? codes.y : codes.x, side ? codes.w : codes.z, eight);
      }
      tokens += static_cast<u64>(8 * row_parts) * num_rows;
    };
    int left = chunks > row_part ? (chunks - row_part - 1) / row_parts + 1 : 0;
    for (; left >= CHUNKS_AHEAD; left -= CHUNKS_AHEAD)
#pragma unroll
      for (int i = 0; i < CHUNKS_AHEAD; ++i) {
        const Quad32 codes = ahead[i];
        ahead[i] = load_fragments(fragment);  // there are some behind the last
        fragment += 32 * row_parts;
        add_next(codes);
      }
#pragma unroll
    for (int i = 0; i < CHUNKS_AHEAD - 1; ++i)
      if (i < left) add_next(ahead[i]);

    if constexpr (Pairs::HAS_EXTRAS) {
      const u64 strip_index = static_cast<u64>(expert) * strips + strip;
      const int extra_end = start_at(arrays.extra_starts, strip_index + 1, arrays.num_extras);
      for (int extra = start_at(arrays.extra_starts, strip_index, arrays.num_extras) + row_part;
           extra < extra_end; extra += row_parts) {
        const Quad32 codes = load_fragments(reinterpret_cast<const Quad32*>(arrays.extra_fragments) +
                                            32 * static_cast<u64>(extra) + lane_of_warp());
#pragma unroll
        for (int side = 0; side < 2; ++side) {
          const Quad32 eight = *reinterpret_cast<const Quad32*>(
              arrays.extra_places + static_cast<u64>(CHUNK_PLACES) * extra + 32 * side + 8 * q);
          const u32 words[4] = {eight.x, eight.y, eight.z, eight.w}, most = product.places - 1;
          u32 offsets[8];
#pragma unroll
          for (int i = 0; i < 8; ++i) {
            const u32 place = min_of(words[i / 2] >> 16 * (i % 2) & 0xffff, most);
            offsets[i] = place / ROW_PLACES * (ROW_PLACES * num_rows) + place % ROW_PLACES;
          }
          own.template add_extra<0>(side ? codes.y : codes.x, side ? codes.w : codes.z, row, offsets);
          }
    }
    }
  }

  // Those that share rows add up, one after another.
  if (row_parts > 1) {
    const u32 at = shared_begin() + 1024 * TILES * warp_of_block() + 4 * lane_of_warp();
#pragma unroll
    for (int half = 0; half < 2; ++half)
#pragma unroll
      for (int tile = 0; tile < TILES; ++tile)
#pragma unroll
        for (int i = 0; i < 4; ++i)
          shared_store<float>(at + 128 * (4 * (TILES * half + tile) + i), own.sums[half][tile][i]);
    __syncthreads();
    if (row_part) return;
    for (int other = 1; other < row_parts; ++other)
#pragma unroll
      for (int half = 0; half < 2; ++half)
#pragma unroll
        for (int tile = 0; tile < TILES; ++tile)
#pragma unroll
          for (int i = 0; i < 4; ++i)
            own.sums[half][tile][i] += shared_load<float>(
                at + 1024 * TILES * other + 128 * (4 * (TILES * half + tile) + i));
  }
#pragma unroll
  for (int tile = 0; tile < TILES; ++tile)
#pragma unroll
    for (int odd = 0; odd < 2; ++odd) {
      const int token = 8 * tile + 2 * q + odd;
      if (token >= count) continue;
      const int place = product.token_order[first + token];
      if (static_cast<u32>(place) >= static_cast<u32>(product.num_tokens)) continue;
      const float scale = Pairs::HAS_EXTRAS ? product.scales[first + token] : 1.0f;
      const int row = CHUNK_ROWS * strip + g;
      const u64 index = static_cast<u64>(place) * product.out_features + row;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (row + 8 * i >= product.out_features) continue;
        const float sum = scale * own.sums[i / 2][tile][2 * (i % 2) + odd];
        if (product.y_is_float32) static_cast<float*>(product.y)[index + 8 * i] = sum;
        else static_cast<u16*>(product.y)[index + 8 * i] = static_cast<u16>(to_bf16(sum));
      }
    }
}

}  // namespace qmoe

// AHEAD: loads of codes that a warp has under way.
#define FRAGMENT_KERNEL(name, pairs, tiles, ahead, threads, blocks)                               \
  extern "C" __global__ void __launch_bounds__(threads, blocks)                                   \
      name(const FragmentArrays arrays, const FragmentProductArguments product) {                 \
    matmul_fragments<tiles, ahead, pairs>(arrays, product);                                       \
  }

FRAGMENT_KERNEL(matmul_fragments_lattice_t8, LatticePairs, 1, 4, 256, 4)
FRAGMENT_KERNEL(matmul_fragments_lattice_t16, LatticePairs, 2, 4, 256, 3)
FRAGMENT_KERNEL(matmul_fragments_lattice_t32, LatticePairs, 4, 4, 256, 2)
FRAGMENT_KERNEL(matmul_fragments_lattice_t64, LatticePairs, 8, 2, 128, 3)
FRAGMENT_KERNEL(matmul_fragments_ternary_t8, TernaryPairs, 1, 4, 256, 4)
FRAGMENT_KERNEL(matmul_fragments_ternary_t16, TernaryPairs, 2, 4, 256, 3)
FRAGMENT_KERNEL(matmul_fragments_ternary_t32, TernaryPairs, 4, 4, 256, 2)
FRAGMENT_KERNEL(matmul_fragments_ternary_t64, TernaryPairs, 8, 2, 128, 3)
