"""Which files a folder holds, told without reading them: has it changed since?

Resumed runs and kept results are of one checkpoint. A path does not say which: another may be put
in its place.
"""

import hashlib
import os

import tensorstore as ts

from qmoe_jax.checkpoints.storage import Folder, short_message
from qmoe_jax.errors import CheckpointError

# Of a checkpoint on gs://, where no size or time is to be had without reading: the generation,
# which changes with every write, of the small files that are written with each array.
_METADATA = (".zarray", "checkpoint", "_METADATA", "manifest.ocdbt", "manifest.json")


def fingerprint(folder: Folder) -> str:
    """Digest names, sizes and modification times of all files below a folder; hex sha256.

    On gs:// instead of sizes and times the generations of the metadata files.

    Raises:
      CheckpointError: the folder cannot be listed.
    """
    digest = hashlib.sha256()
    for line in _local_files(folder) if folder.spec["driver"] == "file" else _objects(folder):
        digest.update(line.encode(errors="surrogateescape") + b"\n")
    return digest.hexdigest()


def _local_files(folder: Folder) -> list[str]:
    root = folder.spec["path"]
    found = []
    try:
        for parent, _, names in os.walk(root, followlinks=True, onerror=_raise):
            for name in names:
                path = os.path.join(parent, name)
                status = os.stat(path)
                relative = os.path.relpath(path, root)
                found.append(f"{relative} {status.st_size} {status.st_mtime_ns}")
    except OSError as error:
        raise CheckpointError(f"cannot list {folder.url}: {error}") from error
    return sorted(found)


def _raise(error: OSError) -> None:
    raise error


def _objects(folder: Folder) -> list[str]:
    try:
        store = ts.KvStore.open(folder.spec, context=folder.context).result()
        keys = sorted(store.list().result())
        metadata = [key for key in keys if key.decode().rpartition("/")[2] in _METADATA]
        reads = [(key, store.read(key)) for key in metadata]
        stamps = {key: read.result().stamp.generation.hex() for key, read in reads}
    except Exception as error:
        raise CheckpointError(f"cannot list {folder.url}: {short_message(error)}") from error
    return [f"{key.decode()} {stamps.get(key, '')}" for key in keys]
