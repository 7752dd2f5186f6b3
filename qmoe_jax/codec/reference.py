"""Reference encoder and decoder: plain Python in the order of FORMAT.md, which tests hold all to.

It shares only the "qmoe" dictionary's table with them: no trie, no expansion, no threads.
"""

import functools
from fractions import Fraction

import numpy as np
from jaxtyping import Float32, UInt8

from qmoe_jax.codec.dictionary import NUM_ENTRIES, dictionary
from qmoe_jax.codec.reference_lattice import lattice_weights
from qmoe_jax.codec.tensor import CodedTensor
from qmoe_jax.codec.tunstall import ZERO_WEIGHTS

# --- Dictionary ---


def entry_codes(codeword: int) -> list[int]:
    """Codes that a codeword stands for: read its two table words, least significant bit first."""
    codes = []
    first, second = (int(word) for word in dictionary().table[2 * codeword : 2 * codeword + 2])
    num_pairs = first & 15
    for pair in range(num_pairs):
        word, place = (first, pair) if pair < 7 else (second, pair - 7)
        nibble = word >> (4 + 4 * place) & 15
        codes += [nibble & 3, nibble >> 2]
    return codes


@functools.cache
def _codewords_by_codes() -> dict[tuple[int, ...], int]:
    return {tuple(entry_codes(codeword)): codeword for codeword in range(NUM_ENTRIES)}


# --- qmoe ---


def encode_row(codes: list[int]) -> list[int]:
    """Codewords of a row of ternary codes: always the longest entry that matches."""
    codes = codes + [0] * (len(codes) % 2)
    codewords = []
    at = 0
    while at < len(codes):
        for length in range(min(28, len(codes) - at), 0, -2):
            codeword = _codewords_by_codes().get(tuple(codes[at : at + length]))
            if codeword is not None:
                codewords.append(codeword)
                at += length
                break
    return codewords


def decode_row(codewords: list[int], width: int) -> list[int]:
    """Codes of a row: its entries one after another, without the code that fills an odd width."""
    codes = [code for codeword in codewords for code in entry_codes(codeword)]
    return codes[:width]


def decode_qmoe(coded: CodedTensor) -> UInt8[np.ndarray, "experts rows width"]:
    """Decode all codes of a valid "qmoe" tensor."""
    spec, arrays = coded.spec, coded.arrays
    codes = np.zeros((spec.num_experts, spec.rows, spec.width), np.uint8)
    for expert in range(spec.num_experts):
        start = int(arrays["expert_offsets"][expert])
        for row in range(spec.rows):
            stop = start + int(arrays["row_lengths"][expert, row])
            codewords = arrays["codewords"][start:stop].tolist()
            codes[expert, row] = decode_row(codewords, spec.width)
            start = stop
    return codes


# --- packed2 ---


