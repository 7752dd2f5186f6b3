"""Span corruption: against its reference, lossless, and with the statistics of T5."""

import itertools

import numpy as np
import pytest
from golden_data import DEMO
from hypothesis import given, settings
from hypothesis import strategies as st

from qmoe_jax.calibration import span_corruption

TOP = 4067
COUNT = 100
EOS = 1


@pytest.fixture(scope="module")
def tf():
    return pytest.importorskip("tensorflow")


@pytest.fixture(scope="module")
def features():
    seqio = pytest.importorskip("seqio")
    vocabulary = seqio.SentencePieceVocabulary(str(DEMO / "sentencepiece.model"))
    return {key: seqio.Feature(vocabulary=vocabulary) for key in ("inputs", "targets")}


def run(protocol, features, documents, inputs_length, targets_length, seed=3, **options):
    """The examples of a protocol for token lists, as a list of (inputs, targets)."""
    import seqio
    import tensorflow as tf

    lengths = {"inputs": inputs_length, "targets": targets_length}
    dataset = tf.data.Dataset.from_generator(
        lambda: ({"targets": np.array(document, np.int32)} for document in documents),
        output_signature={"targets": tf.TensorSpec([None], tf.int32)},
    )
    with seqio.map_seed_manager(seed):
        dataset = protocol(dataset, lengths, features, **options)
    return [(one["inputs"], one["targets"]) for one in dataset.as_numpy_iterator()]


def merge(inputs, targets):
    """The tokens that were corrupted: each sentinel of the inputs replaced by its span."""
    spans = {}
    for token in targets.tolist():
        if token > TOP - COUNT:
            current = spans.setdefault(token, [])
        else:
            current.append(token)
    return list(
        itertools.chain.from_iterable(
            spans[token] if token > TOP - COUNT else [token] for token in inputs.tolist()
        )
    )


def sentinels(tokens):
    return [token for token in tokens.tolist() if token > TOP - COUNT]


def documents_of(lengths, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(3, TOP - COUNT, length).tolist() for length in lengths]


def test_reference_by_hand():
    tokens = np.array([10, 11, 12, 13, 14, 15], np.int32)
    mask = np.array([False, True, True, False, False, True])
    inputs, targets = span_corruption.corrupt_reference(tokens, mask, TOP)
    assert inputs.tolist() == [10, 4067, 13, 14, 4066]
    assert targets.tolist() == [4067, 11, 12, 4066, 15]


@settings(max_examples=200, deadline=None)
@given(st.lists(st.booleans(), min_size=1, max_size=60))
def test_corrupt_equals_reference_and_loses_nothing(mask):
    pytest.importorskip("tensorflow")
    # Spans beyond the sentinels' number would not be told apart; 60 tokens have at most 30.
    mask = np.array([False, *mask])
    tokens = np.arange(3, 3 + len(mask), dtype=np.int32)
    reference = span_corruption.corrupt_reference(tokens, mask, TOP)
    for fast, slow in zip(span_corruption.corrupt(tokens, mask, TOP), reference, strict=True):
        np.testing.assert_array_equal(fast, slow)
    inputs, targets = reference
    assert merge(inputs, targets) == tokens.tolist()
    assert sentinels(inputs) == list(range(TOP, TOP - len(sentinels(inputs)), -1))


def test_corrupt_when_the_mask_begins_with_noise(tf):
    tokens = np.array([10, 11, 12], np.int32)
    mask = np.array([True, False, True])
    for fast, slow in zip(
        span_corruption.corrupt(tokens, mask, TOP),
        span_corruption.corrupt_reference(tokens, mask, TOP),
        strict=True,
    ):
        np.testing.assert_array_equal(fast, slow)


