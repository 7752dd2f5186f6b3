"""Fine-tuning over codes: what is trained and what is not, what is written, resumed and refused."""

import dataclasses
import json
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_switch
from factories import same_tree

import qmoe_jax
from qmoe_jax.__main__ import main
from qmoe_jax.calibration.tokens import write_tokens
from qmoe_jax.checkpoints import names
from qmoe_jax.checkpoints.adapters import read_adapters, write_adapters
from qmoe_jax.checkpoints.compressed import open_compressed_checkpoint
from qmoe_jax.errors import CheckpointError, TokensError
from qmoe_jax.evaluation.metrics import evaluate_loss
from qmoe_jax.models.adapters import merge_adapters
from qmoe_jax.models.dropout import DropoutRates
from qmoe_jax.models.load import load_switch
from qmoe_jax.training import finetune as training
from qmoe_jax.training import loop
from qmoe_jax.training.examples import ExampleOrder
from qmoe_jax.training.finetune import finetune, recover
from qmoe_jax.training.settings import FinetuneSettings
from qmoe_jax.training.trainable import split_variables

QUICK = FinetuneSettings(
    trainable=("lora", "gains", "norms"),
    train_steps=6,
    batch_size=8,
    microbatches=2,
    learning_rate=0.01,
    lora_rank=2,
    lora_kernels=("*attention/query", "*/expert/wo"),
    dropout_rate=0.1,
    expert_dropout_rate=0.2,
    eval_steps=3,
    save_steps=2,
    log_steps=2,
)
TRAIN, HELD_OUT = tiny_switch.copying_tokens(0, 64), tiny_switch.copying_tokens(1, 16)
SILENT = {"progress": False, "tensorboard": False}


@pytest.fixture(scope="module")
def native(tmp_path_factory):
    return tiny_switch.write_checkpoint(tmp_path_factory.mktemp("native"))


@pytest.fixture(scope="module")
def compressed(native, tmp_path_factory):
    """The coding whose programs are compiled fastest; a slow test has the others."""
    path = tmp_path_factory.mktemp("compressed") / "2bit"
    settings = {"grid": "2bit", "expert_coding": "packed2", "method": "rtn"}
    qmoe_jax.compress(native, path, **settings, progress=False)
    return path


@pytest.fixture(scope="module")
def tuned(compressed, tmp_path_factory):
    """A run's folder and its report; do not write to it."""
    folder = tmp_path_factory.mktemp("tuned") / "run"
    return folder, finetune(compressed, folder, TRAIN, QUICK, validation_tokens=HELD_OUT, **SILENT)


def loss_of(module, variables):
    batches = [batch.arrays() for batch in HELD_OUT.batches(8)]
    return evaluate_loss(module, variables, batches).loss


def code_files(checkpoint):
    """The bytes of all arrays of codes but levels, by kernel and name."""
    found = open_compressed_checkpoint(checkpoint)
    return {
        (kernel, name): array.tobytes()
        for kernel in found.specs
        for name, array in found.read_coded(kernel).arrays.items()
        if name != "levels"
    }


def test_codes_stay_what_they_are_to_the_byte(compressed, tuned):
    folder, report = tuned
    written = folder / f"checkpoint_{QUICK.train_steps}"
    assert report["checkpoint"] == str(written)
    codes = code_files(compressed)
    assert codes
    assert code_files(written) == codes
    # Levels were trained, and are stored as bfloat16 again.
    before, after = (open_compressed_checkpoint(path) for path in (compressed, written))
    for kernel in before.specs:
        old, new = (c.read_coded(kernel).arrays["levels"] for c in (before, after))
        assert old.dtype == new.dtype
        assert np.any(old[..., 0] != new[..., 0])
        # The zero of 2-bit codes is a code.
        np.testing.assert_array_equal(old[..., 1], new[..., 1])
    # A folder of steps stands for the latest of them, here as everywhere.
    assert open_compressed_checkpoint(folder).fingerprint() == after.fingerprint()


def test_what_was_not_chosen_stays(compressed, tuned):
    before, after = (open_compressed_checkpoint(path) for path in (compressed, tuned[0]))
    assert before.dense_names == after.dense_names
    for name in before.dense_names:
        old, new = (checkpoint.read_dense([name])[name] for checkpoint in (before, after))
        chosen = name.endswith("_norm/scale") or name.endswith("attention/query/kernel")
        assert np.array_equal(old, new) != chosen, name
        assert old.dtype == new.dtype


