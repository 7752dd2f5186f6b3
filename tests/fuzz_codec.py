"""Damages valid coded tensors at random: each is refused, or decodes as the reference decoder does.

    python tests/fuzz_codec.py --count 1000000 --seed 0 --json fuzz.json

Not a test module; test_fuzz_codec.py runs a short part of it. Every input depends on the seed and
its number alone: `--first N --count 1` runs input N again.

For every input that `codings.validate` accepts, the codes of the reference decoder must be
below `num_symbols`, and XLA's must equal them. XLA compiles for each spec and set of shapes, so
only the first `MAX_COMPILED` a coding are decoded that way; damage to contents alone, most
of it, keeps them. Some refused inputs are decoded as well: decoders must stay in bounds whatever
the arrays hold. Anything but CodecError and CheckpointError is a finding.
"""

import argparse
import collections
import dataclasses
import functools
import json
import random
import sys
import time
import warnings
from collections.abc import Callable, Iterable

import jax
import jaxtyping
import ml_dtypes
import numpy as np

from qmoe_jax.codec import codings, encode
from qmoe_jax.codec.decode import decode_expert
from qmoe_jax.codec.tensor import CodedTensor, TensorSpec
from qmoe_jax.errors import CheckpointError, CodecError

MAX_COMPILED = 12
"""Specs and shapes of a coding that are compiled."""
DECODE_REFUSED = 0.1
"""Share of the refused inputs of known shapes that are decoded too."""
SHAPES = ((2, 3, 23), (1, 4, 8), (3, 2, 1), (1, 2, 150), (2, 1, 64))
"""(experts, out, in) of the valid tensors."""
DTYPES = (np.uint8, np.uint16, np.int16, np.int32, np.int64, np.uint32, np.float32)


@functools.cache
def valid_tensors() -> tuple[CodedTensor, ...]:
    """Small valid tensors of every coding, some sparse, some not."""
    rng = np.random.default_rng(0)
    tensors = []
    for name in codings.coding_names():
        symbols = codings.get_coding(name).num_symbols
        for number, shape in enumerate(SHAPES):
            zeros = 1 / symbols if number % 2 else 0.9
            if codings.get_coding(name).grid == "lattice":
                tensors.append(_lattice_tensor(rng, shape, zeros))
                continue
            p = [zeros] + [(1 - zeros) / (symbols - 1)] * (symbols - 1)
            codes = rng.choice(symbols, shape, p=p).astype(np.uint8)
            levels = np.sort(rng.standard_normal((*shape[:2], 2)), axis=-1)
            tensors.append(encode.encode(codes, levels.astype(ml_dtypes.bfloat16), name))
    return tuple(tensors)


def _lattice_tensor(
    rng: np.random.Generator, shape: tuple[int, int, int], zeros: float
) -> CodedTensor:
    """Small multiples and a few large ones, also columns of zeros."""
    nonzero = rng.random(shape) > zeros * rng.random((shape[0], 1, shape[2]))
    codes = np.where(nonzero, rng.geometric(0.4, shape), 0)
    codes = np.where(rng.random(shape) < 0.02, rng.integers(0, 255, shape), codes)
    codes[:, :, ::5] = 0
    levels = {
        "step_index": rng.integers(0, 120, (shape[0], shape[2])).astype(np.uint8),
        "origin": rng.random(shape[0]).astype(np.float32),
    }
    return encode.encode(codes.clip(0, 254).astype(np.uint8), levels, "lattice")


# --- Damage ---


def _some_array(rng: random.Random, coded: CodedTensor) -> str:
    return rng.choice(list(coded.arrays))


def _flip_bits(rng: random.Random, coded: CodedTensor) -> CodedTensor:
    name = _some_array(rng, coded)
    array = coded.arrays[name].copy()
    data = array.reshape(-1).view(np.uint8)
    for _ in range(rng.choice((1, 1, 1, 2, 8)) if data.size else 0):
        data[rng.randrange(data.size)] ^= 1 << rng.randrange(8)
    return _with_array(coded, name, array)


def _set_bytes(rng: random.Random, coded: CodedTensor) -> CodedTensor:
    name = _some_array(rng, coded)
    array = coded.arrays[name].copy()
    data = array.reshape(-1).view(np.uint8)
    if data.size:
        start = rng.randrange(data.size)
        length = rng.choice((1, 2, 4, data.size))
        value = rng.choice((0, 255, rng.randrange(256)))
        data[start : start + length] = value
    return _with_array(coded, name, array)


def _copy_elements(rng: random.Random, coded: CodedTensor) -> CodedTensor:
    """Often valid again: elements of one array exchange their places."""
    name = _some_array(rng, coded)
    array = coded.arrays[name].copy()
    flat = array.reshape(-1)
    if flat.size > 1:
        a, b = rng.randrange(flat.size), rng.randrange(flat.size)
        if rng.random() < 0.5:
            flat[a], flat[b] = flat[b], flat[a].copy()
        else:
            flat[a] = flat[b]
    return _with_array(coded, name, array)


