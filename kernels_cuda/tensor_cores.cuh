// A product of small matrices by a warp, in bfloat16 with float32 sums.
#pragma once
#include "common.cuh"

namespace qmoe {

// c += a b: rows 16 of a, 8 columns of b, 16 products each. Lane l = 4 g + q holds of a the rows g and
// g + 8 in turn, columns 2 q and 2 q + 1, then 2 q + 8 and 2 q + 9; of b the same columns as rows, of
// column g; of c the rows g and g + 8, columns 2 q and 2 q + 1. Before compute capability 8.0 by shuffles.
QMOE_DEVICE void multiply_16x8x16(float (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
#if defined(QMOE_EMULATION) || __CUDA_ARCH__ < 800
  const int g = lane_of_warp() / 4, q = lane_of_warp() % 4;
#pragma unroll 1  // these take registers
  for (int other = 0; other < 4; ++other) {
    const u32 rows[4] = {__shfl_sync(ALL_LANES, a0, 4 * g + other),
                         __shfl_sync(ALL_LANES, a1, 4 * g + other),
                         __shfl_sync(ALL_LANES, a2, 4 * g + other),
                         __shfl_sync(ALL_LANES, a3, 4 * g + other)};
    for (int column = 0; column < 2; ++column) {
      const int lane = 4 * (2 * q + column) + other;
      const u32 factors[2] = {__shfl_sync(ALL_LANES, b0, lane), __shfl_sync(ALL_LANES, b1, lane)};
      for (int half = 0; half < 2; ++half)
        for (int part = 0; part < 2; ++part) {
          float& sum = c[2 * half + column];
          sum = fmaf(from_bf16(rows[half + 2 * part] & 0xffff), from_bf16(factors[part] & 0xffff), sum);
          sum = fmaf(__uint_as_float(rows[half + 2 * part] & 0xffff0000u),
                     __uint_as_float(factors[part] & 0xffff0000u), sum);
        }
    }
  }
#else
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7},\n"
      "  {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
#endif
}

}  // namespace qmoe