def test_the_loss_falls_and_is_that_of_what_was_written(tuned):
    folder, report = tuned
    validation = report["validation"]
    assert validation["after"]["loss"] < validation["before"]["loss"] - 0.01
    module, variables = load_switch(folder, adapters=folder / "expert_adapters.npz")
    np.testing.assert_allclose(loss_of(module, variables), validation["written"]["loss"], rtol=1e-6)
    lines = [json.loads(line) for line in (folder / loop.LOG).read_text().splitlines()]
    assert [line["step"] for line in lines if "validation" in line] == [0, 3, 6]
    assert [line["step"] for line in lines if "train" in line] == [2, 4, 6]


def test_adapters_apart_and_merged_are_the_same_model(native, compressed, tuned):
    adapters = read_adapters(tuned[0] / "adapters.npz")
    module, variables = load_switch(compressed, adapters=tuned[0] / "adapters.npz")
    merged = merge_adapters(variables)
    left = set(names.flatten(merged["adapters"]))
    assert left == {name for name in adapters.arrays if "/expert/" in name}
    plain = {"params": variables["params"]}
    apart, together, without = (loss_of(module, v) for v in (variables, merged, plain))
    # Kernels are bfloat16, so a merged correction is rounded.
    assert abs(apart - together) < 2e-3
    assert abs(apart - without) > 5e-3


@pytest.mark.slow
def test_dense_kernels_of_experts_take_their_adapters_in(native, tuned):
    module, variables = load_switch(native, adapters=tuned[0] / "adapters.npz")
    wide = names.flatten(variables["params"])
    variables["params"] = names.unflatten({n: a.astype(jnp.float32) for n, a in wide.items()})
    merged = merge_adapters(variables)
    assert merged.keys() == {"params"}
    np.testing.assert_allclose(loss_of(module, variables), loss_of(module, merged), rtol=1e-5)


def test_the_same_call_returns_what_a_finished_run_has(compressed, tuned):
    again = finetune(compressed, tuned[0], TRAIN, QUICK, validation_tokens=HELD_OUT, **SILENT)
    assert again == {name: value for name, value in tuned[1].items() if name != "history"}


def test_a_stopped_run_goes_on_and_ends_with_the_same_bytes(
    compressed, tuned, tmp_path, monkeypatch
):
    folder = tmp_path / "run"
    steps = loop.Loop._one
    left = [5]

    def stop(self, *arguments):
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        return steps(self, *arguments)

    monkeypatch.setattr(loop.Loop, "_one", stop)
    with pytest.raises(KeyboardInterrupt):
        finetune(compressed, folder, TRAIN, QUICK, validation_tokens=HELD_OUT, **SILENT)
    assert not (folder / "report.json").exists()
    left[0] = 2  # from the save after step 4
    finetune(compressed, folder, TRAIN, QUICK, validation_tokens=HELD_OUT, **SILENT)
    assert left == [0]
    for name in ("adapters.npz", "expert_adapters.npz", "metrics.jsonl"):
        assert (folder / name).read_bytes() == (tuned[0] / name).read_bytes()
    assert same_tree(folder / "checkpoint_6", tuned[0] / "checkpoint_6")
    other = dataclasses.replace(QUICK, seed=1)
    with pytest.raises(CheckpointError, match=r"settings\.seed: 0 became 1"):
        finetune(compressed, folder, TRAIN, other, validation_tokens=HELD_OUT, **SILENT)


_PROGRAM = """
import sys
sys.path[:0] = {paths!r}
from test_finetune import HELD_OUT, QUICK, TRAIN, dataclasses, finetune
settings = dataclasses.replace(QUICK, train_steps=60, save_steps=3)
finetune(sys.argv[1], sys.argv[2], TRAIN, settings, validation_tokens=HELD_OUT, progress=False,
         tensorboard=False)
"""


@pytest.mark.slow
@pytest.mark.parametrize("grid", ["ternary", "lattice"])
def test_other_codings(native, tmp_path, grid):
    """By the CPU's products, whose gradients XLA computes."""
    qmoe_jax.compress(native, tmp_path / grid, method="rtn", grid=grid, progress=False)
    run = tmp_path / "run"
    report = finetune(tmp_path / grid, run, TRAIN, QUICK, validation_tokens=HELD_OUT, **SILENT)
    before, after = (report["validation"][when]["loss"] for when in ("before", "written"))
    assert after < before - 0.01
    levels = "origins" if grid == "lattice" else "levels"
    old, new = (
        {path: data for path, data in code_files(folder).items() if levels not in path}
        for folder in (tmp_path / grid, run / "checkpoint_6")
    )
    assert old
    assert new == old


