"""KL to a reference model, agreement and the paired gap."""

import golden_data
import jax.numpy as jnp
import numpy as np
import pytest
from factories import CALIBRATION

from qmoe_jax.calibration.tokens import TokenMetadata, read_plain_tokens
from qmoe_jax.errors import CheckpointError, TokensError
from qmoe_jax.evaluation.divergence import divergence_sums, measure_divergence
from qmoe_jax.evaluation.evaluate import evaluate
from qmoe_jax.evaluation.metrics import evaluate_loss
from qmoe_jax.evaluation.tables import summary
from qmoe_jax.models.load import load_switch
from qmoe_jax.pipeline.compress import compress

CHECKPOINT = golden_data.DEMO / "checkpoint_4200"
METADATA = TokenMetadata("demo", "validation", 4068, 3968, 100, 1, 0, "")


def log_softmax(logits):
    logits = logits.astype(np.float64)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def test_sums_equal_numpy():
    rng = np.random.default_rng(0)
    ours, reference = rng.normal(size=(2, 3, 5, 11)).astype(np.float32) * 2
    targets = rng.integers(0, 11, (3, 5))
    weights = np.array([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [0, 0, 0, 0, 0]])
    found = divergence_sums(*(jnp.asarray(a) for a in (ours, reference, targets, weights)))
    log_p, log_q = log_softmax(reference), log_softmax(ours)
    kl = (np.exp(log_p) * (log_p - log_q)).sum(-1)
    np.testing.assert_allclose(found.kl, (kl * weights).sum(1), rtol=1e-5)
    agree = (ours.argmax(-1) == reference.argmax(-1)) * weights
    np.testing.assert_array_equal(found.num_agreeing, agree.sum(1))
    losses = -np.take_along_axis(log_p, targets[..., None], -1)[..., 0] * weights
    np.testing.assert_allclose(found.reference_cross_entropy, losses.sum(1), rtol=1e-5)


@pytest.fixture(scope="module")
def demo_tokens():
    return read_plain_tokens(golden_data.DEMO / "validation_tokens.npz", METADATA).first(64)


@pytest.fixture(scope="module")
def rounded(tmp_path_factory):
    path = tmp_path_factory.mktemp("divergence") / "rtn"
    compress(CHECKPOINT, path, grid="ternary", method="rtn", progress=False)
    return path


def test_a_model_is_its_own_equal(demo_tokens):
    model = load_switch(CHECKPOINT)
    batches = [batch.arrays() for batch in demo_tokens.first(8).batches(8)]
    report = measure_divergence(*model, *model, batches)
    # XLA may compile the two copies differently.
    assert report.divergence == pytest.approx((0.0, 0.0), abs=1e-7)
    assert report.agreement == 1.0
    assert report.gap == pytest.approx((0.0, 0.0), abs=1e-6)
    with pytest.raises(ValueError, match="no batches to compare on"):
        measure_divergence(*model, *model, [])


def test_evaluate_with_a_reference(demo_tokens, rounded, tmp_path):
    """The figures are those of the library's parts, and shards of a stopped run hold them."""
    run = {"reference": CHECKPOINT, "batch_size": 16, "progress": False, "tensorboard": False}
    document = evaluate([("RTN", rounded)], demo_tokens, output=tmp_path, **run)
    (model,) = document["models"]
    found = model["reference"]
    batches = [batch.arrays() for batch in demo_tokens.batches(16)]
    models = load_switch(rounded), load_switch(CHECKPOINT)
    report = measure_divergence(*models[0], *models[1], batches)
    assert found == report.to_json()
    assert 0.001 < found["kl"] < 0.1
    assert 0 < found["kl_standard_error"] < found["kl"] / 5
    assert 0.8 < found["agreement"] < 1
    ours, reference = (evaluate_loss(*loaded, batches) for loaded in models)
    assert model["loss"] == pytest.approx(ours.loss, rel=1e-6)
    assert found["gap"] == pytest.approx(ours.gap_to(reference)[0], abs=1e-6)
    assert found["gap_standard_error"] == pytest.approx(ours.gap_to(reference)[1], rel=1e-3)
    again = evaluate([("RTN", rounded)], demo_tokens, output=tmp_path, **run)
    assert again == document
    assert f"{found['kl']:.5f}" in summary(document)


def test_compress_compares_its_output(demo_tokens, rounded, tmp_path):
    with pytest.raises(TokensError, match="compare needs validation_tokens"):
        compress(CHECKPOINT, tmp_path / "out", demo_tokens, compare=True, progress=False)
    report = compress(
        *(CHECKPOINT, tmp_path / "out", demo_tokens.first(4)),
        **{"grid": "ternary", "method": "rtn", "batch_size": 16, "progress": False},
        validation_tokens=demo_tokens,
        compare=True,
    )
    run = {"reference": CHECKPOINT, "batch_size": 16, "progress": False, "tensorboard": False}
    (model,) = evaluate([("RTN", rounded)], demo_tokens, **run)["models"]
    assert report.to_json()["divergence"] == model["reference"]
    assert report.separate_validation.loss == pytest.approx(report.validation.loss, rel=1e-5)
    assert f"KL {model['reference']['kl']:.5f}" in report.summary()


def test_a_reference_of_another_vocabulary_is_refused(base):
    with pytest.raises(CheckpointError, match="has 512 embeddings, and reference .* has 4096"):
        evaluate(base, CALIBRATION, reference=CHECKPOINT, progress=False)


def test_without_a_reference_there_are_no_figures(demo_tokens, rounded):
    document = evaluate(rounded, demo_tokens.first(8), batch_size=8, progress=False)
    assert document["models"][0]["reference"] is None
    assert "agreement" not in summary(document)
