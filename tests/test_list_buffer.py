"""The host buffer of hidden states, sample batches and dispatch, against loops."""

import numpy as np
import pytest

from qmoe_jax.calibration.dispatch import dispatch_tokens
from qmoe_jax.calibration.list_buffer import ListBuffer
from qmoe_jax.calibration.sample_batches import plan_sample_batches


@pytest.mark.parametrize("mapped", [False, True])
class TestListBuffer:
    def make(self, mapped, tmp_path, lengths, dim=3):
        path = tmp_path / "rows.bin" if mapped else None
        return ListBuffer(np.array(lengths, np.int64), dim, path=path)

    def test_padded_and_store_are_inverse(self, mapped, tmp_path):
        buffer = self.make(mapped, tmp_path, [2, 5, 1, 4])
        rng = np.random.default_rng(0)
        buffer.rows[:] = rng.normal(size=buffer.rows.shape)
        before = buffer.rows.copy()
        samples = np.array([3, 1])
        batch = buffer.padded(samples, length=6, batch_size=4)
        assert batch.shape == (4, 6, 3)
        np.testing.assert_array_equal(batch[0, :4], before[8:12])
        np.testing.assert_array_equal(batch[1, :5], before[2:7])
        assert not batch[0, 4:].any()
        assert not batch[2:].any()
        buffer.store(samples, batch + 1)
        expected = before.copy()
        expected[8:12] += 1
        expected[2:7] += 1
        np.testing.assert_array_equal(buffer.rows, expected)

    def test_no_samples(self, mapped, tmp_path):
        buffer = self.make(mapped, tmp_path, [])
        assert len(buffer) == 0
        assert buffer.padded(np.array([], int), 4, 2).shape == (2, 4, 3)

    def test_refuses_a_sample_that_does_not_fit(self, mapped, tmp_path):
        buffer = self.make(mapped, tmp_path, [2, 5])
        with pytest.raises(ValueError, match="5 rows does not fit length 4"):
            buffer.padded(np.array([1]), 4, 1)


def test_sample_batches_cover_every_sample_once():
    rng = np.random.default_rng(2)
    for _ in range(20):
        count, batch_size = rng.integers(1, 40), rng.integers(1, 9)
        encoder, decoder = rng.integers(1, 200, count), rng.integers(1, 90, count)
        batches = list(
            plan_sample_batches(
                encoder,
                decoder,
                batch_size=int(batch_size),
                full_encoder_length=200,
                full_decoder_length=90,
                first_sample=7,
            )
        )
        seen = np.concatenate([batch.samples for batch in batches])
        np.testing.assert_array_equal(np.sort(seen), np.arange(count) + 7)
        for batch in batches:
            assert len(batch.samples) <= batch.batch_size == batch_size
            assert encoder[batch.samples - 7].max() <= batch.encoder_length <= 200
            assert decoder[batch.samples - 7].max() <= batch.decoder_length <= 90


def test_dispatch_equals_a_loop():
    rng = np.random.default_rng(3)
    for _ in range(30):
        tokens, experts = int(rng.integers(1, 80)), int(rng.integers(1, 9))
        index = rng.integers(0, experts, tokens).astype(np.int32)
        usable = rng.random(tokens) < 0.7
        factor = float(rng.choice([0.5, 1.0, 4.0]))
        dispatch = dispatch_tokens(index, usable, num_experts=experts, max_tokens_factor=factor)
        cap = max(1, int(factor * usable.sum() / experts))
        assert dispatch.max_hessian_tokens == cap
        for expert in range(experts):
            mine = [t for t in range(tokens) if index[t] == expert]
            np.testing.assert_array_equal(dispatch.tokens_of(expert), mine)
            eligible = [t for t in mine if usable[t]][:cap]
            np.testing.assert_array_equal(dispatch.hessian_tokens_of(expert), eligible)


def test_dispatch_without_any_eligible_token():
    dispatch = dispatch_tokens(
        np.array([1, 1], np.int32), np.zeros(2, bool), num_experts=3, max_tokens_factor=4.0
    )
    assert [len(dispatch.hessian_tokens_of(e)) for e in range(3)] == [0, 0, 0]
    assert [len(dispatch.tokens_of(e)) for e in range(3)] == [0, 2, 0]
