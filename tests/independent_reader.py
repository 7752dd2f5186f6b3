"""A second reader of the format, by `FORMAT.md` alone.

It shares no line with the package and imports nothing of it: where the two disagree, the document
is unclear or one of them is wrong. It needs only the standard library, numpy and ml_dtypes, and is
slow.

    codes, weights = read_tensor(spec, arrays)
    parameters = read_checkpoint(folder)
"""

from __future__ import annotations

import decimal
import functools
import gzip
import hashlib
import heapq
import itertools
import json
import math
import re
import zlib
from pathlib import Path

import ml_dtypes
import numpy as np

CODINGS = ("qmoe", "packed2", "tunstall", "tunstall_2bit", "lattice")
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
DTYPES = {
    "uint8": np.dtype("u1"),
    "uint16": np.dtype("<u2"),
    "uint32": np.dtype("<u4"),
    "int32": np.dtype("<i4"),
    "float16": np.dtype("<f2"),
    "float32": np.dtype("<f4"),
    "float64": np.dtype("<f8"),
    "bfloat16": BFLOAT16,
}


class Refused(Exception):
    """What was given is not of the format."""


def require(condition: object, message: str) -> None:
    if not condition:
        raise Refused(message)


# Spec and arrays


def check_spec(spec) -> tuple[str, int, int, int, int]:
    require(isinstance(spec, dict), f"the spec is {spec!r}; it must be an object")
    names = {"coding", "num_experts", "out_features", "in_features", "max_row_codewords"}
    require(
        set(spec) == names, f"the spec has the fields {sorted(spec)}; they must be {sorted(names)}"
    )
    coding = spec["coding"]
    require(
        isinstance(coding, str) and coding in CODINGS, f"coding {coding!r} is none of {CODINGS}"
    )
    numbers = []
    for name, least in (
        ("num_experts", 0),
        ("out_features", 0),
        ("in_features", 1),
        ("max_row_codewords", 0),
    ):
        value = spec[name]
        require(
            type(value) is int and value >= least,
            f"{name} is {value!r}; it must be an integer >= {least}",
        )
        numbers.append(value)
    experts, out, width, bound = numbers
    require(width < 2**23, f"in_features is {width}; it must be less than 2^23")
    require(
        out * width < 2**31, f"an expert has {out * width} weights; it must have fewer than 2^31"
    )
    require(experts < 2**31, f"num_experts is {experts}; it must be less than 2^31")
    if coding in ("packed2", "lattice"):
        require(bound == 0, f"max_row_codewords is {bound}; {coding} requires 0")
    else:
        require(
            bound <= 2 * width + 64, f"max_row_codewords is {bound}, more than {2 * width + 64}"
        )
    if coding == "qmoe":
        require(bound < 2**16, f"max_row_codewords is {bound}; qmoe requires less than 2^16")
    if coding == "lattice":
        require(width < 2**19, f"in_features is {width}; lattice requires less than 2^19")
    return coding, experts, out, width, bound


def check_arrays(arrays, wanted: dict) -> None:
    """`wanted`: name to (dtypes allowed, shape); None in a shape is any length."""
    require(
        set(arrays) == set(wanted),
        f"the arrays are {sorted(arrays)}; they must be {sorted(wanted)}",
    )
    for name, (dtypes, shape) in wanted.items():
        array = arrays[name]
        require(
            any(array.dtype == DTYPES[dtype] for dtype in dtypes),
            f"{name} is {array.dtype}, not {dtypes}",
        )
        fits = len(array.shape) == len(shape) and all(
            want is None or have == want for have, want in zip(array.shape, shape, strict=True)
        )
        require(fits, f"{name} has shape {array.shape}; it must be {shape}")


def check_offsets(offsets: np.ndarray, count: int) -> list[int]:
    numbers = [int(number) for number in offsets]
    require(count < 2**31, f"{count} elements; there must be fewer than 2^31")
    require(numbers[0] == 0, f"offsets start at {numbers[0]}, not 0")
    require(all(a <= b for a, b in itertools.pairwise(numbers)), "offsets decrease")
    require(numbers[-1] == count, f"offsets end at {numbers[-1]}, not {count}")
    return numbers


def check_levels(levels: np.ndarray) -> np.ndarray:
    values = levels.astype(np.float32)
    require(np.isfinite(values).all(), "a level is NaN or infinite")
    return values


