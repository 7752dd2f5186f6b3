"""Slow and plain encoder and decoder, in the order of FORMAT.md. The fast paths are held to it.

It shares only the dictionary's table with them: no trie, no expansion, no threads.
"""

import functools

import numpy as np
from jaxtyping import Float32, UInt8

from qmoe_jax.codec.dictionary import NUM_ENTRIES, dictionary
from qmoe_jax.codec.tensor import CodedTensor

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


def decode_row(codewords: list[int], in_features: int) -> list[int]:
    """Codes of a row: its entries one after another, without the code that fills an odd width."""
    codes = [code for codeword in codewords for code in entry_codes(codeword)]
    return codes[:in_features]


def decode_qmoe(coded: CodedTensor) -> UInt8[np.ndarray, "experts out in"]:
    """Decode all codes of a valid "qmoe" tensor."""
    spec, arrays = coded.spec, coded.arrays
    codes = np.zeros((spec.num_experts, spec.out_features, spec.in_features), np.uint8)
    for expert in range(spec.num_experts):
        start = int(arrays["expert_offsets"][expert])
        for row in range(spec.out_features):
            stop = start + int(arrays["row_lengths"][expert, row])
            codewords = arrays["codewords"][start:stop].tolist()
            codes[expert, row] = decode_row(codewords, spec.in_features)
            start = stop
    return codes


# --- packed2 ---


def decode_packed2(coded: CodedTensor) -> UInt8[np.ndarray, "experts out in"]:
    """Decode all codes of a valid "packed2" tensor."""
    spec = coded.spec
    codes = np.zeros((spec.num_experts, spec.out_features, spec.in_features), np.uint8)
    for column in range(spec.in_features):
        codes[..., column] = coded.arrays["packed"][..., column // 4] >> 2 * (column % 4) & 3
    return codes


# --- Weights ---


def dequantize(
    coded: CodedTensor, codes: UInt8[np.ndarray, "experts out in"]
) -> Float32[np.ndarray, "experts out in"]:
    """Weights of codes, float32."""
    first, second = np.split(coded.arrays["levels"].astype(np.float32), 2, axis=-1)
    if coded.spec.coding == "packed2":
        return first * (codes.astype(np.float32) - second)
    return np.select([codes == 1, codes == 2], [first, second], np.float32(0))
