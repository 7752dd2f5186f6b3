"""Writes golden files of the codings with levels for each row, and of what is refused in any spec.

    python tests/golden_rows.py tests/golden/codec

Not a test module; test_codec_golden.py tests the files, and that this writes them. `readable_*` are
valid, but no encoder of ours writes them. Each `broken_*` breaks one rule of FORMAT.md, most by
damage to the stored `valid_*` file of the coding. Older files of these codings, those without
which a rule had none, are not written here.
"""

import copy
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from qmoe_jax.codec import reference
from qmoe_jax.codec.dictionary import NUM_ENTRIES
from qmoe_jax.codec.tensor import NUM_SYMBOLS

Document = dict[str, Any]
FOLDER = Path(__file__).parent / "golden" / "codec"


def described(array: np.ndarray) -> dict[str, Any]:
    """An array as files hold it."""
    return {"dtype": array.dtype.name, "shape": list(array.shape), "bytes": array.tobytes().hex()}


def document(
    coding: str, shape: tuple[int, int, int], bound: int, arrays: dict[str, np.ndarray], codes: Any
) -> Document:
    """A file."""
    experts, rows, width = shape
    spec = {
        "coding": coding,
        "num_experts": experts,
        "out_features": rows,
        "in_features": width,
        "max_row_codewords": bound,
    }
    return {
        "spec": spec,
        "arrays": {name: described(array) for name, array in arrays.items()},
        "codes": np.asarray(codes).reshape(-1, width).tolist(),
    }


# --- Valid, but written by no encoder of ours ---


def sample(shape: tuple[int, int, int], symbols: int) -> np.ndarray:
    """Codes of which most are 0."""
    rng = np.random.default_rng(5)
    p = [0.7] + [0.3 / (symbols - 1)] * (symbols - 1)
    return rng.choice(symbols, shape, p=p).astype(np.uint8)


def split_rows() -> Document:
    """`qmoe`: a codeword for every pair, low above high, and a bound that makes lengths wide."""
    shape = (1, 2, 97)
    codes = sample(shape, NUM_SYMBOLS["ternary"])
    codeword_of = {tuple(reference.entry_codes(c)): c for c in range(NUM_ENTRIES)}
    pairs = np.append(codes, np.zeros((1, 2, 1), np.uint8), axis=2).reshape(-1, 2)
    codewords = [codeword_of[int(first), int(second)] for first, second in pairs]
    arrays = {
        "codewords": np.array(codewords, np.uint16),
        "expert_offsets": np.array([0, 98], np.int32),
        "row_lengths": np.array([[49, 49]], np.uint16),
        "levels": np.array([[[0.5, -0.25], [-0.0, 3e38]]], ml_dtypes.bfloat16),
    }
    return document("qmoe", shape, 2 * 97 + 64, arrays, codes)


