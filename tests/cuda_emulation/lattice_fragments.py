"""Fragments of codes of the lattice, and tokens for them, as NumPy arrays."""

import jax.numpy as jnp
import numpy as np

from qmoe_jax.codec.codings import get_coding
from qmoe_jax.codec.lattice_values import multiples
from qmoe_jax.codec.tensor import CodedTensor
from qmoe_jax.ops.cuda import fragment_products, fragments, kernels


def decoded(coded: CodedTensor) -> np.ndarray:
    """Multiples [experts, out, in] by the reference decoder."""
    codes = get_coding("lattice").decode_numpy_reference(coded)
    return np.asarray(multiples(jnp.asarray(codes)), np.int64)


def made(coded: CodedTensor) -> dict[str, np.ndarray]:
    """Fragments of the multiples that the reference decoder finds."""
    values = decoded(coded)
    found = fragments.make_fragments(
        coded.spec, coded.arrays, lambda expert: jnp.asarray(values[expert][None], jnp.int8)
    )
    return {name: np.asarray(array) for name, array in found._asdict().items()}


def placed_tokens(
    coded: CodedTensor, arrays: dict[str, np.ndarray], x: np.ndarray, experts: np.ndarray
) -> list[np.ndarray]:
    """What kernels take of tokens: rows and scales."""
    order = kernels.sort_tokens(jnp.asarray(experts), coded.spec.num_experts)
    places, origins = arrays["fragment_places"], coded.arrays["origins"]
    placed = fragment_products.place_tokens(
        jnp.asarray(x), order, jnp.asarray(places), jnp.asarray(origins)
    )
    return [np.asarray(array) for array in placed]
