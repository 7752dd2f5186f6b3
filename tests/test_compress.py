"""The block loop on small models: what it stores, what it promises, what it refuses."""

import dataclasses
import filecmp
import json
import os
import shutil
import subprocess
import sys

import golden_data
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tensorstore as ts
from markers import slow

import qmoe_jax
from qmoe_jax.calibration.tokens import TokenFile, TokenMetadata, from_sequences, write_tokens
from qmoe_jax.checkpoints.compressed import open_compressed_checkpoint
from qmoe_jax.checkpoints.read_config import read_config
from qmoe_jax.errors import CheckpointError, TokensError
from qmoe_jax.evaluation.metrics import evaluate_loss
from qmoe_jax.models.load import dequantized
from qmoe_jax.pipeline import expert_layer

SENTINELS = (500, 12)


def random_tokens(seed, count, longest=24, num_embeddings=500):
    """Examples with sentinels, of different lengths."""
    rng = np.random.default_rng(seed)
    inputs, targets = [], []
    for _ in range(count):
        body = rng.integers(3, num_embeddings, rng.integers(4, longest))
        body[len(body) // 2] = SENTINELS[0] + SENTINELS[1] - 1
        inputs.append(np.append(body, 1))
        answer = rng.integers(3, num_embeddings, rng.integers(2, longest // 2))
        answer[0] = SENTINELS[0] + SENTINELS[1] - 1
        targets.append(np.append(answer, 1))
    batch = from_sequences(inputs, targets, inputs_length=longest + 8, targets_length=longest)
    metadata = TokenMetadata(
        task="random",
        split="train",
        vocabulary_size=512,
        sentinel_first=SENTINELS[0],
        sentinel_count=SENTINELS[1],
        eos_id=1,
        seed=seed,
        source="test",
    )
    return TokenFile(batch, metadata)


CALIBRATION = random_tokens(0, 40)
QUICK = {"progress": False, "batch_size": 8, "expert_batch": 3, "token_chunk": 16}


@pytest.fixture(scope="module")
def base(golden_checkpoint):
    return golden_checkpoint("base", "t5x_float32_inference")


@pytest.fixture(scope="module")
def gptq(base, tmp_path_factory):
    """A compressed checkpoint and its report."""
    path = tmp_path_factory.mktemp("gptq") / "compressed"
    return path, qmoe_jax.compress(base, path, CALIBRATION, **QUICK)


def same_tree(a, b):
    compared = filecmp.dircmp(a, b)
    if compared.left_only or compared.right_only:
        return False
    _, mismatch, errors = filecmp.cmpfiles(a, b, compared.common_files, shallow=False)
    return not (mismatch or errors) and all(
        same_tree(os.path.join(a, d), os.path.join(b, d)) for d in compared.common_dirs
    )


def codes_of(path):
    """All decoded weights, by kernel."""
    module, variables = qmoe_jax.load_switch(path)
    _, dense = dequantized(module, variables)
    flat = jax.tree_util.tree_flatten_with_path(dense["params"])[0]
    return {
        jax.tree_util.keystr(key): np.asarray(value)
        for key, value in flat
        if "'expert'" in jax.tree_util.keystr(key)
    }


def test_two_runs_are_bit_identical(base, gptq, tmp_path):
    path, _ = gptq
    qmoe_jax.compress(base, tmp_path / "again", CALIBRATION, **QUICK)
    assert same_tree(path, tmp_path / "again")


def test_the_manifest_is_complete_and_portable(gptq):
    path, report = gptq
    manifest = json.loads((path / "manifest.json").read_text())
    assert manifest["format"] == "qmoe_jax"
    assert manifest["format_version"] == 2
    assert manifest["compression"]["settings"]["grid"] == "ternary"
    assert str(path.parent) not in json.dumps(manifest)
    stored = open_compressed_checkpoint(path).num_bytes()
    assert 8 * stored["coded"] == report.expert_bits
    assert 8 * stored["dense"] == report.dense_bits


@pytest.mark.parametrize("grid", ["ternary", *slow("2bit")])
def test_loss_through_codes_equals_loss_of_dequantized_weights(base, gptq, tmp_path, grid):
    path, _ = gptq
    if grid == "2bit":
        path = tmp_path / "2bit"
        qmoe_jax.compress(base, path, CALIBRATION, grid=grid, **QUICK)
    module, variables = qmoe_jax.load_switch(path)
    batches = [batch.arrays() for batch in CALIBRATION.batches(16)]
    through_codes = evaluate_loss(module, variables, batches)
    dense = evaluate_loss(*dequantized(module, variables), batches)
    assert through_codes.loss == pytest.approx(dense.loss, abs=1e-4)
    names = {key for key, _ in module.coded}
    assert names == {
        f"{stack}/layers_{layer}/mlp/expert/{kernel}"
        for stack in ("encoder", "decoder")
        for layer in (1, 3)
        for kernel in ("wi", "wo")
    }


def test_reloading_in_a_new_process_gives_bit_identical_logits(gptq, tmp_path):
    path, _ = gptq
    code = f"""
import numpy as np, jax, qmoe_jax
module, variables = qmoe_jax.load_switch({str(path)!r})
golden = np.load({str(tmp_path / "batch.npz")!r})
logits = jax.jit(lambda v, *b: module.apply(v, *b, enable_dropout=False))(
    variables, golden["e"], golden["i"], golden["t"])
np.save({str(tmp_path / "out")!r} + __import__("sys").argv[1], logits)
"""
    tokens = CALIBRATION.tokens
    np.savez(
        tmp_path / "batch.npz",
        e=tokens.encoder_input_tokens[:4],
        i=tokens.decoder_input_tokens[:4],
        t=tokens.decoder_target_tokens[:4],
    )
    for run in ("1", "2"):
        subprocess.run([sys.executable, "-c", code, run], check=True)
    first, second = np.load(tmp_path / "out1.npy"), np.load(tmp_path / "out2.npy")
    assert first.tobytes() == second.tobytes()
    assert np.isfinite(first).all()


def test_validation_tokens_change_nothing_but_give_the_loss(base, gptq, tmp_path):
    path, _ = gptq
    validation = random_tokens(9, 11)
    report = qmoe_jax.compress(
        base, tmp_path / "with", CALIBRATION, validation_tokens=validation, **QUICK
    )
    assert same_tree(path, tmp_path / "with")
    assert report.validation is not None
    module, variables = qmoe_jax.load_switch(tmp_path / "with")
    batches = [batch.arrays() for batch in validation.batches(11)]
    separate = evaluate_loss(module, variables, batches)
    # float32 source, bfloat16 dense parameters in both: only the order of sums differs.
    np.testing.assert_allclose(report.validation.cross_entropy, separate.cross_entropy, rtol=1e-4)
    np.testing.assert_array_equal(report.validation.num_correct, separate.num_correct)


def test_batching_does_not_change_the_codes(base, gptq, tmp_path):
    path, _ = gptq
    other = {**QUICK, "batch_size": 5, "expert_batch": 8, "token_chunk": 100}
    qmoe_jax.compress(base, tmp_path / "other", CALIBRATION, **other)
    ours, theirs = codes_of(path), codes_of(tmp_path / "other")
    different = sum(np.sum(ours[key] != theirs[key]) for key in ours)
    # Sums in another order move a weight across a threshold now and then.
    assert different <= 1e-3 * sum(array.size for array in ours.values())


def test_memory_mapped_hidden_states_change_nothing(base, gptq, tmp_path):
    path, _ = gptq
    qmoe_jax.compress(
        base, tmp_path / "mapped", CALIBRATION, buffer_dir=tmp_path / "buffers", **QUICK
    )
    assert same_tree(path, tmp_path / "mapped")


def test_gptq_is_worse_on_weights_and_better_on_outputs(base, gptq, tmp_path):
    _, report = gptq
    rtn = qmoe_jax.compress(base, tmp_path / "rtn", CALIBRATION, method="rtn", **QUICK)
    for ours, nearest in zip(report.kernels, rtn.kernels, strict=True):
        assert ours.name == nearest.name
        assert ours.relative_weight_error > nearest.relative_weight_error
        assert ours.relative_layer_error < nearest.relative_layer_error


def test_rtn_needs_no_tokens_and_does_not_depend_on_them(base, tmp_path):
    without = qmoe_jax.compress(base, tmp_path / "without", method="rtn", **QUICK)
    qmoe_jax.compress(base, tmp_path / "with", CALIBRATION, method="rtn", **QUICK)
    ours, theirs = codes_of(tmp_path / "without"), codes_of(tmp_path / "with")
    for key in ours:
        np.testing.assert_array_equal(ours[key], theirs[key])
    assert without.kernels[0].relative_layer_error is None


def test_experts_without_tokens_are_rounded_and_counted(base, tmp_path):
    few = CALIBRATION[:1]
    report = qmoe_jax.compress(base, tmp_path / "few", few, **QUICK)
    assert all(kernel.experts_without_tokens > 0 for kernel in report.kernels)
    assert any("saw no calibration token" in warning for warning in report.warnings())
    nearest = qmoe_jax.compress(base, tmp_path / "rtn", method="rtn", **QUICK)
    module, _ = qmoe_jax.load_switch(tmp_path / "few")
    assert len(module.coded) == len(nearest.kernels)


@pytest.mark.parametrize("model", ["xxl", *slow("c")])
def test_other_geometries(golden_checkpoint, tmp_path, model):
    """Gated experts, separate logits, every layer sparse."""
    checkpoint = golden_checkpoint(model, "t5x_bfloat16")
    config = read_config(checkpoint)
    tokens = random_tokens(3, 16, num_embeddings=min(500, config.num_embeddings))
    size = config.num_embeddings
    tokens = dataclasses.replace(
        tokens,
        tokens=dataclasses.replace(
            tokens.tokens,
            **{
                name: np.where(array >= size, size - 1, array)
                for name, array in tokens.tokens.arrays().items()
                if name != "decoder_loss_weights"
            },
        ),
    )
    report = qmoe_jax.compress(
        checkpoint, tmp_path / "out", tokens, validation_tokens=tokens[:4], **QUICK
    )
    sparse = len(config.encoder_sparse_layers) + len(config.decoder_sparse_layers)
    assert len(report.kernels) == sparse * (len(config.wi_names) + 1)
    module, variables = qmoe_jax.load_switch(tmp_path / "out")
    batches = [batch.arrays() for batch in tokens[:4].batches(4)]
    loss = evaluate_loss(module, variables, batches)
    assert loss.loss == pytest.approx(report.validation.loss, rel=1e-4)


OPTIONS = ({"group_size": 32}, {"true_sequential": True}, {"act_order": True})


@pytest.mark.parametrize("option", OPTIONS)
def test_options_run_and_matter(base, gptq, tmp_path, option):
    path, report = gptq
    other = qmoe_jax.compress(base, tmp_path / "other", CALIBRATION, **option, **QUICK)
    ours, theirs = codes_of(path), codes_of(tmp_path / "other")
    assert any(np.any(ours[key] != theirs[key]) for key in ours)
    if "group_size" in option:
        # Two levels a group cost 1 bit a weight, and smaller groups have fewer zeros.
        assert 1.0 < other.bits_per_weight - report.bits_per_weight < 2.5
    else:
        assert other.bits_per_weight == pytest.approx(report.bits_per_weight, rel=0.1)


# But for groups the format is the same.
@pytest.mark.parametrize("option", [OPTIONS[0], *slow(*OPTIONS[1:])])
def test_codes_lose_nothing_under_options(base, tmp_path, option):
    qmoe_jax.compress(base, tmp_path / "other", CALIBRATION, **option, **QUICK)
    module, variables = qmoe_jax.load_switch(tmp_path / "other")
    batches = [batch.arrays() for batch in CALIBRATION[:16].batches(16)]
    through_codes = evaluate_loss(module, variables, batches)
    dense = evaluate_loss(*dequantized(module, variables), batches)
    assert through_codes.loss == pytest.approx(dense.loss, abs=1e-4)


class TestLayers:
    """Layers that are treated otherwise: skipped stacks, overrides."""

    def test_a_skipped_stack_stays_dense(self, base, gptq, tmp_path):
        path, _ = gptq
        validation = random_tokens(9, 11)
        report = qmoe_jax.compress(
            base,
            tmp_path / "out",
            CALIBRATION,
            validation_tokens=validation,
            separate_evaluation=True,
            skip="decoder",
            **QUICK,
        )
        module, variables = qmoe_jax.load_switch(tmp_path / "out")
        assert all(name.startswith("encoder/") for name, _ in module.coded)
        assert len(module.coded) == 4
        source = qmoe_jax.open_t5x_checkpoint(base)
        name = "decoder/layers_3/mlp/expert/wo/kernel"
        kept = variables["params"]["decoder"]["layers_3"]["mlp"]["expert"]["wo"]["kernel"]
        assert kept.dtype == jnp.bfloat16
        np.testing.assert_array_equal(kept, source.read(name).astype(jnp.bfloat16))
        # The encoder does not see what becomes of the decoder.
        ours, whole = codes_of(tmp_path / "out"), codes_of(path)
        for key in whole:
            if key.startswith("['encoder']"):
                np.testing.assert_array_equal(ours[key], whole[key])
        separate = report.separate_validation
        assert report.validation.loss == pytest.approx(separate.loss, rel=1e-4)
        stored = open_compressed_checkpoint(tmp_path / "out").num_bytes()
        assert 8 * stored["dense"] == report.dense_bits
        assert 8 * stored["coded"] == report.expert_bits

    def test_overrides(self, base, tmp_path):
        report = qmoe_jax.compress(
            base,
            tmp_path / "out",
            CALIBRATION,
            layer_overrides={
                "encoder/*": {"method": "rtn"},
                "encoder/layers_3": {"grid": "2bit", "method": "gptq"},
                "decoder/layers_1": {"method": "none"},
            },
            **QUICK,
        )
        specs = open_compressed_checkpoint(tmp_path / "out").specs
        codings = {name.rpartition("/mlp")[0]: spec.coding for name, spec in specs.items()}
        assert codings == {
            "encoder/layers_1": "tunstall",
            "encoder/layers_3": "tunstall_2bit",
            "decoder/layers_3": "tunstall",
        }
        rtn = qmoe_jax.compress(base, tmp_path / "rtn", method="rtn", **QUICK)
        assert report.kernels[0].zeros == rtn.kernels[0].zeros
        assert report.kernels[-1].zeros != rtn.kernels[-1].zeros

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"layer_overrides": {"encoder/layers_2": {"grid": "2bit"}}}, "matches no sparse"),
            ({"layer_overrides": {"*": {"batch_size": 3}}}, "has batch_size; a layer may"),
            ({"layer_overrides": {"*": {"damping": -1.0}}}, "damping is -1.0"),
            ({"method": "none"}, "no layer is left to compress"),
            ({"skip": "both"}, "skip is 'both'"),
            ({"group_size": 24}, "group_size is 24; it must divide the 64"),
            ({"num_devices": 3}, "num_devices is 3; this process has 1"),
        ],
        ids=lambda value: value if isinstance(value, str) else "",
    )
    def test_refusals(self, base, tmp_path, changes, message):
        with pytest.raises(ValueError, match=message):
            qmoe_jax.compress(base, tmp_path / "out", CALIBRATION, **changes, **QUICK)
        assert not list(tmp_path.iterdir())


