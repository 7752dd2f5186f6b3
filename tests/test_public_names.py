"""The public names: one table, and what completion and type checkers see of it."""

import ast
import inspect
import json
import subprocess
import sys
from pathlib import Path

import pytest

import qmoe_jax

INIT = Path(__file__).parent.parent / "qmoe_jax" / "__init__.py"
NAMES = [
    "CheckpointError",
    "CodecError",
    "CompressionReport",
    "CompressionSettings",
    "CudaError",
    "FinetuneSettings",
    "LossReport",
    "SwitchConfig",
    "SwitchTransformer",
    "TokensError",
    "Vocabulary",
    "compress",
    "evaluate",
    "finetune",
    "generate",
    "load_switch",
    "open_t5x_checkpoint",
    "read_tokens",
    "recover",
]


def for_type_checkers():
    """Where the block for type checkers imports each name from; each is `X as X`, a re-export."""
    (block,) = (
        node
        for node in ast.parse(INIT.read_text()).body
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
    )
    found = {}
    for node in block.body:
        assert isinstance(node, ast.ImportFrom)
        (alias,) = node.names
        assert alias.asname == alias.name
        found[alias.name] = node.module
    return found


def test_the_table_the_type_checkers_block_and_all_agree():
    homes = {name: f"qmoe_jax.{home}" for name, home in qmoe_jax._HOMES.items()}
    assert for_type_checkers() == homes
    assert list(homes) == qmoe_jax.__all__ == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_a_name_is_what_its_home_defines(name):
    value = getattr(qmoe_jax, name)
    assert value.__module__ == f"qmoe_jax.{qmoe_jax._HOMES[name]}"
    assert value.__name__ == name
    assert inspect.getdoc(value)
    assert name in dir(qmoe_jax)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'qmoe_jax' has no attribute 'comprss'"):
        _ = qmoe_jax.comprss  # pyright: ignore[reportAttributeAccessIssue]


def test_modules_do_not_hide_names():
    """`import qmoe_jax.x` sets the attribute x: it must not be one of the names."""
    modules = {path.stem for path in INIT.parent.glob("*.py")}
    folders = {path.parent.name for path in INIT.parent.glob("*/__init__.py")}
    assert not (modules | folders) & set(NAMES)


def test_a_type_checker_finds_them(tmp_path):
    pytest.importorskip("pyright")
    program = tmp_path / "user.py"
    program.write_text(
        "import qmoe_jax\n"
        + "".join(f"reveal_type(qmoe_jax.{name})\n" for name in NAMES)
        + "qmoe_jax.comprss\n"
    )
    checked = subprocess.run(
        [sys.executable, "-m", "pyright", "--pythonpath", sys.executable, "--outputjson", program],
        capture_output=True,
        text=True,
        cwd=INIT.parent.parent,
        check=False,
    )
    if not checked.stdout.startswith("{"):
        pytest.skip(f"pyright does not run here: {checked.stderr.strip()[-200:]}")
    found = json.loads(checked.stdout)["generalDiagnostics"]
    (mistake,) = (d for d in found if d["severity"] == "error")
    assert mistake["rule"] == "reportAttributeAccessIssue"
    assert "comprss" in mistake["message"]
    types = [d["message"] for d in found if d["severity"] == "information"]
    assert len(types) == len(NAMES)
    for name, text in zip(NAMES, types, strict=True):
        assert f'"qmoe_jax.{name}" is' in text
        assert not text.endswith('"Unknown"')
        if name[0].isupper():
            assert text.endswith(f'"type[{name}]"')
