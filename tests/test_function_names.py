"""The task to fine-tune on: names of functions, from the packages that are asked for."""

import json

import pytest

from qmoe_jax.demo.function_names import TRAINING, VALIDATION, function_names, write_pairs

SOURCE = '''
def sort_all_rows(x):
    """Sorts the rows of an array by what stands in their first column."""

def _private(x):
    """Is left out, however long its docstring may be, since it is private."""

def short(x):
    """Too short."""

class A:
    def again(self):
        """Sorts the rows of an array by what stands in their first column."""

    def method_of_a(self):
        """Says of every row whether it is the first of those that are equal."""
'''
PAIRS = {
    "Sorts the rows of an array by what stands in their first column.": "sort all rows",
    "Says of every row whether it is the first of those that are equal.": "method of a",
}


@pytest.fixture
def package(tmp_path, monkeypatch):
    folder = tmp_path / "site" / "a_made_package"
    (folder / "tests").mkdir(parents=True)
    (folder / "__init__.py").write_text(SOURCE)
    (folder / "broken.py").write_text("def (")
    (folder / "tests" / "some.py").write_text(SOURCE.replace("Sorts", "Tests"))
    monkeypatch.syspath_prepend(tmp_path / "site")
    return folder.name


def test_pairs_are_docstrings_and_names(package):
    assert dict(function_names((package, "no_such_package"))) == PAIRS


def test_splits_share_no_package():
    assert not set(TRAINING) & set(VALIDATION)


def test_written_lines(package, tmp_path):
    path = tmp_path / "pairs.jsonl"
    assert write_pairs(path, (package,)) == 2
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert {line["inputs"]: line["targets"] for line in lines} == PAIRS
    assert write_pairs(path, ()) == 0
    assert path.read_text() == ""
