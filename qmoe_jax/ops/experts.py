"""The kernels of all experts of one layer: dense, or codes, perhaps with a low-rank correction."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, Int32

from qmoe_jax.codec.codings import get_coding
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
    def by_name(self) -> dict[str, Array]:
        """All arrays; those of floats have gradients."""
        return {"kernel": self.kernel}

    def layout(self) -> Callable[[Mapping[str, Any]], "DenseExperts"]:
        """Return what makes the same of other arrays, named as in `by_name`; it holds none."""
        return lambda arrays: DenseExperts(arrays["kernel"])

    def floats(self, expert: Int[Array, ""]) -> dict[str, Array]:
        """Return an expert's part of the arrays of floats."""
        return {"kernel": own_part(self.kernel, expert)}

    def weights(
        self, floats: Mapping[str, Array], expert: Int[Array, ""]
    ) -> Float[Array, "in out"]:
        """Return an expert's kernel, float32, as a function of its `floats`."""
        del expert
        return floats["kernel"].astype(jnp.float32)

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
    def by_name(self) -> dict[str, Array]:
        """All arrays; those of floats, levels or origins, have gradients."""
        return {**self.arrays, **self.derived}

    def layout(self) -> Callable[[Mapping[str, Any]], "CodedExperts"]:
        """Return what makes the same of other arrays, named as in `by_name`; it holds none."""
        spec, in_features = self.spec, self.in_features
        names = tuple(self.arrays), tuple(self.derived)

        def make(arrays: Mapping[str, Any]) -> CodedExperts:
            stored, derived = ({name: arrays[name] for name in own} for own in names)
            return CodedExperts(spec, stored, in_features, derived)

        return make

    def floats(self, expert: Int[Array, ""]) -> dict[str, Array]:
        """Return an expert's part of the arrays of floats."""
        return {
            name: own_part(array, expert) for name, array in self.arrays.items() if is_float(array)
        }

    def weights(
        self, floats: Mapping[str, Array], expert: Int[Array, ""]
    ) -> Float[Array, "in out"]:
        """Return an expert's kernel, float32, as a function of its `floats`; codes are fixed."""
        coding = get_coding(self.spec.coding)
        codes = coding.decode_expert(self.spec, self.arrays, expert)
        # Levels of this expert alone, or a gradient would be an array of all experts.
        levels = {
            name: floats[name] if name in floats else own_part(self.arrays[name], expert)
            for name, kind in coding.array_kinds.items()
            if kind == "levels"
        }
        own = {name: array[None] for name, array in levels.items()}
        rows = coding.weights(self.spec, own, jnp.zeros((), jnp.int32), codes)
        return rows.reshape(-1, self.in_features).T

    @property
    def out_features(self) -> int:
        """Output features."""
        return self.spec.rows * self.spec.width // self.in_features

    def fetch(self, expert: Int[Array, ""], dtype: DTypeLike) -> Float[Array, "in out"]:
        """One expert's kernel in the activation dtype, decoded with XLA."""
        rows = decode_expert_weights(self.spec, self.arrays, expert, dtype)
        return rows.reshape(-1, self.in_features).T


@dataclasses.dataclass(frozen=True, eq=False)
class AdaptedExperts:
    """Kernels with a low-rank correction: base + a b.

    Attributes:
      base: the kernels.
      a: float [experts, in, rank], or [1, in, rank]: one that all experts share.
      b: float [experts, rank, out], or [1, rank, out].
    """

    base: DenseExperts | CodedExperts
    a: Array
    b: Array

    @property
    def by_name(self) -> dict[str, Array]:
        """All arrays; those of floats have gradients."""
        return {**self.base.by_name, "adapter_a": self.a, "adapter_b": self.b}

    def layout(self) -> Callable[[Mapping[str, Any]], "AdaptedExperts"]:
        """Return what makes the same of other arrays, named as in `by_name`; it holds none."""
        base = self.base.layout()
        return lambda arrays: AdaptedExperts(base(arrays), arrays["adapter_a"], arrays["adapter_b"])

    def floats(self, expert: Int[Array, ""]) -> dict[str, Array]:
        """Return an expert's part of the arrays of floats."""
        own = {"adapter_a": own_part(self.a, expert), "adapter_b": own_part(self.b, expert)}
        return {**self.base.floats(expert), **own}

    def weights(
        self, floats: Mapping[str, Array], expert: Int[Array, ""]
    ) -> Float[Array, "in out"]:
        """Return an expert's kernel, float32, as a function of its `floats`."""
        a, b = (floats[name].astype(jnp.float32) for name in ("adapter_a", "adapter_b"))
        correction = jnp.dot(a, b, precision=lax.Precision.HIGHEST)
        return self.base.weights(floats, expert) + correction

    def fetch(self, expert: Int[Array, ""], dtype: DTypeLike) -> Float[Array, "in out"]:
        """One expert's kernel in the activation dtype, the correction added."""
        a, b = (own_part(array, expert).astype(jnp.float32) for array in (self.a, self.b))
        correction = jnp.dot(a, b, precision=lax.Precision.HIGHEST)
        return (self.base.fetch(expert, jnp.float32) + correction).astype(dtype)


Experts = DenseExperts | CodedExperts | AdaptedExperts


def is_float(array: Array) -> bool:
    """Whether an array has gradients."""
    return jnp.issubdtype(array.dtype, jnp.floating)


def own_part(array: Array, expert: Int[Array, ""]) -> Array:
    """Return an expert's part of an array; the one part of an array that experts share."""
    if array.shape[0] == 1:
        return array[0]
    # Behind a barrier, as in `DenseExperts.fetch`.
    array, expert = lax.optimization_barrier((array, expert))
    return lax.dynamic_index_in_dim(array, expert, keepdims=False)


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
