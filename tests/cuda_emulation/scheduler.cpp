// Fibres, meetings and the record of shared memory; see emulation.h. Compiled together with the kernels.
#include "emulation.h"

#include <csetjmp>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <memory>
#include <mutex>
#include <random>
#include <string>
#include <vector>

#include <ucontext.h>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#ifndef QMOE_RECORD_SHARED
#define QMOE_RECORD_SHARED 1  // 0: no record of who accessed what; quicker
#endif

namespace emulation {

Dim3 thread_index, block_index, block_dim, grid_dim;

namespace {

constexpr size_t STACK_BYTES = 256 * 1024;
constexpr unsigned MAX_SHARED_BYTES = 227 * 1024;  // of the largest multiprocessor
constexpr unsigned FULL = ~0u;

enum class State { fresh, ready, waiting, done };

struct Fibre {
  State state;
  Meeting kind;
  unsigned mask, value, result;
  int operand, width, line;
  ucontext_t context;
#ifdef __SANITIZE_ADDRESS__
  void* fake_stack;
#else
  jmp_buf jump;
#endif
};

constexpr int SEVERAL = -1;

// Who accessed a byte of shared memory. Epochs count the barriers passed.
struct Record {
  bool written, atomically;
  int writer, writer_warp;  // SEVERAL: since the latest barrier there were others, all atomic
  unsigned write_block_epoch, write_warp_epoch;
  // Readers since the latest __syncthreads: warps, and the lanes of the latest warp since its latest
  // __syncwarp. If several warps read, any write races with one of them.
  unsigned read_block_epoch, read_warp_epoch;
  unsigned read_warps, read_lanes;
};

struct Block {
  std::vector<Fibre> fibres;
  std::vector<std::unique_ptr<char[]>> stacks;
  std::vector<unsigned> warp_epochs;
  unsigned block_epoch = 1;
  std::unique_ptr<char[]> shared;
  unsigned shared_bytes = 0;
  std::vector<Record> records;
  const std::function<void()>* kernel = nullptr;
  int current = -1;
  std::string error;
  ucontext_t scheduler;
#ifdef __SANITIZE_ADDRESS__
  void* scheduler_fake_stack = nullptr;
  const void* scheduler_stack = nullptr;
  size_t scheduler_stack_bytes = 0;
#else
  jmp_buf scheduler_jump;
#endif
};

Block block;

const char* name_of(Meeting kind) {
  static const char* const names[] = {"__syncthreads",  "__syncwarp",       "__shfl_sync",
                                      "__shfl_up_sync", "__shfl_xor_sync", "a vote"};
  return names[static_cast<int>(kind)];
}

std::string format(const char* pattern, va_list arguments) {
  char text[512];
  std::vsnprintf(text, sizeof text, pattern, arguments);
  return text;
}

void note_error(const char* pattern, ...) {
  va_list arguments;
  va_start(arguments, pattern);
  if (block.error.empty()) {
    block.error = format(pattern, arguments);
    char where[96];
    std::snprintf(where, sizeof where, " [block (%u, %u, %u)]", block_index.x, block_index.y,
                  block_index.z);
    block.error += where;
  }
  va_end(arguments);
}

// --- Switching between the scheduler and fibres ---

void to_scheduler(bool for_good) {
  Fibre& fibre = block.fibres[block.current];
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_start_switch_fiber(for_good ? nullptr : &fibre.fake_stack, block.scheduler_stack,
                                 block.scheduler_stack_bytes);
  swapcontext(&fibre.context, &block.scheduler);
  __sanitizer_finish_switch_fiber(fibre.fake_stack, &block.scheduler_stack,
                                  &block.scheduler_stack_bytes);
#else
  // Unlike swapcontext, these make no system call.
  if (for_good || !_setjmp(fibre.jump)) _longjmp(block.scheduler_jump, 1);
#endif
}

void fibre_main() {
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(nullptr, &block.scheduler_stack, &block.scheduler_stack_bytes);
#endif
  (*block.kernel)();
  block.fibres[block.current].state = State::done;
  to_scheduler(true);
  std::abort();
}

void run_fibre(int index) {
  Fibre& fibre = block.fibres[index];
  block.current = index;
  const unsigned x = index % block_dim.x, rest = index / block_dim.x;
  thread_index = Dim3{x, rest % block_dim.y, rest / block_dim.y};
  const bool fresh = fibre.state == State::fresh;
  if (fresh) {
    getcontext(&fibre.context);
    fibre.context.uc_stack.ss_sp = block.stacks[index].get();
    fibre.context.uc_stack.ss_size = STACK_BYTES;
    fibre.context.uc_link = nullptr;
    makecontext(&fibre.context, fibre_main, 0);
  }
  fibre.state = State::ready;
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_start_switch_fiber(&block.scheduler_fake_stack, block.stacks[index].get(),
                                 STACK_BYTES);
  swapcontext(&block.scheduler, &fibre.context);
  __sanitizer_finish_switch_fiber(block.scheduler_fake_stack, nullptr, nullptr);
#else
  if (!_setjmp(block.scheduler_jump)) {
    if (fresh) setcontext(&fibre.context);
    else _longjmp(fibre.jump, 1);
  }
#endif
}

// --- Meetings ---

void describe(int index, char* text, size_t size) {
  const Fibre& fibre = block.fibres[index];
  if (fibre.state == State::done) std::snprintf(text, size, "thread %d has ended", index);
  else
    std::snprintf(text, size, "thread %d waits at %s of line %d (operand %d, width %d)", index,
                  name_of(fibre.kind), fibre.line, fibre.operand, fibre.width);
}

bool same_meeting(const Fibre& a, const Fibre& b) {
  if (a.state != b.state) return false;
  if (a.state == State::done) return true;
  const bool operand_counts =
      a.kind == Meeting::shuffle_up || a.kind == Meeting::shuffle_xor;
  return a.kind == b.kind && a.line == b.line && a.width == b.width &&
         (!operand_counts || a.operand == b.operand);
}

// All of [first, last) must stand at the same place.
bool agree(int first, int last, const char* what) {
  for (int index = first + 1; index < last; ++index) {
    if (same_meeting(block.fibres[first], block.fibres[index])) continue;
    char one[160], other[160];
    describe(first, one, sizeof one);
    describe(index, other, sizeof other);
    note_error("divergent %s: %s, but %s", what, one, other);
    return false;
  }
  return true;
}

void finish_warp_meeting(int first) {
  Fibre* lanes = &block.fibres[first];
  unsigned ballot = 0;
  for (int lane = 0; lane < 32; ++lane) ballot |= (lanes[lane].value != 0 ? 1u : 0u) << lane;
  for (int lane = 0; lane < 32; ++lane) {
    Fibre& fibre = lanes[lane];
    const int group = lane / fibre.width * fibre.width;
    int source = lane;
    switch (fibre.kind) {
      case Meeting::shuffle:
        source = group + (fibre.operand & (fibre.width - 1));
        break;
      case Meeting::shuffle_up:
        if (lane - fibre.operand >= group) source = lane - fibre.operand;
        break;
      case Meeting::shuffle_xor:
        if ((lane ^ fibre.operand) < group + fibre.width) source = lane ^ fibre.operand;
        break;
      default:
        break;
    }
    fibre.result = fibre.kind == Meeting::vote ? ballot : lanes[source].value;
  }
  if (lanes[0].kind == Meeting::warp) ++block.warp_epochs[first / 32];
  for (int lane = 0; lane < 32; ++lane) lanes[lane].state = State::ready;
}

void run_block(unsigned num_threads, std::mt19937& random, int order) {
  std::vector<int> turns(num_threads);
  for (unsigned i = 0; i < num_threads; ++i) turns[i] = order == 1 ? num_threads - 1 - i : i;
  while (block.error.empty()) {
    if (order > 1)
      for (unsigned i = num_threads - 1; i > 0; --i) std::swap(turns[i], turns[random() % (i + 1)]);
    for (const int index : turns) {
      const State state = block.fibres[index].state;
      if (state == State::fresh || state == State::ready) run_fibre(index);
      if (!block.error.empty()) return;
    }
    // Now everybody waits or has ended.
    bool at_barrier = true;
    for (unsigned first = 0; first < num_threads; first += 32) {
      if (!agree(first, first + 32, "warp")) return;
      const Fibre& fibre = block.fibres[first];
      if (fibre.state == State::waiting && fibre.kind != Meeting::block) {
        finish_warp_meeting(first);
        at_barrier = false;
      }
    }
    if (!at_barrier) continue;
    if (!agree(0, num_threads, "block")) return;
    if (block.fibres[0].state == State::done) return;
    ++block.block_epoch;
    for (Fibre& fibre : block.fibres) fibre.state = State::ready;
  }
}

// --- Launches ---

struct Kernel {
  std::string name, signature;
  std::function<void(void**)> call;
};

std::vector<Kernel>& kernels() {
  static std::vector<Kernel> list;
  return list;
}

// What a parameter is: c a pointer to const, p another pointer, sN a struct of N bytes, N a number
// of N bytes.
template <class T>
std::string parameter() {
  if (std::is_pointer_v<T>) return std::is_const_v<std::remove_pointer_t<T>> ? "c" : "p";
  return (std::is_class_v<T> ? "s" : "") + std::to_string(sizeof(T));
}

std::string joined(std::initializer_list<std::string> parts) {
  std::string text;
  for (const std::string& part : parts) text += (text.empty() ? "" : ",") + part;
  return text;
}

template <class... T, size_t... I>
void call_with(void (*function)(T...), void** arguments, std::index_sequence<I...>) {
  function(*static_cast<T*>(arguments[I])...);
}

template <class... T>
int add_kernel(const char* name, void (*function)(T...)) {
  kernels().push_back({name, joined({parameter<T>()...}), [function](void** arguments) {
                         call_with(function, arguments, std::index_sequence_for<T...>());
                       }});
  return 0;
}

}  // namespace

unsigned meet(Meeting kind, unsigned mask, unsigned value, int operand, int width, int line) {
  if (mask != FULL)
    fail("thread %d: %s of line %d has the mask %#x; only full masks are supported", block.current,
         name_of(kind), line, mask);
  if (width < 1 || width > 32 || (width & (width - 1)) != 0)
    fail("thread %d: the shuffle of line %d has the width %d", block.current, line, width);
  Fibre& fibre = block.fibres[block.current];
  fibre.kind = kind;
  fibre.mask = mask;
  fibre.value = value;
  fibre.operand = operand;
  fibre.width = width;
  fibre.line = line;
  fibre.state = State::waiting;
  to_scheduler(false);
  return fibre.result;
}

void fail(const char* pattern, ...) {
  va_list arguments;
  va_start(arguments, pattern);
  const std::string text = format(pattern, arguments);
  va_end(arguments);
  note_error("%s", text.c_str());
  to_scheduler(true);
  std::abort();
}

void* shared_access(unsigned offset, unsigned size, unsigned alignment, bool write, int line,
                    const char* file, bool atomic) {
  const int thread = block.current;
  const char* const what = write ? "write" : "read";
  if (const char* slash = std::strrchr(file, '/')) file = slash + 1;
  if (offset + static_cast<uint64_t>(size) > block.shared_bytes)
    fail("thread %d: %s of %u bytes at shared offset %u, but the launch has %u bytes (%s:%d)",
         thread, what, size, offset, block.shared_bytes, file, line);
  if (offset % alignment != 0)
    fail("thread %d: %s at shared offset %u is not aligned to %u bytes (%s:%d)", thread, what,
         offset, alignment, file, line);
#if QMOE_RECORD_SHARED
  const int warp = thread / 32;
  const unsigned lane_bit = 1u << thread % 32, warp_bit = 1u << warp;
  const unsigned block_epoch = block.block_epoch, warp_epoch = block.warp_epochs[warp];
  for (unsigned i = offset; i < offset + size; ++i) {
    Record& record = block.records[i];
    if ((!write || atomic) && !record.written)
      fail("thread %d: read of shared offset %u, which nobody has written (%s:%d)", thread, i, file,
           line);
    const bool recent = record.written && record.write_block_epoch == block_epoch &&
                        (record.writer_warp != warp || record.write_warp_epoch == warp_epoch);
    const bool together = recent && atomic && record.atomically;
    if (recent && !together && record.writer != thread)
      fail("race on shared offset %u: %s by thread %d after a write by thread %d, with no barrier "
           "between (%s:%d)",
           i, what, thread, record.writer, file, line);
    if (write) {
      if (record.read_block_epoch == block_epoch) {
        const unsigned lanes = record.read_warp_epoch == warp_epoch ? record.read_lanes : 0;
        if ((record.read_warps & ~warp_bit) != 0 || (lanes & ~lane_bit) != 0)
          fail("race on shared offset %u: write by thread %d after reads by others, with no barrier "
               "between (%s:%d)",
               i, thread, file, line);
      }
      record.written = true;
      record.atomically = atomic;
      record.writer_warp = together && record.writer_warp != warp ? SEVERAL : warp;
      record.writer = together && record.writer != thread ? SEVERAL : thread;
      record.write_block_epoch = block_epoch;
      record.write_warp_epoch = warp_epoch;
    } else {
      if (record.read_block_epoch != block_epoch) {
        record.read_block_epoch = block_epoch;
        record.read_warps = record.read_lanes = 0;
      }
      if (record.read_warps != warp_bit || record.read_warp_epoch != warp_epoch)
        record.read_lanes = 0;
      record.read_warps |= warp_bit;
      record.read_warp_epoch = warp_epoch;
      record.read_lanes |= lane_bit;
    }
  }
#endif
  return block.shared.get() + offset;
}

}  // namespace emulation

