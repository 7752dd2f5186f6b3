"""Quantization codes to a coded tensor."""

from collections.abc import Mapping

import jax
import ml_dtypes
import numpy as np

from qmoe_jax.codec.codings import coding_names, get_coding
from qmoe_jax.codec.tensor import CodedTensor, check_levels
from qmoe_jax.errors import CodecError


def encode(
    codes: np.ndarray | jax.Array,
    levels: np.ndarray | jax.Array | Mapping[str, np.ndarray],
    coding: str,
) -> CodedTensor:
    """Encode the codes of a batch of experts, or of all of them.

    Args:
      codes: uint8 [experts, rows, width]. Ternary: 0 = zero, 1 = low, 2 = high; 2-bit: 0 to 3.
        Experts and rows may be 0 in number, the width is at least 1.
      levels: bfloat16 [experts, rows, 2], the two parameters of each row: (low, high) for ternary
        codes, (scale, zero) for 2-bit ones. Kept as they are; other dtypes are refused, since
        codes that were chosen for unrounded levels no longer are the nearest. For lattice codes
        a mapping: `step_index` uint8 [experts, width] and `origin` float32 [experts].
      coding: name, one of `codings.codings_of_grid` of the codes' grid.

    Batches of consecutive experts are joined by `codings.concatenate`.
    """
    codes = np.asarray(codes)
    implementation = get_coding(coding)
    if codes.dtype != np.uint8 or codes.ndim != 3 or codes.shape[2] == 0:
        raise CodecError(
            f"codes are {codes.dtype} of shape {codes.shape}; encoding requires uint8 "
            "[experts, out, in] with at least one weight in a row."
        )
    if isinstance(levels, Mapping):
        return implementation.encode(codes, levels)
    levels = np.asarray(levels)
    if levels.dtype != ml_dtypes.bfloat16 or levels.shape != (*codes.shape[:2], 2):
        raise CodecError(
            f"levels are {levels.dtype} of shape {levels.shape}; codes of shape {codes.shape} "
            f"require bfloat16 {(*codes.shape[:2], 2)}. Round the levels to bfloat16 before the "
            "codes are chosen."
        )
    check_levels(levels)
    if codes.size and codes.max() >= implementation.num_symbols:
        wider = [n for n in coding_names() if get_coding(n).num_symbols > codes.max()]
        raise CodecError(
            f"codes hold the symbol {codes.max()}; coding '{coding}' takes 0 to "
            f"{implementation.num_symbols - 1}. Codings that take it: {', '.join(wider) or 'none'}."
        )
    return implementation.encode(codes, levels)
