"""Native checkpoints out of compressed ones: same weights, same loss, read by us and by T5X."""

import hashlib
import shutil
import subprocess
import sys
from typing import Any

import golden_data
import jax
import numpy as np
import pytest
from command import command
from factories import CALIBRATION, shortened
from stored_files import change_coded, flipped

import qmoe_jax
from qmoe_jax.checkpoints import dequantize as library
from qmoe_jax.checkpoints import names
from qmoe_jax.checkpoints.compressed import open_compressed_checkpoint
from qmoe_jax.checkpoints.compressed_parts import CodedExperts, variable_shapes
from qmoe_jax.checkpoints.dequantize import dequantize_checkpoint
from qmoe_jax.checkpoints.layouts import step_of_name
from qmoe_jax.checkpoints.t5x import open_t5x_checkpoint
from qmoe_jax.checkpoints.t5x_writer import T5XCheckpointWriter
from qmoe_jax.codec import codings
from qmoe_jax.errors import CheckpointError
from qmoe_jax.evaluation.metrics import evaluate_loss
from qmoe_jax.models.load import dequantized, load_switch

# A ternary, a 2-bit and a paper's coding; the gated model with separate logits is among them.
MADE: dict[str, tuple[str, dict[str, Any]]] = {
    "base": ("base", {"grid": "ternary"}),
    "qmoe": ("base", {"grid": "ternary", "expert_coding": "qmoe"}),
    "xxl": ("xxl", {"grid": "2bit", "expert_coding": "packed2"}),
}


@pytest.fixture(scope="module")
def compressed(golden_checkpoint, tmp_path_factory):
    """`compressed(kind)`: a checkpoint of `MADE`, rounded to nearest, named as T5X names them."""
    root, made = tmp_path_factory.mktemp("compressed"), {}

    def make(kind):
        if kind not in made:
            model, settings = MADE[kind]
            made[kind] = root / kind / "checkpoint_77"
            qmoe_jax.compress(
                golden_checkpoint(model, "t5x_float32_inference"),
                made[kind],
                method="rtn",
                progress=False,
                **settings,
            )
        return made[kind]

    return make


@pytest.fixture(scope="module")
def native(compressed, tmp_path_factory):
    return dequantize_checkpoint(
        compressed("base"), tmp_path_factory.mktemp("native"), progress=False
    )


@pytest.mark.parametrize("kind", MADE)
def test_float32_keeps_every_value(compressed, tmp_path, kind):
    path = dequantize_checkpoint(compressed(kind), tmp_path, progress=False)
    assert path == tmp_path / "checkpoint_77"
    native = open_t5x_checkpoint(path)
    assert (native.layout, native.step) == ("t5x", 77)
    assert {dtype.name for dtype in native.dtypes.values()} == {"float32"}
    # The reference decodes all experts with the model's arrays in memory.
    _, variables = dequantized(*load_switch(compressed(kind)), dtype="float32")
    expected = names.flatten(variables["params"])
    assert set(native.names) == set(expected)
    for name in native.names:
        np.testing.assert_array_equal(native.read(name), np.asarray(expected[name], np.float32))


def test_loss_is_that_of_the_codes(compressed, native):
    tokens = CALIBRATION[:8]
    losses = [
        evaluate_loss(*shortened(*load_switch(path), 2), [tokens.tokens.arrays()])
        for path in (compressed("base"), native)
    ]
    assert losses[0].loss == pytest.approx(losses[1].loss, abs=1e-6)
    assert losses[0].loss > 0


def test_few_experts_at_a_time_are_all_experts(compressed, native, tmp_path, monkeypatch):
    whole = open_t5x_checkpoint(native)
    counts = []
    original = CodedExperts.read
    monkeypatch.setattr("qmoe_jax.checkpoints.t5x_writer._CHUNK_BYTES", 1)
    monkeypatch.setattr(
        CodedExperts,
        "read",
        lambda self, start, stop: counts.append(stop - start) or original(self, start, stop),
    )
    parts = open_t5x_checkpoint(dequantize_checkpoint(compressed("base"), tmp_path, progress=False))
    assert set(counts) == {1}
    for name in whole.names:
        assert parts.chunk_shape(name)[0] == 1
        np.testing.assert_array_equal(whole.read(name), parts.read(name))


