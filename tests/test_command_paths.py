"""Every path that a command takes, wrong in a dozen ways: one line, exit status 2, no file touched.

The next path argument is covered by a row of `PATHS`; one that has no row fails a test.
"""

import dataclasses
import inspect as inspect_module
import json
import os
import shutil
import typing
from pathlib import Path

import golden_data
import pytest
from canary import tree
from factories import CALIBRATION

from qmoe_jax.__main__ import COMMANDS, main
from qmoe_jax.calibration.sources import task_tokens
from qmoe_jax.calibration.tokens import write_tokens
from qmoe_jax.checkpoints.recode import recode_checkpoint
from qmoe_jax.cli import (
    convert,
    demo,
    dequantize,
    evaluate,
    finetune,
    infer,
    inspect,
    plan,
    prepare_tokens,
    recover,
)
from qmoe_jax.pipeline.compress import compress
from qmoe_jax.quantization.settings import CompressionSettings

pytest.importorskip("gin")

# Wrong whatever is wanted there, as read and as written.
NOWHERE = {
    "empty": "",
    "link loop": "loop",
    "below a file": "notes.txt/below",
    "300 characters": "n" * 300,
    "no such user": "~nosuchuser/x",
    "no bucket": "gs://",
    "one slash": "gs:/bucket/x",
    "no slash": "gs:bucket/x",
    "other storage": "s3://bucket/x",
}
NOT_THERE = NOWHERE | {
    "missing": "absent/deeper",
    "dangling link": "dangling",
    "non-ASCII, two lines": "gr\u00fc\u00dfe\nn\u00e4chste",
    "a folder of another kind": "folder",
}
if os.geteuid():
    NOT_THERE["unreadable"] = "unreadable"

# What is wrong with a path, by what the command does with it.
READ_FOLDER = NOT_THERE | {"a file": "notes.txt"}
READ_FILE = NOT_THERE | {"a file of another kind": "notes.txt"}
READ_TEXT = NOT_THERE
WRITE_INTO = NOWHERE | {"a file": "notes.txt"}
WRITE_FOLDER = WRITE_INTO | {"a folder of another kind": "folder"}
WRITE_FILE = NOWHERE | {"a folder": "folder", "somebody's file": "notes.txt"}


def onto(*inputs):
    """Outputs that are, or would hold, an input."""
    return {f"onto {path}": path for path in inputs}


INPUT = ("model/checkpoint_500100", "link/checkpoint_500100")
OWN = onto("model", "link", *INPUT)


@dataclasses.dataclass(frozen=True)
class Row:
    """A path argument.

    Attributes:
      command: that has it.
      name: of the argument.
      wrong: paths, by what is wrong with them.
      arguments: of the whole command line; `{}` among them is the path.
    """

    command: str
    name: str
    wrong: dict[str, str]
    arguments: tuple[str, ...]

    def command_line(self, path):
        spelled = repr(path) if any(a.startswith("--gin.") for a in self.arguments) else path
        return [argument.replace("{}", spelled) for argument in self.arguments]


def gin(command, name, wrong, *bindings):
    """A row of a command with gin bindings."""
    return Row(command, name, wrong, tuple(f"--gin.{binding}" for binding in bindings))


def plain(command, name, wrong, *arguments):
    """A row of a command with plain options."""
    return Row(command, name, wrong, arguments)


MODEL, TOKENS = "CHECKPOINT='model/checkpoint_500100'", "TOKENS='tokens.npz'"
COMPRESS = (MODEL, "OUTPUT='out'", TOKENS)
SMALL = f"CHECKPOINT='{golden_data.DEMO}/checkpoint_4200'"  # of that vocabulary
INFER = ("VOCABULARY='vocabulary.model'", "PROMPTS=['a <extra_id_0>']")
TASK = (MODEL, "TASK='text_span_corruption'", "NUM_EXAMPLES=2", "INPUTS_LENGTH=64")
C4 = ("TASK='c4_v301_span_corruption'", "--source=c4_tfds", "--vocabulary=vocabulary.model")
TEXT = ("--source=text", "--num_examples=2", "--inputs_length=64", "--vocabulary=vocabulary.model")
PLAN = ("model/checkpoint_500100", "--num_examples=8")
EXPORT = ("published", "export", "compressed_qmoe")
TUNE = ("INITIAL_CHECKPOINT='model/checkpoint_500100'", "OUTPUT='out'", "TRAIN_STEPS=1", TOKENS)
TUNE_TASK = (*TUNE[:3], "MIXTURE_OR_TASK='text_span_corruption'", "NUM_EXAMPLES=2")
RECOVER = (MODEL, "REFERENCE='model/checkpoint_500100'", "OUTPUT='out'", TOKENS)
DEMO = ("--num_examples=2", "--num_validation_examples=2")

