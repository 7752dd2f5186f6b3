"""How large a coded tensor is, beside what its codes would need at least."""

import math

import numpy as np
from jaxtyping import Int64

from qmoe_jax.codec.codings import get_coding
from qmoe_jax.codec.outline import CodedOutline
from qmoe_jax.codec.tensor import CodedTensor


def bits(coded: CodedTensor) -> dict[str, int | float]:
    """Count every stored bit of a coded tensor; see `outline_bits`."""
    counts = get_coding(coded.spec.coding).symbol_counts(coded)
    return outline_bits(CodedOutline.of(coded), counts)


def bits_by_part(coded: CodedTensor) -> dict[str, int]:
    """Count the stored bits of a valid tensor by part.

    Parts are those that the coding divides its code array into, with what is left of it as
    "filler", and every other array by name. They add up to the total of `bits`.
    """
    coding = get_coding(coded.spec.coding)
    parts: dict[str, int] = {}
    for name, kind in coding.array_kinds.items():
        size = 8 * coded.arrays[name].nbytes
        if kind == "codes":
            own = {part: 8 * count for part, count in coding.code_parts(coded).items()}
            parts |= own | {"filler": size - sum(own.values())}
        else:
            parts[name] = size
    return parts


def expert_bits(coded: CodedTensor) -> Int64[np.ndarray, "experts"]:
    """Count the stored bits of each expert: all that grows with their number."""
    experts = coded.spec.num_experts
    bits = np.zeros(experts, np.int64)
    for name, array in coded.arrays.items():
        if name == get_coding(coded.spec.coding).code_array:
            bits += 8 * array.itemsize * np.diff(coded.arrays["expert_offsets"].astype(np.int64))
        elif experts:
            # Of expert_offsets each expert has one; the last, that of all, is no expert's.
            bits += 8 * array.itemsize * math.prod(array.shape[1:])
    return bits


def outline_bits(
    outline: CodedOutline, counts: Int64[np.ndarray, "symbols"]
) -> dict[str, int | float]:
    """Count every stored bit of a coded tensor. The dictionary, common to a model, is not in it.

    Args:
      outline: of the tensor.
      counts: how often each value occurs in it, as `Coding.symbol_counts` counts.

    Returns a dict of
      codes, levels, offsets, total: bits stored; offsets are arrays of lengths of every sort.
      bits_per_weight: total over the number of weights.
      code_bits_per_weight: codes alone over the number of weights.
      zero_share: share of the weight 0.
      entropy: of the values (`Coding.symbol_counts`), taken as independent, in bits per weight.
      entropy_share: entropy over bits_per_weight; 1 is the limit of a coder that uses nothing but
        the share of each value.
    Quotients of a tensor without weights are 0.
    """
    kinds = get_coding(outline.spec.coding).array_kinds
    stored = {"codes": 0, "levels": 0, "offsets": 0}
    for name in outline.dtypes:
        kind = kinds[name]
        stored["offsets" if kind == "lengths" else kind] += 8 * outline.num_bytes(name)
    total, weights = sum(stored.values()), outline.spec.num_weights
    entropy = code_entropy(counts)
    return {
        **stored,
        "total": total,
        "bits_per_weight": total / weights if weights else 0.0,
        "code_bits_per_weight": stored["codes"] / weights if weights else 0.0,
        "zero_share": int(counts[0]) / weights if weights else 0.0,
        "entropy": entropy,
        "entropy_share": entropy * weights / total if total else 0.0,
    }


def code_entropy(counts: Int64[np.ndarray, "symbols"]) -> float:
    """Entropy, in bits a symbol, of symbols that occur `counts` times; 0 for none."""
    seen = counts[counts > 0]
    shares = seen / max(int(counts.sum()), 1)
    return float(-(shares * np.log2(shares)).sum()) if seen.size else 0.0
