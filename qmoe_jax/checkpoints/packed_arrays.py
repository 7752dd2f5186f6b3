"""Small arrays of a checkpoint share one: each file and each folder takes a block of its own.

A run writes every array into a folder of its own. When all are there, those of fewer than
`PACKED_BYTES` are copied, one after another, into an array of bytes, and their folders go. Until
the checkpoint has its name a killed run can be taken back to where it was: `unpack`.
"""

import contextlib
import os
import shutil
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import tensorstore as ts

from qmoe_jax.checkpoints.storage import Folder, short_message
from qmoe_jax.checkpoints.stored_arrays import (
    ArrayPartWriter,
    create_array,
    entry_bytes,
    finish_read,
    start_read,
    write_array,
)
from qmoe_jax.errors import CheckpointError

PACKED_BYTES = 1 << 20  # arrays of so many bytes have a folder of their own
PACK_CHUNK_BYTES = 1 << 22

Entry = Mapping[str, Any]


def pack(
    folder: Folder, file: str, entries: Sequence[Entry], *, compressed: bool
) -> list[dict[str, Any]]:
    """Copy the small ones of some arrays into one, checked against their checksums.

    Args:
      folder: of the checkpoint.
      file: name of the array of bytes.
      entries: of the arrays, in the order in which they are to lie there.
      compressed: whether its chunks are.

    Returns:
      The entries, those that were copied with their place.

    Raises:
      CheckpointError: an array is damaged, or the bytes cannot be written.
    """
    sizes = [entry_bytes(entry) for entry in entries]
    small = [size < PACKED_BYTES for size in sizes]
    if not any(small):
        return [dict(entry) for entry in entries]
    total = sum(size for size, own in zip(sizes, small, strict=True) if own)
    create_array(folder, file, "uint8", (total,), compressed=compressed, most=PACK_CHUNK_BYTES)
    writer, start, found = ArrayPartWriter(folder, file, 0), 0, []
    for entry, size, is_small in zip(entries, sizes, small, strict=True):
        found.append(dict(entry))
        if is_small:
            array = finish_read(folder, entry["file"], entry, start_read(folder, entry))
            writer.append(np.frombuffer(np.ascontiguousarray(array).tobytes(), np.uint8))
            found[-1] |= {"file": file, "start": start}
            start += size
    writer.close()
    return found


def remove_arrays(folder: Folder, names: Sequence[str]) -> None:
    """Delete the folders of arrays, if they are there; what holds nothing then goes as well.

    Raises:
      CheckpointError: one cannot be deleted.
    """
    for name in names:
        own = folder.child(name)
        try:
            if own.spec["driver"] == "file":
                if os.path.isdir(own.spec["path"]):
                    shutil.rmtree(own.spec["path"])
                    with contextlib.suppress(OSError):  # it holds other arrays
                        os.rmdir(own.parent().spec["path"])
            else:
                store = ts.KvStore.open(own.spec, context=own.context).result()
                store.delete_range(ts.KvStore.KeyRange()).result()
        except Exception as error:
            raise CheckpointError(
                f"cannot delete {own.url}: {short_message(error)}. Check permissions, then run "
                "again."
            ) from error


def unpack(folder: Folder, arrays: Mapping[str, Entry], *, compressed: bool) -> None:
    """Write packed arrays into folders of their own again, as they were.

    Args:
      folder: of the checkpoint.
      arrays: entries by the names that the folders had.
      compressed: whether their chunks were.

    Raises:
      CheckpointError: the bytes are damaged, or an array cannot be written.
    """
    for name, entry in arrays.items():
        if "start" in entry:
            array = finish_read(folder, name, entry, start_read(folder, entry))
            write_array(folder, name, array, compressed=compressed)
