"""Evaluation: resume to the bit, several checkpoints, outputs, and what bad input gets."""

import copy
import json
import os
import signal
import struct
import subprocess
import sys

import golden_data
import numpy as np
import pytest
from command import command, refusal, start_and_wait

import qmoe_jax.evaluation.evaluate as evaluation
from qmoe_jax.calibration.tokens import TokenMetadata, read_plain_tokens, write_tokens
from qmoe_jax.checkpoints.inspection import inspect_checkpoint
from qmoe_jax.errors import CheckpointError, TokensError
from qmoe_jax.evaluation.metrics import evaluate_loss
from qmoe_jax.evaluation.writers import scalars
from qmoe_jax.models.load import load_switch

CHECKPOINT = golden_data.DEMO / "checkpoint_4200"
METADATA = TokenMetadata("demo", "validation", 4068, 3968, 100, 1, 0, "")


@pytest.fixture(scope="module")
def demo_tokens():
    return read_plain_tokens(golden_data.DEMO / "validation_tokens.npz", METADATA)


@pytest.fixture(scope="module")
def demo_file(demo_tokens, tmp_path_factory):
    path = tmp_path_factory.mktemp("tokens") / "demo.npz"
    write_tokens(path, demo_tokens.tokens, demo_tokens.metadata)
    return path


@pytest.fixture(scope="module")
def loaded():
    return load_switch(CHECKPOINT)


@pytest.fixture
def evaluate(loaded, demo_tokens):
    """The library's `evaluate` on 20 examples in batches of 4, two a shard, loaded once."""

    def evaluate(output=None, checkpoint=CHECKPOINT, **changes):
        arguments = {
            "num_examples": 20,
            "batch_size": 4,
            "batches_per_shard": 2,
            "load": lambda *_: loaded,
            "progress": False,
            "tensorboard": False,
        }
        return evaluation.evaluate(checkpoint, demo_tokens, output=output, **arguments | changes)

    return evaluate


def without_times(document):
    document = copy.deepcopy(document)
    for model in document["models"]:
        del model["seconds"], model["target_tokens_per_second"]
    return document


@pytest.mark.parametrize(
    ("factor", "result"),
    [
        (None, "dropless_f32"),
        pytest.param(2.0, "capacity_factor_2_f32", marks=pytest.mark.slow),
    ],
)
def test_the_demo_model_s_losses_through_the_command(demo_file, tmp_path, factor, result):
    pytest.importorskip("gin")
    expected = golden_data.demo_info()["results"][result]
    assert not command("evaluate")(
        [
            f"--gin.CHECKPOINT='{CHECKPOINT}'",
            f"--gin.TOKENS='{demo_file}'",
            f"--gin.EXPERT_CAPACITY_FACTOR={factor}",
            f"--gin.OUTPUT='{tmp_path / 'out'}'",
            "--gin.TENSORBOARD=False",
        ]
    )
    (found,) = json.loads((tmp_path / "out" / "metrics.json").read_text())["models"]
    assert found["loss"] == pytest.approx(expected["loss_per_target_token"], abs=1e-4)
    assert found["accuracy"] == pytest.approx(expected["accuracy"], abs=1e-4)
    assert found["num_target_tokens"] == expected["num_target_tokens"]
    assert (found["router"]["total"]["num_dropped"] == 0) == (factor is None)


class _KilledError(BaseException):
    pass


def test_a_stopped_run_goes_on_with_the_same_figures(evaluate, tmp_path, monkeypatch):
    whole = evaluate(tmp_path / "whole")
    computed = []
    original = evaluation.evaluate_batch

    def counted(module, variables, batch):
        if len(computed) == 3:
            raise _KilledError
        computed.append(batch)
        return original(module, variables, batch)

    monkeypatch.setattr(evaluation, "evaluate_batch", counted)
    with pytest.raises(_KilledError):
        evaluate(tmp_path / "stopped")
    # Of three batches one full shard of two was stored.
    folder = tmp_path / "stopped" / "checkpoint_4200"
    assert [path.name for path in sorted(folder.glob("*.npz"))] == ["shard_00000.npz"]
    assert not (tmp_path / "stopped" / "metrics.json").exists()
    computed[:] = [None, None]  # three batches are left, one more than may be computed
    with pytest.raises(_KilledError):
        evaluate(tmp_path / "stopped")
    monkeypatch.setattr(evaluation, "evaluate_batch", original)
    resumed = evaluate(tmp_path / "stopped")
    assert without_times(resumed) == without_times(whole)
    assert without_times(evaluate()) == without_times(whole)
    # Everything is there: nothing is computed, and the times are the first run's.
    monkeypatch.setattr(evaluation, "evaluate_batch", None)
    assert evaluate(tmp_path / "whole") == whole
    assert json.loads((tmp_path / "whole" / "metrics.json").read_text()) == whole


