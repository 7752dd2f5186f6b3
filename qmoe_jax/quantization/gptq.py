"""GPTQ for one expert: quantize column by column, let the rest make up for the error.

This file keeps the letters of the paper (Frantar et al. 2022, arXiv 2210.17323, algorithm 1):
W the weights, H the Hessian of the layer error, and d = w - q the error of a column. Here W is
`[in, out]`, the Flax orientation, so that a GPTQ column (one input feature) is a contiguous row.

The paper inverts H and factorises the inverse: inv(H) = U^T U, two Cholesky factorisations and an
inverse. We need only one Cholesky factorisation. With the upper triangular V = inv(U), so that
H = V V^T, the errors e_j = (w'_j - q_j) / U_jj that GPTQ propagates satisfy e = V^T d, where
d = w - q is taken against the ORIGINAL weight. Solved for the updated weight at column j,

    w'_j = w_j + sum_{i < j} (V_ij / V_jj) d_i,

which is the linear feedback form (LDLQ) of Chee et al. 2023, arXiv 2307.13304, theorem 6. It is
the same algorithm: `tests/test_gptq.py` holds it against the column-by-column elimination of the
inverse Hessian in float64. It is also left-looking: a block of columns is written once, by one
matrix product with all errors before it, instead of being updated by every block before it.
"""

import math
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, UInt8

from qmoe_jax.quantization.grids import Grid, Levels, dequantize_kernel, quantize_kernel
from qmoe_jax.quantization.lattice import Overlap

# Columns that one run of the column loop takes. The loop does one vector-matrix product a column,
# which XLA does not fuse: 3 to 9 us at out = 3072. What lost there: rank-1 updates of the panel
# (right-looking) 10 us at 8 columns, a sum over rows instead of the product 25 us at 16, and eight
# columns as straight-line code 40 us, because XLA's fusion then recomputes the chain of columns.
_PANEL = 16

# The least damping, as in the original: an expert whose Hessian is all zero is then rounded to
# nearest by the same code path.
_MIN_DAMP = 1e-6

# Blocks are unrolled when compiling; this many keep compilation within seconds.
_MAX_BLOCKS = 12

# Outputs that an expert's gain is measured on, the first: all of them would double the products of
# a sweep, and the gains of rows vary by some 5 %, their mean over these by half a percent.
GAIN_OUTPUTS = 128

# Columns that one LAPACK call factorises; see `_factor_corner`.
_LAPACK_SIZE = 64


class GptqResult(NamedTuple):
    """The quantized kernel of one expert.

    Attributes:
      codes: uint8 `[in, out]`, in the orientation and order of the kernel.
      levels: as the grid fits them (`grids.Levels`), in their stored form.
      fell_back: the Hessian could not be factorised, or an input was not finite; the codes are
        those of round-to-nearest (of zero where a weight was not finite).
      layer_error: trace(d^T H d) / 2 with the undamped H: with the Hessians of
        `calibration.hessian`, the squared output error summed over `out`, averaged over tokens.
        0 where `fell_back`.
      weight_error: the sum of d^2, of the finite weights.
    """

    codes: UInt8[Array, "in out"]
    levels: Levels
    fell_back: Bool[Array, ""]
    layer_error: Float[Array, ""]
    weight_error: Float[Array, ""]


