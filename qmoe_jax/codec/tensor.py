"""A coded tensor: the stored form of one layer's expert kernel, and the static facts about it."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import jax
import numpy as np
from jaxtyping import Int32, Int64, UInt8, UInt32

from qmoe_jax.errors import CodecError

NUM_SYMBOLS = {"ternary": 3, "2bit": 4, "lattice": 255}
"""Grids by name: codes are below this."""

ArrayKind = Literal["codes", "levels", "lengths"]
"""What a stored array holds: codes, what gives them values (levels or steps), or where and how rows
lie among the codes."""

Levels = np.ndarray | jax.Array | Mapping[str, np.ndarray | jax.Array]
"""What gives codes their values, as `encode` takes it.

Of ternary and 2-bit codes: bfloat16 [experts, rows, 2]. Of lattice codes: `step_index` uint8
[experts, width] and `origin` float32 [experts].
"""

MAX_WIDTH = 2**23
"""Rows are narrower: decoders count their weights in float32."""
MAX_EXPERT_WEIGHTS = 2**31
"""An expert has fewer weights, and a tensor fewer experts: decoders count them in int32."""

# Fields of a spec -> the keys that manifests store them under, and the minimum of numbers.
_STORED = {
    "coding": ("coding", None),
    "num_experts": ("num_experts", 0),
    "rows": ("out_features", 0),
    "width": ("in_features", 1),
    "max_row_codewords": ("max_row_codewords", 0),
}


@dataclasses.dataclass(frozen=True)
class TensorSpec:
    """What decoding must know at trace time. Hashable, so it can be a static argument of jit.

    Attributes:
      coding: name, one of `codings.coding_names()`.
      num_experts: experts.
      rows: rows of an expert: output features, or groups of their weights.
      width: weights in a row, at least 1.
      max_row_codewords: no row has more codewords than this (0 for codings of fixed size). An upper
        bound, not necessarily reached: layers given a common bound share one compiled decoder.
    """

    coding: str
    num_experts: int
    rows: int
    width: int
    max_row_codewords: int = 0

    def __post_init__(self) -> None:
        for name in _STORED:
            _check_number(name, getattr(self, name))
        # Decoders make room for what a spec says: a damaged one must not ask for all memory.
        if self.width >= MAX_WIDTH or max(1, self.rows) * self.width >= MAX_EXPERT_WEIGHTS:
            raise CodecError(
                f"A tensor spec says {self.rows} rows of {self.width} weights an expert "
                "(out_features, in_features); a row must have fewer than 2^23 weights, and "
                "an expert fewer than 2^31. Split the kernel."
            )
        if self.num_experts >= MAX_EXPERT_WEIGHTS:
            raise CodecError(
                f"A tensor spec says {self.num_experts} experts; there must be fewer than 2^31. "
                "Split the tensor."
            )
        most = 2 * self.width + 64
        if self.max_row_codewords > most:
            raise CodecError(
                f"TensorSpec.max_row_codewords is {self.max_row_codewords}; a row of {self.width} "
                f"weights may have a bound of at most {most} = 2 in + 64. The manifest is damaged."
            )

    @property
    def num_weights(self) -> int:
        """Weights in the whole tensor."""
        return self.num_experts * self.rows * self.width

    def to_json(self) -> dict[str, Any]:
        """Return the fields as a JSON object, under the keys that the manifest stores."""
        return {stored: getattr(self, name) for name, (stored, _) in _STORED.items()}

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> "TensorSpec":
        """Rebuild a spec from `to_json`'s object; refuse missing and unknown fields."""
        expected = {stored for stored, _ in _STORED.values()}
        if set(fields) != expected:
            raise CodecError(
                f"A tensor spec has the fields {sorted(fields)}; the format requires exactly "
                f"{sorted(expected)}. The manifest is damaged or of another version."
            )
        if not isinstance(fields["coding"], str):
            raise CodecError(f"A tensor spec's coding is {fields['coding']!r}; it must be a name.")
        for name, (stored, _) in _STORED.items():
            _check_number(name, fields[stored])
        return cls(**{name: fields[stored] for name, (stored, _) in _STORED.items()})


def _check_number(name: str, value: Any) -> None:
    stored, lowest = _STORED[name]
    if lowest is None or (type(value) is int and value >= lowest):
        return
    also = "" if name == stored else f" (stored as {stored})"
    raise CodecError(
        f"TensorSpec.{name}{also} is {value!r}; it must be an integer of at least {lowest}."
    )


@dataclasses.dataclass(frozen=True, eq=False)
class CodedTensor:
    """A spec and its arrays on the host. FORMAT.md lists the arrays of each coding."""

    spec: TensorSpec
    arrays: dict[str, np.ndarray]


def to_offsets(counts: np.ndarray, name: str) -> np.ndarray:
    """Return cumulative sums of counts [..., n] along the last axis, from 0: int32 [..., n + 1]."""
    offsets = np.zeros((*counts.shape[:-1], counts.shape[-1] + 1), np.int64)
    np.cumsum(counts, axis=-1, dtype=np.int64, out=offsets[..., 1:])
    if offsets.size and offsets.max() >= 2**31:
        raise CodecError(
            f"{name} would reach {offsets.max()} codewords; a coded tensor holds fewer than 2**31, "
            "for its offsets are int32. Split the experts over several coded tensors."
        )
    return offsets.astype(np.int32)