def test_changed_settings_are_refused_and_named(evaluate, tmp_path):
    evaluate(tmp_path, num_examples=4)
    with pytest.raises(CheckpointError, match=r"batch_size: 4 became 2.*overwrite=True"):
        evaluate(tmp_path, num_examples=4, batch_size=2)
    with pytest.raises(CheckpointError, match=r"num_examples: 4 became 8"):
        evaluate(tmp_path, num_examples=8)
    fresh = evaluate(tmp_path, num_examples=8, overwrite=True)
    assert without_times(fresh) == without_times(evaluate(num_examples=8))


def test_damaged_shards_and_folders_in_use(evaluate, tmp_path):
    evaluate(tmp_path, num_examples=8)
    shard = tmp_path / "checkpoint_4200" / "shard_00000.npz"
    content = shard.read_bytes()
    shard.write_bytes(content[: len(content) // 2])
    with pytest.raises(CheckpointError, match=r"shard_00000\.npz is damaged .*; delete it"):
        evaluate(tmp_path, num_examples=8)
    shard.write_bytes(content)
    settings = json.loads((shard.parent / "run.json").read_text())["qmoe_jax_run"]
    with (
        evaluation.RunFolder(shard.parent, settings),
        pytest.raises(CheckpointError, match="another process is working in"),
    ):
        evaluate(tmp_path, num_examples=8)
    evaluate(tmp_path, num_examples=8)


@pytest.mark.slow
def test_sigkill(demo_file, tmp_path):
    """A killed process loses at most the shard that it was computing."""
    program = [sys.executable, "-m", "qmoe_jax"]
    arguments = [
        *("evaluate", f"--gin.CHECKPOINT='{CHECKPOINT}'"),
        *(f"--gin.TOKENS='{demo_file}'", "--gin.OUTPUT='out'", "--gin.NUM_EXAMPLES=512"),
        *("--gin.BATCH_SIZE=8", "--gin.TENSORBOARD=False"),
    ]
    process = start_and_wait(
        *("qmoe_jax.evaluation.shards", "_write_shard", 1),
        *arguments,
        cwd=tmp_path,
        stderr=subprocess.DEVNULL,
    )
    first = tmp_path / "out" / "checkpoint_4200" / "shard_00000.npz"
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    written = first.stat().st_mtime_ns
    subprocess.run([*program, *arguments], cwd=tmp_path, check=True, capture_output=True)
    resumed = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert first.stat().st_mtime_ns == written
    arguments[3] = "--gin.OUTPUT='whole'"
    subprocess.run([*program, *arguments], cwd=tmp_path, check=True, capture_output=True)
    whole = json.loads((tmp_path / "whole" / "metrics.json").read_text())
    assert without_times(resumed) == without_times(whole)


def test_the_last_batch_may_be_short(evaluate, loaded, demo_tokens):
    """Filler rows count nowhere; T5X's means are over whole batches."""
    (model,) = evaluate(num_examples=18)["models"]
    (whole,) = evaluate(num_examples=16)["models"]
    assert model["num_examples"] == 18
    batches = [batch.arrays() for batch in demo_tokens[:18].batches(18)]
    expected = evaluate_loss(*loaded, batches)
    assert model["loss"] == pytest.approx(expected.loss, rel=1e-6)
    assert model["accuracy"] == expected.accuracy
    assert model["t5x"] == whole["t5x"]
    real = int((demo_tokens[:18].tokens.encoder_input_tokens > 0).sum())
    assert model["router"]["layers"]["encoder/layers_1/mlp"]["num_tokens"] == real


@pytest.fixture(scope="module")
def compared(demo_file, tmp_path_factory):
    """Uncompressed and rounded to nearest, through the command: its output folder."""
    pytest.importorskip("gin")
    folder = tmp_path_factory.mktemp("compared")
    assert not command("evaluate")(
        [
            f"--gin.CHECKPOINT=[('full', '{CHECKPOINT}'), ('RTN', 'rtn:ternary:{CHECKPOINT}')]",
            f"--gin.TOKENS='{demo_file}'",
            "--gin.NUM_EXAMPLES=64",
            f"--gin.OUTPUT='{folder}/'",
        ]
    )
    return folder


def test_several_checkpoints_are_compared_on_the_same_tokens(compared, demo_tokens):
    full, ternary = json.loads((compared / "metrics.json").read_text())["models"]
    assert (full["gap"], full["gap_standard_error"], full["bits_per_weight"]) == (0, 0, None)
    assert ternary["gap"] > 0
    # The same from the checkpoints by themselves.
    batches = [batch.arrays() for batch in demo_tokens[:64].batches(32)]
    reports = [
        evaluate_loss(*load_switch(path), batches) for path in (CHECKPOINT, ternary["checkpoint"])
    ]
    gap, error = reports[1].gap_to(reports[0])
    assert ternary["gap"] == pytest.approx(gap, abs=1e-6)
    assert ternary["gap_standard_error"] == pytest.approx(error, rel=1e-3)
    inspected = inspect_checkpoint(ternary["checkpoint"])
    assert ternary["bits_per_weight"] == inspected["experts"]["bits"]["bits_per_weight"]
    assert (compared.parent / f"{compared.name}.operative_config.gin").exists()


def test_tensorboard_events_hold_the_metrics(compared):
    event_pb2 = pytest.importorskip("tensorboardX.proto.event_pb2")
    models = json.loads((compared / "metrics.json").read_text())["models"]
    for model in models:
        (path,) = (compared / model["name"]).glob("events.out.tfevents.*")
        found = {}
        content = path.read_bytes()
        while content:  # TFRecord: length, its checksum, the event, its checksum
            (length,) = struct.unpack("<Q", content[:8])
            event = event_pb2.Event.FromString(content[12 : 12 + length])
            content = content[16 + length :]
            for value in event.summary.value:
                found[value.tag] = (event.step, value.simple_value)
        expected = {name: np.float32(value) for name, value in scalars(model)}
        assert {name: np.float32(value) for name, (_, value) in found.items()} == expected
        assert "router/layers/decoder/layers_1/mlp/max_load" in found
        step = 4200 if model["name"] == "full" else 0
        assert {steps for steps, _ in found.values()} == {step}


def test_names_of_checkpoints():
    name = evaluation.name_checkpoints
    assert name("/a/b/") == {"b": "/a/b/"}
    assert name([("x", "/a"), "/c/d"]) == {"x": "/a", "d": "/c/d"}
    assert name({"x": "/a"}) == {"x": "/a"}
    for bad, message in (
        ([], "no checkpoint is given"),
        (["/a/x", "/b/x"], r"two checkpoints would be called 'x': /a/x and /b/x; give \(name"),
        ({"../x": "/a"}, r"called '\.\./x'; use letters"),
    ):
        with pytest.raises(ValueError, match=message):
            name(bad)


def test_bad_settings(evaluate, monkeypatch):
    with pytest.raises(ValueError, match="num_examples is 0, but there are 1024"):
        evaluate(num_examples=0)
    with pytest.raises(TokensError, match="num_examples is 2000, but there are 1024 examples"):
        evaluate(num_examples=2000)
    with pytest.raises(ValueError, match="batches_per_shard is 0"):
        evaluate(batches_per_shard=0)
    with pytest.raises(TokensError, match="batch_size is 0"):
        evaluate(batch_size=0)
    with pytest.raises(ValueError, match=r"output is 'gs://bucket/out'; give a local path"):
        evaluate("gs://bucket/out")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="tensorboard=True needs tensorboardX: pip install"):
        evaluate("unused", tensorboard=True)


@pytest.fixture(scope="module")
def truncated(compared, tmp_path_factory):
    """A compressed checkpoint of which one array lost its end."""
    import shutil

    (rounded, *_) = sorted((compared / "rounded").iterdir())
    copied = shutil.copytree(rounded, tmp_path_factory.mktemp("truncated") / "model")
    files = [path for path in (copied / "coded").rglob("*") if path.is_file()]
    largest = max(files, key=lambda path: path.stat().st_size)
    os.truncate(largest, largest.stat().st_size // 2)
    return copied


@pytest.fixture(scope="module")
def large_vocabulary(demo_tokens, tmp_path_factory):
    """Tokens of a vocabulary with more ids than the demo model has embeddings."""
    path = tmp_path_factory.mktemp("large") / "tokens.npz"
    few = demo_tokens[:2].tokens
    write_tokens(path, few, TokenMetadata("other", "test", 32100, 32000, 100, 1, 0, ""))
    return path


C4 = "--gin.TASK='c4_v220_span_corruption'"
VOCABULARY = f"--gin.VOCABULARY='{golden_data.DEMO / 'sentencepiece.model'}'"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["TOKENS"], "--gin.TOKENS: write --gin.NAME=VALUE"),
        ([], "give either TOKENS, a token file, or TASK"),
        (["TASK='c4_v220'"], "There is no task 'c4_v220'; known are c4_ (the newest"),
        (["TASK='x'", "TASK_MODULE='no.such'"], "task_module 'no.such' cannot be imported"),
        ([C4], "c4_v220_span_corruption needs vocabulary"),
        ([C4, VOCABULARY, "DATA_DIR='nowhere'"], "There is no folder data_dir 'nowhere'"),
        ([C4, VOCABULARY, "FILES='x'"], "reads TFDS; for files use jsonl_span_corruption"),
        (["TASK='text_whole_documents'", VOCABULARY], "text_whole_documents needs files"),
        (["TOKENS='nothing.npz'"], "There is no token file nothing.npz"),
        (["TOKENS='{large_vocabulary}'"], "32100 ids, but the model has 4096 embeddings"),
        (["TOKENS='{demo}'", "CHECKPOINT='{truncated}'"], "or compress again"),
        (["TOKENS='{demo}'", "CHECKPOINT='nowhere'"], "nowhere"),
        (["TOKENS='{demo}'", "CHECKPOINT=['{demo_model}', 'nowhere']"], "nowhere"),
        (["TOKENS='{demo}'", "CHECKPOINT='rtn:4bit:x'"], "write rtn:ternary:PATH or rtn:2bit:PATH"),
        (["TOKENS='{demo}'", "NUM_EXAMPLE=3"], "nothing is called NUM_EXAMPLE; did you mean NUM_"),
        (["TOKENS='{demo}'", "evaluate.btach_size=3"], "btach_size"),
        (["TOKENS='{demo}'", "evalute.batch_size=3"], "evalute"),
        (["TOKENS='{demo}'", "evaluate.batch_size=3+"], "--gin.evaluate.batch_size=3+ is no"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    arguments, message, demo_file, large_vocabulary, truncated, tmp_path, monkeypatch, capsys
):
    pytest.importorskip("gin")
    if "TASK_MODULE='no.such'" in arguments:
        pytest.importorskip("seqio")
    monkeypatch.chdir(tmp_path)
    paths = {
        "demo": demo_file,
        "demo_model": CHECKPOINT,
        "large_vocabulary": large_vocabulary,
        "truncated": truncated,
    }
    given = [f"--gin.CHECKPOINT='{CHECKPOINT}'"]
    for argument in arguments:
        given.append("--gin." + argument.removeprefix("--gin.").format(**paths))
    assert message in refusal(capsys, "evaluate", *given)


def test_no_traceback_from_a_real_process(tmp_path):
    pytest.importorskip("seqio")
    result = subprocess.run(
        [sys.executable, "-m", "qmoe_jax", "evaluate", C4, VOCABULARY, "--gin.CHECKPOINT='x'"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=False,
    )
    assert result.returncode == 2
    assert result.stderr.splitlines()[-1].startswith(
        "qmoe-jax evaluate: TFDS has no prepared c4/en"
    )
    assert "Traceback" not in result.stderr
