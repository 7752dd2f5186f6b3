"""Tasks over real TFDS and JSON-lines files, up to a written token file."""

import gzip
import itertools
import json

import numpy as np
import pytest
from command import command, refusal
from factories import CALIBRATION
from golden_data import DEMO

from qmoe_jax.calibration import prepared_c4, sources, span_corruption, tasks, tokens
from qmoe_jax.errors import TokensError

VOCABULARY = str(DEMO / "sentencepiece.model")
WORDS = ["the", "array", "of", "shape", "and", "type", "returned", "by", "this", "function"]

seqio = pytest.importorskip("seqio")


@pytest.fixture(scope="module")
def texts():
    rng = np.random.default_rng(0)
    return [" ".join(rng.choice(WORDS, rng.integers(5, 150))) for _ in range(60)]


@pytest.fixture(scope="module")
def c4_folder(tmp_path_factory, texts):
    """C4 in TFDS: c4/en/3.0.1."""
    folder = tmp_path_factory.mktemp("tfds")
    prepare_c4(folder, "3.0.1", texts)
    return str(folder)


@pytest.fixture(scope="module")
def more_of_c4(tmp_path_factory, texts):
    """Other versions, and a folder of one that was never finished."""
    folder = tmp_path_factory.mktemp("more")
    for version in ("3.1.0", "10.0.2"):
        prepare_c4(folder, version, texts[:9])
    (folder / "c4" / "en" / "2.3.0").mkdir()
    (folder / "c4" / "en" / "downloads").mkdir()
    return str(folder)