#include "kernels.inc"  // generated: the kernel sources, and REGISTER(name) for each kernel

extern "C" {

// Names and parameters of all kernels: "name parameter,parameter\n" each.
const char* emulation_kernels() {
  static std::string text;
  text.clear();
  for (const auto& kernel : emulation::kernels())
    text += kernel.name + " " + kernel.signature + "\n";
  return text.c_str();
}

// Runs a kernel. `arguments` points to each argument's value. `order`: 0 threads take turns forwards,
// 1 backwards, above in an order drawn with that seed, anew after each meeting. Returns 0, or 1 with a
// message.
int emulation_launch(const char* name, const unsigned* grid, const unsigned* threads,
                     unsigned shared_bytes, void** arguments, int order, char* message,
                     size_t message_size) {
  using namespace emulation;
  static std::mutex one_at_a_time;
  const std::lock_guard<std::mutex> lock(one_at_a_time);
  const Kernel* found = nullptr;
  for (const auto& kernel : kernels())
    if (kernel.name == name) found = &kernel;
  block.error.clear();
  const unsigned num_threads = threads[0] * threads[1] * threads[2];
  if (!found) block.error = "there is no such kernel";
  else if (num_threads == 0 || num_threads % 32 != 0 || num_threads > 1024)
    block.error = "a block must have a multiple of 32 threads, at most 1024";
  else if (grid[0] == 0 || grid[1] == 0 || grid[2] == 0 || grid[0] > 0x7fffffff ||
           grid[1] > 65535 || grid[2] > 65535)
    block.error = "grid dimensions must be from 1 to 2147483647, 65535, 65535";
  else if (shared_bytes > MAX_SHARED_BYTES)
    block.error = "more shared memory than any device has";
  if (block.error.empty()) {
    const std::function<void()> kernel = [&] { found->call(arguments); };
    block.kernel = &kernel;
    while (block.stacks.size() < num_threads)
      block.stacks.emplace_back(new char[STACK_BYTES]);
    block.shared.reset(new char[shared_bytes + 1]);
    block.shared_bytes = shared_bytes;
    block_dim = Dim3{threads[0], threads[1], threads[2]};
    grid_dim = Dim3{grid[0], grid[1], grid[2]};
    std::mt19937 random(order);
    for (unsigned z = 0; z < grid[2]; ++z)
      for (unsigned y = 0; y < grid[1]; ++y)
        for (unsigned x = 0; x < grid[0] && block.error.empty(); ++x) {
          block_index = Dim3{x, y, z};
          block.fibres.assign(num_threads, Fibre{});
          block.warp_epochs.assign(num_threads / 32, 1);
          block.block_epoch = 1;
          std::memset(block.shared.get(), 0xa5, shared_bytes);
#if QMOE_RECORD_SHARED
          block.records.assign(shared_bytes, Record{});
#endif
          run_block(num_threads, random, order);
        }
    if (!block.error.empty()) {
#ifdef __SANITIZE_ADDRESS__
      // Abandoned frames have left marks on the stacks.
      for (auto& stack : block.stacks) ASAN_UNPOISON_MEMORY_REGION(stack.get(), STACK_BYTES);
#endif
    }
  }
  std::snprintf(message, message_size, "%s", block.error.c_str());
  return block.error.empty() ? 0 : 1;
}

}  // extern "C"