@pytest.mark.slow
def test_ten_killed_runs_end_with_the_same_bytes(compressed, tmp_path):
    here = Path(__file__).parent
    program = _PROGRAM.format(paths=[str(here), str(here.parent)])

    def start(folder):
        return subprocess.Popen([sys.executable, "-c", program, str(compressed), str(folder)])

    undisturbed = tmp_path / "undisturbed"
    duration = 0.0
    for _ in range(2):  # the first one compiles
        shutil.rmtree(undisturbed, ignore_errors=True)
        started = time.monotonic()
        assert start(undisturbed).wait() == 0
        duration = time.monotonic() - started
    rng = random.Random(0)
    killed = tmp_path / "killed"
    for _ in range(10):
        process = start(killed)
        try:
            process.wait(timeout=rng.uniform(0.3, 1.0) * duration)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
    assert start(killed).wait() == 0
    for name in ("adapters.npz", "expert_adapters.npz", "metrics.jsonl"):
        assert (killed / name).read_bytes() == (undisturbed / name).read_bytes()
    assert same_tree(killed / "checkpoint_60", undisturbed / "checkpoint_60")


@pytest.mark.slow
def test_a_native_checkpoint_and_its_experts(native, tmp_path):
    settings = dataclasses.replace(
        QUICK, trainable=("dense", "experts"), train_steps=2, microbatches=1, optimizer="adam"
    )
    report = finetune(native, tmp_path / "run", TRAIN, settings, **SILENT)
    assert report["adapters"] is None
    before, after = (
        names.flatten(load_switch(path)[1]["params"]) for path in (native, tmp_path / "run")
    )
    moved = [name for name in before if not np.array_equal(before[name], after[name])]
    assert any("/expert/" in name for name in moved)
    assert "token_embedder/embedding" in moved
    assert report["num_trained"] == sum(array.size for array in before.values())
    # A run that was killed when the checkpoint was whole and the report was not.
    (tmp_path / "run" / "report.json").unlink()
    assert finetune(native, tmp_path / "run", TRAIN, settings, **SILENT) == report


@pytest.mark.slow
def test_recover_takes_the_uncompressed_model_as_target(native, compressed, tmp_path):
    settings = dataclasses.replace(
        QUICK, trainable=("norms", "gains"), dropout_rate=0.0, expert_dropout_rate=0.0, eval_steps=6
    )
    report = recover(
        compressed, native, tmp_path / "run", TRAIN, settings, validation_tokens=HELD_OUT, **SILENT
    )
    before, after = (report["validation"][when]["kl"] for when in ("before", "written"))
    assert 0 < after < before


def test_dropout_is_drawn_from_its_key_and_spares_evaluation(compressed):
    module, variables = load_switch(compressed)
    dropped = dataclasses.replace(module, dropout=DropoutRates(0.5, 0.5))
    arrays = HELD_OUT.tokens.arrays()
    batch = [jnp.asarray(arrays[n][:4]) for n in tuple(arrays)[:3]]

    @jax.jit
    def logits(key):
        return dropped.apply(variables, *batch, enable_dropout=True, rngs={"dropout": key})

    one, again, other = (logits(jax.random.key(seed)) for seed in (0, 0, 1))
    np.testing.assert_array_equal(one, again)
    assert np.abs(one - other).max() > 0.1
    # What a model without rates computes in evaluation, this one does.
    plain, spared = (
        str(jax.make_jaxpr(lambda v, m=m: m.apply(v, *batch, enable_dropout=False))(variables))
        for m in (module, dropped)
    )
    assert "random_bits" not in spared
    assert len(plain) == len(spared)


def test_every_example_comes_once_an_epoch():
    order = ExampleOrder(10, 4, seed=3)
    seen = np.concatenate([order.indices(step) for step in range(5)])
    assert sorted(seen[:10]) == sorted(seen[10:]) == list(range(10))
    assert list(seen[:10]) != list(seen[10:])
    np.testing.assert_array_equal(ExampleOrder(10, 4, seed=3).indices(3), seen[12:16])


