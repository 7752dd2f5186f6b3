"""Levels of rows: what the codings of the "ternary" and "2bit" grids store beside codes."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jaxtyping import BFloat16, Float, Float32, UInt8

from qmoe_jax.codec.tensor import ArrayKind, CodedTensor, Levels, TensorSpec, check_levels
from qmoe_jax.errors import CodecError


class RowLevels:
    """The part of `Coding` that has to do with levels, for codings with an array `levels`."""

    grid: str
    array_kinds: Mapping[str, ArrayKind]

    def check_levels(self, shape: tuple[int, ...], levels: Levels) -> BFloat16[np.ndarray, "..."]:
        """Refuse levels that are not finite bfloat16 [experts, rows, 2]."""
        levels = np.asarray(levels)
        if levels.dtype != ml_dtypes.bfloat16 or levels.shape != (*shape[:2], 2):
            raise CodecError(
                f"levels are {levels.dtype} of shape {levels.shape}; codes of shape {shape} "
                f"require bfloat16 {(*shape[:2], 2)}. Round the levels to bfloat16 before the "
                "codes are chosen."
            )
        check_levels(levels)
        return levels

    def levels_of(self, coded: CodedTensor) -> BFloat16[np.ndarray, "experts rows 2"]:
        """Return the levels."""
        return coded.arrays["levels"]

    def code_parts(self, coded: CodedTensor) -> dict[str, int]:
        """Return one part: all of the codes."""
        (name,) = [name for name, kind in self.array_kinds.items() if kind == "codes"]
        return {"codes": coded.arrays[name].nbytes}

    def weights(
        self,
        spec: TensorSpec,
        arrays: Mapping[str, Any],
        expert: Any,
        codes: UInt8[jax.Array, "rows width"],
    ) -> Float32[jax.Array, "rows width"]:
        """Weights of one expert's codes."""
        levels = jnp.take(jnp.asarray(arrays["levels"]), expert, axis=0, mode="clip")
        return row_weights(self.grid, codes, levels)


def row_weights(
    grid: str, codes: UInt8[jax.Array, "*rows width"], levels: Float[jax.Array, "*rows 2"]
) -> Float32[jax.Array, "*rows width"]:
    """Weights of codes: 0, low or high for ternary codes; scale * (code - zero) for 2-bit codes."""
    first, second = jnp.split(levels.astype(jnp.float32), 2, axis=-1)
    if grid == "ternary":
        return jnp.where(codes == 1, first, jnp.where(codes == 2, second, 0.0))
    return first * (codes.astype(jnp.float32) - second)
