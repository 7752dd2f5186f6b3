"""Native T5X checkpoints, read lazily: metadata when opened, then one slice at a time."""

import difflib
import os
from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType
from typing import Any

import numpy as np
import tensorstore as ts
from jaxtyping import DTypeLike, Float

from qmoe_jax.checkpoints import names as parameter_names
from qmoe_jax.checkpoints.fingerprint import fingerprint
from qmoe_jax.checkpoints.layouts import ArrayLocation, CheckpointFiles, Layout, find_checkpoint
from qmoe_jax.checkpoints.storage import open_folder, short_message
from qmoe_jax.errors import CheckpointError

Index = int | slice | tuple[int | slice, ...]

_DTYPES = ("float32", "bfloat16")


def open_t5x_checkpoint(
    path: str | os.PathLike[str], *, cache_bytes: int = 512 * 2**20
) -> "T5XCheckpoint":
    """Open a checkpoint that T5X wrote, in any of its layouts, and read its metadata only.

    Every array's `.zarray` is read and checked against what the checkpoint records, so that a
    missing parameter is found now and not hours into a run.

    Args:
      path: the `checkpoint_<step>` folder, or a folder that holds some, of which the latest step is
        taken. Local or `gs://bucket/...` (application default credentials if there are any, else
        none; name the step there, as finding the latest one lists every file).
      cache_bytes: how much memory decoded chunks may occupy. A chunk often spans many experts, and
        the cache saves decoding it again for the next of them.

    Raises:
      CheckpointError: nothing there, no checkpoint, an unsupported version or dtype, truncated
        metadata, or an array that is missing or has another shape or dtype than recorded.
    """
    files = find_checkpoint(open_folder(path, cache_bytes))
    return T5XCheckpoint(files)