def _resize(rng: random.Random, coded: CodedTensor) -> CodedTensor:
    name = _some_array(rng, coded)
    array = coded.arrays[name]
    axis = rng.randrange(array.ndim)
    length = array.shape[axis]
    target = max(0, rng.choice((0, 1, length - 1, length + 1, length + 4, 2 * length)))
    if target <= length:
        return _with_array(coded, name, array.take(range(target), axis=axis))
    shape = list(array.shape)
    shape[axis] = target - length
    return _with_array(
        coded, name, np.concatenate([array, np.zeros(shape, array.dtype)], axis=axis)
    )


def _reshape(rng: random.Random, coded: CodedTensor) -> CodedTensor:
    name = _some_array(rng, coded)
    array = coded.arrays[name]
    changed = rng.choice((array.reshape(-1), array.T, array[None], array[..., None]))
    return _with_array(coded, name, changed)


def _retype(rng: random.Random, coded: CodedTensor) -> CodedTensor:
    name = _some_array(rng, coded)
    array = coded.arrays[name]
    dtype = np.dtype(rng.choice(DTYPES))
    if rng.random() < 0.5 and array.ndim and array.shape[-1] * array.itemsize % dtype.itemsize == 0:
        return _with_array(coded, name, np.ascontiguousarray(array).view(dtype))
    return _with_array(coded, name, array.astype(dtype))


def _rename(rng: random.Random, coded: CodedTensor) -> CodedTensor:
    arrays = dict(coded.arrays)
    name = _some_array(rng, coded)
    if rng.random() < 0.5:
        arrays["extra"] = arrays[name]
    else:
        other = _some_array(rng, coded)
        arrays[name], arrays[other] = arrays[other], arrays[name]
    if rng.random() < 0.5:
        del arrays[name]
    return CodedTensor(coded.spec, arrays)


def _change_spec(rng: random.Random, coded: CodedTensor) -> CodedTensor:
    fields = coded.spec.to_json()
    name = rng.choice(list(fields))
    if name == "coding":
        fields[name] = rng.choice((*codings.coding_names(), "", "zip", None))
    else:
        value = fields[name]
        small = (value - 1, value + 1, 0, 1, 2 * value, 254, 255, 256, 65535)
        odd = (-1, 2**16, 2**31, 2**62, None, "3", 1.0, True)
        fields[name] = rng.choice(small) if rng.random() < 0.8 else rng.choice(odd)
    if rng.random() < 0.05:
        fields["extra"] = 1
    if rng.random() < 0.05:
        del fields[rng.choice(list(fields))]
    try:
        return CodedTensor(TensorSpec.from_json(fields), coded.arrays)
    except jaxtyping.TypeCheckError as error:  # under pytest, annotations refuse it even earlier
        raise CodecError(str(error)) from error


def _mix_tensors(rng: random.Random, coded: CodedTensor) -> CodedTensor:
    """An array of another tensor in the place of this one's."""
    other = rng.choice(valid_tensors())
    name = _some_array(rng, coded)
    return _with_array(coded, name, other.arrays.get(name, coded.arrays[name]))


def _with_array(coded: CodedTensor, name: str, array: np.ndarray) -> CodedTensor:
    return dataclasses.replace(coded, arrays=coded.arrays | {name: array})


Damage = Callable[[random.Random, CodedTensor], CodedTensor]
DAMAGES: tuple[Damage, ...] = (
    *[_flip_bits] * 4,
    *[_set_bytes] * 2,
    *[_copy_elements] * 4,
    _resize,
    _reshape,
    _retype,
    _rename,
    *[_change_spec] * 2,
    _mix_tensors,
)


# --- The property ---


class Finding(AssertionError):
    """An input that was neither refused nor decoded as it must be."""


