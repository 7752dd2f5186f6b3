"""Commands without the packages that they need: one line that says what to install."""

import inspect
import os
import subprocess
import sys
from pathlib import Path

import golden_data
import pytest
from command import refusal

import qmoe_jax.demo
from qmoe_jax.__main__ import _EXTRAS, COMMANDS, main

REPOSITORY = Path(__file__).parent.parent
VOCABULARY = str(golden_data.DEMO / "sentencepiece.model")


class Hide:
    """Finds no package of the given names, as if they were not installed."""

    def __init__(self, packages):
        self.packages = packages

    def find_spec(self, name, path=None, target=None):
        if name in self.packages:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


@pytest.fixture
def without(monkeypatch):
    """Hides packages in this process."""

    def hide(*packages):
        for name in [name for name in sys.modules if name.split(".")[0] in packages]:
            monkeypatch.delitem(sys.modules, name)
        monkeypatch.setattr(sys, "meta_path", [Hide(packages), *sys.meta_path])

    return hide


def test_text_to_tokens_needs_seqio(without, capsys, tmp_path):
    (tmp_path / "a.txt").write_text("Some text.")
    without("seqio")
    text = ["--source", "text", "--files", str(tmp_path), "--vocabulary", VOCABULARY]
    line = refusal(capsys, "prepare-tokens", *text, "--output", str(tmp_path / "x.npz"))
    assert line.endswith(": seqio is not installed: pip install 'qmoe-jax[data]'")


def test_filling_blanks_needs_sentencepiece(without, capsys):
    pytest.importorskip("gin")
    without("sentencepiece")
    checkpoint = golden_data.DEMO / "checkpoint_4200"
    bindings = [f"--gin.CHECKPOINT='{checkpoint}'", f"--gin.VOCABULARY='{VOCABULARY}'"]
    line = refusal(capsys, "infer", *bindings, "A <extra_id_0>.")
    assert line.endswith(": sentencepiece is not installed: pip install 'qmoe-jax[data]'")


def test_the_demo_s_page_needs_matplotlib(without, capsys, monkeypatch, tmp_path):
    """Said at once, not when everything else is done."""
    without("matplotlib")
    for module in ("qmoe_jax.demo.report", "qmoe_jax.demo.run"):
        monkeypatch.delitem(sys.modules, module, raising=False)
    monkeypatch.delattr(qmoe_jax.demo, "report", raising=False)  # where `from` looks first
    line = refusal(capsys, "demo", "--output", str(tmp_path / "out"))
    assert line.endswith(": matplotlib is not installed: pip install 'qmoe-jax[plots]'")
    assert not (tmp_path / "out").exists()


def test_a_package_without_an_extra_is_named_itself(capsys, monkeypatch):
    def needs(arguments):
        raise ModuleNotFoundError("No module named 'tqdm'", name="tqdm")

    monkeypatch.setattr("qmoe_jax.cli.inspect.main", needs)
    assert refusal(capsys, "inspect", "x").endswith(": tqdm is not installed: pip install tqdm")


@pytest.mark.parametrize("name", ["qmoe_jax", "jax.no_such_module", None])
def test_a_mistake_of_ours_keeps_its_traceback(monkeypatch, name):
    def needs(arguments):
        raise ModuleNotFoundError("No such module", name=name)

    monkeypatch.setattr("qmoe_jax.cli.inspect.main", needs)
    with pytest.raises(ModuleNotFoundError):
        main(["inspect", "x"])


def test_every_command_helps_without_any_extra():
    """In a checkout that is not installed, whose folder gin/ is not gin-config."""
    hidden = [name for name in _EXTRAS if name != "gin"] + ["gin.config"]
    code = f"""
import sys
{inspect.getsource(Hide)}
sys.meta_path.insert(0, Hide({hidden}))
from qmoe_jax.__main__ import main
for command in {list(COMMANDS)}:
    try:
        main([command, "--help"])
    except SystemExit as end:
        assert end.code == 0, command
    else:
        raise AssertionError(command)
"""
    result = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=REPOSITORY,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    for command in COMMANDS:
        assert f"usage: qmoe-jax {command} " in result.stdout
