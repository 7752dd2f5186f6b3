// Types, bfloat16, shared memory, warp scans and reductions: what all kernels need. No header of CUDA
// is included, so NVRTC alone compiles the sources. On a CPU, tests/cuda_emulation defines
// QMOE_EMULATION, what CUDA has built in, and the access to shared memory.
#pragma once

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

#define QMOE_DEVICE static __device__ __forceinline__
#define QMOE_DEVICE_MEMBER __device__ __forceinline__

namespace qmoe {

constexpr u32 ALL_LANES = 0xffffffffu;
// A warp learns the places of so many rows from one starting point (row_block_starts).
constexpr int ROW_BLOCK = 32;
// Zero columns behind the staged tokens: an entry may reach this far past the row, when damaged.
constexpr int COLUMN_PADDING = 64;
constexpr int MAX_TILE_TOKENS = 16;

struct alignas(8) Pair32 {
  u32 x, y;
};
struct alignas(16) Quad32 {
  u32 x, y, z, w;
};

// --- Shared memory: one dynamic array per block, addressed by 32-bit addresses from shared_begin(). ---

#ifndef QMOE_EMULATION  // which brings its own, to check and record every access
extern __shared__ __align__(16) u8 shared_bytes[];

QMOE_DEVICE u32 shared_begin() {
  return static_cast<u32>(__cvta_generic_to_shared(shared_bytes));
}

template <class T>
QMOE_DEVICE T shared_load(u32 address) {
  return *static_cast<const T*>(__cvta_shared_to_generic(address));
}

template <class T>
QMOE_DEVICE void shared_store(u32 address, T value) {
  *static_cast<T*>(__cvta_shared_to_generic(address)) = value;
}

// Sets bits of the word at a shared address, whatever others set there.
QMOE_DEVICE void shared_or(u32 address, u32 bits) {
  asm volatile("red.shared.or.b32 [%0], %1;" : : "r"(address), "r"(bits) : "memory");
}
#endif

// The value at a shared address that is valid if `present`; else zeros. On the device without a branch:
// loads of several weights then wait together, and a warp does not diverge.
template <class T>
QMOE_DEVICE T shared_load_if(bool present, u32 address) {
#ifdef QMOE_EMULATION
  return present ? shared_load<T>(address) : T{};
#else
  union {
    T value;
    u32 words[sizeof(T) / 4];
  } loaded;
  if constexpr (sizeof(T) == 4) {
    asm volatile(
        "{ .reg .pred p; setp.ne.u32 p, %2, 0; mov.u32 %0, 0; @p ld.shared.u32 %0, [%1]; }"
        : "=&r"(loaded.words[0])
        : "r"(address), "r"(static_cast<u32>(present)));
  } else if constexpr (sizeof(T) == 8) {
    asm volatile(
        "{ .reg .pred p; setp.ne.u32 p, %3, 0; mov.u32 %0, 0; mov.u32 %1, 0;\n"
        "  @p ld.shared.v2.u32 {%0, %1}, [%2]; }"
        : "=&r"(loaded.words[0]), "=&r"(loaded.words[1])
        : "r"(address), "r"(static_cast<u32>(present)));
  } else {
#pragma unroll
    for (u32 i = 0; i < sizeof(T) / 16; ++i)
      asm volatile(
          "{ .reg .pred p; setp.ne.u32 p, %5, 0;\n"
          "  mov.u32 %0, 0; mov.u32 %1, 0; mov.u32 %2, 0; mov.u32 %3, 0;\n"
          "  @p ld.shared.v4.u32 {%0, %1, %2, %3}, [%4]; }"
          : "=&r"(loaded.words[4 * i]), "=&r"(loaded.words[4 * i + 1]),
            "=&r"(loaded.words[4 * i + 2]), "=&r"(loaded.words[4 * i + 3])
          : "r"(address + 16 * i), "r"(static_cast<u32>(present)));
  }
  return loaded.value;
#endif
}

// sum + weight * the float at a shared address, if `present`; likewise without a branch.
QMOE_DEVICE float add_product_if(bool present, u32 address, float weight, float sum) {
#ifdef QMOE_EMULATION
  return present ? fmaf(weight, shared_load<float>(address), sum) : sum;
#else
  asm volatile(
      "{ .reg .pred p; .reg .f32 x; setp.ne.u32 p, %3, 0;\n"
      "  @p ld.shared.f32 x, [%1]; @p fma.rn.f32 %0, %2, x, %0; }"
      : "+f"(sum)
      : "r"(address), "f"(weight), "r"(static_cast<u32>(present)));
  return sum;
#endif
}

// Hides how a pointer was computed, so that it is not computed again in every round.
template <class T>
QMOE_DEVICE void keep_in_register(T*& pointer) {
#ifndef QMOE_EMULATION
  asm volatile("" : "+l"(pointer));
#endif
}

// Four bytes of the eight of (low, high), by the lowest three bits of the selector's four nibbles.
QMOE_DEVICE u32 byte_select(u32 low, u32 high, u32 selector) {
#ifdef QMOE_EMULATION
  const u64 bytes = low | static_cast<u64>(high) << 32;
  u32 result = 0;
  for (int i = 0; i < 4; ++i)
    result |= static_cast<u32>(bytes >> 8 * (selector >> 4 * i & 7) & 255) << 8 * i;
  return result;
#else
  return __byte_perm(low, high, selector);
#endif
}

// The same by nibbles below 8, which spares an instruction.
QMOE_DEVICE u32 select_bytes(u32 low, u32 high, u32 selector) {
#ifdef QMOE_EMULATION
  return byte_select(low, high, selector);
#else
  u32 result;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(result) : "r"(low), "r"(high), "r"(selector));
  return result;
#endif
}