def test_memory_follows_the_chunk_and_not_the_experts(compressed):
    """What is read at once is a batch of experts, of every array."""
    checkpoint = open_compressed_checkpoint(compressed("base"))
    for kernel in checkpoint.specs:
        whole, experts = checkpoint.read_coded(kernel), CodedExperts(checkpoint, kernel)
        experts.verify()
        for start, part in experts.each(3):
            stop = min(start + 3, whole.spec.num_experts)
            expected = codings.slice_experts(whole, start, stop)
            assert part.arrays.keys() == expected.arrays.keys()
            for key, array in part.arrays.items():
                np.testing.assert_array_equal(array, expected.arrays[key])


def test_bfloat16_keeps_ternary_weights_and_routers(compressed, native, tmp_path):
    path = dequantize_checkpoint(compressed("base"), tmp_path, dtype="bfloat16", progress=False)
    small, full = open_t5x_checkpoint(path), open_t5x_checkpoint(native)
    kinds = {name: small.dtypes[name].name for name in small.names}
    assert {kinds[n] for n in kinds if names.is_expert_kernel(n)} == {"bfloat16"}
    assert {kinds[n] for n in kinds if "/router/" in n} == {"float32"}
    for name in small.names:
        np.testing.assert_array_equal(small.read(name).astype(np.float32), full.read(name))


def test_shapes_of_variables(compressed):
    shapes = variable_shapes(open_compressed_checkpoint(compressed("base")))
    _, variables = load_switch(compressed("base"))
    found = {name: (a.shape, a.dtype) for name, a in names.flatten(variables["params"]).items()}
    assert {name: (s.shape, s.dtype) for name, s in shapes.items()} == found


def test_step_of_name():
    assert step_of_name("/a/checkpoint_12") == 12
    assert step_of_name("checkpoint_12/") == 12
    assert step_of_name("file:///a/checkpoint_12/state") == 12
    assert step_of_name("gs://b/my_checkpoint_12") is None
    assert step_of_name("/a/checkpoint_12x") is None


