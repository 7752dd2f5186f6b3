"""The lengths of training, found beside a checkpoint, and what `prepare-tokens` makes of them."""

import pytest
from command import command
from golden_data import DEMO

from qmoe_jax.calibration.tokens import read_tokens
from qmoe_jax.checkpoints.training_lengths import lengths_of, training_lengths

VOCABULARY = str(DEMO / "sentencepiece.model")


@pytest.mark.parametrize(
    ("text", "lengths"),
    [
        ("TASK_FEATURE_LENGTHS = {'inputs': 512, 'targets': 114}", (512, 114)),
        ('A = 1\nTASK_FEATURE_LENGTHS={"targets": 32, "inputs": 128}\nB = 2\n', (128, 32)),
        ("TASK_FEATURE_LENGTHS = \\\n    {'inputs': 512, 'targets': 114}\n", (512, 114)),
        ("TASK_FEATURE_LENGTHS = {\n    'inputs': 512,\n    'targets': 114,\n}\n", (512, 114)),
        (
            "train/utils.DatasetConfig.task_feature_lengths = {'inputs': 64, 'targets': 16}",
            (64, 16),
        ),
        (
            "train/utils.DatasetConfig.task_feature_lengths = %TASK_FEATURE_LENGTHS\n"
            "TASK_FEATURE_LENGTHS = {'inputs': 512, 'targets': 62, 'other': 3}",
            (512, 62),
        ),
        ("# TASK_FEATURE_LENGTHS = {'inputs': 512, 'targets': 114}", None),
        ("TASK_FEATURE_LENGTHS = {'inputs': None, 'targets': None}", None),
        ("TASK_FEATURE_LENGTHS = {'targets': 512}", None),
        ("TASK_FEATURE_LENGTHS = {'inputs': __import__('os'), 'targets': 3}", None),
        ("TASK_FEATURE_LENGTHS = %gin.REQUIRED", None),
        ("", None),
    ],
)
def test_what_a_gin_file_says(text, lengths):
    assert lengths_of(text) == lengths


@pytest.mark.parametrize("layout", ["t5x_float32_inference", "orbax_ocdbt_float32"])
def test_where_it_is_looked_for(golden_copy, layout):
    model = golden_copy("base", layout)
    given = [model, model.parent, *([model / "state"] if (model / "state").exists() else [])]
    assert all(training_lengths(path) is None for path in given)
    file = model.parent / "config.gin"
    file.write_text("TASK_FEATURE_LENGTHS = {'inputs': 48, 'targets': 14}\n")
    for path in given:
        found = training_lengths(path)
        assert found is not None
        assert (found.inputs, found.targets, found.source) == (48, 14, str(file))


def test_the_folder_above_another_name_is_not_asked(golden_copy, tmp_path):
    model = golden_copy("base", "t5x_float32_inference")
    (model.parent / "config.gin").write_text("TASK_FEATURE_LENGTHS = {'inputs': 4, 'targets': 4}")
    assert training_lengths(model.rename(model.with_name("mine"))) is None


class TestPrepareTokens:
    @pytest.fixture
    def prepare(self, tmp_path, capsys):
        pytest.importorskip("seqio")
        (tmp_path / "text.txt").write_text("the array of the given shape and type " * 200)

        def run(*more):
            given = ["--source", "text", "--files", str(tmp_path / "text.txt"), "--overwrite"]
            given += ["--vocabulary", VOCABULARY, "--output", str(tmp_path / "tokens.npz")]
            assert command("prepare-tokens")([*given, "--num_examples", "2", *more]) == 0
            lengths = read_tokens(tmp_path / "tokens.npz").tokens.lengths
            return lengths, capsys.readouterr().err.splitlines()[-1]

        return run

    def test_lengths_are_those_of_training(self, prepare, golden_copy):
        model = golden_copy("base", "t5x_float32_inference")
        file = model.parent / "config.gin"
        file.write_text("TASK_FEATURE_LENGTHS = {'inputs': 96, 'targets': 40}\n")
        lengths, note = prepare("--checkpoint", str(model))
        assert lengths == (96, 40)
        said = f"96 and 40 (TASK_FEATURE_LENGTHS in {file})"
        assert note == f"note: these are the lengths that the model was trained with, {said}"
        lengths, note = prepare("--checkpoint", str(model), "--targets_length", "44")
        assert lengths == (96, 44)
        assert note == f"note: the model was trained with other lengths, {said}"
        lengths, note = prepare("--checkpoint", str(model), "--inputs_length", "64")
        assert lengths[0] == 64
        assert note == f"note: the model was trained with other lengths, {said}"

    def test_where_nothing_tells_them(self, prepare, base):
        lengths, note = prepare("--checkpoint", str(base), "--inputs_length", "64")
        assert lengths[0] == 64
        assert "no gin file beside" in note
        assert "must be those that the model was trained with" in note
        _, note = prepare("--inputs_length", "64")
        assert "must be those that the model was trained with" in note
        assert "--checkpoint finds them" in note
