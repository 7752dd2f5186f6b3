"""Sampling, greedy generation, streaming and batches of prompts."""

import functools

import jax
import jax.numpy as jnp
import jitted
import numpy as np
import pytest
import toy_decoder
from markers import slow

import qmoe_jax
from qmoe_jax.errors import CheckpointError, TokensError
from qmoe_jax.generation import beam_search, prompts, sampling, streaming
from qmoe_jax.generation.reference import greedy_generate_reference, next_token_logits
from qmoe_jax.generation.sampling import (
    NEG_INF,
    greedy_generate,
    sample_generate,
    sample_token,
    temperature_sample,
    top_k_mask,
    top_p_mask,
)
from qmoe_jax.generation.settings import GenerationSettings

EOS = 1
LENGTH = 6


@pytest.fixture(scope="module")
def model():
    """A random one, sparse and dense in the decoder: compiling takes the time of these tests."""
    config = qmoe_jax.SwitchConfig(
        num_embeddings=512,
        embed_dim=16,
        mlp_dim=24,
        expert_mlp_dim=24,
        num_heads=2,
        head_dim=4,
        num_experts=4,
        num_encoder_layers=1,
        num_decoder_layers=2,
        encoder_sparse_layers=(0,),
        decoder_sparse_layers=(1,),
        eval_capacity_factor=None,
    )
    module = qmoe_jax.SwitchTransformer(config)
    ones = jnp.ones((1, 2), jnp.int32)
    init = jax.jit(lambda key: module.init(key, ones, ones, ones, enable_dropout=False))
    return module, {"params": init(jax.random.key(1))["params"]}


@pytest.fixture(scope="module")
def inputs():
    return jnp.asarray(np.random.default_rng(0).integers(3, 500, (2, 32)), jnp.int32)


def numpy_top_k(logits, k):
    """Keeps what is at least the k-th largest."""
    least = np.sort(logits, axis=-1)[:, -min(k, logits.shape[-1])]
    return np.where(logits >= least[:, None], logits, np.float32(NEG_INF))


def numpy_top_p(logits, p):
    """Takes tokens, the most probable first and ties together, until they hold p."""
    masked = np.full_like(logits, NEG_INF)
    exponentials = np.exp(logits.astype(np.float64) - logits.max(axis=-1, keepdims=True))
    probabilities = exponentials / exponentials.sum(axis=-1, keepdims=True)
    for row, probability in enumerate(probabilities):
        held = 0.0
        for value in sorted(set(logits[row].tolist()), reverse=True):
            same = logits[row] == value
            masked[row, same] = logits[row, same]
            held += probability[same].sum()
            if held >= p:
                break
    return masked


class TestMasks:
    @pytest.mark.parametrize("shape", [(1, 1), (3, 7), (2, 129)])
    def test_top_k_equals_the_numpy_twin(self, shape):
        rng = np.random.default_rng(shape[1])
        logits = rng.normal(size=shape).astype(np.float32)
        ties = rng.integers(-2, 3, size=shape).astype(np.float32)
        mask = jax.jit(top_k_mask)
        for case in (logits, ties, -ties * 0.0):
            for k in (1, 2, shape[1], shape[1] + 5):
                np.testing.assert_array_equal(mask(case, k), numpy_top_k(case, k))

    @pytest.mark.parametrize("shape", [(1, 1), (3, 7), (2, 129)])
    def test_top_p_equals_the_numpy_twin(self, shape):
        rng = np.random.default_rng(shape[1])
        logits = (3 * rng.normal(size=shape)).astype(np.float32)
        ties = rng.integers(-2, 3, size=shape).astype(np.float32)
        mask = jax.jit(top_p_mask)
        for case in (logits, ties):
            for p in (1e-6, 0.123, 0.5, 0.9, 0.98):
                np.testing.assert_array_equal(mask(case, p), numpy_top_p(case, p))

    def test_top_p_of_one_keeps_all_that_counts(self):
        logits = np.float32([[0.0, -1.0, -2.0, -50.0]])
        masked = np.asarray(jax.jit(top_p_mask)(logits, 1.0))
        np.testing.assert_array_equal(masked[:, :3], logits[:, :3])