def decode_packed2(coded: CodedTensor) -> UInt8[np.ndarray, "experts rows width"]:
    """Decode all codes of a valid "packed2" tensor."""
    spec = coded.spec
    codes = np.zeros((spec.num_experts, spec.rows, spec.width), np.uint8)
    for column in range(spec.width):
        codes[..., column] = coded.arrays["packed"][..., column // 4] >> 2 * (column % 4) & 3
    return codes


# --- Dictionaries of tunstall ---


@functools.cache
def tunstall_entries(number: int, num_escapes: int) -> list[tuple[int, ...]]:
    """Entries of a dictionary by codeword, as sequences of 0 (zero) and 1 (non-zero weight)."""
    zero_share = Fraction(ZERO_WEIGHTS[number], 1024)
    leaves: dict[tuple[int, ...], Fraction] = {(): Fraction(1)}
    while len(leaves) < 256 - num_escapes:
        short = [leaf for leaf in leaves if len(leaf) < 58]
        likeliest = min(short, key=lambda leaf: (-leaves[leaf], leaf))
        probability = leaves.pop(likeliest)
        leaves[*likeliest, 0] = probability * zero_share
        leaves[*likeliest, 1] = probability * (1 - zero_share)
    return sorted(leaves)


# --- tunstall and tunstall_2bit ---


def encode_tunstall_row(symbols: list[int], entries: list[tuple[int, ...]]) -> bytes:
    """Bytes of a row of symbols 0 to 3 (3 only where there are escapes)."""
    codeword_of = {entry: codeword for codeword, entry in enumerate(entries)}
    codewords, signs = [], []
    bits = [int(symbol > 0) for symbol in symbols] + [0] * 58
    at = 0
    while at < len(symbols):
        entry = next(
            tuple(bits[at : at + n])
            for n in range(1, 59)
            if tuple(bits[at : at + n]) in codeword_of
        )
        nonzero = [symbol for symbol in symbols[at : at + len(entry)] if symbol]
        codewords += [len(entries) + rank for rank, symbol in enumerate(nonzero) if symbol == 3]
        codewords.append(codeword_of[entry])
        signs += [int(symbol == 2) for symbol in nonzero]
        at += len(entry)
    signs += [0] * (-len(signs) % 8)
    sign_bytes = [int("".join(map(str, signs[n : n + 8])), 2) for n in range(0, len(signs), 8)]
    return bytes(codewords + sign_bytes[::-1])


def decode_tunstall_row(data: bytes, width: int, entries: list[tuple[int, ...]]) -> list[int]:
    """Symbols of a row."""
    signs = "".join(f"{byte:08b}" for byte in reversed(data))  # sign bits come first in it
    symbols: list[int] = []
    escaped: list[int] = []
    at = rank = 0
    while len(symbols) < width:
        codeword = data[at]
        at += 1
        if codeword >= len(entries):
            escaped.append(codeword - len(entries))
            continue
        first_rank = rank
        for bit in entries[codeword]:
            if bit and rank - first_rank in escaped:
                symbols.append(3)
            else:
                symbols.append(1 + int(signs[rank]) if bit else 0)
            rank += bit
        escaped = []
    return symbols[:width]


def codes_of_symbols(coding: str, zero: float) -> list[int]:
    """Codes that symbols 0 to 3 stand for in a row, by the second level of the row."""
    if coding == "tunstall_2bit":
        return {1.0: [1, 2, 0, 3], 2.0: [2, 1, 3, 0], 3.0: [3, 2, 1, 0]}.get(zero, [0, 1, 2, 3])
    return [0, 1, 2, 3]


def decode_tunstall(coded: CodedTensor) -> UInt8[np.ndarray, "experts rows width"]:
    """Decode all codes of a valid "tunstall" or "tunstall_2bit" tensor."""
    spec, arrays = coded.spec, coded.arrays
    data = arrays["words"].astype("<u4").tobytes()
    codes = np.zeros((spec.num_experts, spec.rows, spec.width), np.uint8)
    num_escapes = 8 if spec.coding == "tunstall_2bit" else 0
    for expert in range(spec.num_experts):
        entries = tunstall_entries(int(arrays["dictionaries"][expert]), num_escapes)
        start = 4 * int(arrays["expert_offsets"][expert])
        for row in range(spec.rows):
            length = int(arrays["shortest_rows"][expert]) + int(arrays["row_lengths"][expert, row])
            order = codes_of_symbols(spec.coding, float(arrays["levels"][expert, row, 1]))
            symbols = decode_tunstall_row(data[start : start + length], spec.width, entries)
            codes[expert, row] = [order[symbol] for symbol in symbols]
            start += length
    return codes


# --- Weights ---


def dequantize(
    coded: CodedTensor, codes: UInt8[np.ndarray, "experts rows width"]
) -> Float32[np.ndarray, "experts rows width"]:
    """Weights of codes, float32."""
    if coded.spec.coding == "lattice":
        return lattice_weights(coded, codes)
    first, second = np.split(coded.arrays["levels"].astype(np.float32), 2, axis=-1)
    if coded.spec.coding in ("packed2", "tunstall_2bit"):
        return first * (codes.astype(np.float32) - second)
    return np.select([codes == 1, codes == 2], [first, second], np.float32(0))
