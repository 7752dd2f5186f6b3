// Compressed experts times their tokens, coding "qmoe": one launch for all (expert, tokens)
// pairs of a layer; one expert is the same with all tokens in it. README.md in this folder has launch
// sizes; the arguments are explained at their structs.
#include "coding_qmoe.cuh"
#include "multiply.cuh"

using namespace qmoe;

#define QMOE_KERNEL(name, max_tokens)                                                             \
  extern "C" __global__ void __launch_bounds__(256)                                               \
      name(const QmoeArrays arrays, const ProductArguments product) {                             \
    multiply<max_tokens>(QmoeCoding(arrays), product);                                            \
  }

QMOE_KERNEL(fused_qmoe_t2, 2)
QMOE_KERNEL(fused_qmoe_t16, 16)
