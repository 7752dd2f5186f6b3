"""Folders that hold checkpoints, local or on gs://, read through one key-value interface.

gs:// goes through TensorStore's own `gcs` driver. It uses Google's application default credentials
where there are any and none otherwise, which public buckets accept.
"""

import dataclasses
import functools
import os
import re
from typing import Any

import tensorstore as ts

from qmoe_jax.captured_stderr import captured_stderr
from qmoe_jax.errors import CheckpointError
from qmoe_jax.paths import expanded

_REACHED_WITHIN = 10.0
# How TensorStore's errors begin where no server has answered.
_NO_ANSWER = ("ABORTED", "UNAVAILABLE", "DEADLINE_EXCEEDED")
_STEP_FOLDER = re.compile(rb"checkpoint_(\d+)/")


def kvstore_spec(path: str | os.PathLike[str]) -> dict[str, Any]:
    """TensorStore key-value spec of a folder, its path ending in '/'.

    Args:
      path: local path (`~` is expanded), `file://` URL or `gs://bucket/prefix`; a trailing '/' is
        allowed.

    Raises:
      CheckpointError: an empty path, another URL scheme, or a gs:// URL without bucket.
    """
    text = expanded(path, "the folder of the checkpoint")
    scheme, separator, rest = text.partition("://")
    if not separator:
        scheme, rest = "file", text
    if scheme == "file":
        return {"driver": "file", "path": os.path.abspath(rest).rstrip("/") + "/"}
    if scheme == "gs":
        bucket, _, prefix = rest.partition("/")
        prefix = prefix.strip("/")
        return {"driver": "gcs", "bucket": bucket, "path": prefix + "/" if prefix else ""}
    raise CheckpointError(
        f"{text!r} has scheme {scheme}://, which cannot be read: give a local path or gs://"
    )


def write_file(path: str | os.PathLike[str], content: bytes) -> None:
    """Write a local file or an object of gs://, whole or not at all.

    Raises:
      CheckpointError: it cannot be written.
    """
    folder, _, file = os.fspath(path).rpartition("/")
    if not folder:
        folder = "/" if os.fspath(path).startswith("/") else "."
    try:
        ts.KvStore.open(kvstore_spec(folder)).result().write(file, content).result()
    except Exception as error:
        raise CheckpointError(
            f"cannot write {os.fspath(path)}: {short_message(error)}. Check free space and "
            "permissions."
        ) from error


def make_context(cache_bytes: int) -> ts.Context:
    """TensorStore context whose decoded chunks are cached up to `cache_bytes`."""
    return ts.Context(
        {
            "cache_pool": {"total_bytes_limit": cache_bytes},
            # Three minutes: a run of hours outlives a network that stutters. The default of 32
            # retries makes one that went away look like a hang.
            "gcs_request_retries": {"max_retries": 10},
        }
    )


def open_folder(path: str | os.PathLike[str], cache_bytes: int = 0) -> "Folder":
    """Return a folder, whether it exists or not.

    Raises:
      CheckpointError: another URL scheme, or storage that cannot be reached.
    """
    spec = kvstore_spec(path)
    check_reachable(path)
    return Folder(spec, make_context(cache_bytes))


def check_reachable(path: str | os.PathLike[str]) -> None:
    """Find out within seconds whether storage can be reached; local paths always can.

    Raises:
      CheckpointError: it cannot.
    """
    text = os.fspath(path)
    if not text.startswith("gs://"):
        return
    try:
        _reach(text.removeprefix("gs://").partition("/")[0])
    except ConnectionError as error:
        raise CheckpointError(
            f"cannot reach {text}: {error}. Check the network and its proxy settings, or copy it "
            "to a local disk and give that path"
        ) from error