def test_command(compressed, native, tmp_path, capsys):
    assert (
        command("dequantize")(
            [str(compressed("base")), str(tmp_path), "--step", "5", "--no-progress"]
        )
        == 0
    )
    assert capsys.readouterr().out == f"{tmp_path / 'checkpoint_5'} written\n"
    checkpoint = open_t5x_checkpoint(tmp_path / "checkpoint_5")
    assert checkpoint.step == 5
    name = "encoder/layers_1/mlp/expert/wi/kernel"
    np.testing.assert_array_equal(checkpoint.read(name), open_t5x_checkpoint(native).read(name))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("{nothing}", "{out}"), "nothing is not a folder; give that of a compressed checkpoint"),
        (("{empty}", "{out}"), "has no manifest.json"),
        (("{good}", "{taken}"), "exists already"),
        (("{good}", "gs://bucket/x"), "give a local path"),
        (("{good}", "{out}", "--step", "-1"), "step is -1"),
        (("{native}", "{out}"), "is a native checkpoint; a compressed one is needed here"),
    ],
)
def test_bad_input_is_one_line(compressed, native, tmp_path, capsys, arguments, message):
    places = {
        "nothing": tmp_path / "nothing",
        "empty": tmp_path / "empty",
        "out": tmp_path / "out",
        "good": compressed("base"),
        "taken": tmp_path / "taken",
        "native": native,
    }
    (tmp_path / "taken" / "checkpoint_77").mkdir(parents=True)
    (tmp_path / "empty").mkdir()
    assert command("dequantize")([argument.format(**places) for argument in arguments]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert message in lines[0]
    assert not (tmp_path / "out").exists()


def test_altered_codes_leave_nothing_behind(compressed, tmp_path):
    copy = shutil.copytree(compressed("base"), tmp_path / "checkpoint_77")
    change_coded(copy, "encoder/layers_1/mlp/expert/wi", "levels", flipped)
    with pytest.raises(CheckpointError, match="does not match its checksum"):
        dequantize_checkpoint(copy, tmp_path / "out", progress=False)
    assert list((tmp_path / "out").iterdir()) == []


def test_a_stopped_run_leaves_nothing_that_looks_whole(compressed, tmp_path, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(library, "decode_kernel", stop)
    with pytest.raises(KeyboardInterrupt):
        dequantize_checkpoint(compressed("base"), tmp_path, progress=False)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("shape", [(), (1,), (5,), (0, 3), (3, 0), (7, 2, 3)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_writer_round_trip(tmp_path, monkeypatch, shape, dtype):
    monkeypatch.setattr("qmoe_jax.checkpoints.t5x_writer._CHUNK_BYTES", 40)
    array = np.random.default_rng(0).standard_normal(shape).astype(jax.numpy.dtype(dtype))
    if array.size > 1:
        array.reshape(-1)[:6] = 0  # a chunk of zeros is stored all the same
    writer = T5XCheckpointWriter(tmp_path, 3)
    assert writer.create("a/b", shape, dtype) >= 1
    writer.create("c", (2,), "float32")
    writer.write("a/b", array)
    writer.write("c", np.ones(1, np.float32), start=1)
    writer.write("c", np.zeros(1, np.float32))
    assert not writer.path.exists()
    checkpoint = open_t5x_checkpoint(writer.finish())
    np.testing.assert_array_equal(checkpoint.read("a/b"), array)
    np.testing.assert_array_equal(checkpoint.read("c"), [0, 1])
    with pytest.raises(CheckpointError, match="exists already"):
        T5XCheckpointWriter(tmp_path, 3)


def test_writer_refuses_another_dtype(tmp_path):
    with pytest.raises(CheckpointError, match="float16"):
        T5XCheckpointWriter(tmp_path, 0).create("a", (1,), "float16")


def test_t5x_reads_it(native):
    """T5X's own function, in a process without this package."""
    pytest.importorskip(
        "t5x",
        reason="t5x is not installed (docs/t5x.md says how to install it)",
        exc_type=ImportError,
    )
    code = """
import sys, hashlib, numpy as np
from t5x import checkpoints
from flax.traverse_util import flatten_dict
state = checkpoints.load_t5x_checkpoint(sys.argv[1])
assert "qmoe_jax" not in sys.modules
print("STEP", int(state["state"]["step"]))
for name, array in sorted(flatten_dict(state["target"], sep="/").items()):
    array = np.ascontiguousarray(np.asarray(array, np.float32))
    print("SHA", name, hashlib.sha256(array.tobytes()).hexdigest())
"""
    result = subprocess.run(
        [sys.executable, "-c", code, str(native)], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr[-2000:]
    checkpoint = open_t5x_checkpoint(native)
    expected = [f"STEP {checkpoint.step}"] + [
        f"SHA {name} {hashlib.sha256(checkpoint.read(name).tobytes()).hexdigest()}"
        for name in checkpoint.names
    ]
    assert result.stdout.splitlines() == expected


def test_the_demo_keeps_its_size(tmp_path):
    """Geometry and dtypes of the demo's checkpoint, through compression and back."""
    source = golden_data.DEMO / "checkpoint_4200"
    qmoe_jax.compress(source, tmp_path / "compressed", method="rtn", progress=False)
    path = dequantize_checkpoint(
        tmp_path / "compressed", tmp_path, step=4200, dtype="bfloat16", progress=False
    )
    before, after = open_t5x_checkpoint(source), open_t5x_checkpoint(path)
    assert before.shapes == after.shapes
    assert before.dtypes == after.dtypes
