// Compressed experts times many tokens each, coding "tunstall", by tensor cores (compute capability
// 8.0). README.md in this folder has launch sizes; the arguments are explained at their structs.
#include "coding_tunstall.cuh"
#include "matmul.cuh"

using namespace qmoe;

#define MATMUL_KERNEL(name, tiles)                                                                \
  extern "C" __global__ void __launch_bounds__(512, 2)                                            \
      name(const TunstallArrays arrays, const MatmulArguments product) {                          \
    matmul<tiles>(TunstallCoding<8, 4, false, 1>(arrays), product);                                  \
  }

MATMUL_KERNEL(matmul_tunstall_t8, 1)
MATMUL_KERNEL(matmul_tunstall_t16, 2)
MATMUL_KERNEL(matmul_tunstall_t32, 4)
MATMUL_KERNEL(matmul_tunstall_t64, 8)