def test_the_log_has_a_line_a_layer(base, gptq, tmp_path):
    log = tmp_path / "log.jsonl"
    report = qmoe_jax.compress(base, tmp_path / "out", CALIBRATION, log=log, **QUICK)
    start, *layers, finish = [json.loads(line) for line in log.read_text().splitlines()]
    assert (start["event"], finish["event"]) == ("start", "finish")
    assert [(line["stack"], line["layer"]) for line in layers] == [
        ("encoder", 1),
        ("encoder", 3),
        ("decoder", 1),
        ("decoder", 3),
    ]
    kernels = [kernel for line in layers for kernel in line["kernels"]]
    assert kernels == json.loads(json.dumps([dataclasses.asdict(k) for k in report.kernels]))
    assert sum(line["bytes_read"] for line in layers) == 4 * report.expert_weights
    assert finish["bits_per_weight"] == report.bits_per_weight
    assert same_tree(tmp_path / "out", gptq[0])


def test_premasking_leaves_sentinels_out(base, gptq, tmp_path):
    """Replacing what stands at sentinels by another sentinel moves hidden states, so instead:
    without premasking the Hessians, and with them the codes, are different."""
    path, _ = gptq
    qmoe_jax.compress(base, tmp_path / "all", CALIBRATION, premask_sentinels=False, **QUICK)
    ours, theirs = codes_of(path), codes_of(tmp_path / "all")
    assert any(np.any(ours[key] != theirs[key]) for key in ours)


