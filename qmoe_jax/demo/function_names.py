"""A task to fine-tune on that every installation has: the name of a function, from its docstring.

Packages are split, not functions: validation asks for names in packages of which nothing was seen.
Source files are parsed, never imported. What is found depends on the installed versions alone.
"""

import ast
import hashlib
import importlib.util
import json
import os
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

from qmoe_jax.atomic_file import open_atomically

TRAINING = ("jax", "numpy", "scipy", "tensorflow", "orbax", "etils", "pip", "setuptools", "fsspec")
VALIDATION = ("optax", "flax", "rich", "requests", "urllib3", "chex", "seqio", "pygments")
MIN_CHARACTERS = 40


def function_names(packages: Sequence[str]) -> list[tuple[str, str]]:
    """Return docstrings and the words of their functions' names, in an order that mixes packages.

    Of equal docstrings the first is kept; private functions and short docstrings are left out, and
    packages that are not installed.
    """
    found: dict[str, str] = {}
    for package in packages:
        for node in _functions(package):
            text = ast.get_docstring(node) or ""
            if len(text) >= MIN_CHARACTERS:
                found.setdefault(text, node.name.replace("_", " "))
    return sorted(found.items(), key=lambda pair: hashlib.sha256(pair[0].encode()).digest())


def write_pairs(path: str | os.PathLike[str], packages: Sequence[str]) -> int:
    """Write what `function_names` finds as JSON lines with `inputs` and `targets`; return how many.

    Args:
      path: local file, replaced whole.
      packages: names of packages.
    """
    pairs = function_names(packages)
    lines = [json.dumps({"inputs": text, "targets": name}) + "\n" for text, name in pairs]
    with open_atomically(path) as file:
        file.write("".join(lines).encode())
    return len(pairs)


def _functions(package: str) -> Iterator[ast.FunctionDef]:
    spec = importlib.util.find_spec(package)
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        root = Path(folder)
        for file in sorted(root.rglob("*.py")):
            if "test" in file.relative_to(root).as_posix():
                continue
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # other people's invalid escapes
                    tree = ast.parse(file.read_text("utf-8"))
            except (SyntaxError, ValueError, RecursionError):
                continue
            for node in ast.walk(tree):
                if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
                    yield node
