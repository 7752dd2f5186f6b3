"""Losses per example, and the paired comparison of two models."""

import jax.numpy as jnp
import numpy as np
import pytest

from qmoe_jax.evaluation.metrics import (
    LossReport,
    batch_sums,
    cross_entropy,
    worse_than_guessing,
)


def test_cross_entropy_equals_numpy():
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(3, 5, 11)).astype(np.float32) * 4
    targets = rng.integers(0, 11, (3, 5))
    p = np.exp(logits.astype(np.float64))
    p /= p.sum(-1, keepdims=True)
    expected = -np.log(np.take_along_axis(p, targets[..., None], -1)[..., 0])
    np.testing.assert_allclose(
        cross_entropy(jnp.asarray(logits), jnp.asarray(targets)), expected, rtol=1e-5
    )


def test_batch_sums_leave_out_what_has_no_weight():
    logits = np.zeros((2, 3, 4), np.float32)
    logits[0, 0, 2] = 9.0
    targets = np.array([[2, 1, 3], [1, 1, 1]])
    weights = np.array([[1, 1, 0], [0, 0, 0]])
    losses, tokens, correct = batch_sums(
        jnp.asarray(logits), jnp.asarray(targets), jnp.asarray(weights)
    )
    assert tokens.tolist() == [2, 0]
    assert correct.tolist() == [1, 0]
    assert losses[1] == 0
    expected = np.log(np.exp(9) + 3) - 9 + np.log(4)
    assert float(losses[0]) == pytest.approx(expected, rel=1e-5)


def report(losses, tokens):
    losses, tokens = np.asarray(losses, np.float64), np.asarray(tokens, np.int64)
    return LossReport(losses, tokens, np.zeros_like(tokens))


def test_gap_is_paired():
    rng = np.random.default_rng(1)
    tokens = rng.integers(5, 30, 400)
    base = tokens * rng.normal(3, 1, 400)
    # A constant per-token gap has no spread, however much the losses themselves vary.
    gap, error = report(base + 0.25 * tokens, tokens).gap_to(report(base, tokens))
    assert gap == pytest.approx(0.25)
    assert error == pytest.approx(0.0, abs=1e-9)
    # With equal lengths it is the standard error of the mean of the differences.
    tokens = np.full(400, 10)
    difference = rng.normal(0.3, 2.0, 400)
    gap, error = report(base + difference, tokens).gap_to(report(base, tokens))
    assert gap == pytest.approx(difference.mean() / 10)
    assert error == pytest.approx(difference.std(ddof=1) / np.sqrt(400) / 10)


def test_gap_refuses_other_examples():
    with pytest.raises(ValueError, match="same token file"):
        report([1.0], [3]).gap_to(report([1.0], [4]))


def test_a_loss_worse_than_guessing_is_remarked_on():
    assert worse_than_guessing(8.0, 3200, 512, 114) is None
    warning = worse_than_guessing(9.42, 3200, 512, 114)
    assert "9.42 is worse than guessing, ln(3200) = 8.07" in warning
    assert "512 input, 114 target positions" in warning


def test_both_commands_say_so(base, tmp_path):
    """A random model, scaled to be sure of wrong answers, on random text."""
    from factories import CALIBRATION, TERNARY

    import qmoe_jax
    from qmoe_jax.evaluation.evaluate import evaluate
    from qmoe_jax.evaluation.tables import summary

    document = evaluate(base, CALIBRATION[:8], batch_size=8, progress=False)
    loss = document["models"][0]["loss"]
    assert (loss > np.log(512)) == bool(document["models"][0]["warnings"])
    document["models"][0]["warnings"] = ["something is wrong"]
    assert summary(document).endswith("warning: checkpoint_500100: something is wrong")
    options = TERNARY | {"method": "rtn", "validation_tokens": CALIBRATION[:8]}
    report = qmoe_jax.compress(base, tmp_path / "out", CALIBRATION[:8], **options)
    assert (report.validation.loss > np.log(512)) == any("guessing" in w for w in report.warnings())
