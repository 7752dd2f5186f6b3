"""The task to fine-tune on: names of functions, from the packages that are asked for."""

import ast
import importlib
import json

from qmoe_jax.demo.function_names import TRAINING, VALIDATION, function_names, write_pairs


def test_pairs_are_docstrings_and_names():
    pairs = dict(function_names(("einops", "no_such_package")))
    einops = importlib.import_module("einops")
    text = ast.get_docstring(ast.parse(f'def f():\n    """{einops.rearrange.__doc__}"""'))
    assert pairs[text] == "rearrange"
    assert all(len(text) >= 40 and "_" not in name for text, name in pairs.items())


def test_splits_share_no_package():
    assert not set(TRAINING) & set(VALIDATION)


def test_written_lines(tmp_path):
    path = tmp_path / "pairs.jsonl"
    assert write_pairs(path, ("einops",)) == len(function_names(("einops",)))
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(line["inputs"], line["targets"]) for line in lines] == function_names(("einops",))
    assert write_pairs(path, ()) == 0
    assert path.read_text() == ""