def join_batches(batches: Sequence[CodedTensor]) -> CodedTensor:
    """Join the arrays of consecutive expert batches; `expert_offsets` are counted anew."""
    spec = dataclasses.replace(
        batches[0].spec,
        num_experts=sum(b.spec.num_experts for b in batches),
        max_row_codewords=max(b.spec.max_row_codewords for b in batches),
    )
    sizes = np.concatenate([np.diff(b.arrays["expert_offsets"]) for b in batches])
    offsets = to_offsets(sizes, "expert_offsets")  # before the copying: it may refuse
    arrays = {
        name: np.concatenate([b.arrays[name] for b in batches])
        for name in batches[0].arrays
        if name != "expert_offsets"
    }
    return CodedTensor(spec, arrays | {"expert_offsets": offsets})


def words_as_bytes(words: UInt32[np.ndarray, "words"]) -> UInt8[np.ndarray, "bytes"]:
    """Bytes of words, the lowest first."""
    return np.ascontiguousarray(words, "<u4").view(np.uint8)


def in_words(
    data: UInt8[np.ndarray, "bytes"], expert_bytes: Int64[np.ndarray, "experts"], most: int
) -> tuple[UInt32[np.ndarray, "words"], Int32[np.ndarray, "experts+1"]]:
    """Start every expert at a new word; words and expert offsets.

    Args:
      data: of all experts, one after another.
      expert_bytes: bytes of each expert.
      most: an expert has fewer words.
    """
    sizes = (expert_bytes + 3) // 4
    if sizes.max(initial=0) >= most:
        raise CodecError(too_many_words(int(sizes.max()), most))
    offsets = to_offsets(sizes, "expert_offsets")
    padded = np.zeros(4 * int(offsets[-1]), np.uint8)
    start = 0
    for expert, size in enumerate(expert_bytes):
        first = 4 * int(offsets[expert])
        padded[first : first + size] = data[start : start + size]
        start += size
    return padded.view("<u4").astype(np.uint32, copy=False), offsets


def too_many_words(num_words: int, most: int) -> str:
    """Word the refusal of an expert that is too large."""
    return (
        f"An expert has {num_words} words; its coding requires fewer than {most}, for decoders "
        "count bits in int32. Split the rows over several coded tensors."
    )


def row_length_dtype(max_row_codewords: int) -> np.dtype:
    """Dtype of `row_lengths`: uint8 if every row of a tensor with that bound fits, else uint16."""
    if max_row_codewords >= 2**16:
        raise CodecError(
            f"Rows have up to {max_row_codewords} codewords; row lengths are uint16, so a row has "
            "fewer than 65536. Split the rows over several coded tensors by columns."
        )
    return np.dtype(np.uint8 if max_row_codewords < 2**8 else np.uint16)


def check_offsets(name: str, offsets: np.ndarray, total: int, things: str) -> None:
    """Refuse offsets that do not rise from 0 to `total`, the number of `things` they index."""
    if offsets[0] != 0:
        raise CodecError(f"{name} start at {offsets[0]}; offsets must start at 0.")
    if (bad := np.flatnonzero(offsets[1:] < offsets[:-1])).size:
        at = bad[0]
        raise CodecError(
            f"{name} fall from {offsets[at]} to {offsets[at + 1]} at index {at + 1}; offsets must "
            "not decrease."
        )
    if offsets[-1] != total:
        raise CodecError(
            f"{name} end at {offsets[-1]}, but there are {total} {things}; the two must agree. "
            "One of the arrays is truncated."
        )


def check_array(
    arrays: Mapping[str, np.ndarray], name: str, dtype: Any, shape: tuple[int | None, ...]
) -> np.ndarray:
    """Return arrays[name] after checking dtype and shape; None in the shape is any length."""
    array, dtype = arrays[name], np.dtype(dtype)
    if array.dtype != dtype:
        raise CodecError(f"Array '{name}' is {array.dtype}; the format requires {dtype}.")
    fits = array.ndim == len(shape) and all(
        want is None or have == want for have, want in zip(array.shape, shape, strict=True)
    )
    if not fits:
        wanted = ", ".join("any" if n is None else str(n) for n in shape)
        raise CodecError(
            f"Array '{name}' has shape {array.shape}; the tensor's spec requires ({wanted}). The "
            "array is truncated or belongs to another tensor."
        )
    return array


def check_names(arrays: Mapping[str, np.ndarray], names: tuple[str, ...]) -> None:
    """Refuse a missing or an unknown array."""
    if set(arrays) != set(names):
        raise CodecError(
            f"The coded tensor has the arrays {sorted(arrays)}; its coding requires exactly "
            f"{sorted(names)}."
        )


def check_levels(levels: np.ndarray) -> None:
    """Refuse levels that are NaN or infinite. bfloat16 [experts, rows, 2]."""
    finite = np.isfinite(levels)
    if not finite.all():
        expert, row, level = np.argwhere(~finite)[0]
        raise CodecError(
            f"levels[{expert}, {row}, {level}] is {levels[expert, row, level]}; levels must be "
            "finite. Quantize the tensor again, from finite weights."
        )


def zero_codes(levels: np.ndarray) -> np.ndarray:
    """Return the code of the weight 0 in each row of a 2-bit tensor, int64 [experts, rows].

    Levels (scale, zero) whose zero is no code have 0 here.
    """
    zero = levels[..., 1].astype(np.float32)
    return np.where(np.isin(zero, (1, 2, 3)), zero, 0).astype(np.int64)
