"""Beam search against T5X's own outputs, an obvious twin in Python, and all sequences there are."""

import itertools

import golden_data
import jax
import jax.numpy as jnp
import jitted
import numpy as np
import pytest
import toy_decoder
from factories import shortened
from markers import slow

import qmoe_jax
from qmoe_jax.generation.beam_search import beam_generate, beam_search, brevity_penalty
from qmoe_jax.generation.reference import next_token_logits
from qmoe_jax.generation.sampling import NEG_INF, greedy_generate

EVAL_FACTOR = {"base": 2.0, "xxl": 4.0, "c": 2.0}
EOS = 1


@pytest.mark.parametrize("model", ["base", "xxl", *slow("c")])
@pytest.mark.parametrize("case", ["std_f32", *slow("nodrop_f32")])
def test_t5x_s_own_beams(golden_checkpoint, model, case):
    golden = golden_data.load_golden(model)
    factor = EVAL_FACTOR[model] if case == "std_f32" else None
    module, variables = qmoe_jax.load_switch(
        golden_checkpoint(model, "t5x_float32"), expert_capacity_factor=factor
    )
    prompts = jnp.asarray(golden["batch/encoder_input_tokens"])
    expected = golden[f"{case}/decode/beam4"]
    length = expected.shape[-1]
    generated = beam_generate(module, variables, prompts, max_decode_length=length, beam_size=4)
    np.testing.assert_array_equal(generated.tokens, expected)
    expected_scores = golden[f"{case}/decode/beam4_scores"]
    np.testing.assert_allclose(generated.scores, expected_scores, atol=1e-4, rtol=1e-6)
    if case == "std_f32":  # gin's default of T5X: one beam
        one = beam_generate(module, variables, prompts, max_decode_length=length, beam_size=1)
        expected = golden[f"{case}/decode/predict_batch_default"]
        np.testing.assert_array_equal(one.tokens[:, 0], expected)


def slow_beam_search(log_probs_of, *, beam_size, length, alpha, eos_id=EOS):
    """One example, with lists: (finished, live), each [(score, tokens)], the best first.

    `log_probs_of(prefix)` gives the log probabilities of the next token as a list.
    """
    live, finished = [(0.0, ())], []
    for step in range(1, length + 1):
        candidates = [
            (score + log_prob, (*prefix, token))
            for score, prefix in live
            for token, log_prob in enumerate(log_probs_of(prefix))
        ]
        candidates.sort(key=lambda item: -item[0])
        candidates = candidates[: 2 * beam_size]
        penalty = ((5 + step) / 6) ** alpha
        finished += [
            (score / penalty, tokens) for score, tokens in candidates if tokens[-1] == eos_id
        ]
        finished = sorted(finished, key=lambda item: -item[0])[:beam_size]
        live = [item for item in candidates if item[1][-1] != eos_id][:beam_size]
        reachable = live[0][0] / ((5 + length + 1) / 6) ** alpha
        if len(finished) == beam_size and finished[-1][0] > reachable:
            break
    return finished, live


def best_first(tokens, scores, eos_id=EOS):
    """A row of the results as the reference gives it, without fillers."""
    rows = []
    for row, score in zip(np.asarray(tokens)[::-1], np.asarray(scores)[::-1], strict=True):
        if score > NEG_INF / 2:
            row = row.tolist()
            end = row.index(eos_id) + 1 if eos_id in row else len(row)
            assert not any(row[end:])
            rows.append((float(score), tuple(row[:end])))
    return rows


def run_toy(toy, batch, **keywords):
    rows = batch * keywords["beam_size"]
    search = jax.jit(lambda cache: beam_search(toy.step, cache, batch, **keywords))
    return search(toy.cache(rows, keywords["beam_size"]))


@pytest.mark.parametrize(
    ("beam_size", "length", "alpha", "eos_bias"),
    [
        (1, 5, 0.6, 0.0),
        (2, 7, 0.6, 1.0),
        (3, 9, 0.0, 0.5),
        (4, 12, 1.5, 2.0),
        (5, 1, 0.6, 0.0),
        (3, 6, 0.6, 9.0),  # eos first, nearly always
        (3, 6, 0.6, -30.0),  # never an eos: live beams are returned
    ],
)
def test_equals_the_slow_twin(beam_size, length, alpha, eos_bias):
    batch = 3
    toy = toy_decoder.ToyDecoder(vocab=7, seed=beam_size, eos_bias=eos_bias, examples=batch)
    tokens, scores = run_toy(
        toy, batch, beam_size=beam_size, max_decode_length=length, alpha=alpha, eos_id=EOS
    )
    assert tokens.shape == (batch, beam_size, length)
    assert np.all(np.diff(scores, axis=1) >= 0)
    for example in range(batch):
        finished, live = slow_beam_search(
            lambda prefix, example=example: toy.log_probs(example, prefix),
            beam_size=beam_size,
            length=length,
            alpha=alpha,
        )
        expected = finished or live
        found = best_first(tokens[example], scores[example])
        assert [row for _, row in found] == [row for _, row in expected]
        np.testing.assert_allclose(
            [score for score, _ in found], [score for score, _ in expected], atol=1e-4
        )
    if eos_bias == -30.0:
        assert not np.any(np.asarray(tokens) == EOS)
    if eos_bias == 9.0:
        assert np.all(np.asarray(tokens)[:, -1, 0] == EOS)