class TestSampleToken:
    def counts(self, draws=20_000, **keywords):
        """Frequencies of tokens with known probabilities, drawn in one call."""
        probabilities = np.float32([0.4, 0.3, 0.15, 0.1, 0.05])
        logits = jnp.tile(jnp.log(probabilities), (draws, 1))
        tokens, log_probs = sample_token(logits, jax.random.key(5), **keywords)
        return probabilities, np.bincount(tokens, minlength=5), np.asarray(log_probs), tokens

    @staticmethod
    def chi_square(counts, probabilities):
        expected = probabilities / probabilities.sum() * counts.sum()
        possible = expected > 0
        assert counts[~possible].sum() == 0
        return np.sum((counts[possible] - expected[possible]) ** 2 / expected[possible])

    @pytest.mark.parametrize(
        ("keywords", "weights"),
        [
            ({"temperature": 1.0}, lambda p: p),
            ({"temperature": 0.5}, lambda p: p**2),
            ({"temperature": 2.0}, lambda p: p**0.5),
            ({"temperature": 1.0, "top_k": 2}, lambda p: p * [1, 1, 0, 0, 0]),
            ({"temperature": 1.0, "top_p": 0.8}, lambda p: p * [1, 1, 1, 0, 0]),
            # top_k first: 0.4 and 0.3 of 0.85 hold 0.8.
            ({"temperature": 1.0, "top_k": 3, "top_p": 0.8}, lambda p: p * [1, 1, 0, 0, 0]),
        ],
    )
    def test_the_distribution(self, keywords, weights):
        probabilities, counts, log_probs, tokens = self.counts(**keywords)
        expected = weights(probabilities.astype(np.float64))
        # The 99.9th percentile of chi square with 4 degrees of freedom is 18.5.
        assert self.chi_square(counts, expected) < 18.5
        normalised = expected / expected.sum()
        np.testing.assert_allclose(log_probs, np.log(normalised[tokens]), atol=1e-5)

    def test_the_test_would_notice_another_distribution(self):
        probabilities, counts, _, _ = self.counts(temperature=1.0)
        assert self.chi_square(counts, probabilities**1.1) > 18.5

    def test_own_log_probs(self):
        probabilities, _, log_probs, tokens = self.counts(
            draws=50, temperature=0.7, top_k=2, rescale_log_probs=False
        )
        np.testing.assert_allclose(log_probs, np.log(probabilities[tokens]), atol=1e-5)

    def test_temperature_zero_is_greedy(self):
        logits = jnp.asarray([[1.0, 3.0, 3.0], [0.0, -1.0, -2.0]])
        tokens, log_probs = sample_token(logits, jax.random.key(0), temperature=0.0)
        assert tokens.tolist() == [1, 0]  # the lowest id on ties
        assert log_probs.tolist() == [0.0, 0.0]
        _, own = sample_token(logits, jax.random.key(0), temperature=0.0, rescale_log_probs=False)
        np.testing.assert_allclose(own, np.max(jax.nn.log_softmax(logits), axis=1), rtol=1e-6)


def run_toy(toy, rows, num_decodes=1, seed=0, **keywords):
    sample = jax.jit(
        lambda cache, key: temperature_sample(toy.step, cache, rows, key, eos_id=EOS, **keywords)
    )
    return sample(toy.cache(rows, num_decodes), jax.random.key(seed))


