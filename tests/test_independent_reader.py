"""The reader written from FORMAT.md alone agrees with ours: golden files, whole checkpoints."""

import json
from pathlib import Path

import independent_reader
import numpy as np
import pytest
from independent_reader import DTYPES, Refused

from qmoe_jax.codec.codings import validate
from qmoe_jax.codec.decode import decode_expert_weights
from qmoe_jax.codec.tensor import CodedTensor, TensorSpec

FOLDER = Path(__file__).parent / "golden" / "codec"
NAMES = sorted(path.stem for path in FOLDER.glob("*.json"))
BROKEN = [name for name in NAMES if name.startswith("broken_")]


def read(name):
    """Spec, arrays and, of a valid file, codes."""
    stored = json.loads((FOLDER / f"{name}.json").read_text("utf-8"))
    arrays = {
        key: np.frombuffer(bytes.fromhex(array["bytes"]), DTYPES[array["dtype"]]).reshape(
            array["shape"]
        )
        for key, array in stored["arrays"].items()
    }
    codes = np.array([[int(code) for code in row] for row in stored.get("codes", [])])
    return stored["spec"], arrays, codes


def our_weights(spec, arrays):
    coded = CodedTensor(TensorSpec.from_json(spec), arrays)
    validate(coded)
    return np.stack(
        [
            decode_expert_weights(coded.spec, arrays, expert, np.float32)
            for expert in range(coded.spec.num_experts)
        ]
    )


@pytest.mark.parametrize("name", [name for name in NAMES if name not in BROKEN])
def test_valid(name):
    spec, arrays, stored = read(name)
    codes, weights = independent_reader.read_tensor(spec, arrays)
    np.testing.assert_array_equal(codes.reshape(stored.shape), stored)
    np.testing.assert_array_equal(weights, our_weights(spec, arrays))


@pytest.mark.parametrize("name", BROKEN)
def test_broken(name):
    spec, arrays, _ = read(name)
    with pytest.raises(Refused):
        independent_reader.read_tensor(spec, arrays)


def test_it_stands_alone():
    assert "qmoe_jax" not in Path(independent_reader.__file__).read_text("utf-8")
