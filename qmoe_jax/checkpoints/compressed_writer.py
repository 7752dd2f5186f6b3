"""Writes compressed checkpoints: whole tensors, or batches of experts as they come.

`checkpoints.compressed` describes what is written.
"""

import contextlib
import json
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorstore as ts

from qmoe_jax.checkpoints.compressed_parts import read_experts
from qmoe_jax.checkpoints.manifest import (
    CODED_PACK,
    DENSE_PACK,
    FORMAT,
    FORMAT_VERSION,
    check_manifest,
    coded_file,
    dense_file,
    parse_manifest,
)
from qmoe_jax.checkpoints.packed_arrays import pack, remove_arrays, unpack
from qmoe_jax.checkpoints.storage import Folder, kvstore_spec, open_folder, short_message
from qmoe_jax.checkpoints.stored_arrays import (
    ArrayPartWriter,
    array_entry,
    create_array,
    verify_part,
    write_array,
)
from qmoe_jax.codec.outline import CodedOutline
from qmoe_jax.codec.tensor import CodedTensor
from qmoe_jax.config import SwitchConfig
from qmoe_jax.errors import CheckpointError
from qmoe_jax.outputs import FolderKind, OutputFolder, check_no_input

# The checksum of a process's part of each array: name -> [stop, sha256].
Checksums = dict[str, list[Any]]


