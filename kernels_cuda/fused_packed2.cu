// Compressed experts times their tokens, coding "packed2": one launch for all (expert, tokens)
// pairs of a layer; one expert is the same with all tokens in it. README.md in this folder has launch
// sizes; the arguments are explained at their structs.
#include "coding_packed2.cuh"
#include "multiply.cuh"

using namespace qmoe;

#define PACKED2_KERNEL(name, max_tokens)                                                          \
  extern "C" __global__ void __launch_bounds__(256)                                               \
      name(const Packed2Arrays arrays, const ProductArguments product) {                          \
    multiply<max_tokens>(Packed2Coding(arrays), product);                                         \
  }

PACKED2_KERNEL(fused_packed2_t2, 2)
PACKED2_KERNEL(fused_packed2_t16, 16)