def odd_choices(coding: str) -> Document:
    """`tunstall`: dictionaries far from the zero share, wide lengths from 0, a loose bound."""
    two_bit = coding == "tunstall_2bit"
    shape = (2, 3, 21)
    codes = sample(shape, NUM_SYMBOLS["2bit" if two_bit else "ternary"])
    zeros = (1, 0.5, 3, 2, -7, 0) if two_bit else (-0.5, 0.5, 0, 1, 2, 3)
    levels = np.array([(1.5, zero) for zero in zeros], ml_dtypes.bfloat16).reshape(2, 3, 2)
    dictionaries = (9, 0)
    experts, lengths = [], []
    for expert, number in enumerate(dictionaries):
        entries = reference.tunstall_entries(number, 8 if two_bit else 0)
        rows = []
        for row in range(3):
            order = reference.codes_of_symbols(coding, float(levels[expert, row, 1]))
            symbols = [order.index(int(code)) for code in codes[expert, row]]
            rows.append(reference.encode_tunstall_row(symbols, entries))
        lengths.append([len(row) for row in rows])
        data = b"".join(rows)
        experts.append(data + bytes(-len(data) % 4))
    ends = np.cumsum([0, *(len(data) // 4 for data in experts)])
    arrays = {
        "words": np.frombuffer(b"".join(experts), "<u4"),
        "expert_offsets": ends.astype(np.int32),
        "dictionaries": np.array(dictionaries, np.uint8),
        "shortest_rows": np.zeros(2, np.int32),
        "row_lengths": np.array(lengths, np.uint16),
        "levels": levels,
    }
    return document(coding, shape, 2 * 21 + 64, arrays, codes)


def zero_points() -> Document:
    """`packed2`: zeros that are no codes, and a scale of which a weight overflows."""
    codes = sample((1, 3, 5), 4)
    codes[0, 2] = 0, 1, 2, 3, 3
    packed = np.zeros((1, 3, 2), np.uint8)
    for column in range(5):
        packed[..., column // 4] |= codes[..., column] << 2 * (column % 4)
    levels = np.array([[[1, -3.5], [-0.25, 100], [3e38, 0]]], ml_dtypes.bfloat16)
    return document("packed2", (1, 3, 5), 0, {"packed": packed, "levels": levels}, codes)


def empty(coding: str, experts: int, rows: int) -> Document:
    """Without experts, or without rows."""
    stored = stored_document(f"valid_{coding}")
    shapes = {
        "codewords": (0,),
        "words": (0,),
        "expert_offsets": (experts + 1,),
        "row_lengths": (experts, rows),
        "levels": (experts, rows, 2),
        "dictionaries": (experts, 4) if coding == "lattice" else (experts,),
        "shortest_rows": (experts,),
        "packed": (experts, rows, 2),
        "block_lengths": (experts, -(-rows // 32)),
        "grouped_columns": (experts,),
        "schedules": (experts, 3, 15),
        "leans": (experts, -(-min(rows, 5) // 8)),
        "columns": (experts, 5),
        "bases": (experts, 8),
        "origins": (experts,),
    }
    arrays = {
        name: np.zeros(shapes[name], array["dtype"] if array["dtype"] != "bfloat16" else "u2")
        for name, array in stored["arrays"].items()
    }
    if "levels" in arrays:
        arrays["levels"] = arrays["levels"].view(ml_dtypes.bfloat16)
    return document(coding, (experts, rows, 5), 0, arrays, [])


def readable() -> Iterator[tuple[str, Document]]:
    """Valid files."""
    yield "qmoe_split_rows", split_rows()
    yield "packed2_zero_points", zero_points()
    for coding in ("tunstall", "tunstall_2bit"):
        yield f"{coding}_odd_choices", odd_choices(coding)
    for coding in ("qmoe", "packed2", "tunstall", "tunstall_2bit", "lattice"):
        yield f"{coding}_no_experts", empty(coding, 0, 3)
        yield f"{coding}_no_rows", empty(coding, 2, 0)


# --- Broken ---


def stored_document(name: str) -> Document:
    """A file that is there."""
    return json.loads((FOLDER / f"{name}.json").read_text("utf-8"))


def change(coding: str, name: str, index: Any, value: Any) -> Document:
    """The valid file of a coding with an element of an array changed."""
    damaged = stored_document(f"valid_{coding}")
    stored = damaged["arrays"][name]
    dtype = ml_dtypes.bfloat16 if stored["dtype"] == "bfloat16" else np.dtype(stored["dtype"])
    array = np.frombuffer(bytearray.fromhex(stored["bytes"]), dtype).reshape(stored["shape"])
    array[index] = value
    stored["bytes"] = array.tobytes().hex()
    return damaged


def one_row(words: str) -> Document:
    """`tunstall_2bit`: a row of FORMAT.md's worked kind, dictionary 2, zero 2."""
    data = bytes.fromhex(words)
    arrays = {
        "words": np.frombuffer(data + bytes(-len(data) % 4), "<u4"),
        "expert_offsets": np.array([0, -(-len(data) // 4)], np.int32),
        "dictionaries": np.array([2], np.uint8),
        "shortest_rows": np.array([len(data)], np.int32),
        "row_lengths": np.zeros((1, 1), np.uint8),
        "levels": np.array([[[0.5, 2]]], ml_dtypes.bfloat16),
    }
    return document("tunstall_2bit", (1, 1, 15), 32, arrays, [[0] * 15])


def narrow_lengths() -> tuple[tuple[int, int, int], int, dict[str, np.ndarray]]:
    """Of rows whose bound asks for 16 bits."""
    stored = split_rows()
    arrays = {
        name: np.frombuffer(
            bytes.fromhex(array["bytes"]),
            ml_dtypes.bfloat16 if array["dtype"] == "bfloat16" else array["dtype"],
        ).reshape(array["shape"])
        for name, array in stored["arrays"].items()
    }
    arrays["row_lengths"] = arrays["row_lengths"].astype(np.uint8)
    return (1, 2, 97), stored["spec"]["max_row_codewords"], arrays


def broken_specs() -> Iterator[tuple[str, Document]]:
    """What no coding allows in a spec, and what only one does."""
    base = stored_document("valid_tunstall")

    def spec(to: dict[str, Any], coding: str = "tunstall") -> Document:
        damaged = stored_document(f"valid_{coding}")
        return damaged | {"spec": damaged["spec"] | to}

    missing = copy.deepcopy(base)
    del missing["spec"]["max_row_codewords"]
    yield "spec_missing_field", missing
    yield "spec_unknown_field", spec({"group_size": 16})
    yield "spec_coding", spec({"coding": "tunstall_3bit"})
    yield "spec_coding_of_no_name", spec({"coding": 3})
    yield "spec_true", spec({"num_experts": True})
    yield "spec_fraction", spec({"in_features": 37.0})
    yield "spec_negative_rows", spec({"out_features": -3})
    yield "spec_no_weights", spec({"in_features": 0})
    yield "spec_row_of_10_12", spec({"in_features": 10**12})
    yield "spec_row_of_2_23", spec({"in_features": 2**23})
    yield "spec_expert_of_2_31", spec({"out_features": 2**16, "in_features": 2**15})
    damaged = empty("lattice", 0, 3)  # without experts: arrays of such widths are empty
    damaged["spec"]["in_features"] = 2**19
    damaged["arrays"]["columns"]["shape"] = [0, 2**19]
    yield "lattice_row_of_2_19", damaged
    yield "spec_experts", spec({"num_experts": 2**31})
    yield "spec_row_bound", spec({"max_row_codewords": 2 * 37 + 65})
    bounds = {"in_features": 2**15, "max_row_codewords": 2**16}
    yield "qmoe_wide_row_bound", spec(bounds, "qmoe")
    for coding, name in (("qmoe", "row_lengths"), ("packed2", "levels"), ("lattice", "bases")):
        damaged = stored_document(f"valid_{coding}")
        del damaged["arrays"][name]
        yield f"{coding}_missing_array", damaged
    damaged = stored_document("valid_packed2")
    damaged["arrays"]["offsets"] = damaged["arrays"]["packed"]
    yield "packed2_additional_array", damaged
    damaged = stored_document("valid_qmoe")
    lengths = np.array([[3, 4, 3], [5, 4, 5]], np.uint16)
    damaged["arrays"]["row_lengths"] = described(lengths)
    yield "qmoe_wide_row_lengths", damaged
    yield "qmoe_narrow_row_lengths", document("qmoe", *narrow_lengths(), np.zeros((2, 97)))
    damaged = stored_document("valid_tunstall")
    damaged["arrays"]["levels"]["shape"] = [2, 2, 3]
    yield "tunstall_shape", damaged


def broken() -> Iterator[tuple[str, Document]]:
    """Files that break one rule each."""
    yield from broken_specs()
    for coding in ("qmoe", "tunstall", "tunstall_2bit"):
        yield f"{coding}_first_offset", change(coding, "expert_offsets", 0, 1)
        yield f"{coding}_nan_level", change(coding, "levels", (0, 1, 1), np.nan)
    for coding in ("qmoe", "packed2"):
        yield f"{coding}_infinite_level", change(coding, "levels", (1, 2, 0), np.inf)
    yield "packed2_nan_level", change("packed2", "levels", (0, 1, 1), np.nan)
    yield "qmoe_filler", filler()
    yield "tunstall_2bit_escaped_sign", one_row("fa 76 44 60")
    yield "tunstall_2bit_escape_at_the_end", one_row("76 f8")


def filler() -> Document:
    """`qmoe`: the code behind the last of a row of odd width is not 0."""
    stored = stored_document("valid_qmoe")["arrays"]["codewords"]["bytes"]
    codewords = np.frombuffer(bytes.fromhex(stored), np.uint16)
    codeword_of = {tuple(reference.entry_codes(c)): c for c in range(NUM_ENTRIES)}
    for last in np.cumsum([3, 4, 3, 5, 4, 5]) - 1:
        wanted = (*reference.entry_codes(int(codewords[last]))[:-1], 1)
        if wanted in codeword_of:
            return change("qmoe", "codewords", last, codeword_of[wanted])
    raise AssertionError("no row of the valid file ends with such an entry")


def files() -> Iterator[tuple[str, str]]:
    """Name and contents of every file."""
    for name, stored in readable():
        yield f"readable_{name}", json.dumps(stored) + "\n"
    for name, stored in broken():
        yield f"broken_{name}", json.dumps({k: stored[k] for k in ("spec", "arrays")}) + "\n"


def main(folder: str) -> None:
    """Writes all files; prints the rows of the README's table."""
    from test_codec_golden import refusal

    for name, content in files():
        Path(folder, f"{name}.json").write_text(content, "utf-8")
        if name.startswith("broken"):
            print(f"| `{name}.json` | {refusal(name)} |")


if __name__ == "__main__":
    main(sys.argv[1])
