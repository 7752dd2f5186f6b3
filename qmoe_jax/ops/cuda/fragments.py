"""Codes as fragments: two bits a weight, as tensor cores take them.

Made once after loading, from stored codes; `kernels_cuda/matmul_fragments.cu` says how they lie.
Codes of the ternary grid lie column by column. Of the lattice a column of an expert has as many
*places* as its multiples need balanced ternary digits, none if it is zero throughout. So that a few
large multiples do not give all rows of their column another place, up to a fiftieth of its rows may
have something left over, as a sum of magnitudes: it goes to extra places, which only the 32 rows
around have. All codes are kept exactly.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, BFloat16, Float32, Int, Int8, Int16, Int32, UInt8, UInt16, UInt32

from qmoe_jax.codec.codings import get_coding
from qmoe_jax.codec.lattice_choices import CLASS_STEPS
from qmoe_jax.codec.lattice_values import STEP_TABLE
from qmoe_jax.codec.tensor import TensorSpec
from qmoe_jax.errors import CudaError
from qmoe_jax.ops.cuda.kernels import expand_experts
from qmoe_jax.ops.cuda.launcher import Launcher
from qmoe_jax.ops.experts import CodedExperts

FRAGMENT_GRIDS = ("lattice", "ternary")
FREE_SHARE = 0.5
"""Of a device's free memory, what fragments may take that nobody asked for."""
CHUNK_ROWS, CHUNK_PLACES, CHUNK_WORDS = 32, 64, 128
READ_BEHIND = 64
"""Chunks behind the last that kernels read for nothing."""
MAX_PLACES = 65_536
MAX_DIGITS = 6
"""127, the largest multiple, needs six."""
_CAPS = np.array([(3**digits - 1) // 2 for digits in range(MAX_DIGITS + 1)], np.int16)
_ROWS_A_LEFT_OVER = 50
_UNITS = 128  # a weight has fewer left over
_MAX_WIDTH = 1 << 19
# Of a place: its column in bits 0 to 18, the index of its step in 19 to 26, then its digit and 1,
# or 0 for a place that is none.
_STEP_SHIFT, _DIGIT_SHIFT = 19, 27


class Fragments(NamedTuple):
    """All experts of a kernel.

    Attributes:
      fragments: the chunks of an expert's first 32 rows, of the next, and so on; behind all of them
        `READ_BEHIND` that hold nothing.
      fragment_starts: first chunk of each expert, and the end.
      fragment_places: what each place of an expert multiplies, see `places_of`; of ternary codes
        one row of zeros, since places are columns.
      extra_fragments: extra chunks, one at least.
      extra_places: places of their columns.
      extra_starts: first extra chunk of every 32 rows, expert by expert, and the end.
    """

    fragments: UInt32[Array, "chunks 128"]
    fragment_starts: Int32[Array, "experts+1"]
    fragment_places: UInt32[Array, "experts places"]
    extra_fragments: UInt32[Array, "extras 128"]
    extra_places: UInt16[Array, "extras 64"]
    extra_starts: Int32[Array, "strips"]


def has_fragments(derived: Mapping[str, Any]) -> bool:
    """Whether the arrays of `Fragments` are among what was derived from stored ones."""
    return all(name in derived for name in Fragments._fields)


def fragment_grids(compute_capability: str) -> tuple[str, ...]:
    """Return the grids whose codes a device multiplies as fragments.

    Ternary weights are bfloat16, which tensor cores take since 8.0.

    Args:
      compute_capability: "9.0".
    """
    return FRAGMENT_GRIDS if float(compute_capability) >= 8 else ("lattice",)


def fragment_bytes(spec: TensorSpec) -> int:
    """Return the bytes of a kernel's fragments: exact of ternary codes, an estimate of the lattice.

    The estimate is as if each column had one place, and 32 rows of those that may have something
    left over one extra chunk. GPTQ's codes take 0.9 to 1.1 times as much at a step of 4 (0.45
    to 0.65 bits a weight), 1.3 to 1.5 at a step of 2 (1.0 to 1.4 bits), and 0.6 to 1 at 5.6 (0.3
    bits), where whole columns are zero.
    """
    experts, strips = spec.num_experts, -(-spec.rows // CHUNK_ROWS)
    chunks = -(-spec.width // CHUNK_PLACES)
    is_lattice = get_coding(spec.coding).grid == "lattice"
    has_extras = is_lattice and spec.rows >= _ROWS_A_LEFT_OVER
    extras = experts * strips * has_extras + 1
    words = (
        CHUNK_WORDS * (experts * strips * chunks + READ_BEHIND)
        + CHUNK_PLACES * chunks * (experts if is_lattice else 1)
        + CHUNK_WORDS * extras
        + CHUNK_PLACES * extras // 2
        + (experts + 1)
        + (experts * strips + 1)
    )
    return 4 * words


def are_default(specs: Sequence[TensorSpec], free_bytes: int | None) -> bool:
    """Whether `implementation="auto"` has fragments: of the lattice, where memory is ample.

    (The other way of ternary codes has been measured on a GPU, this one not.)

    Args:
      specs: of all kernels that are codes.
      free_bytes: memory that the device has left; None where that is unknown.
    """
    if free_bytes is None or any(spec.coding != "lattice" for spec in specs):
        return False
    return sum(map(fragment_bytes, specs)) <= FREE_SHARE * free_bytes


def derive_fragments(
    launcher: Launcher, spec: TensorSpec, arrays: Mapping[str, Any], derived: Mapping[str, Any]
) -> dict[str, Array]:
    """Return the arrays of `Fragments` by name, from stored codes that the GPU expands.

    Args:
      launcher: of `current_launcher`.
      spec: of codes of the lattice or the ternary grid, whole rows.
      arrays: the stored ones.
      derived: of `kernels.derive`.

    Raises:
      CudaError: experts with too many places.
    """
    if get_coding(spec.coding).grid == "ternary":
        return _derive_ternary(launcher, spec, arrays, derived)
    # With an origin of 1 a step is at most 1 and at least 2^-16, and rounding to bfloat16 takes a
    # 256th of 127 multiples at most: dividing by the step gives the multiple back.
    stored = {**arrays, "origins": jnp.ones_like(jnp.asarray(arrays["origins"]))}
    experts = CodedExperts(spec, stored, spec.width, derived)
    steps = jnp.asarray(STEP_TABLE)[jnp.asarray(step_indices(arrays))]

    @jax.jit
    def divide(weights: BFloat16[Array, "1 out in"], step: Float32[Array, "in"]) -> Array:
        return jnp.rint(weights.astype(jnp.float32) / step).astype(jnp.int8)

    def multiples(expert: int) -> Int8[Array, "1 out in"]:
        weights = expand_experts(launcher, experts, jnp.array([expert], jnp.int32))
        return divide(weights, steps[expert])

    return make_fragments(spec, arrays, multiples)._asdict()


def _derive_ternary(
    launcher: Launcher, spec: TensorSpec, arrays: Mapping[str, Any], derived: Mapping[str, Any]
) -> dict[str, Array]:
    # With these levels a weight says which code it has; the stored ones may be alike, or 0.
    levels = jnp.asarray([-1.0, 1.0], jnp.bfloat16)
    stored = {**arrays, "levels": jnp.broadcast_to(levels, jnp.asarray(arrays["levels"]).shape)}
    experts = CodedExperts(spec, stored, spec.width, derived)
    to_codes = jax.jit(lambda weights: jnp.where(weights < 0, 1, 2 * (weights > 0)).astype("uint8"))

    def codes(expert: int) -> UInt8[Array, "out in"]:
        weights = expand_experts(launcher, experts, jnp.array([expert], jnp.int32))
        return to_codes(weights)[0]

    return make_ternary_fragments(spec, codes)._asdict()


def make_ternary_fragments(
    spec: TensorSpec, codes: Callable[[int], UInt8[Array, "out in"]]
) -> Fragments:
    """Lay out ternary codes of all experts, one at a time.

    Args:
      spec: of the codes, whole rows.
      codes: those of an expert: 0, 1 for the low level, 2 for the high one.

    Raises:
      CudaError: more than `MAX_PLACES` columns.
    """
    width = max(CHUNK_PLACES, -(-spec.width // CHUNK_PLACES) * CHUNK_PLACES)
    if width > MAX_PLACES:
        raise _too_wide(spec.width)
    packed = [
        np.asarray(_pack_ternary(codes(expert))).reshape(-1, CHUNK_WORDS)
        for expert in range(spec.num_experts)
    ]
    starts = np.cumsum([0, *map(len, packed)]).astype(np.int32)
    strips = -(-spec.rows // CHUNK_ROWS)
    nothing = np.zeros((READ_BEHIND, CHUNK_WORDS), np.uint32)
    return Fragments(
        jnp.asarray(np.concatenate([*packed, nothing])),
        jnp.asarray(starts),
        jnp.zeros((1, width), jnp.uint32),
        jnp.zeros((1, CHUNK_WORDS), jnp.uint32),
        jnp.zeros((1, CHUNK_PLACES), jnp.uint16),
        jnp.zeros(spec.num_experts * strips + 1, jnp.int32),
    )


@jax.jit
def _pack_ternary(codes: UInt8[Array, "out in"]) -> UInt32[Array, "strips chunks 128"]:
    bits = jnp.where(codes == 0, 0, 3 - codes.astype(jnp.uint32))  # 1 for the high level
    bits = jnp.pad(bits, ((0, 0), (0, -bits.shape[1] % CHUNK_PLACES)))
    step, pair, lower, odd = np.ix_(*[np.arange(2)] * 4)
    return _words(bits, 16 * step + 2 * (2 * pair + lower) + 8 * odd)


def step_indices(arrays: Mapping[str, Any]) -> UInt8[np.ndarray, "experts in"]:
    """Return the index of each column's step (FORMAT.md, "Coding `lattice`"); any of a zero one."""
    columns, bases = np.asarray(arrays["columns"]), np.asarray(arrays["bases"]).astype(np.int64)
    index = np.take_along_axis(bases, (columns // CLASS_STEPS).astype(np.int64), axis=1)
    return np.minimum(index + columns % CLASS_STEPS, 255).astype(np.uint8)


def make_fragments(
    spec: TensorSpec,
    arrays: Mapping[str, Any],
    multiples: Callable[[int], Int8[Array, "1 out in"]],
) -> Fragments:
    """Lay out the codes of all experts, one at a time.

    Args:
      spec: of codes of the coding "lattice", whole rows.
      arrays: the stored ones; only columns and bases are read.
      multiples: those of an expert, within -127 and 127.

    Raises:
      CudaError: an expert has more than `MAX_PLACES` places, or columns than a place can name.
    """
    if spec.width >= _MAX_WIDTH:
        raise _too_wide(spec.width)
    digits = [np.asarray(count_digits(multiples(expert))) for expert in range(spec.num_experts)]
    most = max((int(own.sum()) for own in digits), default=0)
    num_places = max(CHUNK_PLACES, -(-most // CHUNK_PLACES) * CHUNK_PLACES)
    if num_places > MAX_PLACES:
        raise _too_wide(most)
    steps = step_indices(arrays)
    places = np.zeros((spec.num_experts, num_places), np.uint32)
    strips = -(-spec.rows // CHUNK_ROWS)
    chunks: list[np.ndarray] = []
    extras: list[_Extras] = []
    starts = [0]
    extra_starts = [np.zeros(1, np.int64)]
    for expert, own in enumerate(digits):
        columns, digit = _places_of_columns(own)
        places[expert, : len(columns)] = (
            columns.astype(np.uint32)
            | steps[expert][columns].astype(np.uint32) << _STEP_SHIFT
            | (digit + 1).astype(np.uint32) << _DIGIT_SHIFT
        )
        missing = (0, num_places - len(columns))
        found = multiples(expert)
        packed, num_left = _pack(found, own, np.pad(columns, missing), np.pad(digit + 1, missing))
        used = -(-len(columns) // CHUNK_PLACES)
        chunks.append(np.asarray(packed)[:, :used].reshape(-1, CHUNK_WORDS))
        starts.append(starts[-1] + strips * used)
        rows, at, left = _find_left(found, own, int(num_left))
        place = np.cumsum(own > 0) - 1
        added, counts = _extra_chunks(rows, place[at], left, strips)
        extra_starts.append(extra_starts[-1][-1] + np.cumsum(counts))
        extras.append(added)
    chunks.append(np.zeros((READ_BEHIND, CHUNK_WORDS), np.uint32))
    # So that there is one.
    nothing = np.zeros((1, CHUNK_WORDS), np.uint32), np.zeros((1, CHUNK_PLACES), np.uint16)
    extras.append(_Extras(*nothing))
    return Fragments(
        jnp.asarray(np.concatenate(chunks)),
        jnp.asarray(np.array(starts, np.int32)),
        jnp.asarray(places),
        jnp.asarray(np.concatenate([own.fragments for own in extras])),
        jnp.asarray(np.concatenate([own.places for own in extras])),
        jnp.asarray(np.concatenate(extra_starts).astype(np.int32)),
    )


def _too_wide(width: int) -> CudaError:
    return CudaError(
        f"An expert has {width} columns or places; fragments require less than {MAX_PLACES} places "
        f"and {_MAX_WIDTH} columns. Use implementation='cuda', which reads stored codes."
    )


@jax.jit
def count_digits(multiples: Int8[Array, "1 out in"]) -> UInt8[Array, "in"]:
    """Return how many places each column gets: the fewest that leave little over."""
    magnitudes = jnp.abs(multiples[0].astype(jnp.int16))
    allowed = multiples.shape[1] // _ROWS_A_LEFT_OVER
    digits = (magnitudes != 0).any(axis=0).astype(jnp.uint8)
    for fewer in range(1, MAX_DIGITS):
        left = jnp.maximum(magnitudes - _CAPS[fewer], 0).sum(axis=0, dtype=jnp.int32)
        digits = digits + (left > allowed).astype(jnp.uint8)
    return digits


def _places_of_columns(
    digits: UInt8[np.ndarray, "in"],
) -> tuple[Int[np.ndarray, "places"], Int[np.ndarray, "places"]]:
    """Column and digit of each place: the first digits of all columns, then the second ones."""
    found = [np.flatnonzero(digits > digit) for digit in range(MAX_DIGITS)]
    columns = np.concatenate(found).astype(np.int32)
    return columns, np.repeat(np.arange(MAX_DIGITS), [len(own) for own in found]).astype(np.int32)


@jax.jit
def _pack(
    multiples: Int8[Array, "1 out in"],
    digits: UInt8[Array, "in"],
    columns: Int32[Array, "places"],
    digit: Int32[Array, "places"],
) -> tuple[UInt32[Array, "strips chunks 128"], Int32[Array, ""]]:
    """Chunks of an expert, and how many weights have something left over.

    Args:
      multiples: of the expert.
      digits: of its columns.
      columns: of its places.
      digit: of its places, and 1; 0 for a place that is none.
    """
    own, cap = multiples[0].astype(jnp.int16), jnp.asarray(_CAPS)[digits]
    num_left = (jnp.abs(own) > cap).sum(dtype=jnp.int32)
    clipped = jnp.clip(own, -cap, cap)[:, columns] + cap[columns]
    power = jnp.asarray(3 ** np.arange(MAX_DIGITS), jnp.int16)[jnp.maximum(digit - 1, 0)]
    # Of a balanced ternary digit: 0 is -1, and so on.
    symbol = jnp.where(digit > 0, clipped // power % 3, 1)
    bits = jnp.where(symbol == 1, 0, jnp.where(symbol == 2, 1, 3)).astype(jnp.uint32)
    step, pair, lower, odd = np.ix_(*[np.arange(2)] * 4)
    return _words(bits, 2 * (4 * step + 2 * pair + lower) + 16 * odd), num_left


def _words(
    bits: UInt32[Array, "out places"], shifts: Int[np.ndarray, "2 2 2 2"]
) -> UInt32[Array, "strips chunks 128"]:
    """Put weights together.

    Args:
      bits: two of each weight.
      shifts: where they lie in a word, by t, p, l and e below.
    """
    bits = jnp.pad(bits, ((0, -bits.shape[0] % CHUNK_ROWS), (0, 0)))
    # Row 16 h + 8 l + g, place 32 s + 8 q + 4 t + 2 p + e of a chunk.
    shape = (-1, 2, 2, 8, bits.shape[1] // CHUNK_PLACES, 2, 4, 2, 2, 2)
    strips, h, lower, g, chunks, s, q, t, p, e = range(len(shape))
    weights = bits.reshape(shape).transpose((strips, chunks, g, q, h, s, t, p, lower, e))
    words = (weights << shifts.astype(np.uint32)).sum(axis=(6, 7, 8, 9), dtype=jnp.uint32)
    return words.reshape(words.shape[0], words.shape[1], CHUNK_WORDS)


def _find_left(
    multiples: Int8[Array, "1 out in"], digits: UInt8[np.ndarray, "in"], count: int
) -> tuple[np.ndarray, np.ndarray, Int16[np.ndarray, "left"]]:
    """Rows and columns of weights that have something left over, and what."""
    room = 1 << max(count - 1, 0).bit_length()  # few sizes, so few programs
    rows, columns, left = _find_left_jitted(multiples, digits, room)
    return np.asarray(rows)[:count], np.asarray(columns)[:count], np.asarray(left)[:count]


def _left_of(multiples: Array, digits: Array, room: int) -> tuple[Array, Array, Array]:
    own, cap = multiples[0].astype(jnp.int16), jnp.asarray(_CAPS)[digits]
    left = own - jnp.clip(own, -cap, cap)
    rows, columns = jnp.nonzero(left, size=room, fill_value=0)
    return rows, columns, left[rows, columns]


_find_left_jitted = jax.jit(_left_of, static_argnums=2)


class _Extras(NamedTuple):
    fragments: UInt32[np.ndarray, "extras 128"]
    places: UInt16[np.ndarray, "extras 64"]


def _extra_chunks(
    rows: np.ndarray, places: np.ndarray, left: np.ndarray, strips: int
) -> tuple[_Extras, Int[np.ndarray, "strips"]]:
    """Extra chunks of an expert, and how many each 32 rows have.

    Args:
      rows: of the weights with something left over.
      places: first places of their columns.
      left: what.
      strips: 32 rows each.
    """
    # A unit of a weight is a column of its own, which rows of the same strip share.
    repeats = np.abs(left).astype(np.int64)
    row, place = np.repeat(rows, repeats).astype(np.int64), np.repeat(places, repeats)
    unit = np.arange(repeats.sum()) - np.repeat(np.cumsum(repeats) - repeats, repeats)
    keys = (row // CHUNK_ROWS * MAX_PLACES + place) * _UNITS + unit
    key, column = np.unique(keys, return_inverse=True)
    strip, at = key // (MAX_PLACES * _UNITS), key // _UNITS % MAX_PLACES
    per_strip = np.bincount(strip, minlength=strips)
    counts = -(-per_strip // CHUNK_PLACES)
    first_column, first_chunk = (np.cumsum(own) - own for own in (per_strip, counts))
    slot = np.arange(len(strip)) - first_column[strip] + CHUNK_PLACES * first_chunk[strip]
    found = np.zeros((counts.sum(), CHUNK_PLACES), np.uint16)
    found.reshape(-1)[slot] = at
    fragments = np.zeros((counts.sum(), CHUNK_WORDS), np.uint32)
    own_slot = slot[column]
    word, shift = _word_of(row % CHUNK_ROWS, own_slot % CHUNK_PLACES)
    bits = np.where(np.repeat(left, repeats) > 0, 1, 3).astype(np.uint32) << shift
    index = CHUNK_WORDS * (own_slot // CHUNK_PLACES) + word
    np.bitwise_or.at(fragments.reshape(-1), index, bits)
    return _Extras(fragments, found), counts


def _word_of(row: np.ndarray, place: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Word of a chunk, and place of the lower bit in it, of a weight."""
    half, lower, g = row // 16, row // 8 % 2, row % 8
    side, q, step, pair, odd = (
        place // 32,
        place // 8 % 4,
        place // 4 % 2,
        place // 2 % 2,
        place % 2,
    )
    word = 4 * (4 * g + q) + 2 * half + side
    return word, (2 * (4 * step + 2 * pair + lower) + 16 * odd).astype(np.uint32)


def places_of(
    places: UInt32[Array, "*shape"],
) -> tuple[Int32[Array, "*shape"], Float32[Array, "*shape"]]:
    """Columns of places, and half of what a digit of 1 is there, in units of the origin."""
    columns = (places & jnp.uint32(_MAX_WIDTH - 1)).astype(jnp.int32)
    digit = (places >> _DIGIT_SHIFT).astype(jnp.int32)
    half = np.concatenate([[0.0], 0.5 * 3.0 ** np.arange(MAX_DIGITS)]).astype(np.float32)
    steps = jnp.asarray(STEP_TABLE)[(places >> _STEP_SHIFT & jnp.uint32(255)).astype(jnp.int32)]
    return columns, jnp.asarray(half)[jnp.minimum(digit, MAX_DIGITS)] * steps