// bits & mask | others, in one instruction.
QMOE_DEVICE u32 merge(u32 bits, u32 mask, u32 others) {
#ifdef QMOE_EMULATION
  return bits & mask | others;
#else
  u32 result;
  asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(result) : "r"(bits), "r"(mask), "r"(others));
  return result;
#endif
}

// --- bfloat16 by hand: compute capability 7.5 has no instructions for it. ---

QMOE_DEVICE float from_bf16(u32 bits) { return __uint_as_float(bits << 16); }

// Rounds to nearest even; a NaN stays one.
QMOE_DEVICE u32 to_bf16(float value) {
  const u32 bits = __float_as_uint(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return bits >> 16 | 0x40u;
  return (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
}

QMOE_DEVICE float round_to_bf16(float value) { return from_bf16(to_bf16(value)); }

// --- Small helpers ---

template <class T>
QMOE_DEVICE T min_of(T a, T b) {
  return a < b ? a : b;
}

QMOE_DEVICE int lane_of_warp() { return threadIdx.x & 31; }
QMOE_DEVICE int warp_of_block() { return threadIdx.x >> 5; }
QMOE_DEVICE int warps_of_block() { return blockDim.x >> 5; }

// A constant that the compiler does not see, so that it is not made again at every use. All lanes, with 128
// bytes of shared memory that nobody uses meanwhile.
QMOE_DEVICE u32 in_register(u32 value, u32 shared) {
  shared_store<u32>(shared + 4 * lane_of_warp(), value);
  __syncwarp();
  const u32 same = shared_load<u32>(shared + 4 * (lane_of_warp() ^ 1));
  __syncwarp();
  return same;
}

// Inclusive scan: the sum of values up to and including this lane's, in groups of LANES lanes.
template <int LANES>
QMOE_DEVICE u32 inclusive_scan(u32 value) {
#ifdef QMOE_EMULATION
  const int lane = threadIdx.x & (LANES - 1);
  for (int distance = 1; distance < LANES; distance *= 2) {
    const u32 other = __shfl_up_sync(ALL_LANES, value, distance, LANES);
    if (lane >= distance) value += other;
  }
#else
  // The same; the shuffle itself says whether there is a lane to add.
#pragma unroll
  for (int distance = 1; distance < LANES; distance *= 2)
    asm volatile(
        "{ .reg .u32 other; .reg .pred exists;\n"
        "  shfl.sync.up.b32 other|exists, %0, %1, %2, 0xffffffff;\n"
        "  @exists add.u32 %0, %0, other; }"
        : "+r"(value)
        : "r"(distance), "n"((32 - LANES) << 8));
#endif
  return value;
}

// Warp reduction: the sum of values over groups of LANES lanes, the same in each of them.
template <int LANES>
QMOE_DEVICE float warp_sum(float value) {
#pragma unroll
  for (int distance = LANES / 2; distance > 0; distance /= 2)
    value += __shfl_xor_sync(ALL_LANES, value, distance);
  return value;
}

// Geometry of a coded tensor, the same for all codings.
struct Shape {
  int num_experts, out_features, in_features;
};

// --- Where the rows of an expert lie ---

// Length of one row in stored units (bytes or codewords). row_lengths are u8 or u16; `shortest` is
// added. Damaged lengths are cut to 2^26 - 1, so that 32 of them and a start fit 32 bits.
QMOE_DEVICE u32 row_length(const void* row_lengths, int length_bytes, u64 index, u32 shortest) {
  const u32 rest = length_bytes == 1 ? static_cast<const u8*>(row_lengths)[index]
                                     : static_cast<const u16*>(row_lengths)[index];
  return min_of(rest + shortest, (1u << 26) - 1);
}

// Bounds of rows, one warp's: 32 lengths and one starting point at a time, kept between calls.
struct RowPlaces {
  int block = -1;
  u32 start = 0, length = 0;  // of row 32 block + lane

  // Bounds of `row` in units from the expert's first, at most `limit`; empty for a row that does
  // not exist. All lanes call it; rows of a warp lie within one block of 32.
  QMOE_DEVICE_MEMBER void find(const void* row_lengths, int length_bytes,
                               const int* row_block_starts, const Shape& shape, int expert,
                               u32 shortest, u32 limit, int row, int* begin, int* end) {
    const int wanted = __shfl_sync(ALL_LANES, row, 0) / ROW_BLOCK;
    if (wanted != block) {
      block = wanted;
      const int own = wanted * ROW_BLOCK + lane_of_warp();
      const int blocks = (shape.out_features + ROW_BLOCK - 1) / ROW_BLOCK;
      length = 0;
      u32 first = 0;
      if (wanted < blocks)
        first = static_cast<u32>(row_block_starts[static_cast<u64>(expert) * blocks + wanted]);
      if (own < shape.out_features)
        length = row_length(row_lengths, length_bytes,
                            static_cast<u64>(expert) * shape.out_features + own, shortest);
      start = min_of(first, limit) + inclusive_scan<32>(length) - length;
    }
    const u32 stop = min_of(__shfl_sync(ALL_LANES, start + length, row & 31), limit);
    const u32 from = min_of(__shfl_sync(ALL_LANES, start, row & 31), limit);
    *begin = row < shape.out_features ? static_cast<int>(from) : 0;
    *end = row < shape.out_features ? static_cast<int>(stop) : 0;
  }
};

}  // namespace qmoe