PATHS = [
    gin("compress", "checkpoint", READ_FOLDER, "CHECKPOINT={}", "OUTPUT='out'", TOKENS),
    gin("compress", "tokens", READ_FILE, MODEL, "OUTPUT='out'", "TOKENS={}"),
    gin("compress", "validation_tokens", READ_FILE, *COMPRESS, "VALIDATION_TOKENS={}"),
    gin("compress", "output", WRITE_FOLDER | OWN, MODEL, "OUTPUT={}", TOKENS),
    gin("compress", "output", WRITE_FOLDER | OWN, MODEL, "OUTPUT={}", TOKENS, "OVERWRITE=True"),
    gin("compress", "buffer_dir", WRITE_INTO, *COMPRESS, "BUFFER_DIR={}"),
    gin("compress", "work_dir", WRITE_INTO | onto(*INPUT), *COMPRESS, "WORK_DIR={}"),
    gin("compress", "log", WRITE_FILE | onto("tokens.npz"), *COMPRESS, "LOG={}"),
    gin("evaluate", "checkpoint", READ_FOLDER, "CHECKPOINT={}", TOKENS),
    gin("evaluate", "checkpoint", READ_FOLDER, "CHECKPOINT=[('a', {})]", TOKENS),
    gin("evaluate", "reference", READ_FOLDER, MODEL, TOKENS, "REFERENCE={}"),
    gin("evaluate", "tokens", READ_FILE, MODEL, "TOKENS={}"),
    gin("evaluate", "output", WRITE_INTO | OWN, MODEL, TOKENS, "OUTPUT={}"),
    gin("evaluate", "output", onto(*INPUT), SMALL, TOKENS, f"REFERENCE='{INPUT[0]}'", "OUTPUT={}"),
    gin("evaluate", "files", READ_TEXT, *TASK, INFER[0], "FILES={}"),
    gin("evaluate", "vocabulary", READ_FILE, *TASK, "VOCABULARY={}", "FILES='notes.txt'"),
    gin("evaluate", "data_dir", READ_FOLDER, MODEL, C4[0], INFER[0], "DATA_DIR={}"),
    gin("infer", "checkpoint", READ_FOLDER, "CHECKPOINT={}", *INFER),
    gin("infer", "vocabulary", READ_FILE, SMALL, "VOCABULARY={}", INFER[1]),
    gin("infer", "prompts_file", READ_TEXT, SMALL, INFER[0], "PROMPTS_FILE={}"),
    gin("infer", "output", WRITE_FILE | onto("vocabulary.model"), SMALL, *INFER, "OUTPUT={}"),
    gin("finetune", "checkpoint", READ_FOLDER, "INITIAL_CHECKPOINT={}", *TUNE[1:]),
    gin("finetune", "tokens", READ_FILE, *TUNE[:3], "TOKENS={}"),
    gin("finetune", "validation_tokens", READ_FILE, *TUNE, "VALIDATION_TOKENS={}"),
    gin("finetune", "output", WRITE_FOLDER | OWN, TUNE[0], "OUTPUT={}", *TUNE[2:]),
    gin("finetune", "reference", READ_FOLDER, *TUNE, "REFERENCE={}"),
    gin("finetune", "adapters", READ_FILE, *TUNE, "ADAPTERS={}"),
    gin("finetune", "files", READ_TEXT, *TUNE_TASK, INFER[0], "FILES={}"),
    gin("finetune", "vocabulary", READ_FILE, *TUNE_TASK, "VOCABULARY={}", "FILES='notes.txt'"),
    gin(
        *("finetune", "data_dir", READ_FOLDER, *TUNE_TASK[:3], INFER[0], "DATA_DIR={}"),
        "MIXTURE_OR_TASK='c4_v301_span_corruption'",
    ),
    gin("recover", "checkpoint", READ_FOLDER, "CHECKPOINT={}", *RECOVER[1:]),
    gin("recover", "reference", READ_FOLDER, RECOVER[0], "REFERENCE={}", *RECOVER[2:]),
    gin("recover", "output", WRITE_FOLDER | OWN, *RECOVER[:2], "OUTPUT={}", TOKENS),
    gin("recover", "tokens", READ_FILE, *RECOVER[:3], "TOKENS={}"),
    gin("recover", "validation_tokens", READ_FILE, *RECOVER, "VALIDATION_TOKENS={}"),
    gin("recover", "adapters", READ_FILE, *RECOVER, "recover.adapters={}"),
    plain("plan", "checkpoint", READ_FOLDER, "{}"),
    plain("plan", "tokens", READ_FILE, *PLAN, "--tokens={}"),
    plain(
        *("plan", "validation_tokens", READ_FILE, *PLAN, "--tokens=tokens.npz"),
        "--validation_tokens={}",
    ),
    plain("plan", "json", WRITE_FILE | onto("tokens.npz"), *PLAN, "--json={}"),
    plain("plan", "output", WRITE_INTO, *PLAN, "--output={}"),
    plain("plan", "buffer_dir", WRITE_INTO, *PLAN, "--buffer_dir={}"),
    plain("prepare-tokens", "output", WRITE_FILE, "--files=folder", *TEXT, "--output={}"),
    plain("prepare-tokens", "files", READ_TEXT, "--output=new.npz", *TEXT, "--files={}"),
    plain(
        *("prepare-tokens", "vocabulary", READ_FILE, "--output=new.npz", "--files=notes.txt"),
        *(*TEXT[:-1], "--vocabulary={}"),
    ),
    plain("prepare-tokens", "data_dir", READ_FOLDER, "--output=new.npz", *C4[1:], "--data_dir={}"),
    plain(
        "prepare-tokens", "checkpoint", READ_FOLDER, "--output=new.npz", *TEXT, "--checkpoint={}"
    ),
    plain("inspect", "path", READ_FOLDER, "{}"),
    plain("dequantize", "compressed", READ_FOLDER, "{}", "native"),
    plain("dequantize", "folder", WRITE_INTO, "compressed", "{}"),
    plain("convert", "source", READ_FOLDER, "coding", "qmoe", "{}", "out"),
    plain(
        *("convert", "destination", WRITE_FOLDER | onto("compressed", "."), "coding", "qmoe"),
        *("compressed", "{}", "--overwrite"),
    ),
    plain("convert", "source", READ_FOLDER, "published", "import", "{}", "out"),
    plain("convert", "source", READ_FOLDER, "published", "export", "{}", "out"),
    plain("convert", "destination", WRITE_FOLDER, *EXPORT, "{}", "--overwrite"),
    plain("convert", "source", READ_FOLDER, "huggingface", "{}", "out"),
    plain("convert", "destination", WRITE_FOLDER, "huggingface", "compressed", "{}", "--overwrite"),
    plain(
        *("convert", "vocabulary", READ_FILE, "huggingface", "compressed", "out"),
        "--vocabulary={}",
    ),
    plain("demo", "output", WRITE_INTO, *DEMO, "--output={}"),
    plain("demo", "model", READ_FOLDER, *DEMO, "--output=out", "--model={}"),
    plain("demo", "checkpoint", READ_FOLDER, *DEMO, "--output=out", "--checkpoint={}"),
    plain("demo", "vocabulary", READ_FILE, *DEMO, "--output=out", "--vocabulary={}"),
    *(
        Row(command, "gin_file", READ_FILE, ("--gin_file={}",))
        for command in ("compress", "evaluate", "finetune", "infer", "recover")
    ),
]