def prepare_c4(folder, version, texts):
    """C4's schema, written by TFDS itself, with train and validation."""
    import tensorflow_datasets as tfds

    class C4(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        """A small C4."""

        name = "c4"
        VERSION = tfds.core.Version(version)
        BUILDER_CONFIGS = [tfds.core.BuilderConfig(name="en", description="English")]  # noqa: RUF012

        def _info(self):
            keys = ("text", "timestamp", "url", "content-type", "content-length")
            features = tfds.features.FeaturesDict({key: tfds.features.Text() for key in keys})
            return tfds.core.DatasetInfo(builder=self, features=features)

        def _split_generators(self, dl_manager):
            return {
                "train": self._generate_examples(texts),
                "validation": self._generate_examples(texts[:5]),
            }

        def _generate_examples(self, chosen):
            for number, text in enumerate(chosen):
                yield (
                    number,
                    {
                        "text": text,
                        "timestamp": "2019-04-25T12:57:54Z",
                        "url": f"https://example.org/{number}",
                        "content-type": "text/plain",
                        "content-length": str(len(text)),
                    },
                )

    C4(data_dir=folder, config="en").download_and_prepare()


@pytest.fixture(scope="module")
def jsonl_folder(tmp_path_factory, texts):
    folder = tmp_path_factory.mktemp("jsonl")
    lines = [
        json.dumps({"text": text, "timestamp": "2019-04-25T12:57:54Z", "url": "https://e.org"})
        for text in texts
    ]
    for number, part in enumerate((lines[:20], lines[20:40])):
        path = folder / f"c4-train.0000{number}-of-00003.json.gz"
        with gzip.open(path, "wt", encoding="utf-8") as file:
            file.write("\n".join(part) + "\n")
    (folder / "c4-train.00002-of-00003.json").write_text("\n".join(lines[40:]))
    return folder


def assert_equal(left, right):
    for name in tokens.ARRAY_NAMES:
        np.testing.assert_array_equal(getattr(left.tokens, name), getattr(right.tokens, name))


def test_c4_of_tfds(c4_folder, texts):
    task = tasks.c4_task(VOCABULARY, data_dir=c4_folder, protocol="paper")
    assert tasks.c4_task(VOCABULARY, data_dir=c4_folder, protocol="paper") is task
    made = tasks.tokenize_task(task, split="train", num_examples=55, inputs_length=256, seed=1)
    vocabulary = task.output_features["targets"].vocabulary
    # TFDS stores in hashed order, so documents are compared as a set: each is one of the texts.
    documents = {tuple(vocabulary.encode(text)) for text in texts}
    sentinel = made.metadata.is_sentinel
    found = set()
    for inputs, targets in zip(
        made.tokens.encoder_input_tokens, made.tokens.decoder_target_tokens, strict=True
    ):
        marks = np.flatnonzero(sentinel(targets))
        spans = {
            targets[start]: targets[start + 1 : end] for start, end in itertools.pairwise(marks)
        }
        raw = [spans.get(token, [token]) for token in inputs[inputs != 0]]
        found.add(tuple(np.concatenate(raw).tolist()[:-2]))  # without its own eos and the inputs'
    assert len(found) == 55
    assert found <= documents
    again = tasks.tokenize_task(task, split="train", num_examples=55, inputs_length=256, seed=1)
    assert_equal(made, again)


def test_no_such_tfds_dataset(tmp_path):
    with pytest.raises(TokensError, match=r"no prepared c4/en:3\.0\.1 under .*released JSON lines"):
        tasks.c4_task(VOCABULARY, data_dir=str(tmp_path), version="3.0.1")
    with pytest.raises(TokensError, match=r"no prepared c4/en under .*holds c4/en/<version>"):
        tasks.c4_task(VOCABULARY, data_dir=str(tmp_path))


def test_versions_of_c4_that_are_prepared(c4_folder, more_of_c4, tmp_path, capsys):
    """One that TFDS's own code knows, one that it does not, and one that was begun."""
    assert prepared_c4.prepared_versions(c4_folder) == ["3.0.1"]
    assert prepared_c4.prepared_versions(more_of_c4) == ["10.0.2", "3.1.0"]
    assert prepared_c4.prepared_versions(str(tmp_path)) == []
    made = [
        tasks.tokenize_task(
            tasks.c4_task(VOCABULARY, data_dir=more_of_c4, version=version, protocol="paper"),
            **{"split": "train", "num_examples": 5, "inputs_length": 256},
        )
        for version in ("3.1.0", "10.0.2", None)
    ]
    assert made[1].tokens.decoder_target_tokens.tobytes() == (
        made[2].tokens.decoder_target_tokens.tobytes()
    )
    given = ["--source", "c4_tfds", "--data_dir", more_of_c4, "--vocabulary", VOCABULARY]
    given += ["--output", str(tmp_path / "x.npz"), "--num_examples", "2", "--protocol", "paper"]
    line = refusal(capsys, "prepare-tokens", *given, "--version", "2.3.0")
    assert "no prepared c4/en:2.3.0 under" in line
    assert "prepared are 10.0.2, 3.1.0: take one of these" in line
    assert command("prepare-tokens")([*given, "--version", "3.1.0"]) == 0
    assert "C4 is c4/en:3.1.0" in capsys.readouterr().err
    assert "c4/en:3.1.0" in tokens.read_tokens(tmp_path / "x.npz").metadata.source


@pytest.mark.parametrize("task", ["c4_v310_whole_documents", "c4_whole_documents"])
def test_tasks_of_prepared_versions(more_of_c4, task):
    made = sources.task_tokens(
        task,
        **{"split": "train", "num_examples": 4, "inputs_length": 256},
        **{"vocabulary": VOCABULARY, "data_dir": more_of_c4, "progress": False},
    )
    assert len(made) == 4


def test_json_lines_give_what_the_texts_give(jsonl_folder, texts):
    task = tasks.c4_jsonl_task(VOCABULARY, {"train": str(jsonl_folder / "c4-train.*.json*")})
    other = tasks.text_task("texts", VOCABULARY, {"train": texts})
    lengths = {"split": "train", "num_examples": 20, "inputs_length": 128, "seed": 7}
    made, expected = (tasks.tokenize_task(one, **lengths) for one in (task, other))
    assert_equal(made, expected)
    assert made.tokens.decoder_target_tokens.shape == (20, 29)
    assert made.metadata.seed == 7
    assert task.name.startswith("qmoe_jax_c4_jsonl_t5x_")


def test_tokens_equal_seqios_packed_features(texts):
    task = tasks.text_task("texts", VOCABULARY, {"train": texts})
    made = tasks.tokenize_task(
        task, split="train", num_examples=16, inputs_length=128, targets_length=32
    )
    lengths = {"inputs": 128, "targets": 32}
    dataset = task.get_dataset(lengths, "train", shuffle=False, seed=0).take(16)
    packed = list(seqio.EncDecFeatureConverter(pack=True)(dataset, lengths).as_numpy_iterator())
    for name in tokens.ARRAY_NAMES:
        np.testing.assert_array_equal(
            np.stack([example[name] for example in packed]), getattr(made.tokens, name)
        )


def test_settings_decide_the_task(texts):
    task = tasks.text_task("texts", VOCABULARY, {"train": texts})
    assert tasks.text_task("texts", VOCABULARY, {"train": list(texts)}) is task
    for other in (
        tasks.text_task("texts", VOCABULARY, {"train": texts[1:]}),
        tasks.text_task("texts", VOCABULARY, {"train": texts}, protocol="paper"),
        tasks.text_task("texts", VOCABULARY, {"train": texts}, drop_short=True),
    ):
        assert other.name != task.name


def test_errors_name_value_and_remedy(tmp_path, texts):
    with pytest.raises(TokensError, match=r"No file matches .*nothing"):
        tasks.c4_jsonl_task(VOCABULARY, {"train": str(tmp_path / "nothing*")})
    with pytest.raises(TokensError, match=r"protocol is 'other'; it must be one of"):
        tasks.text_task("texts", VOCABULARY, {"train": texts}, protocol="other")
    with pytest.raises(TokensError, match="drop_short"):
        tasks.text_task("texts", VOCABULARY, {"train": texts}, protocol="paper", drop_short=True)
    with pytest.raises(TokensError, match=r"absent\.model cannot be read"):
        tasks.load_vocabulary(str(tmp_path / "absent.model"))
    (tmp_path / "bad.model").write_bytes(b"no model")
    with pytest.raises(TokensError, match=r"bad\.model is no sentencepiece model"):
        tasks.load_vocabulary(str(tmp_path / "bad.model"))
    task = tasks.text_task("texts", VOCABULARY, {"train": texts})
    for options, message in (
        ({"split": "test", "num_examples": 1}, r"no split 'test'; it has \['train'\]"),
        ({"split": "train", "num_examples": 0}, "num_examples is 0"),
        ({"split": "train", "num_examples": 10000}, "10000 were asked for"),
    ):
        with pytest.raises(TokensError, match=message):
            tasks.tokenize_task(task, inputs_length=128, **options)


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        (b"{broken", "is no JSON"),
        (b'{"url": "no text"}', 'has no "text"'),
        (b'{"text": null}', 'has None as its "text"'),
        (b'{"text": 3}', 'has 3 as its "text"'),
        (b'["text"]', 'has no "text"'),
        (b'{"text": "caf\xe9"}' + b" " * 10**6, "is not UTF-8"),
    ],
)
def test_bad_line_is_named(tmp_path, texts, line, fault):
    path = tmp_path / "bad.json"
    path.write_bytes(json.dumps({"text": texts[0]}).encode() + b"\n" + line)
    task = tasks.c4_jsonl_task(VOCABULARY, {"train": str(path)})
    with pytest.raises(TokensError, match=r"bad\.json line 2 .*needed is a JSON object") as found:
        tasks.tokenize_task(task, split="train", num_examples=5, inputs_length=128)
    assert fault in str(found.value)
    assert len(str(found.value)) < 400  # not the document


