"""The block loop on small models: what it stores and what it promises."""

import dataclasses
import json
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest
from factories import CALIBRATION, QUICK, TERNARY, codes_of, random_tokens, same_tree
from markers import slow

import qmoe_jax
from qmoe_jax.checkpoints.compressed import open_compressed_checkpoint
from qmoe_jax.checkpoints.read_config import read_config
from qmoe_jax.evaluation.metrics import evaluate_loss
from qmoe_jax.models.load import dequantized


def test_two_runs_are_bit_identical(base, gptq, tmp_path):
    path, _ = gptq
    qmoe_jax.compress(base, tmp_path / "again", CALIBRATION, **TERNARY)
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
        base, tmp_path / "with", CALIBRATION, validation_tokens=validation, **TERNARY
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
    other = {**TERNARY, "batch_size": 5, "expert_batch": 8, "token_chunk": 100}
    qmoe_jax.compress(base, tmp_path / "other", CALIBRATION, **other)
    ours, theirs = codes_of(path), codes_of(tmp_path / "other")
    different = sum(np.sum(ours[key] != theirs[key]) for key in ours)
    # Sums in another order move a weight across a threshold now and then.
    assert different <= 1e-3 * sum(array.size for array in ours.values())


def test_memory_mapped_hidden_states_change_nothing(base, gptq, tmp_path):
    path, _ = gptq
    qmoe_jax.compress(
        base, tmp_path / "mapped", CALIBRATION, buffer_dir=tmp_path / "buffers", **TERNARY
    )
    assert same_tree(path, tmp_path / "mapped")


def test_gptq_is_worse_on_weights_and_better_on_outputs(base, gptq, tmp_path):
    _, report = gptq
    rtn = qmoe_jax.compress(base, tmp_path / "rtn", CALIBRATION, method="rtn", **TERNARY)
    for ours, nearest in zip(report.kernels, rtn.kernels, strict=True):
        assert ours.name == nearest.name
        assert ours.relative_weight_error > nearest.relative_weight_error
        assert ours.relative_layer_error < nearest.relative_layer_error


def test_rtn_needs_no_tokens_and_does_not_depend_on_them(base, tmp_path):
    without = qmoe_jax.compress(base, tmp_path / "without", method="rtn", **TERNARY)
    qmoe_jax.compress(base, tmp_path / "with", CALIBRATION, method="rtn", **TERNARY)
    ours, theirs = codes_of(tmp_path / "without"), codes_of(tmp_path / "with")
    for key in ours:
        np.testing.assert_array_equal(ours[key], theirs[key])
    assert without.kernels[0].relative_layer_error is None


def test_experts_without_tokens_are_rounded_and_counted(base, tmp_path):
    few = CALIBRATION[:1]
    report = qmoe_jax.compress(base, tmp_path / "few", few, **TERNARY)
    assert all(kernel.experts_without_tokens > 0 for kernel in report.kernels)
    assert any("saw no calibration token" in warning for warning in report.warnings())
    nearest = qmoe_jax.compress(base, tmp_path / "rtn", method="rtn", **TERNARY)
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
        checkpoint, tmp_path / "out", tokens, validation_tokens=tokens[:4], **TERNARY
    )
    sparse = len(config.encoder_sparse_layers) + len(config.decoder_sparse_layers)
    assert len(report.kernels) == sparse * (len(config.wi_names) + 1)
    module, variables = qmoe_jax.load_switch(tmp_path / "out")
    batches = [batch.arrays() for batch in tokens[:4].batches(4)]
    loss = evaluate_loss(module, variables, batches)
    assert loss.loss == pytest.approx(report.validation.loss, rel=1e-4)


def test_the_log_has_a_line_a_layer(base, gptq, tmp_path):
    log = tmp_path / "log.jsonl"
    report = qmoe_jax.compress(base, tmp_path / "out", CALIBRATION, log=log, **TERNARY)
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


@pytest.mark.slow
def test_generation_through_codes(gptq):
    from qmoe_jax.generation.sampling import greedy_generate

    module, variables = qmoe_jax.load_switch(gptq[0])
    encoder = jnp.asarray(CALIBRATION.tokens.encoder_input_tokens[:2])
    generated = greedy_generate(module, variables, encoder, max_decode_length=6)
    dense = greedy_generate(*dequantized(module, variables), encoder, max_decode_length=6)
    np.testing.assert_array_equal(generated, dense)
