"""Where a writer may write: nothing that it did not make is ever deleted or replaced.

A folder is written as `PATH.partial` and renamed when it is whole. What stands at PATH is replaced
only on request, only if it is a finished output of the same kind and holds nothing else, and never
if it is, or holds, an input of the run. All of that is refused before work starts, and looked at
again before the old output goes. A file is replaced only if it is one of the same kind.
"""

import contextlib
import dataclasses
import json
import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

from qmoe_jax.errors import CheckpointError
from qmoe_jax.paths import local_path

_MOST_NAMED = 4


@dataclasses.dataclass(frozen=True)
class FolderKind:
    """What a writer's folders look like.

    Attributes:
      name: for messages, "a compressed checkpoint".
      owns: whether an entry of that name, at the top of the folder, is one that the writer makes.
      is_whole: whether a folder is a finished one.
    """

    name: str
    owns: Callable[[str], bool]
    is_whole: Callable[[Path], bool]


class OutputFolder:
    """A local folder that appears when it is whole.

    Attributes:
      path: where it will be, links resolved.
      partial: where it is written until then.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        kind: FolderKind,
        *,
        inputs: Iterable[str | os.PathLike[str]] = (),
        overwrite: bool = False,
    ):
        """Claim a path; nothing is written yet.

        Args:
          path: of the folder to be; `~` is expanded.
          kind: of the folder.
          inputs: what the run reads, local or not.
          overwrite: replace a finished output of the same kind that is there.

        Raises:
          CheckpointError: something is there that may not be replaced.
        """
        given = local_path(path, "the output")
        check_writable(given, "the output")
        self.path = Path(os.path.realpath(given))
        self.partial = self.path.with_name(self.path.name + ".partial")
        self._previous = self.path.with_name(self.path.name + ".previous")
        self._kind = kind
        self._overwrite = overwrite
        check_no_input(given, inputs)
        self._check()

    def begin(self, *, anew: bool) -> None:
        """Make the partial folder; with `anew`, throw away what an earlier writer left in it.

        Raises:
          CheckpointError: it cannot be made.
        """
        try:
            if anew:
                self._remove(self.partial)
            self.partial.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CheckpointError(
                f"cannot write to {self.partial}: {error}; choose another output"
            ) from error

    def finish(self) -> Path:
        """Give the partial folder its name, in place of an old output; return the path.

        Raises:
          CheckpointError: what is there may not be replaced, or not be renamed.
        """
        self._check()
        try:
            if os.path.lexists(self.path):
                self._remove(self._previous)
                os.rename(self.path, self._previous)
            os.rename(self.partial, self.path)
        except OSError as error:
            raise CheckpointError(
                f"cannot rename {self.partial}, which is whole, to {self.path}: {error}"
            ) from error
        self._remove(self._previous)
        return self.path

    def discard(self) -> None:
        """Delete what was written, for a writer that cannot finish."""
        self._remove(self.partial)

    def _check(self) -> None:
        if os.path.lexists(self.path):
            if not self._overwrite:
                raise CheckpointError(
                    f"{self.path} exists already; choose another output, or pass overwrite=True "
                    "to replace it"
                )
            self._check_own(self.path, whole=True)
            if os.path.lexists(self._previous):
                self._check_own(self._previous, whole=True)
        if os.path.lexists(self.partial):
            self._check_own(self.partial, whole=False)

    def _check_own(self, folder: Path, *, whole: bool) -> None:
        kind = self._kind.name if whole else f"unfinished work on {self._kind.name}"
        refusal = f"{folder} is not {kind}"
        remedy = "it stays as it is; choose another output, or remove it yourself"
        if folder.is_symlink() or not folder.is_dir():
            raise CheckpointError(f"{refusal} but a file; {remedy}")
        entries = sorted(os.listdir(folder))
        if not entries:
            return
        foreign = [name for name in entries if not self._kind.owns(name)]
        if foreign:
            more = ", ..." if len(foreign) > _MOST_NAMED else ""
            listed = ", ".join(foreign[:_MOST_NAMED]) + more
            raise CheckpointError(f"{refusal} alone, it holds {listed}; {remedy}")
        if whole and not self._kind.is_whole(folder):
            raise CheckpointError(f"{refusal}; {remedy}")

    def _remove(self, folder: Path) -> None:
        """Delete what the writer makes, and the folder if nothing else is in it."""
        if folder.is_symlink() or not folder.is_dir():
            return
        for name in os.listdir(folder):
            entry = folder / name
            if not self._kind.owns(name):
                continue
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry)
            else:
                entry.unlink()
        if not os.listdir(folder):
            folder.rmdir()


def output_file(
    path: str | os.PathLike[str],
    what: str,
    is_own: Callable[[Path], bool],
    *,
    inputs: Iterable[str | os.PathLike[str]] = (),
    error: type[ValueError] = CheckpointError,
) -> Path:
    """Return where a file is to be written, before the work that would be lost.

    Args:
      path: of the file; `~` is expanded.
      what: it is, for the message: "the log".
      is_own: whether a file that is there is such a one, and may be replaced.
      inputs: what the run reads, local or not.
      error: to raise.

    Raises:
      ValueError: of the type `error`: no file can be written there, or something is there that may
        not be replaced.
    """
    file = local_path(path, what, error)
    check_writable(file, what, error)
    try:
        check_no_input(file, inputs)
    except CheckpointError as refusal:
        raise error(str(refusal)) from None
    if file.is_dir():
        raise error(f"{what} {file} is a folder; give a file in it, or another")
    if file.exists() and file.stat().st_size and not is_own(file):
        raise error(
            f"{file} is there and is not such a file as {what}; it stays as it is. Choose another, "
            "or remove it yourself"
        )
    return file


def is_json_object(file: Path, keys: Iterable[str]) -> bool:
    """Whether a file holds a JSON object that has these keys, and perhaps others."""
    try:
        content = json.loads(file.read_bytes())
    except (OSError, ValueError):
        return False
    return isinstance(content, dict) and content.keys() >= set(keys)


def check_writable(path: Path, what: str, error: type[ValueError] = CheckpointError) -> None:
    """Refuse a path at which this process can make nothing.

    Args:
      path: local; nothing need be there yet, nor the folders above it.
      what: it is, for the message.
      error: to raise.

    Raises:
      ValueError: of the type `error`.
    """
    try:
        with contextlib.suppress(FileNotFoundError):
            os.stat(path)  # refuses loops of links, what lies below a file, names too long
        place = Path(os.path.realpath(path))
        while not place.exists():
            place = place.parent
        if not os.access(place, os.W_OK):
            raise PermissionError(13, os.strerror(13), os.fspath(place))
    except OSError as refusal:
        raise error(f"cannot write {what} {path} ({refusal.strerror}); choose another") from refusal


def check_is_no_input(folder: Path, what: str, inputs: Iterable[str | os.PathLike[str]]) -> None:
    """Refuse a folder for results or work that is an input itself.

    Raises:
      CheckpointError: such a folder.
    """
    for given in inputs:
        path = os.path.expanduser(os.fspath(given))
        if folder.exists() and os.path.exists(path) and os.path.samefile(folder, path):
            raise CheckpointError(f"{what} is {folder}, an input; choose another folder")


def check_no_input(
    output: str | os.PathLike[str], inputs: Iterable[str | os.PathLike[str]]
) -> None:
    """Refuse an output that is one of the inputs, or a folder that one lies in.

    Files are compared as the system knows them, so links, relative paths, letter case and mount
    points make no difference.

    Args:
      output: local or a URL.
      inputs: local or URLs.

    Raises:
      CheckpointError: such an output.
    """
    where = os.fspath(output)
    for given in inputs:
        if _holds(where, os.fspath(given)):
            raise CheckpointError(
                f"the output {where} is, or holds, the input {given}; it would be lost. Choose "
                "another output"
            )


def _holds(output: str, given: str) -> bool:
    if "://" in output or "://" in given:
        return (given.rstrip("/") + "/").startswith(output.rstrip("/") + "/")
    if not os.path.lexists(os.path.expanduser(output)):
        return False
    path = os.path.abspath(os.path.expanduser(given))
    # A link is lost with the folder that it stands in; what it leads to, with the folder there.
    for start in {path, os.path.realpath(path)}:
        for ancestor in (Path(start), *Path(start).parents):
            if ancestor.exists() and os.path.samefile(ancestor, os.path.expanduser(output)):
                return True
    return False