class T5XCheckpoint:
    """The parameters of a T5X checkpoint; optimizer state is not visible.

    Reads return NumPy arrays in the dtype they are stored in, float32 or bfloat16, and raise
    CheckpointError where a chunk is missing or truncated or (unless `check_finite=False`) a value
    is NaN or infinite. Reading from several threads is safe.

    Attributes:
      url: the folder that the arrays are in.
      layout: "t5x", "orbax_zarr" or "orbax_ocdbt".
      step: training step, or None where neither the checkpoint nor its folder's name tells it.
      names: sorted '/'-joined names of all parameters.
      shapes: shape by name.
      dtypes: NumPy dtype by name.
    """

    url: str
    layout: Layout
    step: int | None
    names: tuple[str, ...]
    shapes: Mapping[str, tuple[int, ...]]
    dtypes: Mapping[str, np.dtype]

    def __init__(self, files: CheckpointFiles):
        """Open the arrays of a checkpoint; use `open_t5x_checkpoint`."""
        self._folder = files.folder
        self.url = files.folder.url
        self.layout = files.layout
        self.names = tuple(sorted(files.parameters))
        self._locations = files.parameters
        context = files.folder.context
        opening = {name: _start_open(self._locations[name], context) for name in self.names}
        self._arrays = {
            name: _finish_open(f"parameter {name}", self._locations[name], future)
            for name, future in opening.items()
        }
        # Where the array says what an absent chunk stands for, absent chunks are no damage.
        reopening = {
            name: _start_open(self._locations[name], context, fill=True)
            for name, array in self._arrays.items()
            if array.fill_value is not None
        }
        for name, future in reopening.items():
            self._arrays[name] = _finish_open(f"parameter {name}", self._locations[name], future)
        for name in self.names:
            _check_metadata(name, self._locations[name], self._arrays[name])
        self.shapes = MappingProxyType({n: tuple(a.shape) for n, a in self._arrays.items()})
        self.dtypes = MappingProxyType({n: a.dtype.numpy_dtype for n, a in self._arrays.items()})
        if isinstance(files.step, ArrayLocation):
            step = _finish_open("the step", files.step, _start_open(files.step, context))
            self.step = int(_finish_read("the step", files.step, step.read()))
        else:
            self.step = files.step

    def __repr__(self) -> str:
        return f"T5XCheckpoint({self.url!r}, {self.layout}, {len(self.names)} parameters)"

    @property
    def dtype_names(self) -> dict[str, str]:
        """Name of each parameter's dtype, as JSON and plans have it."""
        return {name: dtype.name for name, dtype in self.dtypes.items()}

    def fingerprint(self) -> str:
        """Digest names, sizes and times of its files, to tell whether it is still the same."""
        return fingerprint(self._folder)

    def chunk_shape(self, name: str) -> tuple[int, ...]:
        """Shape of the chunks a parameter is stored in: reading less costs as much as a chunk."""
        array = self._array(name)
        chunk = array.chunk_layout.read_chunk.shape or array.shape
        return tuple(size or whole for size, whole in zip(chunk, array.shape, strict=True))

    def read(
        self, name: str, index: Index = (), *, check_finite: bool = True
    ) -> Float[np.ndarray, "..."]:
        """Read a parameter, or a slice of it, and no chunk that the slice does not touch.

        Args:
          name: one of `names`.
          index: NumPy index on the leading axes: an integer, a slice or a tuple of them.
          check_finite: whether NaN and infinite values are an error.
        """
        return self._finish(name, self._start(name, index), check_finite)

    def read_experts(
        self, name: str, start: int, stop: int, *, check_finite: bool = True
    ) -> Float[np.ndarray, "experts in out"]:
        """Read the kernels of experts start to stop - 1, `[stop - start, in, out]`.

        Args:
          name: an expert kernel, as `encoder/layers_1/mlp/expert/wi/kernel`.
          start: first expert.
          stop: the expert after the last; 0 <= start < stop <= num_experts.
          check_finite: whether NaN and infinite values are an error.

        Raises:
          ValueError: `name` is no expert kernel, or the range is empty or out of bounds.
        """
        if not parameter_names.is_expert_kernel(name):
            raise ValueError(f"parameter {name} is no expert kernel: use read(name, index)")
        num_experts = self._array(name).shape[0]
        if not 0 <= start < stop <= num_experts:
            raise ValueError(
                f"parameter {name} has experts 0 to {num_experts - 1}, and [{start}, {stop}) is "
                "not a non-empty range of them"
            )
        return self.read(name, slice(start, stop), check_finite=check_finite)

    def read_many(
        self, names: Iterable[str], *, check_finite: bool = True
    ) -> dict[str, Float[np.ndarray, "..."]]:
        """Read whole parameters concurrently: `{name: array}` in the order of `names`."""
        reads = {name: self._start(name, ()) for name in names}
        return {name: self._finish(name, read, check_finite) for name, read in reads.items()}

    def params(
        self,
        dtype: DTypeLike | None = None,
        include: Callable[[str], bool] | None = None,
        *,
        check_finite: bool = True,
    ) -> dict[str, Any]:
        """Parameters as the nested dict that Flax modules take.

        Args:
          dtype: what to convert them to; as stored where None.
          include: predicate on names that says which to read; all where None.
          check_finite: whether NaN and infinite values are an error.
        """
        wanted = [name for name in self.names if include is None or include(name)]
        arrays = self.read_many(wanted, check_finite=check_finite)
        if dtype is not None:
            target = np.dtype(dtype)
            for name in wanted:
                arrays[name] = arrays[name].astype(target, copy=False)
        return parameter_names.unflatten(arrays)

    def _array(self, name: str) -> ts.TensorStore:
        if name in self._arrays:
            return self._arrays[name]
        close = difflib.get_close_matches(name, self.names, n=3)
        hint = f"did you mean {' or '.join(close)}?" if close else "see `names`."
        raise CheckpointError(f"{self.url} has no parameter {name}: {hint}")

    def _start(self, name: str, index: Index) -> ts.Future:
        array = self._array(name)
        return array[_resolve(name, index, tuple(array.shape))].read()

    def _finish(self, name: str, read: ts.Future, check_finite: bool) -> np.ndarray:
        values = _finish_read(f"parameter {name}", self._locations[name], read)
        if check_finite and not np.isfinite(values).all():
            count = int(values.size - np.isfinite(values).sum())
            raise CheckpointError(
                f"parameter {name} in {self.url} holds {count} NaN or infinite values of "
                f"{values.size} read: the checkpoint is damaged or its training diverged. "
                "Use another step, or check_finite=False to read it nevertheless."
            )
        return values