class CompressedCheckpointWriter:
    """Writes a compressed checkpoint tensor by tensor; `finish` makes it one.

    What an earlier, unfinished writer left in `PATH.partial` is written over.

    Attributes:
      folder: where arrays go until `finish`.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        overwrite: bool = False,
        inputs: Iterable[str | os.PathLike[str]] = (),
        is_primary: bool = True,
    ):
        """Claim `path`.

        Args:
          path: local folder or gs:// prefix, which becomes the checkpoint.
          overwrite: replace a compressed checkpoint that is there, once the new one is whole.
          inputs: what the new one is made from; never replaced.
          is_primary: False for all but one of the processes that write one checkpoint.

        Raises:
          CheckpointError: something is there and `overwrite` is not set, or it is no compressed
            checkpoint, holds other files too, or is or holds an input.
        """
        self.folder = open_folder(path)
        self._output: OutputFolder | None = None
        if self.folder.spec["driver"] == "file":
            self._output = OutputFolder(
                self.folder.spec["path"],
                _KIND,
                inputs=inputs,
                overwrite=overwrite or not is_primary,  # the primary refuses for all
            )
            self._output.begin(anew=False)
            self.folder = Folder(kvstore_spec(self._output.partial), self.folder.context)
        elif is_primary:
            check_no_input(self.folder.url, inputs)
            if self.folder.read("manifest.json") is not None and not overwrite:
                raise CheckpointError(
                    f"{self.folder.url} exists already; choose another output, or pass "
                    "overwrite=True to replace it"
                )
        self._dense: dict[str, dict[str, Any]] = {}
        self._coded: dict[str, dict[str, Any]] = {}
        self._outlines: dict[str, CodedOutline] = {}
        if self._output is not None and is_primary:
            self._undo_finish()

    @property
    def work_folder(self) -> str | None:
        """Folder for work that is worth keeping until `finish`, which removes it; None on gs://."""
        return None if self._output is None else os.fspath(self._output.partial / _WORK)

    def write_dense(self, name: str, array: np.ndarray) -> None:
        """Write a parameter as it is, under its '/'-joined name."""
        self._dense[name] = write_array(self.folder, dense_file(name), array, compressed=True)

    def create_dense(self, name: str, dtype: str, shape: Sequence[int]) -> None:
        """Make room for a parameter whose parts follow; by one process, before the others."""
        create_array(self.folder, dense_file(name), dtype, shape, compressed=True)

    def dense_part(self, name: str, start: int) -> ArrayPartWriter:
        """Write a created parameter from an index of its first axis on."""
        return ArrayPartWriter(self.folder, dense_file(name), start)

    def register_dense(
        self, name: str, dtype: str, shape: Sequence[int], checksums: Sequence[Sequence[Any]]
    ) -> None:
        """Make a written parameter known to the manifest, by [stop, sha256] of its parts."""
        self._dense[name] = array_entry(dense_file(name), dtype, shape, _rising(list(checksums)))

    def write_coded(self, name: str, coded: CodedTensor) -> None:
        """Write the arrays of a coded expert kernel, under its module path (`.../expert/wi`)."""
        outline = CodedOutline.of(coded)
        self.create_coded(name, outline)
        self.register_coded(name, outline, [self.write_coded_part(name, outline, 0, [coded])])

    def create_coded(self, name: str, outline: CodedOutline) -> None:
        """Make room for a coded kernel whose parts follow; by one process, before the others."""
        for key, dtype in outline.dtypes.items():
            create_array(self.folder, coded_file(name, key), dtype, outline.shape(key))

    def write_coded_part(
        self, name: str, outline: CodedOutline, first_expert: int, batches: Iterable[CodedTensor]
    ) -> Checksums:
        """Write consecutive batches of experts into a created kernel; one is held at a time.

        Args:
          name: module path of the kernel.
          outline: of the whole kernel.
          first_expert: the first of these experts.
          batches: coded as the whole is.

        Returns:
          What `register_coded` needs to know of this part.
        """
        writers = {
            key: ArrayPartWriter(
                self.folder, coded_file(name, key), outline.start(key, first_expert)
            )
            for key in outline.dtypes
            if key != "expert_offsets"
        }
        num_experts = 0
        for batch in batches:
            num_experts += batch.spec.num_experts
            for key, writer in writers.items():
                array = batch.arrays[key]
                if (
                    array.dtype.name != outline.dtypes[key]
                ):  # row lengths, narrower than the whole's
                    array = array.astype(outline.dtypes[key])
                writer.append(array)
        stop = first_expert + num_experts
        checksums = {key: [outline.start(key, stop), w.close()] for key, w in writers.items()}
        if first_expert == 0 and "expert_offsets" in outline.dtypes:
            offsets = outline.expert_offsets()
            entry = write_array(self.folder, coded_file(name, "expert_offsets"), offsets)
            checksums["expert_offsets"] = entry["checksums"][0]
        return checksums

    def register_coded(
        self, name: str, outline: CodedOutline, parts: Sequence[Mapping[str, Sequence[Any]]]
    ) -> None:
        """Make a written kernel known to the manifest.

        Args:
          name: module path of the kernel.
          outline: of the whole kernel.
          parts: what `write_coded_part` returned, in the order of the experts.
        """
        self._outlines[name] = outline
        self._coded[name] = {
            "spec": outline.spec.to_json(),
            "arrays": {
                key: array_entry(
                    coded_file(name, key),
                    dtype,
                    outline.shape(key),
                    # Without the parts that are empty: a process without experts has none.
                    _rising([part[key] for part in parts if key in part]),
                )
                for key, dtype in outline.dtypes.items()
            },
        }

    def verify_coded_part(self, name: str, first_expert: int, part: Mapping[str, Any]) -> None:
        """Read what `write_coded_part` wrote and check it.

        Raises:
          CheckpointError: it is missing, truncated or altered.
        """
        tensor = self._coded[name]
        for key, (stop, checksum) in part.items():
            start = 0
            if key != "expert_offsets":
                start = self._outlines[name].start(key, first_expert)
            entry = tensor["arrays"][key]
            verify_part(self.folder, f"{name}/{key}", entry, start, stop, checksum)

    def read_coded(self, name: str, start: int, stop: int) -> CodedTensor:
        """Read some experts of a registered kernel back; check the structure of their codes.

        Raises:
          CheckpointError: an array is missing or truncated.
          CodecError: the arrays do not form a valid coded tensor.
        """
        outline, entries = self._outlines[name], self._coded[name]["arrays"]
        return read_experts(self.folder, name, entries, outline, start, stop)

    def finish(self, config: SwitchConfig, compression: Mapping[str, Any]) -> None:
        """Write the manifest and make the checkpoint visible under its path.

        Args:
          config: geometry and routing.
          compression: how it was made; JSON, without times or machine paths.
        """
        dense, coded = dict(sorted(self._dense.items())), dict(sorted(self._coded.items()))
        names = [dense_file(name) for name in dense]
        packed = pack(self.folder, DENSE_PACK, list(dense.values()), compressed=True)
        dense = dict(zip(dense, packed, strict=True))
        keys = [(kernel, key) for kernel in coded for key in sorted(coded[kernel]["arrays"])]
        entries = [coded[kernel]["arrays"][key] for kernel, key in keys]
        names += [coded_file(*key) for key in keys]
        found = pack(self.folder, CODED_PACK, entries, compressed=False)
        for (kernel, key), entry in zip(keys, found, strict=True):
            arrays = coded[kernel]["arrays"] | {key: entry}
            coded[kernel] = coded[kernel] | {"arrays": arrays}
        self._write_manifest(
            {
                "format": FORMAT,
                "format_version": FORMAT_VERSION,
                "config": config.to_json(),
                "compression": dict(compression),
                "dense": dense,
                "coded": coded,
            }
        )
        # From here on the folder is a checkpoint; a killed run takes it back (`_undo_finish`).
        entries = zip(names, packed + found, strict=True)
        remove_arrays(self.folder, [name for name, entry in entries if "start" in entry])
        if self._output is not None:
            shutil.rmtree(self._output.partial / _WORK, ignore_errors=True)
            self._output.finish()

    def _write_manifest(self, manifest: Mapping[str, Any]) -> None:
        content = (json.dumps(manifest, indent=1, sort_keys=True) + "\n").encode()
        try:
            store = ts.KvStore.open(self.folder.spec, context=self.folder.context).result()
            store.write("manifest.json", content).result()
        except Exception as error:
            raise CheckpointError(
                f"cannot write {self.folder.url}/manifest.json: {short_message(error)}. "
                "Check free space and permissions, then run again."
            ) from error

    def _undo_finish(self) -> None:
        """Give packed arrays their folders back, where `finish` was cut off behind its manifest."""
        assert self._output is not None
        path = self._output.partial / "manifest.json"
        if path.exists():
            # Of a damaged one, or of another version: a resumed run names what it misses.
            with contextlib.suppress(ValueError):
                manifest = parse_manifest(path.read_bytes())
                check_manifest(manifest, os.fspath(path))
                dense = {dense_file(name): entry for name, entry in manifest["dense"].items()}
                unpack(self.folder, dense, compressed=True)
                for kernel, tensor in manifest["coded"].items():
                    arrays = {coded_file(kernel, key): e for key, e in tensor["arrays"].items()}
                    unpack(self.folder, arrays, compressed=False)
            path.unlink()
        remove_arrays(self.folder, [DENSE_PACK, CODED_PACK])


def _is_compressed(folder: Path) -> bool:
    try:
        manifest = json.loads((folder / "manifest.json").read_bytes())
    except (OSError, ValueError):
        return False
    return isinstance(manifest, dict) and manifest.get("format") == FORMAT


_WORK = "work"
_KIND = FolderKind(
    "a compressed checkpoint",
    lambda name: name in ("manifest.json", "dense", "coded", _WORK),
    _is_compressed,
)


def _rising(checksums: list[Sequence[Any]]) -> list[Sequence[Any]]:
    """Return the first checksum, and those that end behind the one before."""
    kept = checksums[:1]
    for pair in checksums[1:]:
        if pair[0] > kept[-1][0]:
            kept.append(pair)
    return kept
