"""The kernels of all experts of one layer: dense, or codes."""

import dataclasses
from collections.abc import Mapping

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, Int32

from qmoe_jax.codec.decode import decode_expert_weights
from qmoe_jax.codec.tensor import TensorSpec

ROWS_OF_A_BLOCK = 32
"""Rows whose lengths a warp of the CUDA kernels adds up itself."""


@dataclasses.dataclass(frozen=True, eq=False)
class DenseExperts:
    """Kernels as an array.

    Attributes:
      kernel: float [experts, in, out].
    """

    kernel: Array

    @property
    def leaves(self) -> tuple[Array, ...]:
        """The arrays that kernels are fetched from."""
        return (self.kernel,)

    def fetch(self, expert: Int[Array, ""], dtype: DTypeLike) -> Float[Array, "in out"]:
        """One expert's kernel in the activation dtype."""
        # Behind a barrier that the loop's own expert goes through. Else XLA on a CPU, which
        # computes in float32, converts bfloat16 kernels of all experts first, at every call.
        kernel, expert = lax.optimization_barrier((self.kernel, expert))
        return lax.dynamic_index_in_dim(kernel, expert, keepdims=False).astype(dtype)


@dataclasses.dataclass(frozen=True, eq=False)
class CodedExperts:
    """Kernels as codes.

    Attributes:
      spec: static facts; rows are output features, or groups of their weights.
      arrays: the stored arrays by name.
      in_features: input features. Where `spec.width` is less, each output feature has several
        rows, which lie side by side.
      derived: by name what CUDA kernels need besides and the arrays determine, of
        `ops.cuda.kernels.derive`; without, it is found anew at every call of a kernel.
    """

    spec: TensorSpec
    arrays: Mapping[str, Array]
    in_features: int
    derived: Mapping[str, Array] = dataclasses.field(default_factory=dict)

    @property
    def leaves(self) -> tuple[Array, ...]:
        """The arrays that kernels are fetched from."""
        return tuple(self.arrays.values())

    @property
    def out_features(self) -> int:
        """Output features."""
        return self.spec.rows * self.spec.width // self.in_features

    def fetch(self, expert: Int[Array, ""], dtype: DTypeLike) -> Float[Array, "in out"]:
        """One expert's kernel in the activation dtype, decoded with XLA."""
        rows = decode_expert_weights(self.spec, self.arrays, expert, dtype)
        return rows.reshape(-1, self.in_features).T


Experts = DenseExperts | CodedExperts


def find_row_block_starts(
    spec: TensorSpec, arrays: Mapping[str, Array | np.ndarray]
) -> Int32[Array, "experts blocks"] | None:
    """Where every 32nd row of codes begins in its expert, in bytes (`qmoe`: codewords).

    None for codings whose rows all have one size. The CUDA kernels need it; it is not stored,
    since it follows from the lengths, of rows or of blocks of 32.
    """
    if "block_lengths" in arrays:
        sums = jnp.asarray(arrays["block_lengths"]).astype(jnp.int32)
        return jnp.cumsum(sums, axis=1) - sums
    if "row_lengths" not in arrays:
        return None
    lengths = jnp.asarray(arrays["row_lengths"]).astype(jnp.int32)
    if "shortest_rows" in arrays:
        lengths = lengths + jnp.asarray(arrays["shortest_rows"])[:, None]
    missing = -spec.rows % ROWS_OF_A_BLOCK
    blocks = jnp.pad(lengths, ((0, 0), (0, missing))).reshape(spec.num_experts, -1, ROWS_OF_A_BLOCK)
    sums = blocks.sum(axis=2)
    return jnp.cumsum(sums, axis=1) - sums