class TestRefusals:
    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"trainable": "lorax"}, "trainable is 'lorax'; it must be of lora, dense"),
            ({"trainable": ()}, "trainable is empty"),
            ({"learning_rate": 0.0}, "learning_rate is 0.0; give a positive number"),
            ({"batch_size": 10, "microbatches": 3}, "3 microbatches do not divide"),
            ({"dropout_rate": 1.0}, "dropout_rate is 1.0; a rate is at least 0 and below 1"),
            ({"train_steps": 0}, "train_steps is 0; give 1 or more"),
            ({"optimizer": "sgd"}, "optimizer is 'sgd'; it must be 'adafactor' or 'adam'"),
        ],
    )
    def test_settings(self, settings, message):
        with pytest.raises(ValueError, match=message):
            FinetuneSettings(**settings)

    @pytest.mark.parametrize(
        ("kind", "message"),
        [
            ({"trainable": "experts"}, "trainable is 'experts', and the checkpoint has none"),
            ({"lora_kernels": ("*/none",)}, "'\\*/none', which is no kernel of the model"),
        ],
    )
    def test_what_a_checkpoint_does_not_have(self, compressed, tmp_path, kind, message):
        settings = dataclasses.replace(QUICK, **kind)
        with pytest.raises(ValueError, match=message):
            finetune(compressed, tmp_path / "run", TRAIN, settings, **SILENT)
        assert not (tmp_path / "run").exists()  # or the mended call would be refused

    def test_gains_of_a_native_checkpoint(self, native, tmp_path):
        settings = dataclasses.replace(QUICK, trainable="gains")
        with pytest.raises(ValueError, match="trainable is 'gains', and the checkpoint has none"):
            finetune(native, tmp_path / "run", TRAIN, settings, **SILENT)
        assert not (tmp_path / "run").exists()

    def test_an_output_that_is_the_input(self, compressed):
        with pytest.raises(CheckpointError, match="an input; choose another folder"):
            finetune(compressed, compressed, TRAIN, QUICK, **SILENT)

    def test_tokens_of_a_larger_vocabulary(self, compressed, tmp_path):
        metadata = dataclasses.replace(TRAIN.metadata, vocabulary_size=65)
        tokens = dataclasses.replace(TRAIN, metadata=metadata)
        with pytest.raises(TokensError, match="vocabulary of 65 ids, but the model has 64"):
            finetune(compressed, tmp_path / "run", tokens, QUICK, **SILENT)

    def test_adapters_of_another_model(self, compressed, tmp_path):
        path = "encoder/layers_0/attention/query"
        shapes = {"a": (20, 16), "b": (16, 16)}
        arrays = {f"{path}/{n}": np.zeros(shape, np.float32) for n, shape in shapes.items()}
        write_adapters(tmp_path / "adapters.npz", arrays, {})
        with pytest.raises(CheckpointError, match=r"shapes \(20, 16\) and \(16, 16\)"):
            load_switch(compressed, adapters=tmp_path / "adapters.npz")

    @pytest.mark.parametrize("damage", ["truncated", "altered", "missing", "tokens"])
    def test_damaged_adapters(self, tuned, tmp_path, damage):
        path = tmp_path / "adapters.npz"
        content = (tuned[0] / "adapters.npz").read_bytes()
        if damage == "truncated":
            path.write_bytes(content[: len(content) // 2])
        elif damage == "altered":
            arrays = dict(np.load(tuned[0] / "adapters.npz"))
            arrays[next(n for n in arrays if n != "header")][0] += 1
            np.savez(path, **arrays)
        elif damage == "tokens":
            write_tokens(path, TRAIN.tokens, TRAIN.metadata)
        with pytest.raises(CheckpointError, match="adapter"):
            read_adapters(path)

    def test_a_loss_that_is_no_number(self, compressed, tmp_path, monkeypatch):
        def diverged(trained, state, *rest):
            return trained, state, {"loss": jnp.float32(jnp.nan)}

        monkeypatch.setattr(training, "make_step", lambda *a, **k: diverged)
        with pytest.raises(ValueError, match=r"the loss is nan at step 1; .* learning_rate"):
            finetune(compressed, tmp_path / "run", TRAIN, QUICK, **SILENT)


class TestCommands:
    def test_finetune(self, compressed, tuned, tmp_path, capsys):
        """By the gin file, to the bytes of the call with the same settings."""
        for name, tokens in (("train", TRAIN), ("validation", HELD_OUT)):
            write_tokens(tmp_path / f"{name}.npz", tokens.tokens, tokens.metadata)
        bindings = {
            "INITIAL_CHECKPOINT": str(compressed),
            "OUTPUT": str(tmp_path / "run"),
            "TOKENS": str(tmp_path / "train.npz"),
            "VALIDATION_TOKENS": str(tmp_path / "validation.npz"),
            "TRAINABLE": list(QUICK.trainable),
            "LORA_KERNELS": list(QUICK.lora_kernels),
            "LORA_RANK": QUICK.lora_rank,
            "FinetuneSettings.log_steps": QUICK.log_steps,
            "TENSORBOARD": False,
        }
        same = ("train_steps", "batch_size", "microbatches", "learning_rate", "dropout_rate")
        for name in (*same, "expert_dropout_rate", "eval_steps", "save_steps"):
            bindings[name.upper()] = getattr(QUICK, name)
        flags = [f"--gin.{name}={value!r}" for name, value in bindings.items()]
        assert main(["finetune", "--gin_file=gin/runs/finetune.gin", *flags]) == 0
        printed = capsys.readouterr().out
        assert "checkpoint_6: " in printed
        assert "parameters trained (lora, gains, norms, " in printed
        assert "corrections of codes, which the checkpoint needs too" in printed
        assert (tmp_path / "run.operative_config.gin").exists()
        assert same_tree(tmp_path / "run" / "checkpoint_6", tuned[0] / "checkpoint_6")
        assert main(["finetune", *flags, "--gin.SEED=5"]) == 2
        line = capsys.readouterr().err.splitlines()[-1]
        assert "settings.seed: 0 became 5" in line
        assert "--gin.OVERWRITE=True" in line

    def test_the_default_kernels_of_a_model_without_gates(
        self, compressed, tmp_path, capsys, monkeypatch
    ):
        """The gin file names them as a list, among them those of gated MLPs."""

        def train(module, parts, *rest):
            raise ValueError(f"trains {len(parts.trained)} arrays")

        monkeypatch.setattr(training, "_train", train)
        write_tokens(tmp_path / "tokens.npz", TRAIN.tokens, TRAIN.metadata)
        bindings = {
            "INITIAL_CHECKPOINT": str(compressed),
            "OUTPUT": str(tmp_path / "run"),
            "TOKENS": str(tmp_path / "tokens.npz"),
            "TRAIN_STEPS": 1,
        }
        assert main(["finetune", *(f"--gin.{n}={v!r}" for n, v in bindings.items())]) == 2
        module, variables = load_switch(compressed)
        expected = split_variables(module, variables, FinetuneSettings()).trained
        assert expected
        assert f"trains {len(expected)} arrays" in capsys.readouterr().err

    @pytest.mark.slow
    def test_recover(self, native, compressed, tmp_path, capsys):
        write_tokens(tmp_path / "tokens.npz", TRAIN.tokens, TRAIN.metadata)
        bindings = {
            "CHECKPOINT": str(compressed),
            "REFERENCE": str(native),
            "OUTPUT": str(tmp_path / "run"),
            "TOKENS": str(tmp_path / "tokens.npz"),
            "VALIDATION_TOKENS": str(tmp_path / "tokens.npz"),
            "NUM_VALIDATION_EXAMPLES": 8,
            "TRAIN_STEPS": 2,
            "BATCH_SIZE": 8,
        }
        flags = [f"--gin.{name}={value!r}" for name, value in bindings.items()]
        assert main(["recover", *flags]) == 0
        assert "validation kl: " in capsys.readouterr().out

    @pytest.mark.parametrize(
        ("bindings", "message"),
        [
            (["TOKENS=None"], "give either TOKENS, a token file, or MIXTURE_OR_TASK"),
            (["TOKENS='x.npz'", "TRAINABLE='all'"], "trainable is 'all'; it must be of lora"),
            (
                ["MIXTURE_OR_TASK='x'", "TASK_FEATURE_LENGTHS={'labels': 3}"],
                "it takes 'inputs' and 'targets'",
            ),
        ],
    )
    def test_what_is_refused(self, compressed, tmp_path, capsys, bindings, message):
        given = (f"INITIAL_CHECKPOINT='{compressed}'", f"OUTPUT='{tmp_path / 'run'}'")
        flags = [f"--gin.{binding}" for binding in (*given, "TRAIN_STEPS=1", *bindings)]
        assert main(["finetune", *flags]) == 2
        assert message in capsys.readouterr().err
        assert not (tmp_path / "run").exists()
