"""Parts of a compressed checkpoint: the shapes of its arrays, and some experts of a kernel."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np

from qmoe_jax.checkpoints.compressed import CompressedCheckpoint
from qmoe_jax.checkpoints.storage import Folder
from qmoe_jax.checkpoints.stored_arrays import finish_read, start_read, verify_part
from qmoe_jax.codec import codings
from qmoe_jax.codec.outline import CodedOutline
from qmoe_jax.codec.tensor import CodedTensor, check_array, check_offsets
from qmoe_jax.errors import CheckpointError


def variable_shapes(checkpoint: CompressedCheckpoint) -> dict[str, jax.ShapeDtypeStruct]:
    """Shape and dtype of every array that the model holds as a parameter, by '/'-joined name.

    They are those of the variables that `models.load.load_switch` returns. Only the manifest is
    used.
    """
    manifest = checkpoint._manifest
    entries = dict(manifest["dense"])
    for kernel, tensor in manifest["coded"].items():
        entries |= {f"{kernel}/{key}": entry for key, entry in tensor["arrays"].items()}
    return {
        name: jax.ShapeDtypeStruct(tuple(entry["shape"]), jax.numpy.dtype(entry["dtype"]))
        for name, entry in sorted(entries.items())
    }


def read_experts(
    folder: Folder,
    kernel: str,
    entries: Mapping[str, Mapping[str, Any]],
    outline: CodedOutline,
    start: int,
    stop: int,
) -> CodedTensor:
    """Read the experts start to stop - 1 of a kernel; check the structure of their codes.

    Args:
      folder: of the checkpoint.
      kernel: module path.
      entries: manifest entries of its arrays.
      outline: of the whole kernel.
      start: first expert.
      stop: the expert after the last.

    Raises:
      CheckpointError: an array is missing or truncated.
      CodecError: the arrays do not form a valid coded tensor.
    """
    parts = {
        key: slice(outline.start(key, start), outline.start(key, stop))
        for key in entries
        if key != "expert_offsets"
    }
    reads = {key: start_read(folder, entries[key]) for key in parts}
    arrays = {
        key: finish_read(folder, f"{kernel}/{key}", entries[key], reads[key], part)
        for key, part in parts.items()
    }
    if "expert_offsets" in entries:
        offsets = outline.expert_offsets()[start : stop + 1]
        arrays["expert_offsets"] = offsets - offsets[0]
    coded = CodedTensor(dataclasses.replace(outline.spec, num_experts=stop - start), arrays)
    codings.validate(coded)
    return coded


class CodedExperts:
    """A coded kernel of a compressed checkpoint, read a few experts at a time.

    Attributes:
      name: of the kernel's parameter, as `encoder/layers_1/mlp/expert/wi/kernel`.
      spec: of the whole kernel.
      outline: sizes of its arrays.
    """

    def __init__(self, checkpoint: CompressedCheckpoint, kernel: str):
        """Read where each expert's codes begin, and nothing else.

        Args:
          checkpoint: opened.
          kernel: module path, as `encoder/layers_1/mlp/expert/wi`.

        Raises:
          CheckpointError: that array is missing, truncated or altered.
          CodecError: it contradicts the kernel's spec.
        """
        self._folder, self._kernel = checkpoint._folder, kernel
        self._entries = checkpoint._manifest["coded"][kernel]["arrays"]
        self.name = f"{kernel}/kernel"
        self.spec = checkpoint.specs[kernel]
        coding = codings.get_coding(self.spec.coding)
        if self._entries.keys() != set(coding.array_names):
            raise CheckpointError(
                f"the manifest of {checkpoint.url} gives {kernel} the arrays "
                f"{sorted(self._entries)}; {self.spec.coding!r} requires "
                f"{sorted(coding.array_names)}. It is damaged, compress again."
            )
        sizes = np.zeros(0, np.int64)
        if coding.code_array is not None:
            entry = self._entries["expert_offsets"]
            opening = start_read(self._folder, entry)
            offsets = finish_read(self._folder, f"{kernel}/expert_offsets", entry, opening)
            check_array(
                {"expert_offsets": offsets},
                "expert_offsets",
                np.int32,
                (self.spec.num_experts + 1,),
            )
            total = self._entries[coding.code_array]["shape"][0]
            check_offsets("expert_offsets", offsets, total, coding.code_array)
            sizes = np.diff(offsets.astype(np.int64))
        self.outline = CodedOutline(
            self.spec,
            tuple(sizes.tolist()),
            {key: entry["dtype"] for key, entry in self._entries.items()},
            {key: tuple(entry["shape"][1:]) for key, entry in self._entries.items()},
        )

    def verify(self) -> None:
        """Read all arrays once, a chunk at a time, and check them against their checksums.

        Raises:
          CheckpointError: one is missing, truncated or altered.
        """
        for key, entry in self._entries.items():
            start = 0
            for stop, checksum in entry["checksums"]:
                what = f"{self._kernel}/{key}"
                verify_part(self._folder, what, entry, start, stop, checksum)
                start = stop

    def read(self, start: int, stop: int) -> CodedTensor:
        """Read the experts start to stop - 1; check the structure of their codes.

        Raises:
          CheckpointError: an array is missing or truncated.
          CodecError: the arrays do not form a valid coded tensor.
        """
        return read_experts(self._folder, self._kernel, self._entries, self.outline, start, stop)

    def each(self, batch: int) -> Iterator[tuple[int, CodedTensor]]:
        """Read all experts in order, at most `batch` at a time: (first expert, their codes)."""
        for start in range(0, self.spec.num_experts, batch):
            yield start, self.read(start, min(start + batch, self.spec.num_experts))
