"""Reference decoder of "lattice": plain Python in the order of FORMAT.md, and self-contained.

It shares no table, no constant and no code with the encoder and the fast decoders.
"""

import functools
from collections.abc import Iterator
from fractions import Fraction

import numpy as np
from jaxtyping import Float32, UInt8

from qmoe_jax.codec.tensor import CodedTensor

# --- Dictionaries ---

_ZERO_SHARES = (1020, 1014, 1005, 994, 980, 962, 940, 914, 884, 848, 804, 748, 680, 608, 512, 384)


@functools.cache
def entries(number: int) -> list[str]:
    """Entries of a dictionary by codeword, as strings of the digits 0 and 1."""
    zero_share = Fraction(_ZERO_SHARES[number], 1024)
    leaves = {"": Fraction(1)}
    while len(leaves) < 256:
        likeliest = min(filter(_may_grow, leaves), key=lambda leaf: (-leaves[leaf], leaf))
        probability = leaves.pop(likeliest)
        leaves[likeliest + "0"] = probability * zero_share
        leaves[likeliest + "1"] = probability * (1 - zero_share)
    return sorted(leaves)


def _may_grow(leaf: str) -> bool:
    return len(leaf) < 255 and len(leaf.lstrip("0")) < 48


# --- Blocks ---


def decode_lattice(coded: CodedTensor) -> UInt8[np.ndarray, "experts rows width"]:
    """Decode all codes of a valid "lattice" tensor."""
    spec, arrays = coded.spec, coded.arrays
    codes = np.zeros((spec.num_experts, spec.rows, spec.width), np.uint8)
    data = arrays["words"].astype("<u4").tobytes()
    for expert in range(spec.num_experts):
        start = 4 * int(arrays["expert_offsets"][expert])
        for block, length in enumerate(arrays["block_lengths"][expert].tolist()):
            for row, column, multiple in decode_block(
                coded, expert, block, data[start : start + length]
            ):
                codes[expert, row, column] = 2 * multiple if multiple > 0 else -2 * multiple - 1
            start += length
    return codes


def decode_block(
    coded: CodedTensor, expert: int, block: int, data: bytes
) -> Iterator[tuple[int, int, int]]:
    """Find the weights of a block that are not zero: row, column and multiple of the step."""
    spec, arrays = coded.spec, coded.arrays
    columns = arrays["columns"][expert].tolist()
    order = sorted((byte, column) for column, byte in enumerate(columns) if byte != 255)
    schedules = [
        [d for d, count in enumerate(schedule.tolist()) for _ in range(count)]
        for schedule in arrays["schedules"][expert]
    ]
    plain = arrays["dictionaries"][expert].tolist()
    at = 0

    def string(schedule: list[int], wanted: int, otherwise: int = 15) -> str:
        """Read one bit string: dictionaries of its codewords, and of those behind."""
        nonlocal at
        bits: list[str] = []
        length = index = 0
        while length < wanted:
            dictionary = schedule[index] if index < len(schedule) else otherwise
            entry = entries(dictionary)[data[at]]
            bits.append(entry)
            length += len(entry)
            index += 1
            at += 1
        return "".join(bits)[:wanted]

    grouped = int(arrays["grouped_columns"][expert])
    flags = string(schedules[0], 4 * grouped)
    size = -(-3 * flags.count("1") // 8)
    fields = int.from_bytes(data[at : at + size], "little")
    at += size
    firsts = [fields >> 3 * i & 7 for i in range(flags.count("1"))]
    rests = iter(string([], sum(7 - first for first in firsts), plain[0]))
    first_of = iter(firsts)
    places = ""
    for flag in flags:
        if flag == "1":
            first = next(first_of)
            places += "0" * first + "1" + "".join(next(rests) for _ in range(7 - first))
        else:
            places += "0" * 8
    planes = [places + string(schedules[1], 32 * (len(order) - grouped))]
    planes.append(string(schedules[2], planes[0].count("1")))
    planes.append(string([], planes[1].count("1"), plain[1]))
    planes.append(string([], planes[2].count("1"), plain[2]))
    signs = string([], planes[0].count("1"), plain[3])
    remainders = data[at:]

    def lean(index: int) -> int:
        return int(arrays["leans"][expert, index // 8]) >> index % 8 & 1

    ranks = [0, 0, 0, 0]
    for place, bit in enumerate(planes[0]):
        if bit == "0":
            continue
        row, column = 32 * block + place % 32, order[place // 32][1]
        negative = int(signs[ranks[0]]) ^ lean(row if spec.rows < spec.width else column)
        magnitude = 1
        while magnitude < 4 and planes[magnitude][ranks[magnitude - 1]] == "1":
            ranks[magnitude - 1] += 1
            magnitude += 1
        ranks[magnitude - 1] += 1
        if magnitude == 4:
            magnitude += remainders[ranks[3] - 1]
        yield row, column, -magnitude if negative else magnitude


# --- Weights ---


def lattice_weights(
    coded: CodedTensor, codes: UInt8[np.ndarray, "experts rows width"]
) -> Float32[np.ndarray, "experts rows width"]:
    """Weights of codes: multiples times steps."""
    arrays = coded.arrays
    weights = np.zeros(codes.shape, np.float32)
    for expert in range(codes.shape[0]):
        for column, byte in enumerate(arrays["columns"][expert].tolist()):
            index = int(arrays["bases"][expert, byte // 32]) + byte % 32
            step = arrays["origins"][expert] * np.float32(2.0 ** (-index / 16))
            own = codes[expert, :, column].astype(np.float32)
            multiples = np.where(own % 2 == 1, -(own + 1) / 2, own / 2)
            weights[expert, :, column] = multiples.astype(np.float32) * step
    return weights