def gptq(
    W: Float[Array, "in out"],
    H: Float[Array, "in in"],
    grid: Grid,
    *,
    damping: float | Float[Array, ""] = 0.1,
    block_size: int | None = None,
    act_order: bool = False,
    group_size: int | None = None,
    step: float | Float[Array, ""] = 1.0,
) -> GptqResult:
    """Quantize one kernel so that its outputs, not its weights, change least.

    Pure: jit and vmap as needed; `grid`, `block_size`, `act_order` and `group_size` static.

    Args:
      W: the kernel.
      H: float32, symmetric; only the upper triangle is read.
      grid: which values a row may take; fitted before the sweep, on W and, where it has steps, V.
      damping: share of the mean diagonal of H that is added to the diagonal (QMoE uses 0.1).
      block_size: columns per matrix product, a multiple of 16; changes the speed, not the result
        (up to float32 rounding). None takes 128, or more where that would be over 12 blocks.
      act_order: quantize columns by descending diagonal of H instead of from first to last.
      group_size: columns that share a pair of levels, by their place in the kernel; it divides
        `in`. None is all. Levels are fitted on W before the sweep, as without groups ("static
        groups"; the original fits a group when the sweep comes to it).
      step: of a grid that has steps, in units of W (`lattice`); may be traced.
    """
    num_in = W.shape[0]
    block_size = default_block_size(num_in) if block_size is None else block_size
    if block_size < 1 or block_size % _PANEL:
        raise ValueError(
            f"block_size is {block_size}; it must be a positive multiple of {_PANEL}; "
            "leave it None for a good default"
        )

    W = W.astype(jnp.float32)
    H = H.astype(jnp.float32)
    is_finite = jnp.all(jnp.isfinite(W))
    W = jnp.where(jnp.isfinite(W), W, 0.0)

    diagonal = jnp.diagonal(H)
    damp = jnp.maximum(damping * jnp.mean(diagonal), _MIN_DAMP)
    order: Int[Array, " in"] | None = None
    swept, hessian = W, H
    if act_order:
        order = jnp.argsort(diagonal, descending=True)
        swept, hessian = W[order], H[order][:, order]

    # Padding columns weigh nothing and couple to nothing: they are quantized to zero and dropped.
    num_padding = -num_in % _PANEL
    swept = jnp.pad(swept, ((0, num_padding), (0, 0)))
    hessian = jnp.pad(hessian, ((0, num_padding), (0, num_padding)))
    added = jnp.where(jnp.arange(num_in + num_padding) < num_in, damp, 1.0)
    V = upper_factor(hessian, added, block_size)
    # A number in row i of V or H that is not finite makes V_ii not finite: no need to read it all.
    factor_diagonal = jnp.diagonal(V)[:num_in]
    fell_back = ~(is_finite & jnp.all(jnp.isfinite(factor_diagonal)))
    if order is not None:
        factor_diagonal = jnp.zeros_like(factor_diagonal).at[order].set(factor_diagonal)
    levels = grid.fit_kernel(W, jnp.where(fell_back, 1.0, factor_diagonal), step, group_size)
    numbers = grid.of_groups(levels, W.shape[1])
    columns = _Columns(numbers[0], None)
    if numbers.shape[0] > 1:
        group = jnp.arange(num_in) // (num_in // numbers.shape[0])
        columns = _Columns(
            numbers, jnp.pad(group if order is None else group[order], (0, num_padding))
        )

    Outcome = tuple[UInt8[Array, "in out"], Levels, Float[Array, ""], Float[Array, ""]]

    def sweep() -> Outcome:
        codes, damped_error, d = _sweep(swept, V, columns, grid, block_size)
        codes = codes[:num_in]
        if order is not None:
            codes = jnp.zeros_like(codes).at[order].set(codes, unique_indices=True)
        weight_error = jnp.sum(d * d)
        layer_error = jnp.maximum(damped_error - damp * weight_error, 0.0) / 2
        if not grid.has_steps:
            return codes, levels, layer_error, weight_error
        d = d[:num_in]
        if order is not None:
            d = jnp.zeros_like(d).at[order].set(d, unique_indices=True)
        outputs = _outputs_overlap(W, H, d, layer_error)
        weights = Overlap(jnp.sum(W * W), jnp.sum(W * d), weight_error)
        gain = outputs.unbiased_gain
        errors = outputs.error_at(gain) / 2, weights.error_at(gain)
        return codes, grid.scaled(levels, gain), *errors

    def fall_back() -> Outcome:
        codes = quantize_kernel(grid, W, levels)
        values = dequantize_kernel(grid, codes, levels)
        return codes, levels, jnp.float32(0.0), jnp.sum(jnp.square(W - values))

    codes, levels, layer_error, weight_error = lax.cond(fell_back, fall_back, sweep)
    return GptqResult(codes, levels, fell_back, layer_error, weight_error)


def _outputs_overlap(
    W: Float[Array, "in out"],
    H: Float[Array, "in in"],
    d: Float[Array, "in out"],
    layer_error: Float[Array, ""],
) -> Overlap:
    """Return the products of the outputs, those with W from some outputs.

    Only the upper triangle of H is read.
    """
    some_W, some_d = W[:, :GAIN_OUTPUTS], d[:, :GAIN_OUTPUTS]
    upper = jnp.triu(H, 1)
    products = _matmul(upper, some_W) + _matmul(upper.T, some_W)
    products = products + jnp.diagonal(H)[:, None] * some_W
    share = W.shape[1] / some_W.shape[1]
    own, cross = jnp.sum(products * some_W), jnp.sum(products * some_d)
    return Overlap(share * own, share * cross, 2 * layer_error)


