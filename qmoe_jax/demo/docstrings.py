"""The demo corpus: docstrings of the standard library and of installed packages.

The demo model was trained on such docstrings, so its loss can be measured on text that every
installation already has. Source files are parsed, never imported. What is found depends on the
installed versions alone: not on paths, file times or hashing seeds.
"""

import ast
import functools
import gc
import hashlib
import importlib.metadata
import os
import re
import sys
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path

from qmoe_jax.calibration.tokens import TokenFile

MIN_CHARACTERS = 200
VALIDATION_SHARE = 25  # one docstring in so many

# What the demo model was trained on, beside the standard library.
# fmt: off
PACKAGES = (
    "absl", "astunparse", "attr", "chex", "clu", "docstring_parser", "einops", "etils", "flax",
    "fsspec", "gast", "gin", "google", "grpc", "h5py", "humanize", "idna", "jax", "jaxlib",
    "keras", "markdown", "markdown_it", "ml_collections", "ml_dtypes", "msgpack", "numpy",
    "opt_einsum", "optax", "optree", "orbax", "packaging", "pip", "pkg_resources", "promise",
    "psutil", "pygments", "requests", "rich", "scipy", "seqio", "setuptools", "simple_parsing",
    "tensorboard", "tensorflow", "tensorflow_datasets", "tensorflow_text", "tensorstore",
    "toolz", "tree", "treescope", "urllib3", "wrapt", "yaml",
)
# fmt: on
_SKIPPED_FOLDERS = {"test", "tests", "__pycache__", "_api", "site-packages", "dist-packages"}
# Files below this share of docstrings hold 1 % of the text and take 10 % of the parsing.
_MIN_SHARE = 0.05
_LITERAL = re.compile(rb'("""|\'\'\')(.*?)\1', re.DOTALL)


def is_validation(docstring: str) -> bool:
    """Whether a docstring, as `ast.get_docstring` gives it, belongs to the validation split.

    The rule that the demo model was trained by; another one would leak its training text.
    """
    start = re.sub(r"\W+", " ", docstring)[:120]
    return int(hashlib.sha1(start.encode()).hexdigest()[:8], 16) % VALIDATION_SHARE == 0


@functools.cache
def harvest(packages: tuple[str, ...] = PACKAGES) -> tuple[str, ...]:
    """Docstrings of the standard library and of those packages that are installed.

    They come in the order of package and file. Of docstrings that are equal, or begin with the same
    120 characters, the first is kept. Takes about 15 s of one core for all packages with TensorFlow
    installed; the result is kept for the process.
    """
    paths = sysconfig.get_paths()
    roots = [("", Path(paths["stdlib"]))]
    roots += [(package, Path(paths["purelib"]) / package) for package in packages]
    texts: list[str] = []
    seen: set[str] = set()
    # Syntax trees are many small objects without cycles: the collector would only walk them.
    collecting = gc.isenabled()
    gc.disable()
    try:
        for _, root in sorted(roots):
            for file in _python_files(root):
                for text in file_docstrings(file):
                    if text[:120] not in seen:
                        seen.add(text[:120])
                        texts.append(text)
    finally:
        if collecting:
            gc.enable()
    return tuple(texts)


def corpus_versions() -> list[str]:
    """Return what decides the corpus: the versions of Python and of the packages in it."""
    installed = importlib.metadata.packages_distributions()
    names = sorted({name for package in PACKAGES for name in installed.get(package, ())})
    return [sys.version, *(f"{name} {importlib.metadata.version(name)}" for name in names)]


def file_docstrings(path: Path) -> list[str]:
    """Docstrings of a source file that belong to the corpus; none if it does not parse.

    Left out are those shorter than 200 characters, those that spell a sentinel (it would be read
    as one), those that UTF-8 cannot hold, and files that are nearly all code.
    """
    source = path.read_bytes()
    lengths = (len(match[2]) for match in _LITERAL.finditer(source))
    long = sum(length for length in lengths if length >= MIN_CHARACTERS)
    if long == 0 or long < _MIN_SHARE * len(source):
        return []
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # other people's invalid escapes
            tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError):
        return []
    found = []
    for node in _definitions(tree):
        text = ast.get_docstring(node)
        if text and len(text) >= MIN_CHARACTERS and "<extra_id_" not in text and _is_utf8(text):
            found.append(text)
    return found


def demo_texts(split: str, *, seed: int = 0) -> list[str]:
    """Return the docstrings of a split, shuffled by a hash, so that packages are mixed.

    Raises:
      ValueError: a split other than `train` and `validation`.
    """
    if split not in ("train", "validation"):
        raise ValueError(f"split is {split!r}; the demo corpus has 'train' and 'validation'.")
    texts = [text for text in harvest() if is_validation(text) == (split == "validation")]
    return sorted(texts, key=lambda text: hashlib.sha256(f"{seed}:{text}".encode()).digest())


def demo_tokens(
    vocabulary_path: str,
    split: str,
    num_examples: int,
    *,
    seed: int = 0,
    inputs_length: int = 128,
    targets_length: int | None = 32,
    progress: bool = False,
) -> TokenFile:
    """Corrupted examples of the demo corpus, by the t5x protocol, none with encoder padding.

    Args:
      vocabulary_path: the demo model's `sentencepiece.model`.
      split: `train` or `validation`.
      num_examples: how many.
      seed: seed of the documents' order and of the corruption.
      inputs_length: encoder tokens of an example.
      targets_length: decoder tokens; None is what `inputs_length` gives (29 for 128).
      progress: show a progress bar.

    Raises:
      TokensError: the vocabulary cannot be used, or the installed packages hold less text than
        asked for.
      ValueError: a split other than `train` and `validation`.
    """
    from qmoe_jax.calibration import tasks

    # Before the text is collected, which takes longest.
    tasks.check_count(num_examples)
    tasks.load_vocabulary(vocabulary_path)
    task = tasks.text_task(
        "docstrings", vocabulary_path, {split: demo_texts(split, seed=seed)}, drop_short=True
    )
    return tasks.tokenize_task(
        task,
        split=split,
        num_examples=num_examples,
        inputs_length=inputs_length,
        targets_length=targets_length,
        seed=seed,
        source="docstrings of the standard library and of installed packages",
        progress=progress,
    )


def _python_files(root: Path) -> Iterator[Path]:
    for folder, folders, files in os.walk(root):
        folders[:] = sorted(name for name in folders if name not in _SKIPPED_FOLDERS)
        yield from (Path(folder, name) for name in sorted(files) if name.endswith(".py"))


def _definitions(
    tree: ast.Module,
) -> Iterator[ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef]:
    """Return the nodes that may have a docstring, in the order of the file."""
    stack: list[ast.AST] = [tree]
    while stack:
        node = stack.pop()
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield node
        # Definitions are statements: looking into expressions would take as long as parsing.
        for field in ("finalbody", "orelse", "handlers", "body"):
            children = getattr(node, field, None)
            if isinstance(children, list):
                stack.extend(reversed(children))


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