class TestTemperatureSample:
    def test_scores_are_the_sums_of_the_model_s_log_probs(self):
        toy = toy_decoder.ToyDecoder(vocab=8, seed=0, eos_bias=1.0, examples=6)
        tokens, scores = run_toy(
            toy, 6, max_decode_length=9, temperature=1.0, rescale_log_probs=False
        )
        assert len({tuple(row) for row in tokens.tolist()}) > 1
        ended = 0
        for example, row in enumerate(tokens.tolist()):
            end = row.index(EOS) + 1 if EOS in row else len(row)
            assert not any(row[end:])
            ended += EOS in row
            expected = sum(toy.log_probs(example, row[:i])[row[i]] for i in range(end))
            assert float(scores[example]) == pytest.approx(expected, abs=1e-4)
        assert ended > 0

    @pytest.mark.parametrize("length", [1, 5])
    def test_eos_first(self, length):
        toy = toy_decoder.ToyDecoder(vocab=8, seed=0, eos_bias=50.0, examples=3)
        tokens, scores = run_toy(
            toy, 3, max_decode_length=length, temperature=0.0, rescale_log_probs=False
        )
        assert tokens.tolist() == [[EOS, *[0] * (length - 1)]] * 3
        np.testing.assert_allclose(scores, 0.0, atol=1e-5)

    @pytest.mark.parametrize("seed", range(5))
    def test_beside_t5x(self, seed):
        decoding = pytest.importorskip("t5x.decoding", reason="t5x is not installed")
        batch, num_decodes, length = 3, 4, 10
        how = (
            {"temperature": 1.0, "topk": 0},
            {"temperature": 0.7, "topk": 3},
            {"temperature": 1.3, "topk": 0, "topp": 0.8},
            {"temperature": 0.0, "topk": 0},
            {"temperature": 1.0, "topk": 4, "rescale_log_probs": False},
        )[seed]
        toy = toy_decoder.ToyDecoder(vocab=9, seed=seed, eos_bias=1.0, examples=batch)
        ours = {name.replace("top", "top_"): value for name, value in how.items()}
        tokens, scores = run_toy(
            toy, batch * num_decodes, num_decodes, seed, max_decode_length=length, **ours
        )
        expected, expected_scores = decoding.temperature_sample(
            jnp.zeros((batch, length), jnp.int32),
            toy.cache(batch, 1),
            lambda state: toy.step(state.cur_token, state.cache),
            EOS,
            decode_rng=jax.random.key(seed),
            num_decodes=num_decodes,
            **how,
        )
        ascending = jnp.argsort(scores.reshape(batch, num_decodes), axis=-1)
        tokens = tokens.reshape(batch, num_decodes, length)
        np.testing.assert_array_equal(
            jnp.take_along_axis(tokens, ascending[..., None], axis=1), expected
        )
        np.testing.assert_allclose(
            np.sort(scores.reshape(batch, num_decodes)), expected_scores, rtol=1e-5, atol=1e-6
        )


