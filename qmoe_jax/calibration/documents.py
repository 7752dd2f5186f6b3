"""Documents in files: which files there are, and the texts in them, one after the other.

Files may be local or on gs:// (TensorFlow's file system reads both); `.gz` is unpacked.
"""

import glob
import gzip
import json
import os
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence

from qmoe_jax.calibration import text_packages
from qmoe_jax.checkpoints.storage import check_reachable
from qmoe_jax.errors import TokensError
from qmoe_jax.paths import expanded

# For each split a path, a glob, a folder, or several of these.
Files = Mapping[str, str | Sequence[str]]


def find_json_files(files: Files) -> dict[str, list[str]]:
    """Files with a JSON object a line, sorted; of a folder those that end in .json[l][.gz].

    Raises:
      TokensError: a pattern without a file.
    """
    endings = (".json", ".jsonl", ".json.gz", ".jsonl.gz")
    return _find_files(files, endings, ".json or .json.gz files with one document a line")


def find_text_files(files: Files) -> dict[str, list[str]]:
    """Text files, sorted; of a folder those that end in .txt[.gz], in folders below it too.

    Raises:
      TokensError: a pattern without a file.
    """
    return _find_files(files, (".txt", ".txt.gz"), "UTF-8 text files, or of a folder of .txt files")


def local_stamps(patterns: Iterable[str]) -> list[str]:
    """Describe local files by name, size and modification time, to tell whether any has changed.

    Needs no TensorFlow. Files on gs:// are described by the pattern alone.

    Args:
      patterns: paths, globs or folders, of which all files count.
    """
    stamps = []
    for pattern in patterns:
        if "://" in pattern:
            stamps.append(pattern)
            continue
        pattern = expanded(pattern, "files", TokensError)
        found = glob.glob(pattern)
        if os.path.isdir(pattern):
            found = [os.path.join(f, name) for f, _, names in os.walk(pattern) for name in names]
        for path in sorted(path for path in found if os.path.isfile(path)):
            status = os.stat(path)
            stamps.append(f"{path} {status.st_size} {status.st_mtime_ns}")
    return stamps


def text_files(paths: Sequence[str]) -> Iterator[str]:
    """Return the text of each UTF-8 file.

    Raises:
      TokensError: a file that cannot be unpacked or is not UTF-8.
    """
    tf = text_packages.tensorflow()

    for path in paths:
        try:
            with tf.io.gfile.GFile(path, "rb") as raw:
                content = raw.read()
            if path.endswith(".gz"):
                content = gzip.decompress(content)
            yield content.decode()
        except (ValueError, OSError, EOFError, zlib.error) as error:
            raise TokensError(f"{path} {_fault(error)}; needed is UTF-8 text.") from error


def json_lines(paths: Sequence[str]) -> Iterator[str]:
    """Return the "text" of each line that is not blank.

    Raises:
      TokensError: a line that is no JSON object with "text", or a file that cannot be unpacked.
    """
    for record in json_records(paths, ("text",)):
        yield record["text"]


def json_records(paths: Sequence[str], keys: Sequence[str]) -> Iterator[dict[str, str]]:
    """Return the texts under some keys of each line that is not blank.

    Raises:
      TokensError: a line that is no JSON object with these, or a file that cannot be unpacked.
    """
    tf = text_packages.tensorflow()
    needed = " and ".join(f'"{key}"' for key in keys)

    for path in paths:
        done = 0
        try:
            with tf.io.gfile.GFile(path, "rb") as raw:
                lines = gzip.GzipFile(fileobj=raw) if path.endswith(".gz") else raw
                for line in lines:
                    if line.strip():
                        yield _texts_of(line, keys)
                    done += 1
        except (ValueError, OSError, EOFError, zlib.error) as error:
            raise TokensError(
                f"{path} line {done + 1} {_fault(error)}; needed is a JSON object with {needed} a "
                "line."
            ) from error


def _texts_of(line: bytes, keys: Sequence[str]) -> dict[str, str]:
    """Return the texts of a JSON line.

    Raises:
      ValueError: it has not all of them.
    """
    record = json.loads(line)
    for key in keys:
        if not isinstance(record, dict) or key not in record:
            raise ValueError(f'has no "{key}"')
        if not isinstance(record[key], str):
            raise ValueError(f'has {record[key]!r:.40} as its "{key}"')
    return {key: record[key] for key in keys}


def _fault(error: Exception) -> str:
    """Say what is wrong with a document, without the document."""
    if isinstance(error, UnicodeDecodeError):
        return f"is not UTF-8 (at byte {error.start:,})"
    if isinstance(error, json.JSONDecodeError):
        return f"is no JSON ({error.msg} at character {error.pos})"
    if isinstance(error, OSError | EOFError | zlib.error):
        return f"cannot be read ({error})"
    return str(error)


def _matches(pattern: str, endings: tuple[str, ...]) -> list[str]:
    """Return the files of a folder that end so, or those that a path or glob names; sorted."""
    tf = text_packages.tensorflow()

    if not tf.io.gfile.isdir(pattern):
        return sorted(tf.io.gfile.glob(pattern))
    return sorted(
        os.path.join(folder, name)
        for folder, _, names in tf.io.gfile.walk(pattern)
        for name in names
        if name.endswith(endings)
    )


def _find_files(files: Files, endings: tuple[str, ...], needed: str) -> dict[str, list[str]]:
    """Return the files of each split, sorted within each pattern or folder."""
    tf = text_packages.tensorflow()

    found: dict[str, list[str]] = {}
    for split, patterns in files.items():
        found[split] = []
        for given in [patterns] if isinstance(patterns, str) else patterns:
            check_reachable(given)
            pattern = expanded(given, "files", TokensError)
            try:
                matches = _matches(pattern, endings)
            except tf.errors.OpError as error:
                raise TokensError(f"files {pattern!r} cannot be listed: {error.message}") from error
            if not matches:
                raise TokensError(
                    f"No file matches {pattern!r} for split {split!r}; give the path of {needed}."
                )
            found[split] += matches
    return found
