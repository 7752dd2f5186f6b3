"""Between what quantization makes, codes and levels or steps, and what a coding stores."""

from collections.abc import Mapping

import numpy as np
from jaxtyping import BFloat16, UInt8

from qmoe_jax.codec.codings import get_coding
from qmoe_jax.codec.encode import encode
from qmoe_jax.codec.stats import expert_bits
from qmoe_jax.codec.tensor import CodedTensor
from qmoe_jax.quantization.lattice import Steps

Levels = BFloat16[np.ndarray, "experts rows 2"] | Steps


def encode_codes(
    codes: UInt8[np.ndarray, "experts rows width"], levels: Levels, coding: str
) -> CodedTensor:
    """Encode a batch of experts."""
    if isinstance(levels, Steps):
        stored = {"step_index": np.asarray(levels.index), "origin": np.asarray(levels.origin)}
        return encode(codes, stored, coding)
    return encode(codes, levels, coding)


def stored_bits(codes: UInt8[np.ndarray, "experts rows width"], levels: Levels, coding: str) -> int:
    """Return the bits that experts take where they are stored."""
    return int(expert_bits(encode_codes(codes, levels, coding)).sum())


def levels_of(coded: CodedTensor) -> np.ndarray | Steps:
    """Return the levels or steps of coded experts; the step of a column of zeros is any."""
    levels = get_coding(coded.spec.coding).levels_of(coded)
    return Steps(levels["step_index"], levels["origin"]) if isinstance(levels, Mapping) else levels