class Stopped(Exception):
    pass


def stop_after(monkeypatch, num_batches):
    """Makes the block loop fall over once so many expert batches are computed and stored."""
    compute = expert_layer.quantize_batch
    computed = []

    def counting(*arguments):
        if len(computed) == num_batches:
            raise Stopped
        computed.append(None)
        return compute(*arguments)

    monkeypatch.setattr(expert_layer, "quantize_batch", counting)


class TestResume:
    # 4 sparse layers of 8 experts in batches of 3: 12 batches.
    @pytest.mark.parametrize("stops", [(1,), (3, 5), *slow((2, 2, 2, 5))])
    def test_a_stopped_run_ends_with_the_same_bytes(self, base, gptq, tmp_path, monkeypatch, stops):
        path = tmp_path / "out"
        for stop in stops:
            with monkeypatch.context() as patch:
                stop_after(patch, stop)
                with pytest.raises(Stopped):
                    qmoe_jax.compress(base, path, CALIBRATION, **QUICK)
            assert not path.exists()
        report = qmoe_jax.compress(base, path, CALIBRATION, **QUICK)
        assert report.num_replayed == sum(stops)
        # Finished layers are in the output already, and their kernels are not read again.
        assert report.bytes_read < gptq[1].bytes_read
        assert same_tree(path, gptq[0])
        assert [p.name for p in tmp_path.iterdir()] == ["out"]
        # The report too is that of an undisturbed run.
        assert report.kernels == gptq[1].kernels

    def stopped(self, base, path, monkeypatch, **settings):
        with monkeypatch.context() as patch:
            stop_after(patch, 2)
            with pytest.raises(Stopped):
                qmoe_jax.compress(base, path, CALIBRATION, **QUICK, **settings)

    def test_other_settings_are_refused_and_named(self, base, gptq, tmp_path, monkeypatch):
        path = tmp_path / "out"
        self.stopped(base, path, monkeypatch, damping=0.2)
        message = r"settings.damping: 0.2 became 0.1"
        with pytest.raises(CheckpointError, match=message):
            qmoe_jax.compress(base, path, CALIBRATION, **QUICK)
        with pytest.raises(CheckpointError, match=r"tokens\.num_examples: 40 became 7"):
            qmoe_jax.compress(base, path, CALIBRATION, num_examples=7, damping=0.2, **QUICK)
        report = qmoe_jax.compress(base, path, CALIBRATION, overwrite=True, **QUICK)
        assert report.num_replayed == 0
        assert same_tree(path, gptq[0])

    def test_a_second_run_is_refused(self, base, tmp_path, monkeypatch):
        path = tmp_path / "out"
        compute = expert_layer.quantize_batch

        def meanwhile(*arguments):
            with pytest.raises(CheckpointError, match="another process is writing"):
                qmoe_jax.compress(base, path, CALIBRATION, overwrite=True, **QUICK)
            raise Stopped

        monkeypatch.setattr(expert_layer, "quantize_batch", meanwhile)
        with pytest.raises(Stopped):
            qmoe_jax.compress(base, path, CALIBRATION, **QUICK)
        monkeypatch.setattr(expert_layer, "quantize_batch", compute)

    def test_a_work_folder_loses_only_what_is_the_run_s(self, base, gptq, tmp_path, monkeypatch):
        path, work = tmp_path / "out", tmp_path / "work"
        work.mkdir()
        (work / "other.txt").write_text("not ours")
        with monkeypatch.context() as patch:
            stop_after(patch, 2)
            with pytest.raises(Stopped):
                qmoe_jax.compress(base, path, CALIBRATION, work_dir=work, **QUICK)
        report = qmoe_jax.compress(base, path, CALIBRATION, work_dir=work, **QUICK)
        assert report.num_replayed == 2
        assert same_tree(path, gptq[0])
        assert [file.name for file in work.iterdir()] == ["other.txt"]

    def test_a_finished_layer_is_checked(self, base, tmp_path, monkeypatch):
        path = tmp_path / "out"
        with monkeypatch.context() as patch:
            stop_after(patch, 4)  # 3 batches make the first layer
            with pytest.raises(Stopped):
                qmoe_jax.compress(base, path, CALIBRATION, **QUICK)
        (folder,) = path.with_name("out.partial").glob("coded/*encoder.layers_1*.wi/words")
        chunk = folder / "0"
        content = bytearray(chunk.read_bytes())
        content[5] ^= 1
        chunk.write_bytes(content)
        with pytest.raises(CheckpointError, match=r"wi/words .* does not match its checksum"):
            qmoe_jax.compress(base, path, CALIBRATION, **QUICK)

    def test_a_damaged_journal_entry_is_named(self, base, tmp_path, monkeypatch):
        path = tmp_path / "out"
        self.stopped(base, path, monkeypatch)
        entry = sorted((tmp_path / "out.partial" / "work").glob("*.npz"))[0]
        entry.write_bytes(entry.read_bytes()[:100])
        with pytest.raises(CheckpointError, match=f"{entry.name} is damaged"):
            qmoe_jax.compress(base, path, CALIBRATION, **QUICK)
        entry.unlink()
        assert qmoe_jax.compress(base, path, CALIBRATION, **QUICK).num_replayed == 1


