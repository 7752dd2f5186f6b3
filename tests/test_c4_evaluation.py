"""Evaluation straight from text: C4 as TFDS prepares it, JSON lines, folders of text files."""

import gzip
import json
import os
import sys
import types

import golden_data
import numpy as np
import pytest
from command import command, refusal

from qmoe_jax.calibration import sources, tokens
from qmoe_jax.errors import TokensError
from qmoe_jax.evaluation.metrics import evaluate_loss
from qmoe_jax.models.load import load_switch

seqio = pytest.importorskip("seqio")
pytest.importorskip("gin")

CHECKPOINT = golden_data.DEMO / "checkpoint_4200"
VOCABULARY = str(golden_data.DEMO / "sentencepiece.model")
WORDS = ["the", "array", "of", "shape", "and", "type", "returned", "by", "this", "function"]


@pytest.fixture(scope="module")
def texts():
    rng = np.random.default_rng(0)
    return [" ".join(rng.choice(WORDS, rng.integers(20, 200))) for _ in range(40)]


@pytest.fixture(scope="module")
def c4_folder(tmp_path_factory, texts):
    """`c4/en/2.2.0`, the version of T5's c4_v220 tasks, in C4's schema and written by TFDS."""
    import tensorflow_datasets as tfds

    class C4(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        """A small C4."""

        name = "c4"
        VERSION = tfds.core.Version("2.2.0")
        BUILDER_CONFIGS = [tfds.core.BuilderConfig(name="en", description="English")]  # noqa: RUF012

        def _info(self):
            keys = ("text", "url", "content-type", "content-length", "timestamp")
            features = tfds.features.FeaturesDict({key: tfds.features.Text() for key in keys})
            return tfds.core.DatasetInfo(builder=self, features=features)

        def _split_generators(self, dl_manager):
            return {"validation": self._generate_examples()}

        def _generate_examples(self):
            for number, text in enumerate(texts):
                rest = {"url": f"https://example.org/{number}", "content-type": "text/plain"}
                size = str(len(text))
                yield (
                    number,
                    {"text": text, "timestamp": "2019-04-25", "content-length": size, **rest},
                )

    folder = tmp_path_factory.mktemp("tfds")
    C4(data_dir=folder, config="en").download_and_prepare()
    return folder


def run(folder, task, *bindings):
    """The command on the demo model; its metrics and the tokens that it kept."""
    assert not command("evaluate")(arguments(folder, task, *bindings))
    (kept,) = folder.glob("tokens_*.npz")
    return json.loads((folder / "metrics.json").read_text()), kept


def arguments(folder, task, *bindings):
    return [
        f"--gin.CHECKPOINT='{CHECKPOINT}'",
        f"--gin.TASK='{task}'",
        f"--gin.VOCABULARY='{VOCABULARY}'",
        "--gin.INPUTS_LENGTH=128",
        "--gin.BATCH_SIZE=8",
        f"--gin.OUTPUT='{folder}'",
        "--gin.TENSORBOARD=False",
        *bindings,
    ]


def test_tfds_as_t5x_evaluates(c4_folder, tmp_path, monkeypatch):
    bindings = (f"--gin.DATA_DIR='{c4_folder}'", "--gin.NUM_EXAMPLES=20", "--gin.SEED=3")
    document, kept = run(tmp_path / "out", "c4_v220_span_corruption", *bindings)
    (model,) = document["models"]
    # The same from seqio's own features of the task, fed to the model by hand.
    found = tokens.read_tokens(kept)
    assert (found.metadata.split, found.metadata.seed, len(found)) == ("validation", 3, 20)
    task = seqio.get_mixture_or_task(found.metadata.task)
    lengths = {"inputs": 128, "targets": 29}
    dataset = task.get_dataset(lengths, "validation", shuffle=False, seed=3).take(20)
    features = seqio.EncDecFeatureConverter(pack=True)(dataset, lengths)
    examples = list(features.as_numpy_iterator())
    batch = {name: np.stack([one[name] for one in examples]) for name in tokens.ARRAY_NAMES}
    expected = evaluate_loss(*load_switch(CHECKPOINT), [batch])
    assert model["loss"] == pytest.approx(expected.loss, rel=1e-5)
    assert model["num_target_tokens"] == expected.num_target_tokens.sum()
    # Documents are concatenated and cut: every example is full, 22 noise tokens and 7 marks.
    assert (found.tokens.encoder_input_tokens > 0).all()
    assert (found.tokens.decoder_target_tokens > 0).all()
    # Again: the tokens are there, so neither the data nor TensorFlow are asked.
    monkeypatch.setattr(sources, "_find_task", None)
    again, _ = run(tmp_path / "out", "c4_v220_span_corruption", *bindings)
    assert again == document
    # Of another request, nothing is taken from there.
    with pytest.raises(TypeError, match="not callable"):
        sources.task_tokens(
            "c4_v220_span_corruption",
            num_examples=20,
            vocabulary=VOCABULARY,
            data_dir=str(c4_folder),
            inputs_length=128,
            seed=4,
            cache=kept.parent,
        )


def test_kept_tokens_are_of_the_very_files(tmp_path, texts):
    """An edited, a new or a removed document: other tokens. Untouched files: the kept ones."""
    folder = tmp_path / "texts"
    folder.mkdir()
    for number, text in enumerate(texts[:4]):
        (folder / f"{number}.txt").write_text(text)

    def tokenised(**changes):
        options = {"files": str(folder), "vocabulary": VOCABULARY, "inputs_length": 64}
        options |= {"cache": tmp_path / "kept", "progress": False}
        return sources.task_tokens("text_span_corruption", **options | changes).sha256()

    seen = [tokenised()]
    assert tokenised() == seen[0]
    assert len(list((tmp_path / "kept").iterdir())) == 1
    (folder / "1.txt").write_text(texts[5])
    seen.append(tokenised())
    (folder / "1.txt").unlink()
    seen.append(tokenised())
    (folder / "9.txt").write_text(texts[6])
    seen.append(tokenised())
    assert len(set(seen)) == 4
    # Put back with its old time, which nobody can tell: overwrite makes them anew.
    status = (folder / "9.txt").stat()
    swapped = texts[6][::-1].encode()[: status.st_size].ljust(status.st_size)
    (folder / "9.txt").write_bytes(swapped)
    os.utime(folder / "9.txt", ns=(status.st_atime_ns, status.st_mtime_ns))
    assert tokenised() == seen[3]
    assert tokenised(overwrite=True) != seen[3]


def test_whole_documents_from_tfds_json_lines_and_text_files(c4_folder, texts, tmp_path):
    """The paper's protocol gives the same documents from each kind of source."""
    lines = tmp_path / "lines"
    lines.mkdir()
    for number, part in enumerate((texts[:25], texts[25:])):
        with gzip.open(lines / f"c4-validation.0000{number}-of-00002.json.gz", "wt") as file:
            file.writelines(json.dumps({"text": text, "url": "x"}) + "\n" for text in part)
    files = tmp_path / "files"
    for number, text in enumerate(texts):
        path = files / ("a" if number < 25 else "b") / f"{number:03d}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    document, kept = run(tmp_path / "json_out", "jsonl_whole_documents", f"--gin.FILES='{lines}'")
    from_lines = tokens.read_tokens(kept)
    (model,) = document["models"]
    assert model["num_examples"] == len(from_lines) < 40  # all that fit, without NUM_EXAMPLES
    common = {"vocabulary": VOCABULARY, "inputs_length": 128, "progress": False}
    from_files = sources.task_tokens("text_whole_documents", files=str(files), **common)
    for name in tokens.ARRAY_NAMES:
        left, right = (getattr(one.tokens, name) for one in (from_lines, from_files))
        np.testing.assert_array_equal(left, right)
    tfds = sources.task_tokens("c4_v220_whole_documents", data_dir=str(c4_folder), **common)
    # TFDS keeps its own order; as many documents fit, of the same lengths.
    assert lengths(tfds) == lengths(from_files)
    # A token file of the same text, for machines without TensorFlow, is the same evaluation.
    made = tmp_path / "made.npz"
    arguments = ["--source", "text", "--files", str(files), "--protocol", "paper", "--split"]
    arguments += ["validation", "--vocabulary", VOCABULARY, "--inputs_length", "128"]
    assert command("prepare-tokens")([*arguments, "--output", str(made)]) == 0
    np.testing.assert_array_equal(
        tokens.read_tokens(made).tokens.encoder_input_tokens, from_files.tokens.encoder_input_tokens
    )


def lengths(token_file):
    return sorted((token_file.tokens.encoder_input_tokens > 0).sum(axis=1).tolist())


def test_a_seqio_task_of_one_s_own(monkeypatch, texts):
    """As T5X's MIXTURE_OR_TASK_MODULE: a module that registers a task when it is imported."""
    from qmoe_jax.calibration import tasks

    module = types.ModuleType("tasks_of_my_own")
    module.task = tasks.text_task("my_own", VOCABULARY, {"test": texts})
    monkeypatch.setitem(sys.modules, "tasks_of_my_own", module)
    made = sources.task_tokens(
        module.task.name,
        split="test",
        num_examples=4,
        task_module="tasks_of_my_own",
        inputs_length=128,
        progress=False,
    )
    assert len(made) == 4
    assert made.metadata.task == module.task.name
    with pytest.raises(TokensError, match="There is no task 'other'; known are"):
        sources.task_tokens("other", task_module="tasks_of_my_own")


def test_bad_text(tmp_path, texts):
    common = {"vocabulary": VOCABULARY, "inputs_length": 128, "progress": False}
    with pytest.raises(TokensError, match=r"No file matches '.*nothing' for split 'validation'"):
        sources.task_tokens("text_whole_documents", files=str(tmp_path / "nothing"), **common)
    (tmp_path / "latin.txt").write_bytes("café".encode("latin-1"))
    with pytest.raises(
        TokensError, match=r"latin\.txt is not UTF-8 \(at byte 3\); needed is UTF-8"
    ):
        sources.task_tokens("text_whole_documents", files=str(tmp_path), **common)
    (tmp_path / "latin.txt").write_text(" ".join(texts))
    with pytest.raises(TokensError, match=r"has 0 examples in split 'validation'; some were asked"):
        sources.task_tokens("text_whole_documents", files=str(tmp_path), **common)


def test_missing_data_and_seqio_are_one_line(tmp_path, monkeypatch, capsys):
    given = arguments(tmp_path / "out", "c4_v301_span_corruption", f"--gin.DATA_DIR='{tmp_path}'")
    line = refusal(capsys, "evaluate", *given)
    assert "TFDS has no prepared c4/en:3.0.1 under" in line
    monkeypatch.setitem(sys.modules, "seqio", None)
    given = arguments(tmp_path / "out", "jsonl_span_corruption", "--gin.FILES='x'")
    line = refusal(capsys, "evaluate", *given)
    assert "needs seqio" in line
    assert "pip install 'qmoe-jax[data]'" in line