# Arguments that are texts and no paths; everything else must have a row.
NO_PATHS = {
    "compress": {"changes", "implementation", "report"},
    "convert": {"to"},
    "demo": {"implementation"},
    "evaluate": {"task", "split", "activation_dtype", "task_module", "cache"},
    "finetune": {"task", "split", "activation_dtype", "task_module", "cache", "settings"},
    "infer": {"prompts", "activation_dtype"},
    "plan": {"device", "finetune", "optimizer"},
    "prepare-tokens": {"split", "version", "task", "task_module"},
    "recover": {"task", "activation_dtype", "settings"},
}
# The functions that gin binds for each command.
BOUND = {
    "compress": [compress],
    "evaluate": [evaluate.evaluate, task_tokens],
    "finetune": [finetune.finetune, task_tokens],
    "infer": [infer.infer],
    "recover": [recover.recover],
}
PARSERS = {
    "convert": convert.make_parser,
    "demo": demo.make_parser,
    "dequantize": dequantize.make_parser,
    "inspect": inspect.make_parser,
    "plan": plan.make_parser,
    "prepare-tokens": prepare_tokens.make_parser,
}


def takes_text(hint):
    """Whether an annotated argument could be a path."""
    if hint is typing.Any:
        return True
    kinds = [hint, *typing.get_args(hint)]
    return str in kinds or any(typing.get_origin(kind) is os.PathLike for kind in kinds)


