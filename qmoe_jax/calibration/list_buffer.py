"""The list buffer: the hidden states of all samples in one host array (QMoE section 3.2)."""

import math
import os

import numpy as np
from jaxtyping import Float, Int

from qmoe_jax.errors import CheckpointError
from qmoe_jax.formatting import format_memory


class ListBuffer:
    """Rows of all samples, one after another, without padding.

    Access is by sample batch (padded, for attention) or by row (for the tokens of an expert).

    Attributes:
      offsets: int64 [samples + 1]; the rows of sample i are offsets[i] to offsets[i + 1] - 1.
      rows: [total, dim]; an array in memory, or one mapped to a file.
    """

    offsets: Int[np.ndarray, "samples_plus_1"]
    rows: Float[np.ndarray, "total dim"]

    def __init__(
        self,
        lengths: Int[np.ndarray, "samples"],
        dim: int,
        dtype: np.dtype | type = np.float32,
        path: str | os.PathLike[str] | None = None,
    ):
        """Make room for samples of the given lengths.

        Args:
          lengths: rows of each sample.
          dim: width of a row.
          dtype: dtype of the rows.
          path: file to map the rows to; in memory where None.

        Raises:
          CheckpointError: there is no room for the file.
        """
        self.offsets = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
        shape = (int(self.offsets[-1]), dim)
        if path is None or shape[0] == 0:
            self.rows = np.zeros(shape, dtype)
        else:
            _reserve(path, math.prod(shape) * np.dtype(dtype).itemsize)
            self.rows = np.memmap(path, dtype, mode="r+", shape=shape)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def row_index(
        self, samples: Int[np.ndarray, "batch"], length: int
    ) -> tuple[Int[np.ndarray, "batch length"], np.ndarray]:
        """Row numbers of a padded batch, and which of its positions are real, bool.

        Raises:
          ValueError: a sample is longer than `length`.
        """
        lengths = self.offsets[samples + 1] - self.offsets[samples]
        if len(lengths) and lengths.max() > length:
            raise ValueError(f"a sample of {lengths.max()} rows does not fit length {length}")
        position = np.arange(length)[None]
        real = position < lengths[:, None]
        return np.where(real, self.offsets[samples][:, None] + position, 0), real

    def padded(
        self, samples: Int[np.ndarray, "batch"], length: int, batch_size: int
    ) -> Float[np.ndarray, "batch_size length dim"]:
        """Pad a sample batch with zeros, where a sample is shorter and in rows past the samples."""
        index, real = self.row_index(samples, length)
        batch = np.zeros((batch_size, length, self.rows.shape[1]), self.rows.dtype)
        batch[: len(samples)][real] = self.rows[index[real]]
        return batch

    def store(
        self, samples: Int[np.ndarray, "batch"], batch: Float[np.ndarray, "batch_size length dim"]
    ) -> None:
        """Write a padded batch back; padding is left out."""
        index, real = self.row_index(samples, batch.shape[1])
        self.rows[index[real]] = batch[: len(samples)][real]


def _reserve(path: str | os.PathLike[str], num_bytes: int) -> None:
    """Make a file that has its blocks: on a full disk a mapped write would end in a signal."""
    try:
        with open(path, "wb") as file:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, num_bytes)
            else:  # macOS
                file.truncate(num_bytes)
    except OSError as error:
        raise CheckpointError(
            f"cannot reserve {format_memory(num_bytes, 'GiB')} for hidden states at {path} "
            f"({error}); free some space or choose another buffer_dir"
        ) from error
