"""A product with stored codes, piece by piece on plain arrays: the reference of what XLA calls."""

import functools

import numpy as np

from qmoe_jax.codec.lattice_dictionaries import NUM_DICTIONARIES, lattice_dictionaries
from qmoe_jax.codec.lattice_values import STEP_TABLE
from qmoe_jax.codec.tunstall import tunstall_family
from qmoe_jax.ops.cpu import lattice_kernel, tunstall_kernel
from qmoe_jax.ops.cpu.work_sharing import cut_work

GUARD = 128


@functools.cache
def tables(coding):
    if coding == "lattice":
        return lattice_kernel.dictionary_entries(lattice_dictionaries().table)
    return tunstall_kernel.dictionary_entries(tunstall_family(0).table)


class Guarded:
    """Scratch with bytes around it that no kernel may touch."""

    def __init__(self):
        self.wholes = []

    def __call__(self, shape, dtype):
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        self.wholes.append(whole := np.full(size + 2 * GUARD, 0xA5, np.uint8))
        return whole[GUARD : GUARD + size].view(dtype).reshape(shape)

    def check(self):
        for whole in self.wholes:
            assert (whole[:GUARD] == 0xA5).all()
            assert (whole[-GUARD:] == 0xA5).all()


def multiply_by_pieces(
    spec, x, expert_index, arrays, y, piece=1000, most_pieces=8, most_tokens=128
):
    """Write y, float32 [tokens, rows]; `arrays` in the order of `products`. Scratch is guarded."""
    words, offsets, *others = arrays
    most_pieces, most_tokens = 32, 128
    experts, blocks = spec.num_experts, -(-spec.rows // 32)
    is_lattice = spec.coding == "lattice"
    lengths = others[0 if is_lattice else 2]
    length_bytes, lengths = lengths.itemsize, np.ascontiguousarray(lengths).view(np.uint8)
    scratch = Guarded()
    order, starts = scratch(len(x), np.int64), scratch(experts + 1, np.int64)
    busy, cuts = scratch(experts, np.int64), scratch(most_pieces + 1, np.int64)
    num_busy, pieces, busiest = cut_work(
        expert_index, offsets, lengths.reshape(-1), length_bytes if is_lattice else 0, blocks,
        most_tokens, piece, most_pieces, order, starts, busy, cuts, scratch(experts + 1, np.int64),
    )  # fmt: skip
    y[order[starts[-1] :]] = 0
    most, width = min(most_tokens, busiest), spec.width
    for number in range(pieces if num_busy else 0):
        where = (order, starts, busy, cuts[number], cuts[number + 1], most, y)
        if is_lattice:
            pairs = (width + 1) // 2
            lattice_kernel.multiply_piece(
                words.view(np.uint8), offsets, lengths.reshape(-1), length_bytes, *others[1:],
                STEP_TABLE, *tables("lattice"), x, *where,
                scratch((lattice_kernel.NUM_REGIONS, lattice_kernel.region_bytes(width)), np.uint8),
                scratch((2, pairs + 1, 4), np.uint64),
                scratch((7, NUM_DICTIONARIES), np.int64),
                scratch(257, np.int64),
                scratch(width, np.int32),
                scratch(width, np.float32),
                scratch(2 * pairs * most, np.float32),
                scratch((most, 32), np.float32),
            )  # fmt: skip
        else:
            string = tunstall_kernel.scratch_bytes(width)
            tunstall_kernel.multiply_piece(
                words.view(np.uint8), offsets, *others[:2], lengths.reshape(-1), length_bytes,
                others[3].view(np.uint16),
                *tables("tunstall"), x, *where,
                scratch(string, np.uint8),
                scratch(string, np.uint8),
                scratch((most, tunstall_kernel.padded_width(width)), np.float32),
                scratch(most, np.float32),
            )  # fmt: skip
    scratch.check()