def text_arguments(command):
    """The arguments of a command that take a text of one's own choice."""
    if command in PARSERS:
        actions = PARSERS[command]()._actions
        settings = {field.name for field in dataclasses.fields(CompressionSettings)}
        free = [a for a in actions if a.type in (None, Path) and a.nargs != 0 and not a.choices]
        return {action.dest for action in free} - (settings if command == "plan" else set())
    hints = [typing.get_type_hints(inspect_module.unwrap(f)) for f in BOUND[command]]
    named = [(name, hint) for own in hints for name, hint in own.items() if name != "return"]
    return {name for name, hint in named if takes_text(hint)}


@pytest.mark.parametrize("command", COMMANDS)
def test_every_path_has_a_row(command):
    rows = {row.name for row in PATHS if row.command == command} - {"gin_file"}
    assert text_arguments(command) - NO_PATHS.get(command, set()) == rows


@pytest.fixture(scope="module")
def canaries(base, gptq, tmp_path_factory):
    """Inputs, links and files of somebody else."""
    folder = tmp_path_factory.mktemp("canaries")
    shutil.copytree(base, folder / "model" / "checkpoint_500100")
    shutil.copytree(gptq[0], folder / "compressed")
    recode_checkpoint(gptq[0], folder / "compressed_qmoe", "qmoe", progress=False)
    shutil.copy(golden_data.DEMO / "sentencepiece.model", folder / "vocabulary.model")
    few = CALIBRATION[:8]
    write_tokens(folder / "tokens.npz", few.tokens, few.metadata)
    (folder / "folder").mkdir()
    (folder / "folder" / "thesis.tex").write_text("mine")
    (folder / "notes.txt").write_text("mine")
    (folder / "link").symlink_to("model")
    (folder / "loop").symlink_to("loop")
    (folder / "dangling").symlink_to("absent")
    (folder / "unreadable").write_text("mine")
    (folder / "unreadable").chmod(0)
    return folder


@pytest.mark.parametrize("row", PATHS, ids=lambda row: f"{row.command}-{row.name}")
def test_wrong_paths(row, canaries, monkeypatch, capsys):
    monkeypatch.chdir(canaries)
    before = tree(canaries)
    wrong = {}
    for kind, path in row.wrong.items():
        status = main([row.command, *row.command_line(path)])
        captured = capsys.readouterr()
        lines = captured.err.splitlines()
        named = [path.partition("\n")[0][:10]] if path else ["empty", "''", "FILES"]
        if status != 2 or captured.out or len(lines) != 1 or not any(n in lines[0] for n in named):
            wrong[kind] = f"exit status {status}: {captured.err[-500:]}"
        after = tree(canaries)
        if after != before:
            changed = [path for path in before if after.get(path) != before[path]]
            wrong[kind] = f"changed {changed}, added {sorted(after.keys() - before.keys())[:5]}"
            for new in sorted(after.keys() - before.keys(), reverse=True):
                path = canaries / new
                path.rmdir() if path.is_dir() else path.unlink()
    assert not wrong, json.dumps(wrong, indent=1)
