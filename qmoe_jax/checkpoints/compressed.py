"""The compressed checkpoint: one zarr array per stored tensor, and a manifest written last.

    PATH/
      manifest.json            format version, geometry, every array's dtype, shape and sha256
      dense/<parameter>        parameters kept as they are, zarr
      coded/<kernel>/<array>   the arrays of a coded expert kernel (codec/FORMAT.md), zarr

A local checkpoint is written to `PATH.partial` and renamed when it is whole; on gs:// the manifest
is what makes it whole. Nothing in it depends on time, place or thread order: equal inputs give
equal bytes.
"""

import dataclasses
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import tensorstore as ts

from qmoe_jax.checkpoints.config import SwitchConfig
from qmoe_jax.checkpoints.storage import Folder, kvstore_spec, make_context, short_message
from qmoe_jax.codec import codings
from qmoe_jax.codec.tensor import CodedTensor, TensorSpec
from qmoe_jax.errors import CheckpointError

FORMAT = "qmoe_jax"
FORMAT_VERSION = 1
_CHUNK_BYTES = 1 << 24


def _array_spec(folder: Folder, name: str) -> dict[str, Any]:
    return {"driver": "zarr", "kvstore": folder.child(name).spec}


def _sha256(array: np.ndarray) -> str:
    """Of the little-endian bytes in C order."""
    contiguous = np.ascontiguousarray(array)
    return hashlib.sha256(contiguous.view(np.uint8).reshape(-1).data).hexdigest()


