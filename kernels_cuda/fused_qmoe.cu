// Compressed experts times their tokens, coding "qmoe": one launch for all (expert, tokens) pairs of a
// layer; one expert is the same with all tokens in it. README.md in this folder has arguments and launch
// sizes.
#include "coding_qmoe.cuh"
#include "multiply.cuh"

using namespace qmoe;

#define QMOE_KERNEL(name, max_tokens)                                                             \
  extern "C" __global__ void __launch_bounds__(256) name(QMOE_PARAMETERS, TOKEN_PARAMETERS) {     \
    QmoeCoding coding;                                                                            \
    QMOE_ARRAYS(coding);                                                                          \
    MULTIPLY(max_tokens, coding);                                                                 \
  }

QMOE_KERNEL(fused_qmoe_t2, 2)
QMOE_KERNEL(fused_qmoe_t16, 16)