def _start_open(location: ArrayLocation, context: ts.Context, *, fill: bool = False) -> ts.Future:
    spec = {
        "driver": "zarr",
        "kvstore": location.kvstore,
        # Without a fill value (T5X writes none) every chunk is stored, zeros included: a missing
        # one is damage, which TensorStore's default would turn into zeros.
        "fill_missing_data_reads": fill,
        # A checkpoint does not change: never ask the storage whether a cached chunk is fresh.
        "recheck_cached_data": "open",
    }
    return ts.open(spec, open=True, read=True, context=context)


def _finish_open(what: str, location: ArrayLocation, opening: ts.Future) -> ts.TensorStore:
    try:
        return opening.result()
    except Exception as error:
        raise CheckpointError(
            f"{what} cannot be opened at {location.url}: {short_message(error)}. "
            "The array is missing or its .zarray corrupt: copy the checkpoint again."
        ) from error


def _finish_read(what: str, location: ArrayLocation, reading: ts.Future) -> np.ndarray:
    try:
        return np.asarray(reading.result())
    except Exception as error:
        raise CheckpointError(
            f"{what} cannot be read from {location.url}: {short_message(error)}. "
            "A chunk is missing, truncated or unreachable: copy the checkpoint again."
        ) from error


def _check_metadata(name: str, location: ArrayLocation, array: ts.TensorStore) -> None:
    dtype, shape = array.dtype.name, tuple(array.shape)
    if "uint16" in (dtype, location.dtype):
        raise CheckpointError(
            f"parameter {name} at {location.url} is uint16, expected {' or '.join(_DTYPES)}: "
            "an old T5X stored bfloat16 that way. Save it again with a current T5X."
        )
    if dtype not in _DTYPES:
        raise CheckpointError(
            f"parameter {name} at {location.url} is {dtype}, expected {' or '.join(_DTYPES)}: "
            "save the checkpoint with one of these dtypes."
        )
    if location.dtype not in (None, dtype):
        raise CheckpointError(
            f"parameter {name} is {dtype} in {location.url}/.zarray, and the `checkpoint` file "
            f"says {location.dtype}: they are of two checkpoints. Copy both again."
        )
    if location.shape not in (None, shape):
        raise CheckpointError(
            f"parameter {name} has shape {list(shape)} in {location.url}/.zarray, and the "
            f"`checkpoint` file says {list(location.shape or ())}: they are of two checkpoints. "
            "Copy both again."
        )


def _resolve(name: str, index: Index, shape: tuple[int, ...]) -> tuple[int | slice, ...]:
    """NumPy's meaning of an index in bounds that TensorStore, which has no negative ones, takes."""
    index = index if isinstance(index, tuple) else (index,)
    if len(index) > len(shape):
        raise IndexError(f"parameter {name} has {len(shape)} axes, the index {index} has more")
    resolved: list[int | slice] = []
    for entry, size in zip(index, shape, strict=False):
        if isinstance(entry, slice):
            start, stop, step = entry.indices(size)
            if step < 1:
                raise IndexError(f"parameter {name}: steps must be positive, {entry} has {step}")
            resolved.append(slice(start, max(start, stop), step))
        else:
            if not -size <= entry < size:
                raise IndexError(f"parameter {name}: {entry} is out of bounds for {size} entries")
            resolved.append(entry % size)
    return tuple(resolved)
