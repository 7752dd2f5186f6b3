"""The demo corpus: what is harvested, how it is split, and the tokens that come out."""

import ast
import functools
import hashlib
import re
import sysconfig
from pathlib import Path

import numpy as np
import pytest
from golden_data import DEMO

from qmoe_jax.calibration import tokens
from qmoe_jax.demo import docstrings
from qmoe_jax.errors import TokensError

# Enough for these tests; all packages take 15 s.
PACKAGES = ("numpy", "rich")
VOCABULARY = str(DEMO / "sentencepiece.model")


@pytest.fixture
def few_packages(monkeypatch):
    monkeypatch.setattr(
        docstrings, "harvest", functools.partial(docstrings.harvest, packages=PACKAGES)
    )


def test_harvest(few_packages):
    texts = docstrings.harvest()
    assert len(texts) > 1500
    assert min(map(len, texts)) >= 200
    assert len({text[:120] for text in texts}) == len(texts)
    assert np.__doc__ is not None
    assert ast.get_docstring(ast.parse(Path(np.__file__).read_text())) in texts
    prefix = sysconfig.get_paths()["purelib"]
    assert not any(prefix in text for text in texts)


def test_harvest_is_repeatable(few_packages):
    files = list(docstrings._python_files(Path(sysconfig.get_paths()["purelib"]) / "rich"))
    assert files == sorted(files, key=lambda file: (file.parent.parts, file.name))
    again = [text for file in files for text in docstrings.file_docstrings(file)]
    first = {text[:120]: text for text in reversed(again)}
    # Order and contents are those of the harvest, where no other package came first.
    harvested = [text for text in docstrings.harvest() if text in set(again)]
    assert harvested == [text for text in again if first.pop(text[:120], None) == text]


def test_file_docstrings(tmp_path):
    long = "word " * 60
    source = f'''"""{long}module"""
def outer():
    """short"""
    if True:
        class Inner:
            """{long}inner

                indented
            """
            async def method(self):
                r"""{long}method \\d"""
    value = """{long}not a docstring"""
def sentinel():
    """{long}<extra_id_0>"""
def surrogate():
    """{long}\\ud800"""
'''
    path = tmp_path / "module.py"
    path.write_text(source)
    found = docstrings.file_docstrings(path)
    assert [re.search(r"(module|inner|method)", text).group() for text in found] == [
        "module",
        "inner",
        "method",
    ]
    assert found[1].endswith("inner\n\nindented")
    path.write_text(source + "def (")
    assert docstrings.file_docstrings(path) == []
    path.write_text(source + "x = 1\n" * 20000)
    assert docstrings.file_docstrings(path) == []


def test_validation_rule():
    def rule(text):
        start = re.sub(r"\W+", " ", text)[:120].encode()
        return int(hashlib.sha1(start).hexdigest()[:8], 16) % 25 == 0

    texts = [f"{number} some -- text " * 20 for number in range(500)]
    assert [docstrings.is_validation(text) for text in texts] == [rule(text) for text in texts]
    assert 5 < sum(map(docstrings.is_validation, texts)) < 40
    # What follows 120 normalised characters does not move a text to the other split.
    assert docstrings.is_validation("a" * 130) == docstrings.is_validation("a" * 130 + "b")


def test_splits_share_nothing_and_cover_all(few_packages):
    train, validation = (docstrings.demo_texts(split) for split in ("train", "validation"))
    assert all(docstrings.is_validation(text) for text in validation)
    assert not any(docstrings.is_validation(text) for text in train)
    assert sorted(train + validation) == sorted(docstrings.harvest())
    assert {text[:120] for text in train}.isdisjoint(text[:120] for text in validation)
    assert docstrings.demo_texts("validation", seed=1) != validation
    with pytest.raises(ValueError, match="'train' and 'validation'"):
        docstrings.demo_texts("test")


def test_demo_tokens_have_the_format_of_the_golden_ones(few_packages, tmp_path):
    pytest.importorskip("seqio")
    first, again = (docstrings.demo_tokens(VOCABULARY, "validation", 40, seed=5) for _ in range(2))
    for name, made in (("first", first), ("again", again)):
        tokens.write_tokens(tmp_path / name, made.tokens, made.metadata)
    assert (tmp_path / "first").read_bytes() == (tmp_path / "again").read_bytes()
    golden = tokens.read_plain_tokens(DEMO / "validation_tokens.npz", first.metadata)
    made = first.tokens
    for name, array in golden.tokens.arrays().items():
        assert getattr(made, name).shape[1:] == array.shape[1:]
        assert getattr(made, name).dtype == array.dtype
    for batch in (made, golden.tokens):
        assert (batch.encoder_input_tokens[:, -1] == 1).all()
        assert ((batch.encoder_input_tokens == 1).sum(1) == 1).all()
        assert (batch.decoder_target_tokens[:, 28] == 1).all()
        assert (batch.decoder_loss_weights.sum(1) == 29).all()
        assert (first.metadata.is_sentinel(batch.encoder_input_tokens).sum(1) == 7).all()
        assert (first.metadata.is_sentinel(batch.decoder_target_tokens).sum(1) == 7).all()
    assert first.metadata.sentinel_first == 3968
    assert first.metadata.vocabulary_size == 4068
    with pytest.raises(TokensError, match="1000000 were asked"):
        docstrings.demo_tokens(VOCABULARY, "validation", 1000000)


@pytest.mark.parametrize(
    ("vocabulary", "count", "message"),
    [
        ("nowhere.model", 8, "vocabulary nowhere.model cannot be read"),
        (__file__, 8, "is no sentencepiece model"),
        (VOCABULARY, 0, "num_examples is 0; at least 1 is needed"),
    ],
)
def test_bad_input_is_refused_before_text_is_collected(monkeypatch, vocabulary, count, message):
    pytest.importorskip("seqio")
    monkeypatch.setattr(docstrings, "harvest", lambda: pytest.fail("text was collected"))
    with pytest.raises(TokensError, match=message):
        docstrings.demo_tokens(vocabulary, "train", count)
