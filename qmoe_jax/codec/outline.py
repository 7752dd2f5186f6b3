"""Sizes of a coded tensor that is stored piece by piece, without its arrays.

A layer's experts are coded batch by batch, by one process or several. Outlines of the batches,
joined, say how large each stored array becomes and where each batch belongs in it.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from qmoe_jax.codec.codings import get_coding
from qmoe_jax.codec.tensor import CodedTensor, TensorSpec, to_offsets
from qmoe_jax.errors import CodecError

_OFFSETS = "expert_offsets"


@dataclasses.dataclass(frozen=True)
class CodedOutline:
    """What a coded tensor stores, but for the contents.

    Attributes:
      spec: of these experts.
      expert_sizes: entries of the code array that each expert has; empty for codings without one.
      dtypes: dtype name of every array.
      trailing: shape of every array behind its first axis.
    """

    spec: TensorSpec
    expert_sizes: tuple[int, ...]
    dtypes: dict[str, str]
    trailing: dict[str, tuple[int, ...]]

    @classmethod
    def of(cls, coded: CodedTensor) -> "CodedOutline":
        """Return the outline of a tensor at hand."""
        offsets = coded.arrays.get(_OFFSETS, np.zeros(1, np.int32))
        return cls(
            coded.spec,
            tuple(np.diff(offsets.astype(np.int64)).tolist()),
            {name: array.dtype.name for name, array in coded.arrays.items()},
            {name: tuple(array.shape[1:]) for name, array in coded.arrays.items()},
        )

    @classmethod
    def join(cls, outlines: Sequence["CodedOutline"]) -> "CodedOutline":
        """Join the outlines of consecutive batches of experts, as `codings.concatenate` joins.

        Raises:
          CodecError: none, or they are not of one tensor.
        """
        if not outlines:
            raise CodecError("No outlines were given; join requires at least one.")
        kinds = {(o.spec.coding, o.spec.rows, o.spec.width) for o in outlines}
        if len(kinds) != 1:
            raise CodecError(
                f"The expert batches differ in (coding, out, in): {sorted(kinds)}; batches of one "
                "tensor have the same."
            )
        spec = dataclasses.replace(
            outlines[0].spec,
            num_experts=sum(o.spec.num_experts for o in outlines),
            max_row_codewords=max(o.spec.max_row_codewords for o in outlines),
        )
        # Only row lengths have a choice, and the widest that a batch needs is what the whole needs.
        widest = {
            name: max((o.dtypes[name] for o in outlines), key=item_bytes)
            for name in outlines[0].dtypes
        }
        sizes = tuple(size for o in outlines for size in o.expert_sizes)
        return cls(spec, sizes, widest, dict(outlines[0].trailing))

    def __post_init__(self) -> None:
        self.expert_offsets()  # refuses more than int32 can count

    def expert_offsets(self) -> np.ndarray:
        """Where each expert begins in the code array, int32 [experts + 1]."""
        return to_offsets(np.array(self.expert_sizes, np.int64), _OFFSETS)

    def start(self, name: str, expert: int) -> int:
        """Return the index on the first axis of an array at which an expert's part begins."""
        if name == get_coding(self.spec.coding).code_array:
            return int(self.expert_offsets()[expert])
        return expert

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of an array."""
        if name == _OFFSETS:
            return (self.spec.num_experts + 1,)
        return (self.start(name, self.spec.num_experts), *self.trailing[name])

    def num_bytes(self, name: str) -> int:
        """Bytes of an array."""
        return item_bytes(self.dtypes[name]) * int(np.prod(self.shape(name), dtype=np.int64))

    def to_json(self) -> dict[str, Any]:
        """All fields; the spec as manifests store it."""
        return dataclasses.asdict(self) | {"spec": self.spec.to_json()}

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> "CodedOutline":
        """Inverse of `to_json`."""
        return cls(
            TensorSpec.from_json(fields["spec"]),
            tuple(fields["expert_sizes"]),
            dict(fields["dtypes"]),
            {name: tuple(shape) for name, shape in fields["trailing"].items()},
        )


def item_bytes(dtype: str) -> int:
    """Bytes of an element of a dtype by name, bfloat16 too."""
    return 2 if dtype == "bfloat16" else np.dtype(dtype).itemsize
