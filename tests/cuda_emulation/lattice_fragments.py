"""Fragments of codes of the lattice, and tokens for them, as NumPy arrays; checks of products."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from cuda_emulation import launches

from qmoe_jax.codec.codings import get_coding
from qmoe_jax.codec.lattice_values import multiples
from qmoe_jax.codec.tensor import CodedTensor
from qmoe_jax.ops.cuda import fragment_products, fragments, kernels

BF16 = ml_dtypes.bfloat16


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
    num_experts = coded.spec.num_experts
    order, token_experts, starts = launches.sort_tokens(experts, num_experts)
    token_experts = np.where(token_experts < 0, num_experts, token_experts)
    tokens = kernels.TokenOrder(*map(jnp.asarray, (order, token_experts, starts)))
    places, origins = arrays["fragment_places"], coded.arrays["origins"]
    placed = _place(jnp.asarray(x), tokens, jnp.asarray(places), jnp.asarray(origins))
    return [np.asarray(array) for array in placed]


_place = jax.jit(fragment_products.place_tokens)


def chunk_symbols(words: np.ndarray, is_ternary: bool = False) -> np.ndarray:
    """-1, 0 and 1 of chunks, [..., 32, 64], weight by weight as the kernel's source says."""
    symbols = np.zeros((*words.shape[:-1], 32, 64), np.int64)
    g, q = np.divmod(np.arange(32), 4)
    for half in range(2):
        for side in range(2):
            of_lanes = words[..., 4 * np.arange(32) + 2 * half + side]
            for i in range(8):
                for odd in range(2):
                    at = 16 * (i // 4) + 2 * (i % 4) + 8 * odd if is_ternary else 2 * i + 16 * odd
                    bits = of_lanes >> np.uint32(at) & np.uint32(3)
                    rows = 16 * half + g + (8 if i % 2 else 0)
                    places = 32 * side + 8 * q + 4 * (i // 4) + 2 * (i // 2 % 2) + odd
                    symbols[..., rows, places] = np.select(
                        [bits == 1, bits == (2 if is_ternary else 3)], [1, -1], 0
                    )
    return symbols


def read_back(coded: CodedTensor, arrays: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Multiples [experts, out, in], and [experts, out, places] of all places, extra ones added."""
    spec = coded.spec
    strips = -(-spec.rows // 32)
    starts, extra_starts = arrays["fragment_starts"], arrays["extra_starts"]
    places = np.zeros((spec.num_experts, 32 * strips, arrays["fragment_places"].shape[1]), np.int64)
    values = np.zeros((spec.num_experts, 32 * strips, spec.width), np.int64)
    for expert in range(spec.num_experts):
        chunks = (starts[expert + 1] - starts[expert]) // strips
        for strip in range(strips):
            rows = slice(32 * strip, 32 * strip + 32)
            first = starts[expert] + strip * chunks
            symbols = chunk_symbols(arrays["fragments"][first : first + chunks])
            places[expert, rows, : 64 * chunks] = symbols.transpose(1, 0, 2).reshape(32, -1)
            at = expert * strips + strip
            for extra in range(extra_starts[at], extra_starts[at + 1]):
                symbols = chunk_symbols(arrays["extra_fragments"][extra])
                for column, place in enumerate(arrays["extra_places"][extra]):
                    places[expert, rows, place] += symbols[:, column]
        for place, packed in enumerate(arrays["fragment_places"][expert]):
            column, digit = packed & 0x7FFFF, int(packed >> 27)
            if digit:
                values[expert, :, column] += places[expert, :, place] * 3 ** (digit - 1)
    return values[:, : spec.rows], places[:, : spec.rows]


def check_kernel(
    get: Callable[[str], Any],
    coded: CodedTensor,
    arrays: dict[str, np.ndarray],
    tokens: int,
    tile: int,
    *,
    places: np.ndarray | None = None,
    seed: int = 0,
    **options: Any,
) -> None:
    """Compare the kernel's sums with float64 ones of the very same rows.

    Args:
      get: the kernels by name.
      coded: codes of the lattice.
      arrays: their fragments.
      tokens: how many, of random experts or none.
      tile: tokens of one.
      places: of `read_back`, if it is at hand.
      seed: of tokens.
      options: of `launches.fragment_product`.
    """
    spec = coded.spec
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(tokens, spec.width)).astype(BF16)
    experts = rng.integers(-1, spec.num_experts, tokens).astype(np.int32)
    placed = placed_tokens(coded, arrays, x, experts)
    y = launches.fragment_product(get, spec, arrays, placed, experts, tile=tile, **options)
    order = np.argsort(np.where(experts < 0, spec.num_experts, experts), kind="stable")
    rows, scales = (array.astype(np.float64) for array in placed)
    rows = rows.transpose(1, 0, 2)[:tokens].reshape(tokens, -1) * scales[:, None]
    weights = read_back(coded, arrays)[1] if places is None else places
    terms = 2 * arrays["fragment_places"].shape[1]
    rounding = 2.0**-8 if y.dtype == BF16 else 0.0
    outputs = y[order].astype(np.float64)
    np.testing.assert_array_equal(outputs[experts[order] < 0], 0)
    for expert in set(experts[experts >= 0]):
        own, chosen = 2.0 * weights[expert].T, experts[order] == expert
        expected, sizes = rows[chosen] @ own, np.abs(rows[chosen]) @ np.abs(own)
        bound = terms * 2.0**-24 * sizes + rounding * np.abs(expected) + 1e-37
        assert (np.abs(outputs[chosen] - expected) <= bound).all()


def assert_rounded_products(
    y: np.ndarray, weights: np.ndarray, x: np.ndarray, experts: np.ndarray
) -> None:
    """Bfloat16 y against float64 products, within the rounding of features times steps.

    Args:
      y: products [tokens, out].
      weights: [experts, out, in].
      x: tokens.
      experts: of each token; below 0 there is none, and y is 0.
    """
    assert not np.any(y[experts < 0])
    for expert in set(experts[experts >= 0]):
        own, chosen = weights[expert].T.astype(np.float64), experts == expert
        tokens = x[chosen].astype(np.float64)
        expected, sizes = tokens @ own, np.abs(tokens) @ np.abs(own)
        # A weight is at most three times as much in its digits; and the result is rounded.
        bound = 3 * 2.0**-11 * sizes + 2.0**-8 * np.abs(expected)
        assert (np.abs(y[chosen].astype(np.float64) - expected) <= bound).all()
