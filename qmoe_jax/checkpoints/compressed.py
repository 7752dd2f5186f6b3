"""The compressed checkpoint: zarr arrays, and a manifest written last (codec/FORMAT.md).

    PATH/
      manifest.json            format version, geometry, every array's dtype, shape and checksums
      dense/<parameter>        a parameter kept as it is
      dense/packed             the small ones of them, one after another, as bytes
      coded/<kernel>/<array>   an array of a coded expert kernel
      coded/packed             the small ones of these

A local checkpoint is written to `PATH.partial` and renamed when it is whole; on gs:// the manifest
is what makes it whole. Nothing in it depends on time, place or thread order: equal inputs give
equal bytes.
"""

import dataclasses
import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from qmoe_jax.checkpoints.manifest import (
    FORMAT,
    FORMAT_VERSION,
    check_manifest,
    parse_manifest,
)
from qmoe_jax.checkpoints.packed_arrays import PACK_CHUNK_BYTES
from qmoe_jax.checkpoints.storage import Folder, open_folder
from qmoe_jax.checkpoints.stored_arrays import (
    entry_bytes,
    finish_read,
    overhead_bytes,
    start_read,
)
from qmoe_jax.codec import codings
from qmoe_jax.codec.tensor import CodedTensor, TensorSpec
from qmoe_jax.config import SwitchConfig
from qmoe_jax.errors import CheckpointError


@dataclasses.dataclass(frozen=True)
class CompressedCheckpoint:
    """A compressed checkpoint, opened: its manifest is read, its arrays are not.

    Attributes:
      url: where it is.
      config: geometry and routing.
      compression: how it was made, as `compress` recorded it.
      specs: spec of every coded expert kernel, by module path.
      dense_names: names of the parameters that are kept as they are.
    """

    url: str
    config: SwitchConfig
    compression: Mapping[str, Any]
    specs: Mapping[str, TensorSpec]
    dense_names: tuple[str, ...]
    _folder: Folder
    _manifest: Mapping[str, Any]
    _manifest_bytes: int

    def fingerprint(self) -> str:
        """Digest its manifest, which holds the checksums of all arrays, to tell if it changed."""
        content = json.dumps(self._manifest, sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()

    def read_dense(self, names: Iterable[str] | None = None) -> dict[str, np.ndarray]:
        """Read parameters by name (all by default), each checked against its checksums."""
        wanted = self.dense_names if names is None else tuple(names)
        entries = self._manifest["dense"]
        reads = {name: start_read(self._folder, entries[name]) for name in wanted}
        return {
            name: finish_read(self._folder, name, entries[name], reads[name]) for name in wanted
        }

    def read_coded(self, name: str) -> CodedTensor:
        """Read one coded kernel; check checksums, then the structure of the codes.

        Raises:
          CheckpointError: an array is missing, truncated or altered.
          CodecError: the arrays do not form a valid coded tensor.
        """
        entries = self._manifest["coded"][name]["arrays"]
        reads = {key: start_read(self._folder, entry) for key, entry in entries.items()}
        arrays = {
            key: finish_read(self._folder, f"{name}/{key}", entries[key], reads[key])
            for key in entries
        }
        coded = CodedTensor(self.specs[name], arrays)
        codings.validate(coded)
        return coded

    def container_bytes(self) -> int:
        """Bytes on disk beside arrays: the manifest, zarr's metadata, filler of the last chunks.

        Reads the metadata of every array. Of compressed arrays there is no filler to count.

        Raises:
          CheckpointError: an array's metadata are missing or no JSON.
        """
        entries = list(self._manifest["dense"].values())
        for tensor in self._manifest["coded"].values():
            entries += tensor["arrays"].values()
        folders: dict[str, list[Mapping[str, Any]]] = {}
        for entry in entries:
            folders.setdefault(entry["file"], []).append(entry)
        overhead = (overhead_bytes(self._folder, own) for own in folders.values())
        return self._manifest_bytes + sum(overhead)

    def num_bytes(self) -> dict[str, int]:
        """Bytes stored for `dense` parameters and `coded` kernels."""
        totals = {"dense": 0, "coded": 0}
        for entry in self._manifest["dense"].values():
            totals["dense"] += entry_bytes(entry)
        for tensor in self._manifest["coded"].values():
            totals["coded"] += sum(entry_bytes(entry) for entry in tensor["arrays"].values())
        return totals


def is_compressed_checkpoint(path: str | os.PathLike[str]) -> bool:
    """Whether there is a compressed checkpoint at `path`, or as the latest step of that folder."""
    return _find_manifest(path)[1] is not None


def _find_manifest(path: str | os.PathLike[str]) -> tuple[Folder, bytes | None]:
    """Return the folder of a compressed checkpoint, and its manifest; None where there is none."""
    folder = open_folder(path, cache_bytes=2 * PACK_CHUNK_BYTES)  # packed arrays share chunks
    content = folder.read("manifest.json")
    if content is not None or not _may_have_steps(folder):
        return folder, content
    try:
        steps = folder.steps()
    except CheckpointError:
        if folder.spec["driver"] == "file":
            raise
        steps = ()  # on storage, listing needs other rights than reading
    if steps:
        latest = folder.child(f"checkpoint_{steps[-1]}")
        found = latest.read("manifest.json")
        if found is not None:
            return latest, found
    return folder, content


def _may_have_steps(folder: Folder) -> bool:
    """Whether it is worth a listing, which can be long on storage, to look for steps."""
    if folder.spec["driver"] == "file":
        return os.path.isdir(folder.spec["path"])
    return not re.fullmatch(r"checkpoint_\d+|state", folder.name)


def open_compressed_checkpoint(path: str | os.PathLike[str]) -> CompressedCheckpoint:
    """Open a compressed checkpoint, local or gs://, by reading its manifest.

    A folder of `checkpoint_<step>` folders stands for the latest of them.

    Raises:
      CheckpointError: no manifest, a damaged one, one that contradicts its geometry, or one of
        another format version.
    """
    folder, content = _find_manifest(path)
    if content is None:
        if folder.spec["driver"] == "file" and not os.path.isdir(folder.spec["path"]):
            raise CheckpointError(
                f"{folder.url} is not a folder; give that of a compressed checkpoint"
            )
        if folder.read("checkpoint") is not None:
            raise CheckpointError(
                f"{folder.url} is a native checkpoint; a compressed one is needed here"
            )
        raise CheckpointError(
            f"{folder.url} has no manifest.json, so it is no compressed checkpoint (or one whose "
            "writing was cut off); give the output folder of qmoe_jax.compress"
        )
    try:
        manifest = parse_manifest(content)
        kind, version = manifest["format"], manifest["format_version"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(
            f"{folder.url}/manifest.json is not a manifest ({type(error).__name__}: {error}): "
            "it is truncated or corrupt, copy it again"
        ) from error
    if kind != FORMAT or type(version) is not int or version != FORMAT_VERSION:
        raise CheckpointError(
            f"{folder.url} has format {kind!r} version {version!r}; this version reads {FORMAT!r} "
            f"version {FORMAT_VERSION}. Use the qmoe_jax that wrote it, or compress again."
        )
    config, specs = check_manifest(manifest, f"{folder.url}/manifest.json")
    return CompressedCheckpoint(
        url=folder.url,
        config=config,
        compression=manifest["compression"],
        specs=specs,
        dense_names=tuple(manifest["dense"]),
        _folder=folder,
        _manifest=manifest,
        _manifest_bytes=len(content),
    )