def expert_bytes(
    words: np.ndarray, offsets: list[int], expert: int, lengths: list[int], what: str
) -> bytes:
    """The bytes of an expert, without filler."""
    count = offsets[expert + 1] - offsets[expert]
    require(count < 2**26, f"expert {expert} has {count} words; it must have fewer than 2^26")
    total = sum(lengths)
    require(
        (total + 3) // 4 == count, f"{what} of expert {expert} have {total} bytes in {count} words"
    )
    data = words[offsets[expert] : offsets[expert + 1]].astype("<u4").tobytes()
    require(not any(data[total:]), f"filler of expert {expert} is not zero")
    return data[:total]


def affine(codes: np.ndarray, levels: np.ndarray) -> np.ndarray:
    """scale * (code - zero)."""
    scale, zero = levels[..., :1], levels[..., 1:]
    with np.errstate(over="ignore"):
        return scale * (codes.astype(np.float32) - zero)


def ternary(codes: np.ndarray, levels: np.ndarray) -> np.ndarray:
    low, high = levels[..., :1], levels[..., 1:]
    return np.where(codes == 0, np.float32(0), np.where(codes == 1, low, high))


# Dictionaries


@functools.cache
def qmoe_entries() -> list[tuple[int, ...]]:
    z = 0.885
    n = (1 - z) / 2
    code = (z, n, n)
    pair = [code[symbol % 3] * code[symbol // 3] for symbol in range(9)]
    # Whatever follows an entry is less likely than the entry, so the heap's top is the next one.
    heap = [(-pair[symbol], (symbol,)) for symbol in range(9)]
    heapq.heapify(heap)
    entries = []
    while len(entries) < 65536:
        negative, sequence = heapq.heappop(heap)
        entries.append(sequence)
        if len(sequence) < 14:
            for symbol in range(9):
                heapq.heappush(heap, (negative * pair[symbol], (*sequence, symbol)))
    table = np.zeros((65536, 2), "<u4")
    for number, sequence in enumerate(entries):
        for half in (0, 1):
            word = len(sequence)
            for place, symbol in enumerate(sequence[7 * half : 7 * half + 7]):
                word |= (symbol % 3) << (4 + 4 * place) | (symbol // 3) << (6 + 4 * place)
            table[number, half] = word
    check_hash(table, "c09862c453fe122634070a475357ff81a679aff65829d84a56f806c02a54ed45")
    return entries


def check_hash(table: np.ndarray, digest: str) -> None:
    found = hashlib.sha256(table.tobytes()).hexdigest()
    if found != digest:
        raise AssertionError(f"the dictionary built has sha256 {found}, not {digest}")


def from_first_one(bits: tuple[int, ...]) -> int:
    return len(bits) - bits.index(1) if 1 in bits else 0


def grow_tree(z: int, leaves: int, longest: int, longest_from_one: int) -> list[tuple[int, ...]]:
    """All leaves, in lexicographic order."""

    def likelihood(bits):
        ones = sum(bits)
        return z ** (len(bits) - ones) * (1024 - z) ** ones * 1024 ** (longest - len(bits))

    growing, grown = [(-likelihood(()), ())], []
    while len(growing) + len(grown) < leaves:
        _, bits = heapq.heappop(growing)
        for bit in (0, 1):
            leaf = (*bits, bit)
            if len(leaf) < longest and from_first_one(leaf) < longest_from_one:
                heapq.heappush(growing, (-likelihood(leaf), leaf))
            else:
                grown.append(leaf)
    return sorted([leaf for _, leaf in growing] + grown)


TUNSTALL_ZEROS = (512, 640, 736, 800, 848, 880, 904, 928, 952, 976)
TUNSTALL_HASHES = {
    256: "4800547715427566f5a9cbc682d179b4258206174aab504ab161d9556a15fb07",
    248: "49b2ad2d8e328632f22f57a1d5605f9cc43fd0aa4fce4ad994da4b2c11eed9e1",
}


@functools.cache
def tunstall_dictionaries(entries: int) -> list[list[tuple[int, ...]]]:
    dictionaries = [grow_tree(z, entries, 58, 1000) for z in TUNSTALL_ZEROS]
    table = np.zeros((10, 256), "<u8")
    for number, dictionary in enumerate(dictionaries):
        for codeword, bits in enumerate(dictionary):
            table[number, codeword] = len(bits) | sum(bit << (6 + i) for i, bit in enumerate(bits))
    check_hash(table, TUNSTALL_HASHES[entries])
    return dictionaries


LATTICE_ZEROS = (1020, 1014, 1005, 994, 980, 962, 940, 914, 884, 848, 804, 748, 680, 608, 512, 384)


@functools.cache
def lattice_dictionaries() -> list[list[tuple[int, ...]]]:
    dictionaries = [grow_tree(z, 256, 255, 48) for z in LATTICE_ZEROS]
    table = np.zeros((16, 256), "<u8")
    for number, dictionary in enumerate(dictionaries):
        for codeword, bits in enumerate(dictionary):
            zeros = bits.index(1) if 1 in bits else 0
            rest = bits[zeros:] if 1 in bits else ()
            table[number, codeword] = (
                len(bits) | zeros << 8 | sum(bit << (16 + i) for i, bit in enumerate(rest))
            )
    check_hash(table, "3d5512d360c6956609c8de07c7a781837a7b23725156bf3e3fee53b31bf6e843")
    return dictionaries


@functools.cache
def lattice_steps() -> np.ndarray:
    """2^(-s/16), rounded to binary32 from 60 decimal digits: none of these is near a tie."""
    with decimal.localcontext(prec=60):
        exact = [decimal.Decimal(2) ** (decimal.Decimal(-s) / 16) for s in range(256)]
    steps = []
    for number in exact:
        near = np.float32(float(number))
        around = [np.nextafter(near, np.float32(0)), near, np.nextafter(near, np.float32(2))]
        steps.append(min(around, key=lambda value: abs(decimal.Decimal(float(value)) - number)))
    return np.array(steps, np.float32)


# Codings


def read_qmoe(arrays, experts, out, width, bound):
    check_arrays(
        arrays,
        {
            "codewords": (("uint16",), (None,)),
            "expert_offsets": (("int32",), (experts + 1,)),
            "row_lengths": (("uint8" if bound <= 255 else "uint16",), (experts, out)),
            "levels": (("bfloat16",), (experts, out, 2)),
        },
    )
    offsets = check_offsets(arrays["expert_offsets"], len(arrays["codewords"]))
    levels = check_levels(arrays["levels"])
    entries = qmoe_entries()
    rows = []
    for expert in range(experts):
        lengths = [int(length) for length in arrays["row_lengths"][expert]]
        require(
            sum(lengths) == offsets[expert + 1] - offsets[expert],
            f"row lengths of expert {expert} do not sum up",
        )
        start = offsets[expert]
        for row, length in enumerate(lengths):
            require(
                length <= bound,
                f"row {row} of expert {expert} has {length} codewords, more than {bound}",
            )
            pairs = [
                pair
                for word in arrays["codewords"][start : start + length]
                for pair in entries[int(word)]
            ]
            start += length
            require(
                len(pairs) == (width + 1) // 2,
                f"row {row} of expert {expert} has {len(pairs)} pairs",
            )
            codes = [code for pair in pairs for code in (pair % 3, pair // 3)]
            require(not any(codes[width:]), f"filler of row {row} of expert {expert} is not 0")
            rows.append(codes[:width])
    codes = np.array(rows, np.uint8).reshape(experts, out, width)
    return codes, ternary(codes, levels)


def read_packed2(arrays, experts, out, width, bound):
    del bound
    check_arrays(
        arrays,
        {
            "packed": (("uint8",), (experts, out, (width + 3) // 4)),
            "levels": (("bfloat16",), (experts, out, 2)),
        },
    )
    levels = check_levels(arrays["levels"])
    codes = np.stack([arrays["packed"] >> shift & 3 for shift in (0, 2, 4, 6)], axis=-1).reshape(
        experts, out, 4 * ((width + 3) // 4)
    )
    require(not codes[..., width:].any(), "bits after a row's last code are set")
    codes = codes[..., :width]
    return codes, affine(codes, levels)


def read_tunstall(arrays, experts, out, width, bound, two_bit=False):
    check_arrays(
        arrays,
        {
            "words": (("uint32",), (None,)),
            "expert_offsets": (("int32",), (experts + 1,)),
            "dictionaries": (("uint8",), (experts,)),
            "shortest_rows": (("int32",), (experts,)),
            "row_lengths": (("uint8", "uint16"), (experts, out)),
            "levels": (("bfloat16",), (experts, out, 2)),
        },
    )
    offsets = check_offsets(arrays["expert_offsets"], len(arrays["words"]))
    levels = check_levels(arrays["levels"])
    dictionaries = tunstall_dictionaries(248 if two_bit else 256)
    rows = []
    for expert in range(experts):
        number, shortest = int(arrays["dictionaries"][expert]), int(arrays["shortest_rows"][expert])
        require(number <= 9, f"dictionary {number} of expert {expert}; there are 0 to 9")
        require(shortest >= 0, f"the shortest row of expert {expert} is {shortest}")
        lengths = [shortest + int(length) for length in arrays["row_lengths"][expert]]
        data = expert_bytes(arrays["words"], offsets, expert, lengths, "rows")
        start = 0
        for row, length in enumerate(lengths):
            place = f"row {row} of expert {expert}"
            symbols, codewords = tunstall_row(
                data[start : start + length], dictionaries[number], width, place
            )
            start += length
            require(codewords <= bound, f"{place} has {codewords} codewords, more than {bound}")
            if two_bit:
                zero = float(levels[expert, row, 1])
                codes_of = {1.0: (1, 2, 0, 3), 2.0: (2, 1, 3, 0), 3.0: (3, 2, 1, 0)}.get(
                    zero, (0, 1, 2, 3)
                )
                symbols = [codes_of[symbol] for symbol in symbols]
            rows.append(symbols)
    codes = np.array(rows, np.uint8).reshape(experts, out, width)
    return codes, (affine if two_bit else ternary)(codes, levels)


def tunstall_row(data: bytes, dictionary, width: int, place: str) -> tuple[list[int], int]:
    """Symbols and the number of codewords."""
    bits: list[int] = []
    escaped: set[int] = set()  # ranks
    used = ones = 0
    while len(bits) < width:
        escapes: list[int] = []
        while True:
            require(used < len(data), f"{place} ends before its weights do")
            codeword = data[used]
            used += 1
            if codeword < len(dictionary):
                break
            escape = codeword - len(dictionary)
            require(
                not escapes or escapes[-1] < escape, f"{place} has an escape that does not rise"
            )
            escapes.append(escape)
        entry = dictionary[codeword]
        require(
            not escapes or escapes[-1] < sum(entry), f"{place} has an escape of no non-zero weight"
        )
        escaped.update(ones + escape for escape in escapes)
        bits.extend(entry)
        ones += sum(entry)
    require(not any(bits[width:]), f"{place} has a non-zero weight beyond its last")
    require(
        len(data) == used + (ones + 7) // 8,
        f"{place} has {len(data)} bytes, {used} codewords, {ones} signs",
    )
    signs = [byte >> (7 - i) & 1 for byte in reversed(data[used:]) for i in range(8)]
    require(not any(signs[ones:]), f"{place} has set bits after its last sign bit")
    require(
        not any(signs[rank] for rank in escaped), f"{place} has a set sign bit of an escaped weight"
    )
    symbols, rank = [], 0
    for bit in bits[:width]:
        symbols.append(0 if not bit else 3 if rank in escaped else 1 + signs[rank])
        rank += bit
    return symbols, used


def read_lattice(arrays, experts, out, width, bound):
    del bound
    blocks = (out + 31) // 32
    leaned = min(out, width)
    check_arrays(
        arrays,
        {
            "words": (("uint32",), (None,)),
            "expert_offsets": (("int32",), (experts + 1,)),
            "block_lengths": (("uint16", "uint32"), (experts, blocks)),
            "grouped_columns": (("int32",), (experts,)),
            "schedules": (("uint16",), (experts, 3, 15)),
            "dictionaries": (("uint8",), (experts, 4)),
            "leans": (("uint8",), (experts, (leaned + 7) // 8)),
            "columns": (("uint8",), (experts, width)),
            "bases": (("uint8",), (experts, 8)),
            "origins": (("float32",), (experts,)),
        },
    )
    offsets = check_offsets(arrays["expert_offsets"], len(arrays["words"]))
    multiples = np.zeros((experts, out, width), np.int32)
    steps = np.zeros((experts, width), np.float32)
    for expert in range(experts):
        origin = arrays["origins"][expert]
        require(0 <= origin <= 2.0**119, f"the origin of expert {expert} is {origin}")
        strings = [int(number) for number in arrays["dictionaries"][expert]]
        require(max(strings) <= 15, f"a dictionary of expert {expert} is above 15")
        leans = [int(byte) >> bit & 1 for byte in arrays["leans"][expert] for bit in range(8)]
        require(not any(leans[leaned:]), f"bits after the last lean of expert {expert} are set")
        columns = [int(byte) for byte in arrays["columns"][expert]]
        visited = sorted((byte, column) for column, byte in enumerate(columns) if byte != 255)
        for byte, column in visited:
            step = int(arrays["bases"][expert, byte // 32]) + byte % 32
            require(step <= 255, f"column {column} of expert {expert} has the step {step}")
            steps[expert, column] = origin * lattice_steps()[step]
        grouped = int(arrays["grouped_columns"][expert])
        require(
            0 <= grouped <= len(visited),
            f"expert {expert} has {grouped} grouped columns of {len(visited)}",
        )
        lengths = [int(length) for length in arrays["block_lengths"][expert]]
        data = expert_bytes(arrays["words"], offsets, expert, lengths, "blocks")
        schedules = [[int(count) for count in schedule] for schedule in arrays["schedules"][expert]]
        order = [column for _, column in visited]
        start = 0
        for block, length in enumerate(lengths):
            place = f"block {block} of expert {expert}"
            found = lattice_block(
                data[start : start + length], len(order), grouped, schedules, strings, place
            )
            start += length
            for position, magnitude, differs in found:
                row, column = 32 * block + position % 32, order[position // 32]
                require(
                    row < out, f"{place} has a weight in row {row}, which the tensor does not have"
                )
                sign = differs ^ leans[row if out < width else column]
                multiples[expert, row, column] = -magnitude if sign else magnitude
    weights = multiples.astype(np.float32) * steps[:, None, :]
    codes = np.where(multiples > 0, 2 * multiples, np.where(multiples < 0, -2 * multiples - 1, 0))
    return codes.astype(np.uint8), weights


def lattice_block(data, visited, grouped, schedules, strings, place) -> list[tuple[int, int, int]]:
    """Position, magnitude and whether the sign differs from the lean, of all but zeros."""
    used = 0

    def take(count: int) -> bytes:
        nonlocal used
        require(used + count <= len(data), f"{place} ends before its parts do")
        used += count
        return data[used - count : used]

    def string(count: int, schedule=None, dictionary=0) -> list[int]:
        bits: list[int] = []
        number = 0
        while len(bits) < count:
            if schedule is not None:
                dictionary, end = 0, 0
                while dictionary < 15:
                    end += schedule[dictionary]
                    if number < end:
                        break
                    dictionary += 1
            bits.extend(lattice_dictionaries()[dictionary][take(1)[0]])
            number += 1
        require(not any(bits[count:]), f"{place} has ones after the end of a bit string")
        return bits[:count]

    flags = string(4 * grouped, schedule=schedules[0])
    groups = [group for group, flag in enumerate(flags) if flag]
    fields = int.from_bytes(take((3 * len(groups) + 7) // 8), "little")
    firsts = [fields >> (3 * i) & 7 for i in range(len(groups))]
    require(
        fields >> (3 * len(groups)) == 0, f"{place} has set bits after the last field of the firsts"
    )
    rests = iter(string(sum(7 - first for first in firsts), dictionary=strings[0]))
    positions = []
    for group, first in zip(groups, firsts, strict=True):
        positions.append(8 * group + first)
        positions.extend(8 * group + row for row in range(first + 1, 8) if next(rests))
    plane1 = string(32 * (visited - grouped), schedule=schedules[1])
    positions.extend(32 * grouped + position for position, bit in enumerate(plane1) if bit)
    plane2 = string(len(positions), schedule=schedules[2])
    plane3 = string(sum(plane2), dictionary=strings[1])
    plane4 = string(sum(plane3), dictionary=strings[2])
    signs = string(len(positions), dictionary=strings[3])
    remainders = take(sum(plane4))
    require(all(remainder <= 123 for remainder in remainders), f"{place} has a remainder above 123")
    require(used == len(data), f"{place} has {len(data)} bytes; its parts need {used}")
    third, fourth, rest = iter(plane3), iter(plane4), iter(remainders)
    found = []
    for position, second, sign in zip(positions, plane2, signs, strict=True):
        magnitude = 1
        if second:
            magnitude = 2
            if next(third):
                magnitude = 3
                if next(fourth):
                    magnitude = 4 + next(rest)
        found.append((position, magnitude, sign))
    return found


READERS = {
    "qmoe": read_qmoe,
    "packed2": read_packed2,
    "tunstall": read_tunstall,
    "tunstall_2bit": functools.partial(read_tunstall, two_bit=True),
    "lattice": read_lattice,
}


def read_tensor(
    spec: dict, arrays: dict[str, np.ndarray], dtype=np.float32
) -> tuple[np.ndarray, np.ndarray]:
    """Codes and weights, [experts, out, in] each."""
    coding, experts, out, width, bound = check_spec(spec)
    codes, weights = READERS[coding](arrays, experts, out, width, bound)
    return codes, weights.astype(dtype)


# Checkpoints

MANIFEST = {
    "format": str,
    "format_version": int,
    "config": dict,
    "compression": dict,
    "dense": dict,
    "coded": dict,
}
CONFIG_INTEGERS = {
    *("num_embeddings", "embed_dim", "mlp_dim", "expert_mlp_dim", "num_heads", "head_dim"),
    *("num_experts", "num_encoder_layers", "num_decoder_layers", "relpos_buckets"),
    *("relpos_max_distance", "max_group_size", "min_expert_capacity"),
}
CONFIG_OTHERS = {
    *("encoder_sparse_layers", "decoder_sparse_layers", "mlp_activations", "tied_logits"),
    *("train_capacity_factor", "eval_capacity_factor"),
}


def read_checkpoint(folder) -> dict[str, np.ndarray]:
    """All parameters by name; expert kernels that are coded as float32 [experts, in, out]."""
    folder = Path(folder)
    manifest = read_manifest(folder)
    config, dense, coded = (manifest[key] for key in ("config", "dense", "coded"))
    layers = check_config(config)
    require(layers <= len(dense), f"{layers} layers, but {len(dense)} dense parameters")
    dense_shapes, expert_shapes = parameter_shapes(config)
    shapes = dense_shapes | expert_shapes
    kernels = {f"{kernel}/kernel" for kernel in coded}
    require(kernels <= set(expert_shapes), "a kernel is coded that is no expert kernel")
    require(not kernels & set(dense), "a kernel is there twice")
    require(kernels | set(dense) == set(shapes), "the parameters are not those of the config")
    found = {}
    stop = 0
    for name, description in sorted(dense.items()):
        file = f"dense/{name.replace('/', '.')}"
        array, stop = read_array(folder, file, description, stop)
        require(array.shape == shapes[name], f"{name} has shape {array.shape}, not {shapes[name]}")
        found[name] = array
    stop = 0
    for kernel, tensor in sorted(coded.items()):
        require(isinstance(tensor, dict) and set(tensor) == {"spec", "arrays"}, f"{kernel}: keys")
        _, experts, rows, width, _ = check_spec(tensor["spec"])
        n, num_in, num_out = shapes[f"{kernel}/kernel"]
        fits = experts == n and num_in % width == 0 and rows * width == num_out * num_in
        require(fits, f"the spec of {kernel} does not fit its config")
        require(isinstance(tensor["arrays"], dict), f"the arrays of {kernel} are no object")
        arrays = {}
        for name, description in sorted(tensor["arrays"].items()):
            file = f"coded/{kernel.replace('/', '.')}/{name}"
            arrays[name], stop = read_array(folder, file, description, stop)
        _, weights = read_tensor(tensor["spec"], arrays)
        # Groups of a row follow each other, so that rows of whole outputs are only a reshape away.
        found[f"{kernel}/kernel"] = weights.reshape(n, num_out, num_in).swapaxes(1, 2)
    return found


def read_manifest(folder: Path) -> dict:
    def unique(pairs):
        require(len({key for key, _ in pairs}) == len(pairs), "a key is there twice")
        return dict(pairs)

    def no_number(name):
        raise Refused(f"{name} is no number")

    def finite(digits):
        require(not math.isinf(float(digits)), f"{digits:.40} is infinite")
        return float(digits)

    try:
        manifest = json.loads(
            (folder / "manifest.json").read_bytes().decode("utf-8"),
            object_pairs_hook=unique,
            parse_constant=no_number,
            parse_float=finite,
        )
    except (OSError, ValueError, RecursionError) as error:
        raise Refused(f"no manifest: {error}") from error
    require(isinstance(manifest, dict), "the manifest is no object")
    require(set(manifest) == set(MANIFEST), f"the manifest has the keys {sorted(manifest)}")
    for key, kind in MANIFEST.items():
        require(type(manifest[key]) is kind, f"{key} is {manifest[key]!r:.60}")
    require(manifest["format"] == "qmoe_jax", f"the format is {manifest['format']!r}")
    require(manifest["format_version"] == 2, f"the version is {manifest['format_version']}")
    return manifest


def check_config(config: dict) -> int:
    """The number of layers."""
    require(set(config) == CONFIG_INTEGERS | CONFIG_OTHERS, f"the config has {sorted(config)}")

    def integer(value):
        return type(value) is int and 0 <= value < 2**63

    def number(value):
        return type(value) is float or (type(value) is int and abs(value) < 2**63)

    for key in CONFIG_INTEGERS:
        require(integer(config[key]), f"{key} is {config[key]!r}")
    require(type(config["tied_logits"]) is bool, "tied_logits")
    require(number(config["train_capacity_factor"]), "train_capacity_factor")
    factor = config["eval_capacity_factor"]
    require(factor is None or number(factor), "eval_capacity_factor")
    activations = config["mlp_activations"]
    named = isinstance(activations, list) and all(isinstance(name, str) for name in activations)
    require(named and len(activations) in (1, 2), f"mlp_activations are {activations!r:.60}")
    total = 0
    for stack in ("encoder", "decoder"):
        layers, sparse = config[f"num_{stack}_layers"], config[f"{stack}_sparse_layers"]
        total += layers
        require(isinstance(sparse, list) and all(map(integer, sparse)), f"{stack}_sparse_layers")
        rising = all(a < b for a, b in itertools.pairwise(sparse))
        require(rising and all(layer < layers for layer in sparse), f"{stack}_sparse_layers")
    return total


def parameter_shapes(config: dict) -> tuple[dict, dict]:
    """Dense parameters, and expert kernels."""
    e, m, x = config["embed_dim"], config["mlp_dim"], config["expert_mlp_dim"]
    heads, experts = config["num_heads"], config["num_experts"]
    joined, embeddings = heads * config["head_dim"], config["num_embeddings"]
    wis = ("wi",) if len(config["mlp_activations"]) == 1 else ("wi_0", "wi_1")
    dense, expert = {"token_embedder/embedding": (embeddings, e)}, {}
    if not config["tied_logits"]:
        dense["decoder/logits_dense/kernel"] = (e, embeddings)
    attentions = {
        "encoder": {"attention": "attention"},
        "decoder": {
            "self_attention": "self_attention",
            "encoder_decoder_attention": "cross_attention",
        },
    }
    for stack in ("encoder", "decoder"):
        dense[f"{stack}/{stack}_norm/scale"] = (e,)
        dense[f"{stack}/relpos_bias/rel_embedding"] = (heads, config["relpos_buckets"])
        for number in range(config[f"num_{stack}_layers"]):
            layer = f"{stack}/layers_{number}"
            dense[f"{layer}/pre_mlp_layer_norm/scale"] = (e,)
            for attention, norm in attentions[stack].items():
                dense[f"{layer}/pre_{norm}_layer_norm/scale"] = (e,)
                for projection in ("query", "key", "value"):
                    dense[f"{layer}/{attention}/{projection}/kernel"] = (e, joined)
                dense[f"{layer}/{attention}/out/kernel"] = (joined, e)
            if number in config[f"{stack}_sparse_layers"]:
                dense[f"{layer}/mlp/router/router_weights/w/kernel"] = (e, experts)
                for wi in wis:
                    expert[f"{layer}/mlp/expert/{wi}/kernel"] = (experts, e, x)
                expert[f"{layer}/mlp/expert/wo/kernel"] = (experts, x, e)
            else:
                for wi in wis:
                    dense[f"{layer}/mlp/{wi}/kernel"] = (e, m)
                dense[f"{layer}/mlp/wo/kernel"] = (m, e)
    return dense, expert


def read_array(folder: Path, file: str, description, stop: int) -> tuple[np.ndarray, int]:
    """An array of a checkpoint, by its description; where the packed ones up to it end."""
    require(isinstance(description, dict), f"{file} is described by {description!r:.60}")
    keys = {"file", "dtype", "shape", "checksums"}
    packed = "start" in description
    if packed:
        keys |= {"start"}
        file = file.split("/")[0] + "/packed"
        start = description["start"]
        require(type(start) is int and start == stop, f"start is {start!r}, not {stop}")
    require(set(description) == keys, f"{file} is described by {sorted(description)}")
    require(description["file"] == file, f"{description['file']!r} should be {file}")
    name, shape = description["dtype"], description["shape"]
    require(isinstance(name, str) and name in DTYPES, f"{file} has the dtype {name!r}")
    sizes = isinstance(shape, list) and all(type(n) is int and 0 <= n < 2**63 for n in shape)
    require(sizes and math.prod(shape) < 2**60, f"{file} has the shape {shape!r:.60}")
    checksums = description["checksums"]
    require(isinstance(checksums, list) and checksums, f"{file} has no checksums")
    for pair in checksums:
        require(isinstance(pair, list) and len(pair) == 2, f"{file} has the checksum {pair!r:.80}")
        digest = isinstance(pair[1], str) and re.fullmatch("[0-9a-f]{64}", pair[1])
        require(type(pair[0]) is int and digest, f"{file} has the checksum {pair!r:.80}")
    stops = [pair[0] for pair in checksums]
    require(stops[0] >= 0 and all(a < b for a, b in itertools.pairwise(stops)), f"{file}: stops")
    require(stops[-1] == (shape[0] if shape else 1), f"{file} has checksums up to {stops[-1]}")
    if packed:
        stop += math.prod(shape) * DTYPES[name].itemsize
        require(stop < 2**60, f"{file} would end at byte {stop}")
        data = read_zarr(folder / file, np.dtype(np.uint8), [stop], packed=True)
        array = data[description["start"] : stop].view(DTYPES[name]).reshape(shape)
    else:
        array = read_zarr(folder / file, DTYPES[name], shape)
    start = 0
    for stop_of_part, digest in checksums:
        part = np.atleast_1d(array)[start:stop_of_part]
        require(hashlib.sha256(part.tobytes()).hexdigest() == digest, f"{file} is altered")
        start = stop_of_part
    return array, stop


def read_zarr(path: Path, dtype: np.dtype, shape: list[int], packed: bool = False) -> np.ndarray:
    """An array on disk; of packed arrays, which may have more bytes, as many as `shape` says."""
    try:
        metadata = json.loads((path / ".zarray").read_bytes())
    except (OSError, ValueError) as error:
        raise Refused(f"{path}: {error}") from error
    require(isinstance(metadata, dict), f"{path}: .zarray")
    wanted = shape
    if packed:
        shape, chunks = metadata.get("shape"), metadata.get("chunks")
        one_axis = isinstance(shape, list) and len(shape) == 1 and type(shape[0]) is int
        require(one_axis and shape[0] >= wanted[0], f"{path} has the shape {shape}, not {wanted}")
        short = isinstance(chunks, list) and all(type(n) is int and n <= 2**24 for n in chunks)
        require(short, f"{path} has the chunks {chunks}")
    require(metadata.get("zarr_format") == 2 and metadata.get("shape") == shape, f"{path}: shape")
    stored = "bfloat16" if dtype == BFLOAT16 else dtype.str
    require(metadata.get("dtype") == stored, f"{path} is {metadata.get('dtype')}, not {stored}")
    plain = (metadata.get("order"), metadata.get("filters"), metadata.get("fill_value"))
    require(plain == ("C", None, None), f"{path}: order, filters or fill_value")
    require(metadata.get("dimension_separator", ".") == ".", f"{path}: dimension_separator")
    compressor = metadata.get("compressor")
    zipped = isinstance(compressor, dict) and compressor.get("id") == "gzip"
    require(compressor is None or zipped, f"{path} has the compressor {compressor}")
    chunks = metadata.get("chunks")
    whole = isinstance(chunks, list) and all(type(n) is int and n >= 1 for n in chunks)
    require(whole and len(chunks) == len(shape), f"{path} has the chunks {chunks}")
    fit = all(n <= max(1, length) for n, length in zip(chunks, shape, strict=True))
    require(fit, f"{path} has chunks of {chunks}, the array is {shape}")
    size = math.prod(chunks) * dtype.itemsize
    array = np.zeros(wanted, dtype)
    grid = [-(-length // chunk) for length, chunk in zip(wanted, chunks, strict=True)]
    for index in itertools.product(*map(range, grid)):
        file = path / (".".join(map(str, index)) or "0")
        try:
            data = file.read_bytes()
            data = gzip.decompress(data) if zipped else data
        except (OSError, EOFError, zlib.error) as error:
            raise Refused(f"{file}: {error}") from error
        require(len(data) == size, f"{file} has {len(data)} bytes, not {size}")
        chunk = np.frombuffer(data, dtype).reshape(chunks)
        starts = [i * n for i, n in zip(index, chunks, strict=True)]
        where = tuple(slice(a, a + n) for a, n in zip(starts, chunks, strict=True))
        inside = tuple(slice(0, length - a) for a, length in zip(starts, wanted, strict=True))
        array[where] = chunk[inside]
    return array
