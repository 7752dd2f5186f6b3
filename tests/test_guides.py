"""The command lines of README.md and docs/: each is understood, and most run on a small model."""

import ast
import gzip
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from string import Template

import pytest
from golden_data import DEMO

from qmoe_jax.__main__ import BAD_INPUT, COMMANDS, main
from qmoe_jax.demo import docstrings

pytest.importorskip("gin")
REPOSITORY = Path(__file__).parent.parent
GUIDES = ("README.md", *sorted(f"docs/{p.name}" for p in (REPOSITORY / "docs").glob("*.md")))


# --- Command lines of a guide ---


def command_lines(guide):
    """Yields the arguments of each `qmoe-jax ...` in shell blocks, in inline code, in comments."""
    text = (REPOSITORY / guide).read_text()
    for block in re.findall(r"^```sh\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        yield from block_lines(block)
    prose = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    for code in re.findall(r"`(qmoe-jax [^`]+)`|<!-- (qmoe-jax .*?) -->", prose, re.DOTALL):
        # NAME, COMMAND, ...: what the reader puts in.
        if not re.search(r" [A-Z]{2,}\b|\.\.\.", " ".join(code)):
            yield shlex.split("".join(code))[1:]


def block_lines(block):
    """Yields the arguments of each `qmoe-jax` line of a shell block, variables put in."""
    values = {}
    for line in logical_lines(block.replace("\\\n", "")):
        if assigned := re.fullmatch(r"(\w+)=(\S+)", line):
            values[assigned[1]] = assigned[2]
        elif line.startswith("qmoe-jax "):
            yield shlex.split(Template(line).substitute(values), comments=True)[1:]


def logical_lines(block):
    """Lines of a shell block; a quoted line break does not end one."""
    line = ""
    for part in block.splitlines():
        line = f"{line}\n{part}" if line else part
        try:
            shlex.split(line, comments=True)
        except ValueError:  # a quotation goes on
            continue
        yield line.strip()
        line = ""


LINES = [(guide, arguments) for guide in GUIDES for arguments in command_lines(guide)]
IDS = [f"{guide}: {' '.join(arguments)[:50]}" for guide, arguments in LINES]


def test_every_command_is_in_a_guide():
    assert {arguments[0] for _, arguments in LINES} >= set(COMMANDS) - {"convert", "demo"}
    assert all(arguments[0] in COMMANDS for _, arguments in LINES)


def test_what_is_read_from_a_block():
    block = (
        "pip install x\nD=a/b\n"
        "qmoe-jax plan $D --device t4  # a comment\n"
        "qmoe-jax evaluate --gin.CHECKPOINT=\"[('a', '$D'),\n   ('b', 'c')]\" \\\n  --gin.X=1\n"
    )
    assert list(block_lines(block)) == [
        ["plan", "a/b", "--device", "t4"],
        ["evaluate", "--gin.CHECKPOINT=[('a', 'a/b'),\n   ('b', 'c')]", "--gin.X=1"],
    ]


# --- Understood ---


def offline(arguments):
    """The same command line with local paths that do not exist in place of those on gs://."""
    local = [argument.replace("gs://", "nowhere/") for argument in arguments]
    if local[0] == "prepare-tokens" and "--vocabulary" not in local:
        local += ["--vocabulary", "nowhere/sentencepiece.model"]
    if any("gin/models/" in argument for argument in local):
        local.append("--gin.CHECKPOINT='nowhere/checkpoint_550000'")
    return local


@pytest.fixture
def folder(monkeypatch, tmp_path):
    """The working folder, empty; the demo's corpus is one package, which is quickly read."""
    monkeypatch.chdir(tmp_path)
    harvest = docstrings.harvest
    monkeypatch.setattr(docstrings, "harvest", lambda: harvest(("numpy",)))
    return tmp_path


@pytest.mark.parametrize(("guide", "arguments"), LINES, ids=IDS)
def test_a_command_line_is_understood(folder, capsys, guide, arguments):
    """In an empty folder: it runs, or what it names is not there, which is said in one line."""
    if len(arguments) == 1:
        return  # a command's name in a sentence
    arguments = offline(arguments)
    status = main(arguments)
    captured = capsys.readouterr()
    if status != BAD_INPUT:
        assert arguments[0] == "plan"  # which needs no files: 0 it fits, 1 it does not
        assert captured.out
        return
    assert captured.out == ""
    line = captured.err.splitlines()[-1]
    assert line.startswith(f"qmoe-jax {arguments[0]}: ")
    paths = [path for a in arguments for path in re.findall(r"[\w.?-]*[./][\w./?-]*\w", a)]
    assert any(path in line for path in paths), line
    for misunderstood in ("--help says more", "is called", "configurable", "gin file"):
        assert misunderstood not in line


@pytest.mark.parametrize("guide", [*GUIDES, "configs/README.md", "kernels_cuda/README.md"])
def test_commands_have_one_spelling(guide):
    assert not re.findall(r"python -m qmoe_jax\.\w+", (REPOSITORY / guide).read_text())


# --- What the guides say that commands print ---


PRINTED = [
    (guide, shlex.split(command)[1:], block)
    for guide in GUIDES
    for command, block in re.findall(
        r"<!-- (qmoe-jax [^>]*?) -->\n```\n(.*?)```", (REPOSITORY / guide).read_text(), re.DOTALL
    )
]


@pytest.mark.parametrize(("guide", "arguments", "block"), PRINTED)
def test_a_block_is_what_the_command_prints(folder, capsys, guide, arguments, block):
    assert main(arguments) == 0
    assert capsys.readouterr().out == block


def test_the_guide_shows_what_plan_prints():
    assert len(PRINTED) == 2


# --- Run ---


def on_the_demo(arguments):
    """A guide's command line for the demo's model: few examples, and rounding in GPTQ's place."""
    words = {"10000": "4", "1280": "4", "128": "2", "64": "2"}
    checkpoint = str(DEMO / "checkpoint_4200")
    changed = [words.get(a, a).replace("/data/checkpoint_550000", checkpoint) for a in arguments]
    if changed[0] == "prepare-tokens":
        return [*changed, "--vocabulary", str(DEMO / "sentencepiece.model"), "--inputs_length=64"]
    if changed[0] == "compress":
        changed.append("--gin.CompressionSettings.method='rtn'")
        changed.append(f"--gin.CHECKPOINT='{checkpoint}'")
    return changed


def test_the_guide_runs_in_its_order(folder, capsys):
    """Text, compress, check: each line on what those before it wrote."""
    (folder / "sentencepiece.model").symlink_to(DEMO / "sentencepiece.model")
    text = [json.dumps({"text": f"Return the number {i} of the array. " * 60}) for i in range(40)]
    for name in ("c4-train.00000-of-01024.json.gz", "c4-validation.00000-of-00008.json.gz"):
        with gzip.open(folder / name, "wt") as file:
            file.write("\n".join(text))
    printed = {}
    for arguments in command_lines("docs/compress_public_checkpoint.md"):
        if len(arguments) > 1 and arguments[0] != "plan" and "c4_tfds" not in arguments:
            status = main(on_the_demo(arguments))
            captured = capsys.readouterr()
            assert status == 0, captured.err
            printed[arguments[0]] = captured.out
    assert "compressed/checkpoint_550000: 8,388,608 expert weights at 0." in printed["compress"]
    assert "validation loss" in printed["compress"]
    assert (folder / "compress.jsonl").exists()
    assert "smaller" in printed["inspect"]
    assert "RTN" in printed["evaluate"]
    assert (folder / "eval_out" / "metrics.json").exists()
    assert "=> The " in printed["infer"]
    # The native checkpoint of the other guide, from this one's.
    ((command, _, *rest),) = [
        a for a in command_lines("docs/t5x.md") if a[0] == "dequantize" and len(a) > 1
    ]
    assert main([command, "compressed/checkpoint_550000", *rest]) == 0
    assert (folder / "native" / "checkpoint_550000").is_dir()


def test_the_readme_runs_in_its_order(folder, capsys):
    """Its commands, and then its Python on what they wrote."""
    (folder / "tests").symlink_to(REPOSITORY / "tests")
    for arguments in command_lines("README.md"):
        if len(arguments) > 1 and arguments[0] != "plan":
            assert main(on_the_demo(arguments)) == 0, capsys.readouterr().err
    capsys.readouterr()
    (program,) = re.findall(
        r"^```python\n(.*?)^```", (REPOSITORY / "README.md").read_text(), re.MULTILINE | re.DOTALL
    )
    exec(compile(program, "README.md", "exec"), {})
    answer, losses = capsys.readouterr().out.splitlines()[-2:]
    assert answer.startswith("Returns the ")
    assert [name for name, _, _ in ast.literal_eval(losses)] == ["checkpoint_4200", "compressed"]


# --- Gin files of an installed package, for T5X's own programs ---


def test_the_link_makes_the_gin_files_known(folder):
    """With gin's own search, which T5X uses: in the working folder, and by a search path."""
    (line,) = re.findall(r"^ln -s .* gin$", (REPOSITORY / "docs/t5x.md").read_text(), re.MULTILINE)
    python = line.replace("$(python ", f"$({shlex.quote(sys.executable)} ")
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    subprocess.run(["bash", "-c", python], check=True, env=environment)
    assert (folder / "gin").resolve() == REPOSITORY / "gin"
    program = (
        "import importlib.util, os, sys, gin\n"
        "def read():\n"
        "    gin.clear_config()\n"
        "    gin.parse_config(\"include 'gin/t5x/model.gin'\", skip_unknown=True)\n"
        "    print(gin.query_parameter('ACTIVATION_DTYPE/macro.value'))\n"
        "read()\n"
        "gin.add_config_file_search_path(os.getcwd())\n"
        "os.chdir('/')\n"
        "read()"
    )
    found = subprocess.run(
        [sys.executable, "-c", program],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.returncode == 0, found.stderr
    assert found.stdout == "float32\n" * 2