class TestRefusals:
    def test_gptq_without_tokens(self, base, tmp_path):
        with pytest.raises(TokensError, match="needs calibration tokens"):
            qmoe_jax.compress(base, tmp_path / "out", **QUICK)
        assert not list(tmp_path.iterdir())

    def test_existing_output(self, base, gptq):
        path, _ = gptq
        before = (path / "manifest.json").read_bytes()
        with pytest.raises(CheckpointError, match="overwrite=True"):
            qmoe_jax.compress(base, path, CALIBRATION, **QUICK)
        assert (path / "manifest.json").read_bytes() == before

    def test_bad_settings(self, base, tmp_path):
        with pytest.raises(ValueError, match="grid is '3bit'"):
            qmoe_jax.compress(base, tmp_path / "out", CALIBRATION, grid="3bit")
        with pytest.raises(ValueError, match="damping is 0.0"):
            qmoe_jax.compress(base, tmp_path / "out", CALIBRATION, damping=0.0)
        with pytest.raises(TypeError, match="dampning"):
            qmoe_jax.compress(base, tmp_path / "out", CALIBRATION, dampning=0.1)
        assert not list(tmp_path.iterdir())

    def test_tokens_of_another_vocabulary(self, golden_checkpoint, tmp_path):
        tokens = random_tokens(0, 4)
        write_tokens(tmp_path / "tokens.npz", tokens.tokens, tokens.metadata)
        config = read_config(golden_checkpoint("c", "t5x_bfloat16"))
        assert config.num_embeddings < 512
        with pytest.raises(TokensError, match="another vocabulary"):
            qmoe_jax.compress(
                golden_checkpoint("c", "t5x_bfloat16"),
                tmp_path / "out",
                tmp_path / "tokens.npz",
                **QUICK,
            )

    def test_a_nan_in_the_last_layer_leaves_no_output(self, golden_copy, tmp_path):
        checkpoint = golden_copy("base", "t5x_float32_inference")
        name = "decoder/layers_3/mlp/expert/wo/kernel"
        array = ts.open(
            {
                "driver": "zarr",
                "kvstore": {
                    "driver": "file",
                    "path": str(checkpoint / f"target.{name.replace('/', '.')}"),
                },
            },
            open=True,
        ).result()
        array[1, 0, 0].write(np.float32("nan")).result()
        with pytest.raises(CheckpointError, match=f"{name}.*NaN"):
            qmoe_jax.compress(checkpoint, tmp_path / "out", method="rtn", **QUICK)
        assert not (tmp_path / "out").exists()
        with pytest.raises(CheckpointError):
            qmoe_jax.load_switch(tmp_path / "out.partial")

    def test_an_interrupted_overwrite_keeps_the_old_output(self, base, gptq, tmp_path, monkeypatch):
        path = shutil.copytree(gptq[0], tmp_path / "out")
        stop_after(monkeypatch, 2)
        with pytest.raises(Stopped):
            qmoe_jax.compress(base, path, CALIBRATION, overwrite=True, **QUICK)
        assert same_tree(path, gptq[0])


