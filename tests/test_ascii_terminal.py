"""On a terminal that has no character but ASCII, no answer is lost and nothing is a traceback."""

import io
import json
import os
import shutil
import subprocess
import sys

import golden_data
import pytest
from factories import random_tokens

import qmoe_jax
from qmoe_jax.__main__ import main
from qmoe_jax.calibration.tokens import write_tokens

pytest.importorskip("gin")

DEMO = golden_data.DEMO
PROMPT = "Café \N{EM DASH} the <extra_id_0> of 数."
ESCAPED = r"Caf\xe9 \u2014 the <extra_id_0> of \u6570."


@pytest.fixture(scope="module")
def folder(tmp_path_factory, base):
    """What commands work on, in a folder whose name no ASCII terminal can show."""
    folder = tmp_path_factory.mktemp("é数")
    shutil.copytree(base, folder / "native", dirs_exist_ok=True)
    qmoe_jax.compress(base, folder / "compressed", method="rtn", progress=False)
    file = random_tokens(1, 4)
    write_tokens(folder / "tokens.npz", file.tokens, file.metadata)
    (folder / "text.txt").write_text("Return the number of the array, Café. " * 60)
    return folder


def gin_flags(folder, **bindings):
    return [f"--gin.{name}={value!r}" for name, value in bindings.items()]


INFER = {"CHECKPOINT": str(DEMO / "checkpoint_4200"), "MAX_DECODE_LENGTH": 4}
INFER["VOCABULARY"] = str(DEMO / "sentencepiece.model")
# What each command is given in that folder, and its exit status.
COMMANDS = {
    "plan": (lambda f: ["plan", f"{f}/native"], 0),
    "prepare-tokens": (
        lambda f: [
            *("prepare-tokens", "--source", "text", "--files", f"{f}/text.txt", "--inputs_length"),
            *("32", "--vocabulary", f"{DEMO}/sentencepiece.model", "--output", f"{f}/new.npz"),
        ],
        0,
    ),
    "compress": (
        lambda f: [
            *("compress", "--gin.CompressionSettings.method='rtn'", "--gin.TOKENS=None"),
            *gin_flags(f, CHECKPOINT=f"{f}/native", OUTPUT=f"{f}/new"),
        ],
        0,
    ),
    "inspect": (lambda f: ["inspect", f"{f}/compressed"], 0),
    "evaluate": (
        lambda f: [
            "evaluate",
            *gin_flags(f, CHECKPOINT=[("é", f"{f}/compressed")], TOKENS=f"{f}/tokens.npz"),
        ],
        0,
    ),
    "infer": (lambda f: ["infer", PROMPT, *gin_flags(f, **INFER)], 0),
    "infer, streaming": (lambda f: ["infer", PROMPT, *gin_flags(f, **INFER, STREAM=True)], 0),
    "finetune": (
        lambda f: [
            *("finetune", "--gin.TRAIN_STEPS=1"),
            *gin_flags(f, INITIAL_CHECKPOINT=f"{f}/native", OUTPUT=f"{f}/x", TOKENS=f"{f}/none"),
        ],
        2,
    ),
    "recover": (
        lambda f: [
            *("recover", *gin_flags(f, CHECKPOINT=f"{f}/native", REFERENCE=f"{f}/native")),
            *gin_flags(f, OUTPUT=f"{f}/x", TOKENS=f"{f}/none"),
        ],
        2,
    ),
    "dequantize": (lambda f: ["dequantize", f"{f}/compressed", f"{f}/dense", "--step", "1"], 0),
    "convert": (lambda f: ["convert", "published", "export", f"{f}/native", f"{f}/x"], 2),
    "demo": (lambda f: ["demo", "--model", f"{f}/none"], 2),
    "a mistake": (lambda f: ["é"], 2),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_no_character_stops_a_command(folder, name, monkeypatch):
    streams = {}
    for stream in ("stdout", "stderr"):
        streams[stream] = io.BytesIO()
        monkeypatch.setattr(sys, stream, io.TextIOWrapper(streams[stream], encoding="ascii"))
    arguments, expected = COMMANDS[name]
    status = main(arguments(folder))
    sys.stderr.flush()
    printed, errors = (stream.getvalue().decode("ascii") for stream in streams.values())
    assert status == expected, errors
    assert "Traceback" not in errors
    if name.startswith("infer"):
        assert printed.startswith(ESCAPED + "\n  -> ")
    elif name not in ("plan", "compress"):  # which name no path, or only its last part
        assert r"\xe9" in printed + errors


def test_every_command_is_tried():
    from qmoe_jax.__main__ import COMMANDS as ALL

    assert COMMANDS.keys() >= ALL.keys()


@pytest.mark.parametrize(
    ("locale", "given"),
    [
        ({"PYTHONIOENCODING": "ascii"}, "--gin.PROMPTS_FILE='-'"),
        ({"LC_ALL": "C"}, PROMPT),
        ({"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}, PROMPT),
    ],
    ids=["stdin and stdout", "Python 3's UTF-8 in C", "C to the letter"],
)
def test_locales(locale, given, tmp_path):
    """A prompt comes as it was typed, and its answer is whole."""
    flags = gin_flags(tmp_path, **INFER, OUTPUT=str(tmp_path / "out.jsonl"))
    result = subprocess.run(
        [sys.executable, "-m", "qmoe_jax", "infer", *flags, given],
        env=os.environ | locale,
        input=PROMPT.encode(),
        capture_output=True,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith((ESCAPED.encode(), PROMPT.encode()))
    (line,) = (tmp_path / "out.jsonl").read_text("utf-8").splitlines()
    assert json.loads(line)["inputs"] == PROMPT


def test_a_prompt_of_no_encoding_is_one_line(capsys):
    assert main(["infer", os.fsdecode(b"Caf\xff <extra_id_0>"), *gin_flags("", **INFER)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert r"'Caf\udcff <extra_id_0>' is not UTF-8" in line