class TestWholeModel:
    def test_greedy_equals_the_loop_that_recomputes(self, model, inputs):
        generated = greedy_generate(*model, inputs, max_decode_length=LENGTH)
        slow = greedy_generate_reference(*model, inputs, max_decode_length=LENGTH)
        np.testing.assert_array_equal(generated, slow)
        # A token that comes up as eos: the row ends, in both.
        eos_id = int(generated[0, 2])
        ended = greedy_generate(*model, inputs, max_decode_length=LENGTH, eos_id=eos_id)
        slow = greedy_generate_reference(*model, inputs, max_decode_length=LENGTH, eos_id=eos_id)
        np.testing.assert_array_equal(ended, slow)
        assert eos_id in ended[0].tolist()
        assert ended[0, -1] == 0

    def test_samples(self, model, inputs):
        def sample(seed):
            return sample_generate(
                *model,
                inputs,
                jax.random.key(seed),
                max_decode_length=LENGTH,
                num_decodes=3,
                temperature=0.8,
                top_k=20,
                rescale_log_probs=False,
            )

        generated, again, other = sample(0), sample(0), sample(1)
        np.testing.assert_array_equal(generated.tokens, again.tokens)
        np.testing.assert_array_equal(generated.scores, again.scores)
        assert not np.array_equal(generated.tokens, other.tokens)
        assert generated.tokens.shape == (2, 3, LENGTH)
        assert np.all(np.diff(generated.scores, axis=1) >= 0)
        # Scores of the best of each example, token by token through the reference.
        module, variables = model
        encoded = jitted.apply(module, variables, inputs, enable_dropout=False, method="encode")
        best = generated.tokens[:, -1]
        total = np.zeros(2)
        logits_of = jax.jit(functools.partial(next_token_logits, module))
        for i in range(LENGTH):
            logits = logits_of(variables, encoded, inputs, best, i)
            allowed = numpy_top_k(np.asarray(logits), 20) > NEG_INF / 2
            for row in range(2):
                token = int(best[row, i])
                if i == 0 or best[row, i - 1] not in (0, EOS):
                    assert allowed[row, token]
                    total[row] += jax.nn.log_softmax(logits[row])[token]
        np.testing.assert_allclose(generated.scores[:, -1], total, atol=1e-3)

    @pytest.mark.parametrize("how", [{}, {"temperature": 0.9, "top_k": 50, "top_p": 0.9}])
    def test_streamed_tokens_are_the_generated_ones(self, model, inputs, how):
        key = jax.random.key(3)
        generated = sample_generate(
            *model, inputs, key, max_decode_length=LENGTH, **{"temperature": 0.0, **how}
        ).tokens[:, 0]
        before = streaming._stream_step._cache_size()
        streamed = list(
            streaming.stream_tokens(*model, inputs, key, max_decode_length=LENGTH, **how)
        )
        assert streaming._stream_step._cache_size() <= before + 1
        np.testing.assert_array_equal(np.stack(streamed, axis=1), generated[:, : len(streamed)])
        assert not np.any(generated[:, len(streamed) :])
        # The key is not used up by donation.
        jax.random.split(key)

    def test_a_stream_stops_when_all_have_ended(self, model, inputs):
        first = greedy_generate(*model, inputs[:1], max_decode_length=LENGTH)[0]
        eos_id = int(first[1])
        position = first.tolist().index(eos_id)
        streamed = list(
            streaming.stream_tokens(*model, inputs[:1], max_decode_length=LENGTH, eos_id=eos_id)
        )
        assert len(streamed) == position + 1

    def test_how_to_sample_is_no_constant_of_the_program(self, model, inputs):
        before = sample_generate._cache_size()
        for how in ({"temperature": 0.7}, {"top_k": 5}, {"top_p": 0.5}, {"temperature": 0.0}):
            how = {"temperature": 1.0, "top_k": 0, "top_p": 0.0, **how}
            sample_generate(*model, inputs, jax.random.key(0), max_decode_length=LENGTH, **how)
        assert sample_generate._cache_size() <= before + 1


