"""Arrays of a compressed checkpoint: zarr, with checksums over their entries.

A manifest entry says what an array is: `file`, `dtype`, `shape`, and `checksums`: pairs
[stop, sha256]. A pair covers the entries, along the first axis, from the previous stop (at first 0)
to its own. Several processes that write one array have a pair each. A packed array (see
`packed_arrays`) has also `start`: where its bytes begin in the array of bytes that `file` names.
"""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import tensorstore as ts

from qmoe_jax.checkpoints.storage import Folder, short_message
from qmoe_jax.codec.outline import item_bytes
from qmoe_jax.errors import CheckpointError

CHUNK_BYTES = 1 << 24  # of a chunk on disk, at the most
_REMEDY = "copy the checkpoint again, or compress again"


def entry_bytes(entry: Mapping[str, Any]) -> int:
    """Bytes of an array before compression, by its manifest entry."""
    return item_bytes(entry["dtype"]) * int(np.prod(entry["shape"], dtype=np.int64))


def overhead_bytes(folder: Folder, entries: Sequence[Mapping[str, Any]]) -> int:
    """Bytes of metadata, and where chunks are not compressed of the last ones' filler.

    Args:
      folder: of the checkpoint.
      entries: of all arrays in one folder.

    Raises:
      CheckpointError: the metadata are missing or no JSON.
    """
    file, item = entries[0]["file"], item_bytes(entries[0]["dtype"])
    content = folder.child(file).read(".zarray")
    try:
        metadata = json.loads(content or b"")
        sizes = zip(metadata["shape"], metadata["chunks"], strict=True)
        padded = math.prod(-(-length // chunk) * chunk for length, chunk in sizes)
        compressed = metadata["compressor"] is not None
    except (ValueError, KeyError, TypeError, ZeroDivisionError) as error:
        raise CheckpointError(
            f"{folder.url}/{file}/.zarray is missing or damaged: {_REMEDY}"
        ) from error
    stored = (1 if "start" in entries[0] else item) * padded
    filler = stored - sum(entry_bytes(entry) for entry in entries)
    return len(content or b"") + (0 if compressed else filler)


def create_array(
    folder: Folder,
    name: str,
    dtype: str,
    shape: Sequence[int],
    *,
    compressed: bool = False,
    most: int | None = None,
) -> None:
    """Create an array without contents; what was stored under its name is deleted.

    Args:
      folder: where.
      name: of the array.
      dtype: by name.
      shape: of the array.
      compressed: its chunks, as T5X's are. Codes are near their entropy.
      most: bytes of a chunk; CHUNK_BYTES where None.

    Raises:
      CheckpointError: it cannot be written.
    """
    spec = _spec(folder, name) | {
        "metadata": {
            "shape": list(shape),
            "chunks": _chunk_shape(dtype, shape, most),
            "dtype": "bfloat16" if dtype == "bfloat16" else np.dtype(dtype).newbyteorder("<").str,
            "compressor": {"id": "gzip", "level": 1} if compressed else None,
            "order": "C",
        },
        "create": True,
        "delete_existing": True,
    }
    try:
        ts.open(spec, context=folder.context).result()
    except Exception as error:
        raise _cannot_write(folder, name, error) from error


def write_array(
    folder: Folder, name: str, array: np.ndarray, *, compressed: bool = False
) -> dict[str, Any]:
    """Create and write an array; return its manifest entry."""
    create_array(folder, name, array.dtype.name, array.shape, compressed=compressed)
    writer = ArrayPartWriter(folder, name, 0 if array.ndim else None)
    writer.append(array)
    stop = array.shape[0] if array.ndim else 1
    return array_entry(name, array.dtype.name, array.shape, [[stop, writer.close()]])


def array_entry(
    name: str, dtype: str, shape: Sequence[int], checksums: Sequence[Sequence[Any]]
) -> dict[str, Any]:
    """Return a manifest entry."""
    return {
        "file": name,
        "dtype": dtype,
        "shape": list(shape),
        "checksums": [list(pair) for pair in checksums],
    }


class ArrayPartWriter:
    """Writes a run of an array's entries, piece by piece, in whole chunks where it can.

    Neighbours may write the entries before and behind at the same time: a chunk that two share is
    read, changed and written by each, which TensorStore does atomically.
    """

    def __init__(self, folder: Folder, name: str, start: int | None):
        """Open a created array.

        Args:
          folder: where it is.
          name: of the array.
          start: first entry to write; None for an array without axes.
        """
        self._folder, self._name = folder, name
        try:
            self._store = ts.open(
                _spec(folder, name), open=True, read=True, write=True, context=folder.context
            ).result()
        except Exception as error:
            raise _cannot_write(folder, name, error) from error
        self._position = start
        self._chunk = 1
        if start is not None:
            chunk = self._store.chunk_layout.write_chunk.shape
            self._chunk = int((chunk or self._store.shape)[0] or 1)
        self._waiting: list[np.ndarray] = []
        self._num_waiting = 0
        self._digest = hashlib.sha256()

    def append(self, array: np.ndarray) -> None:
        """Add entries; they may wait in memory until a chunk is full."""
        self._digest.update(_little_endian_bytes(array))
        if self._position is None:
            self._write((), array)
            return
        self._waiting.append(array)
        self._num_waiting += array.shape[0]
        end = self._position + self._num_waiting
        self._flush(end // self._chunk * self._chunk)

    def close(self) -> str:
        """Write what waits; return the sha256 of all entries."""
        if self._position is not None:
            self._flush(self._position + self._num_waiting)
        return self._digest.hexdigest()

    def _flush(self, stop: int) -> None:
        assert self._position is not None
        if stop <= self._position:
            return
        entries = self._waiting[0] if len(self._waiting) == 1 else np.concatenate(self._waiting)
        count = stop - self._position
        self._write(slice(self._position, stop), entries[:count])
        self._position = stop
        self._num_waiting -= count
        self._waiting = [entries[count:].copy()] if self._num_waiting else []

    def _write(self, index: Any, array: np.ndarray) -> None:
        try:
            self._store[index].write(array).result()
        except Exception as error:
            raise _cannot_write(self._folder, self._name, error) from error


def start_read(folder: Folder, entry: Mapping[str, Any]) -> ts.Future:
    """Begin to open a stored array."""
    spec = _spec(folder, entry["file"]) | {"fill_missing_data_reads": False}
    return ts.open(spec, open=True, context=folder.context)


def finish_read(
    folder: Folder,
    what: str,
    entry: Mapping[str, Any],
    opening: ts.Future,
    part: slice | None = None,
) -> np.ndarray:
    """Read an array and check it against its entry.

    Args:
      folder: where it is.
      what: what messages call it.
      entry: its manifest entry.
      opening: of `start_read`.
      part: entries to read, unchecked by checksums; all, checked, where None.

    Raises:
      CheckpointError: it is missing, truncated or altered.
    """
    where = f"{folder.url}/{entry['file']}"
    try:
        store = opening.result()
        chunk = store.chunk_layout.read_chunk.shape or ()
        if "start" in entry:
            _check_pack(what, where, entry, store, chunk)
        elif list(store.shape) != entry["shape"] or store.dtype.name != entry["dtype"]:
            raise CheckpointError(
                f"{what} in {where} is {store.dtype.name} {list(store.shape)}, but the "
                f"manifest says {entry['dtype']} {entry['shape']}: {_REMEDY}"
            )
        # TensorStore makes room for whole chunks, and ends the process where there is none.
        if any(n > max(1, length) for n, length in zip(chunk, store.shape, strict=False)):
            raise CheckpointError(
                f"{what} in {where} has chunks of {list(chunk)}, but the array is "
                f"{list(store.shape)}: {_REMEDY}"
            )
        array = _read_packed(store, entry, part) if "start" in entry else _read(store, part)
    except CheckpointError:
        raise
    except Exception as error:
        raise CheckpointError(
            f"cannot read {what} from {where}: {short_message(error)}: {_REMEDY}"
        ) from error
    if part is None:
        _check(what, where, entry, np.atleast_1d(array))
    return array


def _read(store: ts.TensorStore, part: slice | None) -> np.ndarray:
    return np.asarray((store if part is None else store[part]).read().result())


def _read_packed(store: ts.TensorStore, entry: Mapping[str, Any], part: slice | None) -> np.ndarray:
    start, shape = entry["start"], list(entry["shape"])
    if part is not None:
        entry_size = item_bytes(entry["dtype"]) * math.prod(shape[1:])
        start += part.start * entry_size
        shape[0] = part.stop - part.start
    data = _read(store, slice(start, start + item_bytes(entry["dtype"]) * math.prod(shape)))
    return data.view(np.dtype(entry["dtype"])).reshape(shape)


def _check_pack(
    what: str, where: str, entry: Mapping[str, Any], store: ts.TensorStore, chunk: Sequence[int]
) -> None:
    """Refuse an array of bytes that does not hold a packed one."""
    stop = entry["start"] + entry_bytes(entry)
    if store.dtype.name != "uint8" or store.rank != 1 or store.shape[0] < stop:
        raise CheckpointError(
            f"{what} is said to end at byte {stop} of {where}, which is {store.dtype.name} "
            f"{list(store.shape)}: {_REMEDY}"
        )
    # Nothing else bounds it: the manifest does not have the shape of this array.
    if chunk[0] > CHUNK_BYTES:
        raise CheckpointError(
            f"{where} has chunks of {chunk[0]} bytes; packed arrays lie in chunks of at most "
            f"{CHUNK_BYTES}: {_REMEDY}"
        )


def verify_part(
    folder: Folder, what: str, entry: Mapping[str, Any], start: int, stop: int, checksum: str
) -> None:
    """Check a run of entries, a chunk's worth at a time, against its sha256.

    Raises:
      CheckpointError: they are missing, truncated or altered.
    """
    step = _chunk_shape(entry["dtype"], entry["shape"])[0]
    opening = start_read(folder, entry)
    digest = hashlib.sha256()
    for first in range(start, stop, step):
        piece = finish_read(folder, what, entry, opening, slice(first, min(first + step, stop)))
        digest.update(_little_endian_bytes(piece))
    if digest.hexdigest() != checksum:
        raise _altered(what, f"{folder.url}/{entry['file']}")


def _check(what: str, where: str, entry: Mapping[str, Any], array: np.ndarray) -> None:
    start = 0
    for stop, checksum in entry["checksums"]:
        if hashlib.sha256(_little_endian_bytes(array[start:stop])).hexdigest() != checksum:
            raise _altered(what, where)
        start = stop
    if start != array.shape[0]:
        raise _altered(what, where)


def _altered(what: str, where: str) -> CheckpointError:
    return CheckpointError(
        f"{what} in {where} does not match its checksum in the manifest: the file is damaged, "
        f"{_REMEDY}"
    )


def _cannot_write(folder: Folder, name: str, error: Exception) -> CheckpointError:
    return CheckpointError(
        f"cannot write {folder.url}/{name}: {short_message(error)}. "
        "Check free space and permissions, then run again."
    )


def _spec(folder: Folder, name: str) -> dict[str, Any]:
    return {"driver": "zarr", "kvstore": folder.child(name).spec}


def _chunk_shape(dtype: str, shape: Sequence[int], most_bytes: int | None = None) -> list[int]:
    """Whole trailing axes, and so many entries of the first that few chunks hold them all."""
    if not shape:
        return []
    row_bytes = max(1, item_bytes(dtype) * int(np.prod(shape[1:], dtype=np.int64)))
    length, most = max(1, shape[0]), max(1, (most_bytes or CHUNK_BYTES) // row_bytes)
    # Even chunks: the last one is stored in full length, whatever is left for it.
    first = -(-length // -(-length // most))
    return [first, *(max(1, n) for n in shape[1:])]


def _little_endian_bytes(array: np.ndarray) -> memoryview:
    """Return the bytes that checksums are taken of: C order."""
    return np.ascontiguousarray(array).view(np.uint8).reshape(-1).data