class Fuzzer:
    """Runs inputs and counts what became of them."""

    def __init__(self, seed: int, max_compiled: int = MAX_COMPILED):
        self.seed = seed
        self.max_compiled = max_compiled
        self.counts: dict[str, collections.Counter[str]] = collections.defaultdict(
            collections.Counter
        )
        self._decoders: dict[object, Callable[..., jax.Array]] = {}
        for coded in valid_tensors():  # their own shapes first, before damaged ones take the places
            self._decoder(coded)

    def run(self, number: int) -> None:
        """Runs one input; raises Finding."""
        rng = random.Random(self.seed << 40 | number)
        valid = rng.choice(valid_tensors())
        counts = self.counts[valid.spec.coding]
        counts["inputs"] += 1
        coded = valid
        try:
            for _ in range(rng.choice((1, 1, 1, 2, 3))):
                if coded.arrays:
                    coded = rng.choice(DAMAGES)(rng, coded)
            codings.validate(coded)
        except (CodecError, CheckpointError):
            counts["refused"] += 1
            if rng.random() < DECODE_REFUSED and self._decode(coded, number) is not None:
                counts["refused_decoded"] += 1
            return
        except Exception as error:
            raise Finding(self._where(number, coded, f"raised {error!r}")) from error
        counts["accepted"] += 1
        counts["changed"] += coded is not valid and not _same(coded, valid)
        self._check_accepted(coded, number)

    def _check_accepted(self, coded: CodedTensor, number: int) -> None:
        spec = coded.spec
        coding = codings.get_coding(spec.coding)
        counts = self.counts[spec.coding]
        try:
            slow = coding.decode_numpy_reference(coded)
        except Exception as error:
            raise Finding(
                self._where(number, coded, f"was accepted, then the reference raised {error!r}")
            ) from error
        shape = (spec.num_experts, spec.rows, spec.width)
        if slow.shape != shape or (slow.size and slow.max() >= coding.num_symbols):
            raise Finding(self._where(number, coded, f"decodes to {slow.shape} codes {slow}"))
        fast = self._decode(coded, number)
        if fast is None:
            counts["not_compiled"] += 1
            return
        counts["decoded"] += 1
        if not np.array_equal(fast, slow):
            raise Finding(self._where(number, coded, "decodes differently by XLA and reference"))

    def _decode(self, coded: CodedTensor, number: int) -> np.ndarray | None:
        """All codes by XLA; None where that would need compiling one shape too many."""
        decoder = self._decoder(coded)
        if decoder is None:
            return None
        try:
            experts = [np.asarray(decoder(coded.arrays, e)) for e in range(coded.spec.num_experts)]
        except Exception as error:
            raise Finding(self._where(number, coded, f"XLA raised {error!r}")) from error
        return np.stack(experts)

    def _decoder(self, coded: CodedTensor) -> Callable[..., jax.Array] | None:
        key = _shapes_of(coded)
        if key not in self._decoders:
            same_coding = sum(k[0].coding == coded.spec.coding for k in self._decoders)
            # Only tensors that are valid in form may take a place.
            if same_coding >= self.max_compiled or not _has_form(coded):
                return None
            self._decoders[key] = jax.jit(functools.partial(decode_expert, coded.spec))
        return self._decoders[key]

    def _where(self, number: int, coded: CodedTensor, what: str) -> str:
        arrays = {name: (a.dtype.name, a.shape, a.tolist()) for name, a in coded.arrays.items()}
        return (
            f"input {number} of seed {self.seed} {what}\n{coded.spec}\n{arrays}\n"
            f"run it again: python tests/fuzz_codec.py --seed {self.seed} --first {number} "
            "--count 1"
        )

    def report(self) -> dict[str, dict[str, int]]:
        """Counts by coding, and in total."""
        total = collections.Counter()
        for counts in self.counts.values():
            total.update(counts)
        return {name: dict(c) for name, c in sorted(self.counts.items())} | {"total": dict(total)}


def _shapes_of(coded: CodedTensor) -> tuple:
    arrays = tuple((n, a.dtype, a.shape) for n, a in sorted(coded.arrays.items()))
    return coded.spec, arrays


def _has_form(coded: CodedTensor) -> bool:
    try:
        codings.validate(coded)
    except (CodecError, CheckpointError):
        return False
    return coded.spec.num_weights > 0


def _same(a: CodedTensor, b: CodedTensor) -> bool:
    return _shapes_of(a) == _shapes_of(b) and all(
        a.arrays[name].tobytes() == b.arrays[name].tobytes() for name in a.arrays
    )


def fuzz(
    numbers: Iterable[int],
    seed: int,
    seconds: float | None = None,
    max_compiled: int = MAX_COMPILED,
) -> Fuzzer:
    """Runs inputs until they or the seconds are used up."""
    fuzzer = Fuzzer(seed, max_compiled)
    start = time.monotonic()
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")  # casts of NaN between dtypes
        for number in numbers:
            fuzzer.run(number)
            if seconds is not None and number % 64 == 0 and time.monotonic() - start > seconds:
                break
    return fuzzer


def main() -> int:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--count", type=int, default=100_000, help="inputs (100000)")
    parser.add_argument("--first", type=int, default=0, help="number of the first input (0)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, help="stop after so long")
    parser.add_argument("--json", help="file for the counts")
    arguments = parser.parse_args()
    numbers = range(arguments.first, arguments.first + arguments.count)
    start = time.monotonic()
    fuzzer = fuzz(numbers, arguments.seed, arguments.seconds)
    report = {
        "seed": arguments.seed,
        "first": arguments.first,
        "seconds": round(time.monotonic() - start, 1),
        "counts": fuzzer.report(),
    }
    text = json.dumps(report, indent=1)
    print(text)
    if arguments.json:
        with open(arguments.json, "w") as file:
            file.write(text + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
