"""What is bound to a command's fields: of the wrong type, misspelt, without quotes, out of range.

Every field of every command is tried with a dozen wrong values: the next field is covered by being
there. No try may end in a traceback, and none may change a file.
"""

import inspect
import math
import os
import typing

import pytest
from canary import tree
from command import refusal

from qmoe_jax.__main__ import main
from qmoe_jax.calibration.sources import task_tokens
from qmoe_jax.cli import evaluate, finetune, infer
from qmoe_jax.cli.argument_types import check_arguments, describe, fits
from qmoe_jax.cli.plan import make_parser
from qmoe_jax.cli.wording import spell_flags, spell_options
from qmoe_jax.generation.settings import GenerationSettings
from qmoe_jax.models.load import load_switch
from qmoe_jax.pipeline.compress import compress
from qmoe_jax.quantization.settings import CompressionSettings
from qmoe_jax.training.settings import FinetuneSettings

pytest.importorskip("gin")


class TestTypes:
    @pytest.mark.parametrize(
        ("hint", "right", "wrong"),
        [
            (int, [0, -3], [True, 1.0, "1", None, [1]]),
            (float, [0.5, 1], [True, "0.1", None]),
            (bool, [True, False], [0, "True", None]),
            (str, ["", "x"], [1, None, ["x"], True]),
            (int | None, [3, None], ["3", 2.5, False]),
            (str | os.PathLike[str], ["x"], [3, None, b"x"]),
            (list[str], [[], ["a"], ("a",)], ["a", [1], None]),
            (typing.Literal["a", "b"], ["a"], ["c", None]),
            (dict[str, dict[str, int]], [{}, {"a": {"b": 1}}], [[], {"a": 1}, {1: {}}]),
            (typing.Callable[..., int] | None, [len, None], [3, "len"]),
            (typing.Any, [None, 3, "x"], []),
        ],
    )
    def test_what_fits(self, hint, right, wrong):
        assert all(fits(value, hint) for value in right)
        assert not any(fits(value, hint) for value in wrong)
        assert describe(hint)

    def test_the_message_names_field_value_type_and_what_is_needed(self):
        with pytest.raises(ValueError, match="^X is '0.1', a value of type str; it must be a numb"):
            check_arguments(CompressionSettings, {"damping": "0.1"}, lambda name: "X")

    def test_every_annotation_is_known(self):
        """None of the commands' own fields is let through because its type is not understood."""
        for function in (
            compress,
            CompressionSettings,
            FinetuneSettings,
            GenerationSettings,
            infer.infer,
        ):
            holder = function if inspect.isclass(function) else inspect.unwrap(function)
            for name, hint in typing.get_type_hints(holder).items():
                if name in ("return", "changes", "settings", "load"):
                    continue
                assert not fits(object(), hint), f"{function.__name__}.{name}: {hint}"


class TestWording:
    def test_flags(self):
        names = {"overwrite": "--gin.OVERWRITE", "method": "--gin.CompressionSettings.method"}
        names["tokens"] = "--gin.TOKENS"
        spelled = spell_flags(
            'needs tokens; pass tokens=, made by X, or use method="rtn", or overwrite=True; x=3',
            names.get,
        )
        assert spelled == (
            "needs tokens; pass --gin.TOKENS=..., made by X, or use "
            "--gin.CompressionSettings.method=\"'rtn'\", or --gin.OVERWRITE=True; x=3"
        )

    def test_options(self):
        text = 'method="gptq" needs examples, or act_order=True, or unknown="x"'
        assert spell_options(text, make_parser()) == (
            '--method gptq needs examples, or --act_order, or unknown="x"'
        )


