// What CUDA C++ has built in, for running kernels on a CPU. Included before every kernel source.
//
// Every CUDA thread of a block is a fibre. A warp operation (__syncwarp, shuffles, votes) is a meeting of
// the 32 lanes of a warp, __syncthreads one of the whole block. A meeting to which a lane does not come,
// because it has ended or waits elsewhere, is an error. Only full masks are supported, and block
// sizes that are multiples of 32.
//
// Shared memory is reached through qmoe::shared_load and shared_store only (addresses begin at 0). Each byte remembers who read
// and wrote it: two accesses of different threads, one of them a write, must have a __syncthreads
// between them or, within a warp, a __syncwarp; but qmoe::shared_or, an atomic write, needs none beside
// others of its kind. Shuffles and votes order nothing. Bytes must be written before they are read,
// lie within what the launch asked for, and be aligned.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#define QMOE_EMULATION 1
#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)

namespace emulation {

struct Dim3 {
  unsigned x, y, z;
};

enum class Meeting { block, warp, shuffle, shuffle_up, shuffle_xor, vote };

// State of the running thread and block, set by the scheduler.
extern Dim3 thread_index, block_index, block_dim, grid_dim;

// Blocks the thread until all that must come have come. Returns its part of the result.
unsigned meet(Meeting kind, unsigned mask, unsigned value, int operand, int width, int line);
// Ends the block with an error.
[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));
// Checks and records an access to shared memory; returns its address.
void* shared_access(unsigned offset, unsigned size, unsigned alignment, bool write, int line,
                    const char* file, bool atomic = false);

template <class T>
unsigned bits_of(T value) {
  static_assert(sizeof(T) == 4);
  unsigned bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}
template <class T>
T from_bits(unsigned bits) {
  T value;
  std::memcpy(&value, &bits, 4);
  return value;
}

}  // namespace emulation

#define threadIdx (emulation::thread_index)
#define blockIdx (emulation::block_index)
#define blockDim (emulation::block_dim)
#define gridDim (emulation::grid_dim)

inline void __syncthreads(int line = __builtin_LINE()) {
  emulation::meet(emulation::Meeting::block, ~0u, 0, 0, 32, line);
}
inline void __syncwarp(unsigned mask = ~0u, int line = __builtin_LINE()) {
  emulation::meet(emulation::Meeting::warp, mask, 0, 0, 32, line);
}
template <class T>
T __shfl_sync(unsigned mask, T value, int lane, int width = 32, int line = __builtin_LINE()) {
  return emulation::from_bits<T>(emulation::meet(emulation::Meeting::shuffle, mask,
                                                 emulation::bits_of(value), lane, width, line));
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32,
                 int line = __builtin_LINE()) {
  return emulation::from_bits<T>(emulation::meet(emulation::Meeting::shuffle_up, mask,
                                                 emulation::bits_of(value),
                                                 static_cast<int>(delta), width, line));
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lanes, int width = 32, int line = __builtin_LINE()) {
  return emulation::from_bits<T>(emulation::meet(emulation::Meeting::shuffle_xor, mask,
                                                 emulation::bits_of(value), lanes, width, line));
}
inline unsigned __ballot_sync(unsigned mask, int predicate, int line = __builtin_LINE()) {
  return emulation::meet(emulation::Meeting::vote, mask, predicate != 0, 0, 32, line);
}
inline int __any_sync(unsigned mask, int predicate, int line = __builtin_LINE()) {
  return __ballot_sync(mask, predicate, line) != 0;
}
inline int __all_sync(unsigned mask, int predicate, int line = __builtin_LINE()) {
  return __ballot_sync(mask, predicate, line) == ~0u;
}

template <class T>
T __ldg(const T* pointer) {
  return *pointer;
}
inline unsigned __dp4a(unsigned a, unsigned b, unsigned sum) {
  for (int i = 0; i < 32; i += 8) sum += (a >> i & 255) * (b >> i & 255);
  return sum;
}
inline unsigned __funnelshift_r(unsigned low, unsigned high, unsigned shift) {
  return static_cast<unsigned>((static_cast<uint64_t>(high) << 32 | low) >> (shift & 31));
}
inline unsigned __funnelshift_l(unsigned low, unsigned high, unsigned shift) {
  return static_cast<unsigned>((static_cast<uint64_t>(high) << 32 | low) << (shift & 31) >> 32);
}
inline int __popc(unsigned value) { return __builtin_popcount(value); }
inline int __popcll(unsigned long long value) { return __builtin_popcountll(value); }
inline int __clz(unsigned value) { return value ? __builtin_clz(value) : 32; }
inline unsigned __brev(unsigned value) {
  unsigned result = 0;
  for (int i = 0; i < 32; ++i) result |= (value >> i & 1) << (31 - i);
  return result;
}
inline int __ffs(unsigned value) { return __builtin_ffs(static_cast<int>(value)); }
inline int __ffsll(unsigned long long value) {
  return __builtin_ffsll(static_cast<long long>(value));
}
inline float __uint_as_float(unsigned bits) { return emulation::from_bits<float>(bits); }
inline unsigned __float_as_uint(float value) { return emulation::bits_of(value); }

namespace qmoe {

inline unsigned shared_begin() { return 0; }

template <class T>
T shared_load(unsigned address, int line = __builtin_LINE(), const char* file = __builtin_FILE()) {
  static_assert(std::is_trivially_copyable_v<T>);
  T value;
  std::memcpy(&value,
              emulation::shared_access(address, sizeof(T), alignof(T), false, line, file),
              sizeof(T));
  return value;
}
template <class T>
void shared_store(unsigned address, T value, int line = __builtin_LINE(),
                  const char* file = __builtin_FILE()) {
  std::memcpy(emulation::shared_access(address, sizeof(T), alignof(T), true, line, file), &value,
              sizeof(T));
}
inline void shared_or(unsigned address, unsigned bits, int line = __builtin_LINE(),
                      const char* file = __builtin_FILE()) {
  unsigned value;
  void* const at = emulation::shared_access(address, 4, 4, true, line, file, true);
  std::memcpy(&value, at, 4);
  value |= bits;
  std::memcpy(at, &value, 4);
}

}  // namespace qmoe
