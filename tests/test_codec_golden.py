"""Golden coded tensors: valid ones decode and encode to the same bytes, broken ones are refused."""

import json
import re
from pathlib import Path

import golden_lattice
import golden_rows
import ml_dtypes
import numpy as np
import pytest

from qmoe_jax.codec import codings
from qmoe_jax.codec.decode import decode_expert
from qmoe_jax.codec.encode import encode
from qmoe_jax.codec.tensor import CodedTensor, TensorSpec
from qmoe_jax.errors import CodecError

FOLDER = Path(__file__).parent / "golden" / "codec"
REFUSALS = dict(
    re.findall(r"^\| `(.+)\.json` \| (.+) \|$", (FOLDER / "README.md").read_text("utf-8"), re.M)
)


def read(name):
    stored = json.loads((FOLDER / f"{name}.json").read_text("utf-8"))
    arrays = {}
    for key, array in stored["arrays"].items():
        bfloat16 = array["dtype"] == "bfloat16"
        dtype = ml_dtypes.bfloat16 if bfloat16 else np.dtype(array["dtype"])
        arrays[key] = np.frombuffer(bytes.fromhex(array["bytes"]), dtype).reshape(array["shape"])
    coded = CodedTensor(TensorSpec.from_json(stored["spec"]), arrays)
    codes = np.array([list(row) for row in stored.get("codes", [])]).astype(np.uint8)
    return coded, codes


def test_the_table_lists_every_broken_file():
    assert set(REFUSALS) == {path.stem for path in FOLDER.glob("broken_*.json")}
    assert all(f"valid_{name}" in names() for name in codings.coding_names())


def test_every_broken_file_holds_a_rule():
    _, rules = (FOLDER / "README.md").read_text("utf-8").split("## Rules")
    named = re.findall(r"^\|.*?\| (`.*`) \|$", rules, re.M)
    assert {f"broken_{name[1:-1]}" for row in named for name in row.split(", ")} == set(REFUSALS)


def names():
    return {path.stem for path in FOLDER.glob("*.json")} - set(REFUSALS)


@pytest.mark.parametrize("name", sorted(names()))
def test_valid(name):
    coded, codes = read(name)
    spec = coded.spec
    codes = codes.reshape(spec.num_experts, spec.rows, spec.width)
    codings.validate(coded)
    implementation = codings.get_coding(spec.coding)
    np.testing.assert_array_equal(implementation.decode_numpy_reference(coded), codes)
    for expert in range(spec.num_experts):
        decoded = decode_expert(spec, coded.arrays, expert)
        np.testing.assert_array_equal(np.asarray(decoded), codes[expert])
    if name.startswith("readable"):
        return
    again = encode(codes, implementation.levels_of(coded), spec.coding)
    assert again.spec == spec
    for key, array in coded.arrays.items():
        np.testing.assert_array_equal(again.arrays[key], array, err_msg=key, strict=True)


@pytest.mark.parametrize("name", sorted(REFUSALS))
def test_broken(name):
    assert refusal(name) == REFUSALS[name]


def refusal(name):
    with pytest.raises(CodecError) as refused:
        codings.validate(read(name)[0])
    return str(refused.value)


def test_the_generator_writes_the_stored_files():
    for name, content in (*golden_lattice.files(), *golden_rows.files()):
        assert (FOLDER / f"{name}.json").read_text("utf-8") == content, name