# What cannot be a value of any field, whatever its type; and what looks like one.
WRONG = ("object", "-3", "2.5", "'x'", "True", "None", "[]", "{}", "()", "1e400", "'~/none'", "%X")
BINDINGS = {
    "compress": [(compress, "compress"), (CompressionSettings, "CompressionSettings")],
    "evaluate": [
        (evaluate.evaluate, "evaluate"),
        (load_switch, "load_switch"),
        (task_tokens, "task_tokens"),
    ],
    "infer": [
        (infer.infer, "infer"),
        (GenerationSettings, "GenerationSettings"),
        (load_switch, "load_switch"),
    ],
    "finetune": [(finetune.finetune, "finetune"), (FinetuneSettings, "FinetuneSettings")],
    "recover": [(finetune.finetune, "recover")],
}
REQUIRED = {
    "compress": ("CHECKPOINT='none'", "OUTPUT='out'", "TOKENS='none.npz'"),
    "evaluate": ("CHECKPOINT='none'", "TOKENS='none.npz'"),
    "finetune": (
        *("INITIAL_CHECKPOINT='none'", "OUTPUT='out'", "TRAIN_STEPS=1", "TOKENS='none.npz'"),
    ),
    "recover": ("CHECKPOINT='none'", "REFERENCE='none'", "OUTPUT='out'", "TOKENS='none.npz'"),
    "infer": ("CHECKPOINT='none'", "VOCABULARY='none.model'", "PROMPTS=['a <extra_id_0>']"),
}


def fields():
    for command, configurables in BINDINGS.items():
        for function, name in configurables:
            for parameter in inspect.signature(function).parameters.values():
                if parameter.kind is not parameter.VAR_KEYWORD:
                    yield command, f"{name}.{parameter.name}"


@pytest.mark.parametrize(("command", "field"), list(fields()))
def test_no_value_of_a_field_ends_in_a_traceback(command, field, tmp_path, monkeypatch, capsys):
    (tmp_path / "canary").write_text("alive")
    monkeypatch.chdir(tmp_path)
    before = tree(tmp_path)
    required = [f"--gin.{binding}" for binding in REQUIRED[command]]
    for value in WRONG:
        line = refusal(capsys, command, *required, f"--gin.{field}={value}")
        assert len(line) < 2000
    assert tree(tmp_path) == before


@pytest.mark.parametrize(
    ("command", "binding", "message"),
    [
        ("compress", "CompressionSettings.damping='0.1'", "damping is '0.1', a value of type str"),
        ("compress", "NUM_EXAMPLES='16'", "--gin.NUM_EXAMPLES is '16', a value of type str"),
        ("compress", "CompressionSettings.expert_batch=2.5", "2.5, a value of type float; it must"),
        ("compress", "CHECKPOINT=None", "--gin.CHECKPOINT is None"),
        ("evaluate", "EXPERT_CAPACITY_FACTOR='2'", "--gin.EXPERT_CAPACITY_FACTOR is '2'"),
        ("infer", "MAX_DECODE_LENGTH=True", "--gin.MAX_DECODE_LENGTH is True"),
        ("compress", "CHECKPOINT=/data/x", "quotes, inside the shell's: --gin.CHECKPOINT=\"'/dat"),
        ("compress", "CompressionSettings.griid='x'", "there is no griid; did you mean grid?"),
        ("compress", "CompressionSettings.dampng=1", "did you mean damping?"),
        ("recover", "REFERENCE=None", "REFERENCE is None; give the native checkpoint that"),
        ("compress", "IMPLEMENTATION='gpu'", "'gpu'; it must be one of auto, xla, cpu, cuda"),
    ],
)
def test_messages(capsys, tmp_path, monkeypatch, command, binding, message):
    monkeypatch.chdir(tmp_path)
    required = [f"--gin.{given}" for given in REQUIRED[command]]
    assert message in refusal(capsys, command, *required, f"--gin.{binding}")


def test_advice_is_in_the_words_of_the_command_line(capsys, gptq, base):
    output = gptq[0]
    given = [f"--gin.CHECKPOINT='{base}'", f"--gin.OUTPUT='{output}'", "--gin.TOKENS=None"]
    line = refusal(capsys, "compress", *given)
    assert "--gin.CompressionSettings.method=\"'rtn'\"" in line
    given.append("--gin.CompressionSettings.method='rtn'")
    assert "pass --gin.OVERWRITE=True to replace it" in refusal(capsys, "compress", *given)


def test_numbers_that_are_none(capsys):
    assert math.isinf(float("1e400"))
    line = refusal(capsys, "plan", "switch_base_8", "--damping", "nan")
    assert "damping is nan" in line
    assert main(["plan", "--list"]) == 0
    capsys.readouterr()