def test_mask_counts_and_spans(tf):
    draw = tf.function(span_corruption.random_spans_mask, reduce_retracing=True)
    masks = []
    for length in (1, 2, 3, 10, 30, 141, 568):
        for seed in range(8):
            seeds = tf.constant([[seed, length], [seed, -length]], tf.int64)
            mask = draw(tf.constant(length), seeds).numpy()
            assert mask.shape == (length,)
            assert not mask[0]
            if length == 1:
                continue
            assert mask[-1]
            # As the original, in float32.
            num_noise = np.round(np.float32(length) * np.float32(0.15))
            num_noise = min(max(num_noise, 1), length - 1)
            assert mask.sum() == num_noise
            num_spans = max(np.round(np.float32(num_noise) / np.float32(3)), 1)
            assert (mask[1:] & ~mask[:-1]).sum() == num_spans
            masks.append(mask)
    again = draw(tf.constant(568), tf.constant([[7, 568], [7, -568]], tf.int64)).numpy()
    np.testing.assert_array_equal(again, masks[-1])
    assert any((masks[-1] != mask).any() for mask in masks[-8:-1])


@pytest.fixture(scope="module")
def draw(tf):
    return tf.function(span_corruption.random_spans_mask, reduce_retracing=True)


@settings(max_examples=60, deadline=None)
@given(length=st.integers(2, 1200), seed=st.integers(0, 2**31 - 1))
def test_the_definition_holds(draw, length, seed):
    """Noise density, mean span length, sentinel order, and nothing lost, at any length."""
    seeds = np.array([[seed, 0], [seed, 1]], np.int64)
    mask = draw(np.int32(length), seeds).numpy()
    tokens = np.arange(3, 3 + length, dtype=np.int32) % (TOP - COUNT - 3) + 3
    inputs, targets = (
        np.asarray(side) for side in span_corruption.corrupt(tokens, mask, TOP + 1000)
    )
    num_spans = int((mask[1:] & ~mask[:-1]).sum())
    # A token more or less is what rounding to whole tokens and at least one of each kind costs.
    assert abs(mask.sum() - 0.15 * length) <= 1
    assert abs(num_spans - mask.sum() / 3) <= 1
    marks = list(range(TOP + 1000, TOP + 1000 - num_spans, -1))
    assert [token for token in inputs.tolist() if token > TOP] == marks
    assert [token for token in targets.tolist() if token > TOP] == marks
    spans = np.split(targets, np.flatnonzero(targets > TOP)[1:])
    restored = [spans[TOP + 1000 - t][1:] if t > TOP else [t] for t in inputs.tolist()]
    assert np.concatenate(restored).astype(int).tolist() == tokens.tolist()


@pytest.mark.parametrize("inputs_length", [128, 512])
@pytest.mark.filterwarnings("ignore")  # those of t5's own imports
def test_equals_t5_itself(features, inputs_length):
    """Beside the original preprocessor, example by example; it is deterministic given the seed."""
    original = pytest.importorskip("t5.data.preprocessors", exc_type=ImportError)
    documents = documents_of([50, 0, 300, 141, 7, 9000, 1, 568, *range(1, 260, 3)])
    targets_length = span_corruption.corruption_lengths(inputs_length)[1]
    for seed in (0, 42):
        ours, theirs = (
            run(protocol, features, documents, inputs_length, targets_length, seed)
            for protocol in (span_corruption.t5x_span_corruption, original.span_corruption)
        )
        assert len(ours) == len(theirs) > 10
        for one, two in zip(ours, theirs, strict=True):
            np.testing.assert_array_equal(one[0], two[0])
            np.testing.assert_array_equal(one[1], two[1])


def test_span_lengths_are_spread(tf):
    """Every partition is equally likely: of 6 tokens in 2 spans the first is 1 to 5, each 1/5."""
    draw = tf.function(span_corruption.random_spans_mask, reduce_retracing=True)
    firsts = []
    for seed in range(300):
        mask = draw(tf.constant(40), tf.constant([[seed, 0], [seed, 1]], tf.int64)).numpy()
        start = int(mask.argmax())
        firsts.append(int((~mask[start:]).argmax()))
    counts = np.bincount(firsts, minlength=6)
    assert counts.sum() == 300
    assert counts[0] == 0
    # Five standard deviations of a binomial with p = 1/5.
    assert (abs(counts[1:] - 60) < 5 * np.sqrt(300 * 0.2 * 0.8)).all()


@pytest.mark.parametrize(
    ("inputs_length", "expected"), [(512, (568, 114)), (128, (141, 29)), (1024, (1137, 229))]
)
def test_corruption_lengths(inputs_length, expected):
    assert span_corruption.corruption_lengths(inputs_length) == expected