# A stronger penalty would lift the fillers of so many beams on so few tokens over real scores.
@pytest.mark.parametrize("alpha", [0.0, 0.6, 1.0])
def test_with_enough_beams_it_is_exhaustive(alpha):
    vocab, length = 4, 4
    toy = toy_decoder.ToyDecoder(vocab=vocab, seed=11, eos_bias=0.3, examples=1)
    tokens, scores = run_toy(
        toy, 1, beam_size=vocab**length, max_decode_length=length, alpha=alpha, eos_id=EOS
    )
    everything = []
    for size in range(1, length + 1):
        for body in itertools.product([t for t in range(vocab) if t != EOS], repeat=size - 1):
            sequence = (*body, EOS)
            log_prob = sum(
                toy.log_probs(0, sequence[:i])[token] for i, token in enumerate(sequence)
            )
            everything.append((log_prob / ((5 + size) / 6) ** alpha, sequence))
    everything.sort(key=lambda item: -item[0])
    found = best_first(tokens[0], scores[0])
    assert [row for _, row in found] == [row for _, row in everything]
    np.testing.assert_allclose(
        [score for score, _ in found], [score for score, _ in everything], atol=1e-4
    )


def test_the_whole_model_equals_a_search_that_recomputes_prefixes(golden_checkpoint):
    checkpoint = golden_checkpoint("base", "t5x_float32")
    module, variables = shortened(*qmoe_jax.load_switch(checkpoint), 2)
    prompts = jnp.asarray(golden_data.load_golden("base")["batch/encoder_input_tokens"][:2, :24])
    beam_size, length = 3, 6
    # A frequent token as eos, so that some beams end.
    eos_id = int(greedy_generate(module, variables, prompts, max_decode_length=3)[0, 2])
    generated = beam_generate(
        module,
        variables,
        prompts,
        max_decode_length=length,
        beam_size=beam_size,
        eos_id=eos_id,
    )
    encoded = jitted.apply(module, variables, prompts, enable_dropout=False, method="encode")
    logits_of = jax.jit(
        lambda encoded, prompt, prefix, position: next_token_logits(
            module, variables, encoded, prompt, prefix, position
        )
    )

    def log_probs_of(example, prefix):
        padded = np.zeros((1, length), np.int32)
        padded[0, : len(prefix)] = prefix
        row = np.s_[example : example + 1]
        logits = logits_of(encoded[row], prompts[row], padded, len(prefix))
        return np.asarray(jax.nn.log_softmax(logits[0])).tolist()

    for example in range(len(prompts)):
        finished, live = slow_beam_search(
            lambda prefix, example=example: log_probs_of(example, prefix),
            beam_size=beam_size,
            length=length,
            alpha=0.6,
            eos_id=eos_id,
        )
        expected = finished or live
        found = best_first(generated.tokens[example], generated.scores[example], eos_id)
        assert [row for _, row in found] == [row for _, row in expected]
        np.testing.assert_allclose(
            [score for score, _ in found], [score for score, _ in expected], atol=1e-3
        )
    assert np.any(np.asarray(generated.tokens) == eos_id)


def test_examples_do_not_depend_on_each_other():
    together = toy_decoder.ToyDecoder(vocab=6, seed=2, eos_bias=1.0, examples=4)
    keywords = {"beam_size": 3, "max_decode_length": 8, "alpha": 0.6}
    tokens, scores = run_toy(together, 4, **keywords)
    for example in range(4):
        alone = together.only(example)
        one_tokens, one_scores = run_toy(alone, 1, **keywords)
        np.testing.assert_array_equal(one_tokens[0], tokens[example])
        np.testing.assert_allclose(one_scores[0], scores[example], rtol=1e-6)


def test_too_many_beams_are_refused(golden_checkpoint):
    module, variables = qmoe_jax.load_switch(golden_checkpoint("base", "t5x_float32"))
    prompts = jnp.ones((1, 32), jnp.int32)
    with pytest.raises(ValueError, match="beam_size is 257, but the model has 512 embeddings"):
        beam_generate(module, variables, prompts, max_decode_length=4, beam_size=257)


def test_brevity_penalty():
    assert float(brevity_penalty(0.0, 7)) == 1.0
    assert float(brevity_penalty(1.0, 1)) == 1.0
    np.testing.assert_allclose(brevity_penalty(0.6, jnp.array([1, 13])), [1.0, 3**0.6], rtol=1e-6)


@pytest.mark.parametrize("seed", range(4))
def test_beside_t5x(seed):
    decoding = pytest.importorskip("t5x.decoding", reason="t5x is not installed")
    batch, beam_size, length = 3, 2 + seed, 10
    alpha = (0.0, 0.6, 1.0, 2.0)[seed]
    toy = toy_decoder.ToyDecoder(vocab=9, seed=seed, eos_bias=1.0, examples=batch)
    tokens, scores = run_toy(toy, batch, beam_size=beam_size, max_decode_length=length, alpha=alpha)
    expected_tokens, expected_scores = decoding.beam_search(
        jnp.zeros((batch, length), jnp.int32),
        toy.cache(batch, 1),
        lambda state: toy.step(state.cur_token, state.cache),
        EOS,
        num_decodes=beam_size,
        alpha=alpha,
    )
    np.testing.assert_array_equal(tokens, expected_tokens)
    np.testing.assert_allclose(scores, expected_scores, rtol=1e-6)