class TestDamagedCompressedCheckpoint:
    @pytest.fixture
    def path(self, gptq, tmp_path):
        return shutil.copytree(gptq[0], tmp_path / "copy")

    def chunk(self, path, array):
        (folder,) = path.glob(f"coded/*encoder.layers_1*.wi/{array}")
        return next(file for file in sorted(folder.iterdir()) if not file.name.startswith("."))

    def test_a_flipped_bit(self, path):
        chunk = self.chunk(path, "words")
        content = bytearray(chunk.read_bytes())
        content[7] ^= 4
        chunk.write_bytes(content)
        with pytest.raises(CheckpointError, match=r"wi/words .* checksum"):
            qmoe_jax.load_switch(path)

    def test_a_truncated_chunk(self, path):
        chunk = self.chunk(path, "levels")
        chunk.write_bytes(chunk.read_bytes()[:-3])
        with pytest.raises(CheckpointError, match="wi/levels"):
            qmoe_jax.load_switch(path)

    def test_a_missing_chunk(self, path):
        self.chunk(path, "levels").unlink()
        with pytest.raises(CheckpointError, match="wi/levels"):
            qmoe_jax.load_switch(path)

    def test_a_missing_array(self, path):
        shutil.rmtree(next(path.glob("dense/encoder.encoder_norm.scale")))
        with pytest.raises(CheckpointError, match="encoder/encoder_norm/scale"):
            qmoe_jax.load_switch(path)

    def test_a_truncated_manifest(self, path):
        manifest = path / "manifest.json"
        manifest.write_bytes(manifest.read_bytes()[:200])
        with pytest.raises(CheckpointError, match=r"manifest.json"):
            qmoe_jax.load_switch(path)

    def test_another_version(self, path):
        manifest = json.loads((path / "manifest.json").read_text())
        manifest["format_version"] = 99
        (path / "manifest.json").write_text(json.dumps(manifest))
        with pytest.raises(CheckpointError, match="version 99; this version reads"):
            qmoe_jax.load_switch(path)

    def test_nothing_there(self, tmp_path):
        with pytest.raises(CheckpointError):
            qmoe_jax.load_switch(tmp_path / "nothing")