def test_truncated_gzip_is_named(tmp_path, jsonl_folder):
    whole = (jsonl_folder / "c4-train.00000-of-00003.json.gz").read_bytes()
    path = tmp_path / "half.json.gz"
    path.write_bytes(whole[: len(whole) // 2])
    task = tasks.c4_jsonl_task(VOCABULARY, {"train": str(path)})
    with pytest.raises(TokensError, match=r"half\.json\.gz line \d+"):
        tasks.tokenize_task(task, split="train", num_examples=50, inputs_length=128)


def test_vocabulary_without_sentinels_gets_them(tmp_path):
    from sentencepiece import sentencepiece_model_pb2

    model = sentencepiece_model_pb2.ModelProto.FromString(
        (DEMO / "sentencepiece.model").read_bytes()
    )
    del model.pieces[-100:]
    (tmp_path / "plain.model").write_bytes(model.SerializeToString())
    plain, extra = (
        tasks.load_vocabulary(path) for path in (str(tmp_path / "plain.model"), VOCABULARY)
    )
    assert plain.vocab_size == extra.vocab_size == 4068
    assert span_corruption.sentinel_range(plain) == span_corruption.sentinel_range(extra)
    assert plain.encode("the input array") == extra.encode("the input array")


def test_command_line(jsonl_folder, c4_folder, tmp_path, capsys):
    common = ["--vocabulary", VOCABULARY, "--num_examples", "6", "--inputs_length", "128"]
    outputs = [str(tmp_path / name) for name in ("a.npz", "b.npz", "c.npz")]
    files = [str(jsonl_folder / "*.json.gz"), str(jsonl_folder / "*.json")]
    json_lines = [*common, "--source", "c4_jsonl", "--files", *files, "--seed", "2"]
    for output in outputs[:2]:
        assert command("prepare-tokens")([*json_lines, "--output", output]) == 0
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()
    tfds = [*common, "--source", "c4_tfds", "--data_dir", c4_folder, "--protocol", "paper"]
    assert command("prepare-tokens")([*tfds, "--output", outputs[2]]) == 0
    assert "6 examples of 128 input and 29 target positions" in capsys.readouterr().out
    read = tokens.read_tokens(outputs[0], num_embeddings=4096)
    assert read.metadata.seed == 2
    assert "c4-train" not in read.metadata.task
    assert len(tokens.read_tokens(outputs[2])) == 6
    assert command("prepare-tokens")([*common, "--source", "c4_jsonl", "--output", "x"]) == 2
    assert "qmoe-jax prepare-tokens: --source c4_jsonl needs --files" in capsys.readouterr().err


class TestPairs:
    """Inputs and targets as they are."""

    @pytest.fixture
    def pairs(self, tmp_path):
        lines = [{"inputs": f"the array {i} of this", "targets": f"type {i}"} for i in range(5)]
        (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, lines)))
        return tmp_path / "pairs.jsonl", lines

    def test_the_texts_are_those_of_the_lines(self, pairs, tmp_path):
        path, lines = pairs
        output = tmp_path / "pairs.npz"
        given = ["--source", "pairs", "--files", str(path), "--vocabulary", VOCABULARY]
        lengths = ["--inputs_length", "16", "--targets_length", "8", "--output", str(output)]
        assert command("prepare-tokens")([*given, *lengths]) == 0
        read = tokens.read_tokens(output)
        vocabulary = tasks.load_vocabulary(VOCABULARY)
        for i, line in enumerate(lines):
            for key, array in (
                ("inputs", read.tokens.encoder_input_tokens[i]),
                ("targets", read.tokens.decoder_target_tokens[i]),
            ):
                ids = [*vocabulary.encode(line[key]), 1]
                np.testing.assert_array_equal(array, np.pad(ids, (0, len(array) - len(ids))))
        # What is longer than asked for is cut, with an end of sequence.
        short = ["--inputs_length", "4", "--targets_length", "8", "--output", str(output)]
        assert command("prepare-tokens")([*given, *short, "--overwrite"]) == 0
        cut = tokens.read_tokens(output).tokens.encoder_input_tokens
        assert cut.shape == (5, 4)
        assert (cut[:, -1] == 1).all()

    def test_a_line_without_targets(self, pairs, tmp_path, capsys):
        path, _ = pairs
        path.write_text('{"inputs": "a", "targets": "b"}\n{"inputs": "a"}\n')
        given = ["--source", "pairs", "--files", str(path), "--vocabulary", VOCABULARY]
        line = refusal(capsys, "prepare-tokens", *given, "--output", str(tmp_path / "x.npz"))
        assert (
            'line 2 has no "targets"; needed is a JSON object with "inputs" and "targets"' in line
        )

    def test_a_registered_task(self, pairs, tmp_path, monkeypatch):
        path, _ = pairs
        (tmp_path / "my_own_tasks.py").write_text(
            "from qmoe_jax.calibration import tasks\n"
            "import seqio\n"
            f"made = tasks.pairs_task({VOCABULARY!r}, {{'validation': {str(path)!r}}})\n"
            "seqio.TaskRegistry.add_provider('my_own_task', made)\n"
        )
        monkeypatch.syspath_prepend(tmp_path)
        output = str(tmp_path / "task.npz")
        given = ["--source", "task", "--task", "my_own_task", "--split", "validation"]
        lengths = ["--inputs_length", "16", "--targets_length", "8", "--output", output]
        assert command("prepare-tokens")([*given, *lengths]) == 2  # no module
        assert command("prepare-tokens")([*given, *lengths, "--task_module", "my_own_tasks"]) == 0
        assert len(tokens.read_tokens(output)) == 5