class _Columns(NamedTuple):
    """The numbers of the columns of a sweep, a block or a panel (`Grid.of_groups`).

    Attributes:
      numbers: of all columns, or by group.
      group: of each column; None where all have the same numbers.
    """

    numbers: Float[Array, "*groups rows numbers"]
    group: Int[Array, " columns"] | None

    def slice(self, first: int | Array, size: int) -> "_Columns":
        if self.group is None:
            return self
        return _Columns(self.numbers, lax.dynamic_slice(self.group, (first,), (size,)))

    def of(self, column: Array) -> Float[Array, "rows numbers"]:
        if self.group is None:
            return self.numbers
        return lax.dynamic_index_in_dim(self.numbers, self.group[column], keepdims=False)


def default_block_size(num_in: int) -> int:
    """128 columns, or the multiple of 128 that makes at most 12 blocks."""
    return 128 * math.ceil(num_in / (128 * _MAX_BLOCKS))


def upper_factor(
    H: Float[Array, "in in"], added: Float[Array, " in"], block_size: int
) -> Float[Array, "in in"]:
    """Return the upper triangular V with H + diag(added) = V V^T: Cholesky from the last column on.

    Only the upper triangle of H is read. A matrix that is not positive definite gives NaN.
    Panels of `block_size` columns, each by one matrix product with the panels to its right.
    """
    num_in = H.shape[0]
    V = jnp.zeros_like(H)
    for stop in range(num_in, 0, -block_size):
        start = max(stop - block_size, 0)
        panel = H[:stop, start:stop]
        if stop < num_in:
            panel = panel - _matmul(V[:stop, stop:], V[start:stop, stop:].T)
        factor, inverse = _factor_corner(panel[start:] + jnp.diag(added[start:stop]))
        if start:
            factor = jnp.concatenate([_matmul(panel[:start], inverse.T), factor])
        V = lax.dynamic_update_slice(V, factor, (0, start))
    return V


def _factor_corner(
    H: Float[Array, "block block"],
) -> tuple[Float[Array, "block block"], Float[Array, "block block"]]:
    """V with H = V V^T, and inv(V), of a diagonal block: by halves down to LAPACK's share.

    Why not LAPACK for all of it: OpenBLAS, which JAX calls on CPU, starts threads for `potrf`
    from 128 columns on and for every `trsm`; its threads then spin on the cores that XLA's matrix
    products need. On two cores that made this factorisation 2 to 10 times slower.
    """
    size = H.shape[0]
    if size <= _LAPACK_SIZE:
        # The reversal turns LAPACK's lower triangular factor into an upper triangular one.
        lower = lax.linalg.cholesky(H[::-1, ::-1], symmetrize_input=False)
        V = lower[::-1, ::-1]
        return V, _invert_upper(V)
    half = _LAPACK_SIZE * math.ceil(size / (2 * _LAPACK_SIZE))
    V_last, inverse_last = _factor_corner(H[half:, half:])
    V_cross = _matmul(H[:half, half:], inverse_last.T)
    V_first, inverse_first = _factor_corner(H[:half, :half] - _matmul(V_cross, V_cross.T))
    inverse_cross = -_matmul(inverse_first, _matmul(V_cross, inverse_last))
    zero = jnp.zeros((size - half, half), H.dtype)
    return (
        jnp.block([[V_first, V_cross], [zero, V_last]]),
        jnp.block([[inverse_first, inverse_cross], [zero, inverse_last]]),
    )


