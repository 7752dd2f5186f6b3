// Compressed experts times their tokens, coding "tunstall": one launch for all (expert, tokens)
// pairs of a layer; one expert is the same with all tokens in it. README.md in this folder has launch
// sizes; the arguments are explained at their structs.
#include "coding_tunstall.cuh"
#include "multiply.cuh"

using namespace qmoe;

// `blocks` on a multiprocessor are worth a few spilled registers: fewer were slower by a tenth and more.
#define TUNSTALL_KERNEL(name, max_tokens, lanes, blocks)                                          \
  extern "C" __global__ void __launch_bounds__(256, blocks)                                       \
      name(const TunstallArrays arrays, const ProductArguments product) {                         \
    multiply<max_tokens>(TunstallCoding<lanes, 4, false>(arrays), product);                       \
  }

TUNSTALL_KERNEL(fused_tunstall_t2_rows4, 2, 8, 4)
TUNSTALL_KERNEL(fused_tunstall_t2_rows1, 2, 32, 4)
TUNSTALL_KERNEL(fused_tunstall_t16_rows4, 16, 8, 3)
TUNSTALL_KERNEL(fused_tunstall_t16_rows1, 16, 32, 3)
