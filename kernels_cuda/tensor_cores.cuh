// Products of small matrices by a warp, in bfloat16 or float16 with float32 sums.
#pragma once
#include "common.cuh"

namespace qmoe {

#if defined(QMOE_EMULATION) || __CUDA_ARCH__ < 800
// The product below by shuffles; `lower` and `upper` convert the halves of a word.
template <class Lower, class Upper>
QMOE_DEVICE void multiply_by_shuffles(float (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1,
                                      Lower lower, Upper upper) {
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
          sum = fmaf(lower(rows[half + 2 * part]), lower(factors[part]), sum);
          sum = fmaf(upper(rows[half + 2 * part]), upper(factors[part]), sum);
        }
    }
  }
}
#endif

// c += a b: rows 16 of a, 8 columns of b, 16 products each. Lane l = 4 g + q holds of a the rows g and
// g + 8 in turn, columns 2 q and 2 q + 1, then 2 q + 8 and 2 q + 9; of b the same columns as rows, of
// column g; of c the rows g and g + 8, columns 2 q and 2 q + 1. Before compute capability 8.0 by shuffles.
QMOE_DEVICE void multiply_16x8x16(float (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
#if defined(QMOE_EMULATION) || __CUDA_ARCH__ < 800
  multiply_by_shuffles(
      c, a0, a1, a2, a3, b0, b1, [](u32 word) { return from_bf16(word & 0xffff); },
      [](u32 word) { return __uint_as_float(word & 0xffff0000u); });
#else
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7},\n"
      "  {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
#endif
}

#ifdef QMOE_EMULATION
QMOE_DEVICE float from_f16(u32 bits) {
  const u32 exponent = bits >> 10 & 31, fraction = bits & 1023;
  const float size = exponent == 0    ? fraction * 0x1p-24f
                     : exponent == 31 ? __uint_as_float(0x7f800000u | fraction << 13)
                                      : __uint_as_float((exponent + 112) << 23 | fraction << 13);
  return bits & 0x8000 ? -size : size;
}
#endif

// The same in float16. At compute capability 7.5 two products of eight.
QMOE_DEVICE void multiply_16x8x16_f16(float (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
#ifdef QMOE_EMULATION
  multiply_by_shuffles(
      c, a0, a1, a2, a3, b0, b1, [](u32 word) { return from_f16(word & 0xffff); },
      [](u32 word) { return from_f16(word >> 16); });
#elif __CUDA_ARCH__ < 800
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6},\n"
      "  {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a0), "r"(a1), "r"(b0));
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6},\n"
      "  {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a2), "r"(a3), "r"(b1));
#else
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7},\n"
      "  {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
#endif
}

}  // namespace qmoe