@functools.cache
def _reach(bucket: str) -> None:
    """Ask a bucket for anything, once a process where an answer comes.

    Raises:
      ConnectionError: none does, and why.
    """
    quick = ts.Context({"gcs_request_retries": {"max_retries": 1, "initial_delay": "0.2s"}})
    spec = {"driver": "gcs", "bucket": bucket, "path": ""}
    cause = ""
    # TensorStore tells of credentials that it did not find; public buckets need none.
    with captured_stderr():
        try:
            store = ts.KvStore.open(spec, context=quick).result(timeout=_REACHED_WITHIN)
            store.read("qmoe_jax_is_there_anybody").result(timeout=_REACHED_WITHIN)
        except TimeoutError:
            cause = f"no answer within {_REACHED_WITHIN:g} seconds"
        except Exception as error:
            # Any other refusal is an answer: what is wanted may be readable all the same.
            if str(error).startswith(_NO_ANSWER):
                cause = short_message(error)
    if cause:
        raise ConnectionError(cause)


def short_message(error: BaseException) -> str:
    """TensorStore's message without the appended spec and source locations."""
    return re.split(r" \[(?:tensorstore_spec|source locations)=", str(error), maxsplit=1)[0]


@dataclasses.dataclass(frozen=True)
class Folder:
    """A local folder or gs:// prefix.

    Attributes:
      spec: TensorStore key-value spec; `spec["path"]` ends in '/'.
      context: TensorStore context that reads share.
    """

    spec: dict[str, Any]
    context: ts.Context

    @property
    def url(self) -> str:
        """What messages call the folder: a local path or a gs:// URL, without trailing '/'."""
        path = self.spec["path"].rstrip("/")
        return f"gs://{self.spec['bucket']}/{path}" if self.spec["driver"] == "gcs" else path or "/"

    @property
    def name(self) -> str:
        """Last component of the path."""
        return self.spec["path"].rstrip("/").rpartition("/")[2]

    def child(self, name: str) -> "Folder":
        """Return the folder `name` inside this one, whether it exists or not."""
        return dataclasses.replace(self, spec=self.spec | {"path": f"{self.spec['path']}{name}/"})

    def parent(self) -> "Folder":
        """Return the folder that holds this one."""
        above = self.spec["path"].rstrip("/").rpartition("/")
        return dataclasses.replace(self, spec=self.spec | {"path": above[0] + above[1]})

    def read(self, key: str) -> bytes | None:
        """Content of a file, or None where there is no such file.

        Raises:
          CheckpointError: the file is there and cannot be read, or the storage cannot be reached.
        """
        if self.spec["driver"] == "file" and os.path.isdir(self.spec["path"] + key):
            return None
        try:
            store = ts.KvStore.open(self.spec, context=self.context).result()
            result = store.read(key).result()
        except Exception as error:
            raise CheckpointError(
                f"cannot read {self.url}/{key}: {short_message(error)}. "
                "Check that the path is right and that it is readable with your credentials."
            ) from error
        return result.value if result.state == "value" else None

    def steps(self) -> tuple[int, ...]:
        """Ascending steps of the `checkpoint_<step>` folders inside this one, links to some too."""
        if self.spec["driver"] == "file":
            return self._local_steps()
        # '`' follows '_': the range holds the keys that begin with 'checkpoint_'.
        keys = ts.KvStore.KeyRange(b"checkpoint_", b"checkpoint`")
        try:
            store = ts.KvStore.open(self.spec, context=self.context).result()
            listed = store.list(keys).result()
        except Exception as error:
            raise CheckpointError(
                f"cannot list {self.url}: {short_message(error)}. "
                "Give the checkpoint_<step> folder itself, which needs no listing."
            ) from error
        matches = (_STEP_FOLDER.match(key) for key in listed)
        return tuple(sorted({int(match[1]) for match in matches if match}))

    def _local_steps(self) -> tuple[int, ...]:
        # TensorStore lists neither what links lead to nor, without all its files, a single folder.
        steps = []
        try:
            for name in os.listdir(self.spec["path"]):
                match = _STEP_FOLDER.fullmatch(os.fsencode(name) + b"/")
                folder = os.path.join(self.spec["path"], name)
                if match and os.path.isdir(folder) and os.listdir(folder):
                    steps.append(int(match[1]))
        except OSError as error:
            raise CheckpointError(
                f"cannot list {self.url}: {error.strerror}. Check that it is a folder that you may "
                "read."
            ) from error
        return tuple(sorted(steps))