class TestOutput:
    """What could not be written, or must not be replaced, is said before documents are read."""

    ARGUMENTS = ("--source", "text", "--files", "no_such_folder", "--vocabulary", VOCABULARY)

    def refused(self, capsys, output, *more):
        return refusal(capsys, "prepare-tokens", *self.ARGUMENTS, "--output", str(output), *more)

    def test_an_older_file_is_replaced_only_when_asked(self, tmp_path, capsys):
        path = tmp_path / "tokens.npz"
        tokens.write_tokens(path, CALIBRATION.tokens, CALIBRATION.metadata)
        before = path.read_bytes()
        assert "exists already; choose another output" in self.refused(capsys, path)
        line = self.refused(capsys, path, "--overwrite")
        assert "no_such_folder" in line  # it got as far as the documents
        assert path.read_bytes() == before

    def test_what_is_no_token_file_is_never_replaced(self, tmp_path, capsys):
        path = tmp_path / "thesis.npz"
        path.write_text("mine")
        assert "stays as it is" in self.refused(capsys, path, "--overwrite")
        assert path.read_text() == "mine"

    def test_nor_is_an_input(self, tmp_path, capsys):
        (tmp_path / "books").mkdir()
        (tmp_path / "books" / "a.txt").write_text("mine")
        given = ["--source", "text", "--files", str(tmp_path / "books"), "--overwrite"]
        line = refusal(
            capsys, "prepare-tokens", *given, "--output", str(tmp_path / "books" / "a.txt")
        )
        assert "stays as it is" in line
        line = refusal(capsys, "prepare-tokens", *given, "--output", str(tmp_path / "books"))
        assert "is, or holds, the input" in line
        assert (tmp_path / "books" / "a.txt").read_text() == "mine"

    def test_what_cannot_be_written(self, tmp_path, capsys):
        (tmp_path / "file").write_text("")
        assert "cannot write" in self.refused(capsys, tmp_path / "file" / "tokens.npz")
        assert "give a local path" in self.refused(capsys, "gs://bucket/tokens.npz")


def test_help_needs_no_tensorflow(capsys):
    with pytest.raises(SystemExit) as exit_info:
        command("prepare-tokens")(["--help"])
    assert exit_info.value.code == 0
    assert "--protocol {t5x,paper}" in capsys.readouterr().out