class TestBatches:
    def prompt_ids(self, lengths):
        rng = np.random.default_rng(0)
        return [[*rng.integers(3, 500, n - 1).tolist(), EOS] for n in lengths]

    def test_padded_length(self):
        lengths = [prompts.padded_length(n, 100) for n in (1, 32, 33, 64, 65, 100)]
        assert lengths == [32, 32, 64, 64, 100, 100]
        assert prompts.padded_length(5, 16) == 16

    def test_every_prompt_is_in_one_batch(self):
        ids = self.prompt_ids([40, 3, 7, 33, 5, 32, 90])
        batches = prompts.plan_batches(ids, GenerationSettings(batch_size=2))
        assert batches == [(1, 2), (4, 5), (0, 3), (6,)]
        assert prompts.plan_batches([], GenerationSettings()) == []

    def test_padding_repeats_the_first_prompt(self):
        tokens = prompts.pad_prompts([[5, 1], [6, 7, 1]], 4, 512)
        assert tokens.shape == (4, 32)
        assert tokens[:, :4].tolist() == [[5, 1, 0, 0], [6, 7, 1, 0], [5, 1, 0, 0], [5, 1, 0, 0]]

    @pytest.mark.parametrize("method", ["greedy", *slow("sample", "beam")])
    def test_one_compilation_per_padded_length(self, model, method):
        settings = GenerationSettings(
            method=method, batch_size=2, max_decode_length=3, num_decodes=1, beam_size=2
        )
        compiled = {
            "beam": beam_search.beam_generate,
            "greedy": sampling.sample_generate,
            "sample": sampling.sample_generate,
        }[method]
        compiled.clear_cache()
        ids = self.prompt_ids([3, 9, 17, 31, 32, 40, 64, 5, 11])
        answered = list(prompts.generate_batches(*model, ids, settings))
        assert compiled._cache_size() == 2  # 32 and 64
        compiled_there = [batch.compile_seconds > 0 for batch in answered]
        assert compiled_there == [True, False, False, False, True]
        assert all(batch.seconds > 0 for batch in answered)
        assert sorted(i for batch in answered for i in batch.indices) == list(range(9))

    def test_answers_do_not_depend_on_batch_and_padding(self, model):
        ids = self.prompt_ids([17, 17, 17])
        settings = GenerationSettings(max_decode_length=LENGTH, batch_size=2)
        together = [a for b in prompts.generate_batches(*model, ids, settings) for a in b.answers]
        for prompt, answers in zip(ids, together, strict=True):
            tokens = jnp.asarray([prompt])  # not padded at all
            alone = sample_generate(
                *model,
                tokens,
                jax.random.key(0),
                max_decode_length=LENGTH,
                temperature=0.0,
                rescale_log_probs=False,
            )
            row = alone.tokens[0, 0].tolist()
            assert answers[0].tokens == tuple(row[: len(answers[0].tokens)])
            assert answers[0].score == pytest.approx(float(alone.scores[0, 0]), abs=1e-3)
            streamed = prompts.stream_prompt(*model, prompt, settings)
            assert tuple(streamed) == answers[0].tokens

    def test_skipped_batches_change_nothing(self, model):
        ids = self.prompt_ids([3, 9, 17])
        settings = GenerationSettings(
            method="sample", max_decode_length=3, batch_size=1, num_decodes=2, top_p=0.9
        )
        everything = list(prompts.generate_batches(*model, ids, settings))
        rest = list(prompts.generate_batches(*model, ids, settings, skip={0}))
        assert [batch.answers for batch in rest] == [batch.answers for batch in everything[1:]]
        assert all(len(answers) == 2 for batch in everything for answers in batch.answers)
        assert list(prompts.generate_batches(*model, [], settings)) == []

    def test_beam_search_s_fillers_are_left_out(self):
        generated = prompts.Generated(
            np.int32([[[0, 0, 0], [7, 1, 0], [5, 6, 1]]]), np.float32([[-1e7, -2.0, -1.0]])
        )
        (answers,) = prompts.answers_of(generated, 1, 3, EOS)
        assert answers == (prompts.Answer((5, 6, 1), -1.0), prompts.Answer((7, 1), -2.0))

    def test_scores_that_are_not_finite_are_refused(self):
        generated = prompts.Generated(np.int32([[[5, 1]]]), np.float32([[np.nan]]))
        with pytest.raises(CheckpointError, match="scores are not finite"):
            prompts.answers_of(generated, 1, 1, EOS)

    def test_a_long_prompt_is_refused_before_anything_runs(self, model):
        ids = self.prompt_ids([3, 70])
        settings = GenerationSettings(max_input_length=64)
        with pytest.raises(TokensError, match="prompt 2 has 70 tokens .* max_input_length is 64"):
            next(prompts.generate_batches(*model, ids, settings))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "beem"}, "method is 'beem'; give one of greedy, beam, sample"),
        ({"num_decodes": 2}, "greedy generation has one answer"),
        ({"method": "beam", "num_decodes": 5}, "beam_size 4"),
        ({"method": "sample", "num_decodes": 0}, "num_decodes is 0"),
        ({"top_p": 1.5}, r"top_p is 1.5; give a number in \[0, 1\]"),
        ({"temperature": -0.1}, "temperature is -0.1; give a number of at least 0"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"alpha": float("inf")}, "alpha is inf"),
        ({"top_k": -1}, "top_k is -1"),
        ({"seed": 2**40}, "seed is"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"max_decode_length": 0}, "max_decode_length is 0"),
        ({"max_input_length": 0}, "max_input_length is 0"),
        ({"beam_size": True}, "beam_size is True"),
    ],
)
def test_bad_settings(changes, message):
    with pytest.raises(ValueError, match=message):
        GenerationSettings(**changes)


def test_what_cannot_be_streamed():
    with pytest.raises(ValueError, match="cannot be streamed"):
        GenerationSettings(method="beam").check_streamable()
    with pytest.raises(ValueError, match="one answer at a time"):
        GenerationSettings(method="sample", num_decodes=2).check_streamable()
