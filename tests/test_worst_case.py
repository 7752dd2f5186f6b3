"""Bounds on the stored size that hold for every input: held against codes made to be bad."""

import ml_dtypes
import numpy as np
import pytest

from qmoe_jax.codec import coding_lattice, codings
from qmoe_jax.codec.encode import encode
from qmoe_jax.codec.lattice_choices import Dictionaries
from qmoe_jax.codec.tunstall import NUM_DICTIONARIES, tunstall_family


def lattice_levels(shape):
    steps = np.uint8(np.arange(shape[2]) % 97)
    return {
        "step_index": np.broadcast_to(steps, shape[::2]),
        "origin": np.ones(shape[0], np.float32),
    }


def stored_bytes(coding, codes, zero=1.0):
    """Bytes of an expert, each row of which has these codes; its share of the offsets too."""
    if coding == "lattice":
        levels = lattice_levels(codes.shape)
    else:
        levels = np.full((*codes.shape[:2], 2), zero, ml_dtypes.bfloat16)
    coded = encode(codes, levels, coding)
    total = sum(array.nbytes for array in coded.arrays.values())
    return total - ("expert_offsets" in coded.arrays) * 4


def patterns(num_symbols, width):
    """Rows of every kind: constant, periodic, sparse, dense, random of every share."""
    rng = np.random.default_rng(0)
    different = sorted({0, 1, 2, min(3, num_symbols - 1), min(6, num_symbols - 1), num_symbols - 1})
    for symbol in different:
        yield np.full(width, symbol)
    for period in (2, 3, 5, 8, 13, 40):
        for offset in (0, 1):
            for symbol in different[1:]:
                yield np.where(np.arange(width) % period == offset, symbol, 0)
                yield np.where(np.arange(width) % period == offset, 0, symbol)
    for share in (0.02, 0.1, 0.3, 0.5, 0.58, 0.66, 0.75, 0.8, 0.84, 0.87, 0.9, 0.93, 0.97):
        symbols = rng.integers(1, num_symbols, width)
        yield np.where(rng.random(width) < share, 0, symbols)
        yield np.where(rng.random(width) < share, 0, num_symbols - 1)


def entries(coding):
    """Rows made of one dictionary entry again and again, and of two mixed: the costly ones."""
    family = codings.get_coding(coding).family  # pyright: ignore[reportAttributeAccessIssue]
    rng = np.random.default_rng(1)
    for number in range(NUM_DICTIONARIES):
        words = family.table[number].astype(np.uint64)
        both = words[:, 0] | words[:, 1] << np.uint64(32)
        sequences = [
            [int(word >> np.uint64(6 + i)) & 1 for i in range(int(word & np.uint64(63)))]
            for word in both
            if word
        ]
        short = sorted(sequences, key=lambda s: (len(s), -sum(s)))
        sparse = sorted(sequences, key=lambda s: sum(s) / len(s))
        yield from short[:6]
        for _ in range(12):
            mixed = [short[rng.integers(8)] for _ in range(8)]
            mixed += [sparse[rng.integers(4)] for _ in range(rng.integers(8))]
            yield [bit for sequence in mixed for bit in sequence]


def worst(coding, rows, width):
    """The most bytes that any of the inputs takes."""
    num_symbols = codings.get_coding(coding).num_symbols
    found = list(patterns(num_symbols, width))
    if coding.startswith("tunstall"):
        for bits in entries(coding):
            repeated = np.resize(np.array(bits), width)
            found += [repeated, repeated * (num_symbols - 1)]
    most = 0
    for row in found:
        for zero in (0.0,) if coding == "lattice" else (0.0, 1.0):
            codes = np.broadcast_to(np.uint8(row), (1, rows, width)).copy()
            most = max(most, stored_bytes(coding, codes, zero))
    return most


@pytest.mark.parametrize("coding", codings.coding_names())
@pytest.mark.parametrize(("rows", "width"), [(1, 1), (3, 2), (7, 33), (16, 256), (4, 1023)])
def test_no_codes_take_more(coding, rows, width):
    assert worst(coding, rows, width) <= codings.get_coding(coding).most_bytes(rows, width)


@pytest.mark.parametrize("coding", codings.coding_names())
def test_the_bound_is_nearly_reached(coding):
    rows, width = 16, 4096
    bound = codings.get_coding(coding).most_bytes(rows, width)
    # No bit string of "lattice" is its bits as they are where the one before it is all ones.
    assert worst(coding, rows, width) > (0.85 if coding == "lattice" else 0.97) * bound


@pytest.mark.parametrize(("rows", "width"), [(1, 1), (40, 33), (64, 20000)])
def test_lattice_choices_that_are_bad_for_the_codes_are_not_kept(monkeypatch, rows, width):
    """Dictionaries for sparse columns, and codes that are dense."""
    sparse = Dictionaries(0, np.full((3, 15), 65535, np.uint16), np.zeros(4, np.uint8))
    monkeypatch.setattr(coding_lattice, "choose_dictionaries", lambda *_: sparse)
    codes = np.random.default_rng(0).integers(7, 255, (1, rows, width)).astype(np.uint8)
    bound = codings.get_coding("lattice").most_bytes(rows, width)
    assert bound / 1.3 < stored_bytes("lattice", codes) <= bound
    codings.validate(encode(codes, lattice_levels(codes.shape), "lattice"))


def test_an_expert_of_many_kinds_of_rows():
    """The dictionary is the expert's, so that single rows may be much worse than their mean."""
    for coding in ("tunstall", "tunstall_2bit"):
        num_symbols = codings.get_coding(coding).num_symbols
        for share in (0.0, 0.02, 0.05, 0.1, 0.2, 0.3, 0.4):
            codes = np.zeros((1, 50, 512), np.uint8)
            codes[:, : round(50 * share)] = num_symbols - 1
            bound = codings.get_coding(coding).most_bytes(50, 512)
            assert stored_bytes(coding, codes) <= bound


def test_families_have_the_entries_that_the_bound_counts():
    for escapes in (0, 8):
        family = tunstall_family(escapes)
        assert (family.lengths > 0).sum() == NUM_DICTIONARIES * (256 - escapes)
        assert (family.nonzeros <= family.lengths).all()