def test_t5x_examples_are_full_and_lossless(features):
    documents = documents_of([50, 0, 300, 141, 7, 20000, 1])
    examples = run(span_corruption.t5x_span_corruption, features, documents, 128, 32)
    merged = [merge(inputs, targets) for inputs, targets in examples]
    assert list(itertools.chain(*merged)) == list(itertools.chain(*documents))
    assert {len(tokens) for tokens in merged[:-1]} == {141}
    noise = 0
    for inputs, targets in examples[:-1]:
        # One position is left for eos, which the task appends.
        assert (len(inputs), len(targets)) == (127, 28)
        assert sentinels(inputs) == sentinels(targets) == list(range(TOP, TOP - 7, -1))
        assert inputs[0] < TOP
        assert targets[0] == TOP
        noise += len(targets) - 7
    assert noise / (141 * (len(examples) - 1)) == pytest.approx(0.15, abs=0.002)
    full = run(span_corruption.t5x_span_corruption, features, documents, 128, 32, drop_short=True)
    assert len(full) == len(examples) - 1
    for left, right in zip(full, examples[:-1], strict=True):
        np.testing.assert_array_equal(np.concatenate(left), np.concatenate(right))


def test_t5x_takes_a_chunk_of_a_huge_document(features):
    document = list(range(3, 3903)) * 20
    examples = run(span_corruption.t5x_span_corruption, features, [document], 512, 114)
    merged = list(itertools.chain.from_iterable(merge(*example) for example in examples))
    assert merged in (document[:65536], document[65536:])


def test_seeds_decide(features):
    documents = documents_of([400, 500])
    first, again, other = (
        run(span_corruption.t5x_span_corruption, features, documents, 128, 32, seed=seed)
        for seed in (3, 3, 4)
    )
    assert all(
        np.array_equal(a, b)
        for one, two in zip(first, again, strict=True)
        for a, b in zip(one, two, strict=True)
    )
    assert any(not np.array_equal(one[0], two[0]) for one, two in zip(first, other, strict=True))


def test_paper_keeps_documents_whole(features):
    documents = documents_of([140, 0, 141, 20, 1, 1000, 100])
    examples = run(span_corruption.paper_span_corruption, features, documents, 128, 29)
    # 141 tokens with eos fit 128 inputs; the empty and the longer documents are skipped.
    kept = [document for document in documents if 1 <= len(document) <= 140]
    assert len(examples) == len(kept) == 4
    for document, (inputs, targets) in zip(kept, examples, strict=True):
        assert inputs[-1] == EOS
        assert len(inputs) <= 128
        closing = TOP - len(sentinels(inputs))
        assert targets[-1] == closing
        assert sentinels(targets) == [*sentinels(inputs), closing]
        # eos belongs to the text, and the last span is noise.
        assert merge(inputs[:-1], targets) == [*document, EOS]
        assert targets[-2] == EOS
    assert (len(examples[0][0]), len(examples[0][1])) == (128, 29)


def test_bad_settings(features):
    with pytest.raises(ValueError, match=r"targets_length is 20; .* targets of 29: raise it"):
        run(span_corruption.t5x_span_corruption, features, [[5]], 128, 20)
    with pytest.raises(ValueError, match="needs 114 sentinels; the vocabulary has 100"):
        run(span_corruption.t5x_span_corruption, features, [[5]], 2048, 600)
    with pytest.raises(ValueError, match="inputs_length is 3; at least 4"):
        span_corruption.corruption_lengths(3)
    with pytest.raises(ValueError, match=r"noise_density 0\.9 with mean_span_length 1\.0"):
        span_corruption.corruption_lengths(128, noise_density=0.9, mean_span_length=1.0)


def test_sentinel_range(features):
    seqio = pytest.importorskip("seqio")
    vocabulary = features["targets"].vocabulary
    assert span_corruption.sentinel_range(vocabulary) == (3968, 100)

    class Reversed:
        vocab_size = 3000  # ends in ordinary pieces
        tokenizer = vocabulary.tokenizer

    with pytest.raises(ValueError, match="needs <extra_id_0> there"):
        span_corruption.sentinel_range(Reversed)
    assert isinstance(vocabulary, seqio.SentencePieceVocabulary)