@pytest.mark.slow
def test_generation_through_codes(gptq):
    from qmoe_jax.generation.sampling import greedy_generate

    module, variables = qmoe_jax.load_switch(gptq[0])
    encoder = jnp.asarray(CALIBRATION.tokens.encoder_input_tokens[:2])
    generated = greedy_generate(module, variables, encoder, max_decode_length=6)
    dense = greedy_generate(*dequantized(module, variables), encoder, max_decode_length=6)
    np.testing.assert_array_equal(generated, dense)


@pytest.mark.slow
def test_bfloat16_activations(golden_checkpoint, tmp_path):
    report = qmoe_jax.compress(
        golden_checkpoint("base", "t5x_bfloat16"),
        tmp_path / "out",
        CALIBRATION,
        validation_tokens=CALIBRATION[:4],
        activation_dtype="bfloat16",
        **QUICK,
    )
    module, variables = qmoe_jax.load_switch(tmp_path / "out", "bfloat16")
    batches = [batch.arrays() for batch in CALIBRATION[:4].batches(4)]
    loss = evaluate_loss(module, variables, batches)
    assert loss.loss == pytest.approx(report.validation.loss, rel=1e-2)


def test_golden_sizes_are_what_these_tests_assume():
    assert golden_data.load_json("base", "config")["NUM_EXPERTS"] == 8