def _chunks(array: np.ndarray) -> list[int]:
    """Whole trailing axes, and as many entries of the first as fit a chunk."""
    if array.ndim == 0 or array.size == 0:
        return [max(1, n) for n in array.shape]
    row_bytes = max(1, array.nbytes // array.shape[0])
    return [min(array.shape[0], max(1, _CHUNK_BYTES // row_bytes)), *array.shape[1:]]


class CompressedCheckpointWriter:
    """Writes a compressed checkpoint tensor by tensor; `finish` makes it one.

    What an earlier, unfinished writer left in `PATH.partial` is written over.
    """

    def __init__(self, path: str | os.PathLike[str], *, overwrite: bool = False):
        """Claims `path`.

        Args:
          path: local folder or gs:// prefix, which becomes the checkpoint.
          overwrite: replace what is there, once the new checkpoint is whole.

        Raises:
          CheckpointError: something is there and `overwrite` is not set.
        """
        final = Folder(kvstore_spec(path), make_context(cache_bytes=0))
        self._local = final.spec["driver"] == "file"
        self._final_path = final.spec["path"].rstrip("/")
        occupied = (
            os.path.lexists(self._final_path)
            if self._local
            else final.read("manifest.json") is not None
        )
        if occupied and not overwrite:
            raise CheckpointError(
                f"{final.url} exists already; choose another output, or pass overwrite=True to "
                "replace it"
            )
        self._folder = final
        if self._local:
            self._folder = Folder(kvstore_spec(self._partial_path), final.context)
            os.makedirs(self._partial_path, exist_ok=True)
        self._dense: dict[str, dict[str, Any]] = {}
        self._coded: dict[str, dict[str, Any]] = {}

    @property
    def _partial_path(self) -> str:
        return self._final_path + ".partial"

    @property
    def work_folder(self) -> str | None:
        """Folder for work that is worth keeping until `finish`, which removes it; None on gs://."""
        return os.path.join(self._partial_path, "work") if self._local else None

    def write_dense(self, name: str, array: np.ndarray) -> None:
        """Writes a parameter as it is, under its '/'-joined name."""
        self._dense[name] = self._write(f"dense/{name.replace('/', '.')}", array)

    def write_coded(self, name: str, coded: CodedTensor) -> None:
        """Writes the arrays of a coded expert kernel, under its module path (`.../expert/wi`)."""
        stem = f"coded/{name.replace('/', '.')}"
        self._coded[name] = {
            "spec": coded.spec.to_json(),
            "arrays": {
                key: self._write(f"{stem}/{key}", array) for key, array in coded.arrays.items()
            },
        }

    def _write(self, name: str, array: np.ndarray) -> dict[str, Any]:
        spec = _array_spec(self._folder, name) | {
            "metadata": {
                "shape": list(array.shape),
                "chunks": _chunks(array),
                "dtype": _zarr_dtype(array.dtype),
                "compressor": None,  # codes are near their entropy; sizes on disk are sizes counted
                "order": "C",
            },
            "create": True,
            "delete_existing": True,
        }
        try:
            store = ts.open(spec, context=self._folder.context).result()
            store.write(array).result()
        except Exception as error:
            raise CheckpointError(
                f"cannot write {self._folder.url}/{name}: {short_message(error)}. "
                "Check free space and permissions, then run again."
            ) from error
        return {
            "file": name,
            "dtype": array.dtype.name,
            "shape": list(array.shape),
            "sha256": _sha256(array),
        }

    def finish(self, config: SwitchConfig, compression: Mapping[str, Any]) -> None:
        """Writes the manifest and makes the checkpoint visible under its path.

        Args:
          config: geometry and routing.
          compression: how it was made; JSON, without times or machine paths.
        """
        manifest = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "config": config.to_json(),
            "compression": dict(compression),
            "dense": dict(sorted(self._dense.items())),
            "coded": dict(sorted(self._coded.items())),
        }
        content = (json.dumps(manifest, indent=1, sort_keys=True) + "\n").encode()
        store = ts.KvStore.open(self._folder.spec, context=self._folder.context).result()
        store.write("manifest.json", content).result()
        if self._local:
            shutil.rmtree(os.path.join(self._partial_path, "work"), ignore_errors=True)
            previous = self._final_path + ".previous"
            if os.path.lexists(self._final_path):
                shutil.rmtree(previous, ignore_errors=True)
                os.rename(self._final_path, previous)
            os.rename(self._partial_path, self._final_path)
            shutil.rmtree(previous, ignore_errors=True)


def _zarr_dtype(dtype: np.dtype) -> str:
    if dtype.name == "bfloat16":
        return "bfloat16"
    return dtype.newbyteorder("<").str


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

    def read_dense(self, names: Iterable[str] | None = None) -> dict[str, np.ndarray]:
        """Reads parameters by name (all by default), each checked against its checksum."""
        wanted = self.dense_names if names is None else tuple(names)
        entries = self._manifest["dense"]
        reads = {name: self._start(entries[name]) for name in wanted}
        return {name: self._finish(name, entries[name], reads[name]) for name in wanted}

    def read_coded(self, name: str) -> CodedTensor:
        """Reads one coded kernel; checks checksums, then the structure of the codes.

        Raises:
          CheckpointError: an array is missing, truncated or altered.
          CodecError: the arrays do not form a valid coded tensor.
        """
        entries = self._manifest["coded"][name]["arrays"]
        reads = {key: self._start(entry) for key, entry in entries.items()}
        arrays = {key: self._finish(f"{name}/{key}", entries[key], reads[key]) for key in entries}
        coded = CodedTensor(self.specs[name], arrays)
        codings.validate(coded)
        return coded

    def num_bytes(self) -> dict[str, int]:
        """Bytes stored for `dense` parameters and `coded` kernels."""
        totals = {"dense": 0, "coded": 0}
        for entry in self._manifest["dense"].values():
            totals["dense"] += _entry_bytes(entry)
        for tensor in self._manifest["coded"].values():
            totals["coded"] += sum(_entry_bytes(entry) for entry in tensor["arrays"].values())
        return totals

    def _start(self, entry: Mapping[str, Any]) -> ts.Future:
        spec = _array_spec(self._folder, entry["file"]) | {"fill_missing_data_reads": False}
        return ts.open(spec, open=True, context=self._folder.context)

    def _finish(self, name: str, entry: Mapping[str, Any], opening: ts.Future) -> np.ndarray:
        where = f"{self.url}/{entry['file']}"
        remedy = "copy the checkpoint again, or compress again"
        try:
            store = opening.result()
            if list(store.shape) != entry["shape"] or store.dtype.name != entry["dtype"]:
                raise CheckpointError(
                    f"{name} in {where} is {store.dtype.name} {list(store.shape)}, but the "
                    f"manifest says {entry['dtype']} {entry['shape']}: {remedy}"
                )
            array = np.asarray(store.read().result())
        except CheckpointError:
            raise
        except Exception as error:
            raise CheckpointError(
                f"cannot read {name} from {where}: {short_message(error)}: {remedy}"
            ) from error
        if _sha256(array) != entry["sha256"]:
            raise CheckpointError(
                f"{name} in {where} does not match its checksum in the manifest: the file is "
                f"damaged, {remedy}"
            )
        return array


def _entry_bytes(entry: Mapping[str, Any]) -> int:
    itemsize = 2 if entry["dtype"] == "bfloat16" else np.dtype(entry["dtype"]).itemsize
    return itemsize * int(np.prod(entry["shape"], dtype=np.int64))


def is_compressed_checkpoint(path: str | os.PathLike[str]) -> bool:
    """Whether there is a `manifest.json` at `path`."""
    return Folder(kvstore_spec(path), make_context(cache_bytes=0)).read("manifest.json") is not None


def open_compressed_checkpoint(path: str | os.PathLike[str]) -> CompressedCheckpoint:
    """Opens a compressed checkpoint, local or gs://, by reading its manifest.

    Raises:
      CheckpointError: no manifest, a damaged one, or one of another format version.
    """
    folder = Folder(kvstore_spec(path), make_context(cache_bytes=0))
    content = folder.read("manifest.json")
    if content is None:
        raise CheckpointError(
            f"{folder.url} has no manifest.json, so it is no compressed checkpoint (or one whose "
            "writing was cut off); give the output folder of qmoe_jax.compress"
        )
    try:
        manifest = json.loads(content)
        kind, version = manifest["format"], manifest["format_version"]
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{folder.url}/manifest.json is not a manifest ({type(error).__name__}: {error}): "
            "it is truncated or corrupt, copy it again"
        ) from error
    if kind != FORMAT or version != FORMAT_VERSION:
        raise CheckpointError(
            f"{folder.url} has format {kind!r} version {version!r}; this version reads {FORMAT!r} "
            f"version {FORMAT_VERSION}. Use the qmoe_jax that wrote it, or compress again."
        )
    try:
        specs = {
            name: TensorSpec.from_json(tensor["spec"]) for name, tensor in manifest["coded"].items()
        }
        return CompressedCheckpoint(
            url=folder.url,
            config=SwitchConfig.from_json(manifest["config"]),
            compression=manifest["compression"],
            specs=specs,
            dense_names=tuple(manifest["dense"]),
            _folder=folder,
            _manifest=manifest,
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{folder.url}/manifest.json lacks or garbles {error}: it is damaged, copy it again"
        ) from error