def _invert_upper(V: Float[Array, "block block"]) -> Float[Array, "block block"]:
    """inv(V) of a small upper triangular V, by block substitution with doubling block size."""
    size = V.shape[0]
    index = jnp.arange(size)

    def merge_pairs(level, inverse):
        width = 1 << level
        pair = index // (2 * width)
        # The upper right block of each pair of neighbours: its part of the inverse is -A^-1 B D^-1.
        crosses = (pair[:, None] == pair) & (index[:, None] // width < index // width)
        cross = jnp.where(crosses, V, 0.0)
        return inverse - _matmul(inverse, _matmul(cross, inverse))

    num_levels = (size - 1).bit_length()
    return lax.fori_loop(0, num_levels, merge_pairs, jnp.diag(1.0 / jnp.diagonal(V)))


def _sweep(
    W: Float[Array, "in out"],
    V: Float[Array, "in in"],
    columns: _Columns,
    grid: Grid,
    block_size: int,
) -> tuple[UInt8[Array, "in out"], Float[Array, ""], Float[Array, "in out"]]:
    """Codes, sum of squared e (the damped layer error), and d = W - dequantize(codes)."""
    num_in, num_out = W.shape
    codes = []
    d = jnp.zeros_like(W)
    squares = jnp.float32(0.0)
    for start in range(0, num_in, block_size):
        stop = min(start + block_size, num_in)
        # e = V^T d without the terms of this block; all earlier blocks in one product.
        if start:
            earlier = _matmul(V[:start, start:stop].T, d[:start])
        else:
            earlier = jnp.zeros((stop, num_out), W.dtype)
        block_codes, block_d, block_squares = _sweep_block(
            W[start:stop],
            earlier,
            V[start:stop, start:stop],
            columns.slice(start, stop - start),
            grid,
        )
        codes.append(block_codes)
        d = lax.dynamic_update_slice(d, block_d, (start, 0))
        squares = squares + block_squares
    return jnp.concatenate(codes), squares, d


def _sweep_block(
    W: Float[Array, "block out"],
    earlier: Float[Array, "block out"],
    V: Float[Array, "block block"],
    columns: _Columns,
    grid: Grid,
) -> tuple[UInt8[Array, "block out"], Float[Array, "block out"], Float[Array, ""]]:
    """Codes, d and the sum of squared e of one block, a panel at a time."""
    size, num_out = W.shape
    scale = jnp.diagonal(V)[:, None]

    def sweep_panel(index, carry):
        codes, d, squares = carry
        first = index * _PANEL
        panel_V = lax.dynamic_slice(V, (0, first), (size, _PANEL))
        # Columns from `first` on have d = 0 still, so no mask is needed.
        e = lax.dynamic_slice(earlier, (first, 0), (_PANEL, num_out))
        e = e + _matmul(panel_V.T, d)
        corner = lax.dynamic_slice(panel_V, (first, 0), (_PANEL, _PANEL))
        original = lax.dynamic_slice(W, (first, 0), (_PANEL, num_out))
        updated = original + e / lax.dynamic_slice(scale, (first, 0), (_PANEL, 1))
        panel_codes, panel_d = _sweep_panel(
            original, updated, corner, columns.slice(first, _PANEL), grid
        )
        # Not summed column by column: in the column loop it costs half as much again.
        squares = squares + jnp.sum(jnp.square(e + _matmul(corner.T, panel_d)))
        codes = lax.dynamic_update_slice(codes, panel_codes, (first, 0))
        d = lax.dynamic_update_slice(d, panel_d, (first, 0))
        return codes, d, squares

    carry = (jnp.zeros((size, num_out), jnp.uint8), jnp.zeros_like(W), jnp.float32(0.0))
    return lax.fori_loop(0, size // _PANEL, sweep_panel, carry)


def _sweep_panel(
    W: Float[Array, "panel out"],
    updated: Float[Array, "panel out"],
    V: Float[Array, "panel panel"],
    columns: _Columns,
    grid: Grid,
) -> tuple[UInt8[Array, "panel out"], Float[Array, "panel out"]]:
    """Codes and d of one panel, column by column; `updated` is w' but for this panel's share."""
    size, num_out = W.shape
    feedback = (V / jnp.diagonal(V) - jnp.eye(size, dtype=V.dtype)).T

    def sweep_column(j, carry):
        codes, d = carry
        row = lax.dynamic_slice(feedback, (j, 0), (1, size))
        w = lax.dynamic_slice(updated, (j, 0), (1, num_out)) + _matmul(row, d)
        numbers = columns.of(j)
        code = grid.quantize(w, numbers)
        original = lax.dynamic_slice(W, (j, 0), (1, num_out))
        # Not `.at[j].set`, which checks bounds and then copies the carry at every column.
        codes = lax.dynamic_update_slice(codes, code, (j, 0))
        d = lax.dynamic_update_slice(d, original - grid.dequantize(code, numbers), (j, 0))
        return codes, d

    carry = (jnp.zeros((size, num_out), jnp.uint8), jnp.zeros_like(W))
    return lax.fori_loop(0, size, sweep_column, carry)


def _matmul(a: Float[Array, "m k"], b: Float[Array, "k n"]) -> Float[Array, "m n"]:
    """Return a product in full float32: TF32 would cost more than the damping repairs."""
    return jnp.matmul(a, b, precision=lax.Precision.HIGHEST)
