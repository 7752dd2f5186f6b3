"""Generation ends when all blanks are filled, with the answers that it would have had anyway."""

import dataclasses

import golden_data
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qmoe_jax.generation import prompts as prompts_module
from qmoe_jax.generation.blanks import blanks_of, fill, until_filled
from qmoe_jax.generation.prompts import generate_batches, stream_prompt
from qmoe_jax.generation.settings import GenerationSettings
from qmoe_jax.generation.text import encode_prompts, fill_blanks
from qmoe_jax.models.load import load_switch

pytest.importorskip("sentencepiece")

# <extra_id_0> is the highest id.
SENTINELS = (19, 18, 17, 16)
TEXTS = (
    "Returns the <extra_id_0> of the array elements over a given <extra_id_1>.",
    "Compute the <extra_id_0> product of two <extra_id_1>.",
    "Raises an <extra_id_0>.",
    "Return the <extra_id_3> array.",
    "No blank in this one.",
)


class TestRule:
    @pytest.mark.parametrize(
        ("prompt", "tokens", "length"),
        [
            ([5, 19, 6], [19, 7, 8, 18, 9], 4),
            ([5, 19, 6, 18], [19, 7, 18, 8, 17, 9], 5),
            ([19, 18], [18, 7, 19, 8, 18, 9], 5),  # in any order; any sentinel ends a span
            ([19], [19, 7, 19, 8], 3),  # its own too: the first span counts
            ([19], [7, 18, 8, 19, 9, 16], 6),  # spans of other blanks are none of this
            ([19], [19, 7, 8, 9], 4),  # never closed
            ([19], [18, 7, 17, 8], 4),  # never filled
            ([5, 6], [19, 7, 18, 8], 4),  # no blank: eos alone ends it
            ([19, 19], [19, 7, 18], 3),  # a blank that stands twice
            ([19], [], 0),
        ],
    )
    def test_where_an_answer_ends(self, prompt, tokens, length):
        assert len(until_filled(tokens, prompt, SENTINELS)) == length

    @settings(max_examples=200)
    @given(
        st.lists(st.lists(st.integers(10, 19), min_size=1, max_size=4), min_size=1, max_size=4),
        st.integers(0, 2**32 - 1),
    )
    def test_devices_do_as_the_host(self, given_prompts, seed):
        padded = np.zeros((len(given_prompts), 4), np.int32)
        for row, prompt in enumerate(given_prompts):
            padded[row, : len(prompt)] = prompt
        tokens = np.random.default_rng(seed).integers(12, 20, (len(padded), 12))
        blanks = blanks_of(padded, SENTINELS)
        ends = np.full(len(padded), tokens.shape[1])
        for position in range(tokens.shape[1]):
            blanks, filled = fill(blanks, jnp.asarray(tokens[:, position], jnp.int32))
            first = np.asarray(filled) & (ends == tokens.shape[1])
            ends[first] = position + 1
        for row, prompt in enumerate(given_prompts):
            assert len(until_filled(tokens[row].tolist(), prompt, SENTINELS)) == ends[row]

    @settings(max_examples=300)
    @given(
        st.lists(st.sampled_from(["<0>", "<1>", "<2>", "a", "b"]), min_size=1, max_size=6),
        st.lists(st.sampled_from(["<0>", "<1>", "<2>", "<3>", "a", "b"]), max_size=10),
    )
    def test_what_comes_after_it_changes_no_text(self, prompt, generated):
        ids = {"<0>": 19, "<1>": 18, "<2>": 17, "<3>": 16, "a": 5, "b": 6}

        def text(words):
            return " ".join(words).replace("<", "<extra_id_")

        end = len(until_filled([ids[w] for w in generated], [ids[w] for w in prompt], SENTINELS))
        whole = fill_blanks(text(prompt), text(generated))
        assert fill_blanks(text(prompt), text(generated[:end])) == whole


@pytest.fixture(scope="module")
def demo():
    from qmoe_jax.generation.text import Vocabulary

    vocabulary = Vocabulary(golden_data.DEMO / "sentencepiece.model")
    module, variables = load_switch(golden_data.DEMO / "checkpoint_4200")
    return module, variables, vocabulary, encode_prompts(vocabulary, TEXTS)


def answers(demo, how):
    module, variables, vocabulary, ids = demo
    batches = generate_batches(
        module, variables, ids, how, eos_id=vocabulary.eos_id, sentinels=vocabulary.sentinel_ids
    )
    return {
        i: best_first
        for batch in batches
        for i, best_first in zip(batch.indices, batch.answers, strict=True)
    }


@pytest.mark.parametrize(
    "method", [{"method": "greedy"}, {"method": "sample", "seed": 3, "top_p": 0.9}]
)
def test_answers_are_those_without_it(demo, method):
    module, variables, vocabulary, ids = demo
    how = GenerationSettings(max_decode_length=24, batch_size=3, **method)
    stopped = answers(demo, how)
    whole = answers(demo, dataclasses.replace(how, stop_when_filled=False))
    shorter = 0
    for i, (answer,) in stopped.items():
        full = whole[i][0].tokens
        assert answer.tokens == until_filled(full, ids[i], vocabulary.sentinel_ids)
        texts = [vocabulary.decode(tokens) for tokens in (answer.tokens, full)]
        assert fill_blanks(TEXTS[i], texts[0]) == fill_blanks(TEXTS[i], texts[1])
        shorter += len(answer.tokens) < len(full)
    assert shorter >= 2
    # Streaming, a prompt at a time, ends there too.
    alone = dataclasses.replace(how, batch_size=1)
    expected = answers(demo, alone)
    for i in (0, 4):
        streamed = stream_prompt(
            module,
            variables,
            ids[i],
            alone,
            number=i,
            eos_id=vocabulary.eos_id,
            sentinels=vocabulary.sentinel_ids,
        )
        assert tuple(streamed) == expected[i][0].tokens


@pytest.mark.parametrize(
    "how",
    [
        {"method": "beam", "beam_size": 2},
        {"method": "beam", "beam_size": 2, "num_decodes": 2},
        {"method": "sample", "num_decodes": 2},
        {"stop_when_filled": False},
        {"capacity": 2.0},
        {"sentinels": ()},
    ],
    ids=str,
)
def test_where_it_would_change_answers_it_is_off(demo, how):
    """What ranks answers is all of what was generated; rows that ended leave others room."""
    module, _, vocabulary, _ = demo
    how = dict(how)
    sentinels = how.pop("sentinels", vocabulary.sentinel_ids)
    config = dataclasses.replace(module.config, eval_capacity_factor=how.pop("capacity", None))
    module = dataclasses.replace(module, config=config)
    tokens = np.array([[4067, 5, 1]])
    assert prompts_module._blanks(module, GenerationSettings(**how), tokens, sentinels) is None


def test_it_is_no_constant_of_the_program(demo):
    """Other blanks, another number of them: the same compiled program."""
    from qmoe_jax.generation.sampling import sample_generate

    before = None
    module, variables, vocabulary, ids = demo
    for prompt in ids[:4]:
        how = GenerationSettings(max_decode_length=4, batch_size=1)
        list(generate_batches(module, variables, [prompt], how, sentinels=vocabulary.sentinel_ids))
        before = before or sample_generate._cache_size()
    assert sample_generate._cache_size() == before
    assert jax.tree.structure(blanks_of(np.zeros((1, 2), np.int32), SENTINELS)).num_leaves == 3
