"""The "lattice_plain" coding: lattice codes as they are, a byte each. Interim, to be replaced.

It lets the pipeline store, load and run lattice models until a coding near the entropy is there;
`quantization.code_bits` says what that would need. `codings` keeps it apart from the codings of the
format: FORMAT.md does not have it.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int64, UInt8

from qmoe_jax.codec.cuda_interface import CudaInterface
from qmoe_jax.codec.tensor import ArrayKind, CodedTensor, TensorSpec, check_array, check_names
from qmoe_jax.errors import CodecError


class LatticePlainCoding:
    """Codes uint8 [experts, rows, width]; steps as an index a column and an origin an expert."""

    name = "lattice_plain"
    grid = "lattice"
    num_symbols = 255
    array_kinds: Mapping[str, ArrayKind] = {
        "plain": "codes",
        "step_index": "levels",
        "origin": "levels",
    }
    array_names: tuple[str, ...] = tuple(array_kinds)
    code_array: str | None = None
    cuda: CudaInterface | None = None

    def encode(self, codes: np.ndarray, levels: Mapping[str, np.ndarray]) -> CodedTensor:
        """Take codes uint8 [experts, rows, width] over."""
        spec = TensorSpec(self.name, *codes.shape)
        coded = CodedTensor(spec, {"plain": codes} | dict(levels))
        self.validate(coded)
        return coded

    def validate(self, coded: CodedTensor) -> None:
        """Check names, dtypes, shapes, and that origins are finite."""
        spec = coded.spec
        check_names(coded.arrays, self.array_names)
        experts = spec.num_experts
        codes = check_array(coded.arrays, "plain", np.uint8, (experts, spec.rows, spec.width))
        check_array(coded.arrays, "step_index", np.uint8, (experts, spec.width))
        origin = check_array(coded.arrays, "origin", np.float32, (experts,))
        if codes.size and codes.max() >= self.num_symbols:
            raise CodecError(f"codes hold {codes.max()}; lattice codes end at 254.")
        if not np.isfinite(origin).all():
            raise CodecError("an origin is not finite; quantize again, from finite weights.")

    def concatenate(self, batches: Sequence[CodedTensor]) -> CodedTensor:
        """Join the arrays along the expert axis."""
        spec = dataclasses.replace(
            batches[0].spec, num_experts=sum(b.spec.num_experts for b in batches)
        )
        arrays = {n: np.concatenate([b.arrays[n] for b in batches]) for n in self.array_names}
        return CodedTensor(spec, arrays)

    def slice_experts(self, coded: CodedTensor, start: int, stop: int) -> CodedTensor:
        """Slice the arrays along the expert axis (views)."""
        spec = dataclasses.replace(coded.spec, num_experts=stop - start)
        return CodedTensor(spec, {n: coded.arrays[n][start:stop] for n in self.array_names})

    def decode_expert(
        self, spec: TensorSpec, arrays: Mapping[str, Any], expert: Any
    ) -> UInt8[jax.Array, "rows width"]:
        """Take one expert's codes."""
        return jnp.take(jnp.asarray(arrays["plain"]), expert, axis=0, mode="clip")

    def decode_numpy_reference(self, coded: CodedTensor) -> UInt8[np.ndarray, "experts rows width"]:
        """Return all codes."""
        return coded.arrays["plain"]

    def symbol_counts(self, coded: CodedTensor) -> Int64[np.ndarray, "symbols"]:
        """Count each code."""
        return np.bincount(coded.arrays["plain"].reshape(-1), minlength=self.num_symbols).astype(
            np.int64
        )
