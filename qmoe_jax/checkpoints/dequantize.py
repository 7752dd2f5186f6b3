"""A compressed checkpoint to a native T5X one, whose experts are dense kernels again."""

import functools
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from qmoe_jax.checkpoints.compressed import CompressedCheckpoint, open_compressed_checkpoint
from qmoe_jax.checkpoints.compressed_parts import CodedExperts
from qmoe_jax.checkpoints.geometry import parameter_shapes
from qmoe_jax.checkpoints.layouts import step_of_name
from qmoe_jax.checkpoints.t5x_writer import T5XCheckpointWriter
from qmoe_jax.codec import codings
from qmoe_jax.codec.decode import decode_expert_weights
from qmoe_jax.codec.tensor import CodedTensor, TensorSpec
from qmoe_jax.errors import CheckpointError
from qmoe_jax.progress import progress as show_progress

NativeDtype = Literal["float32", "bfloat16"]


def dequantize_checkpoint(
    source: str | os.PathLike[str],
    folder: str | os.PathLike[str],
    *,
    step: int | None = None,
    dtype: NativeDtype = "float32",
    progress: bool = True,
) -> Path:
    """Write `FOLDER/checkpoint_<step>`, a native T5X checkpoint, from a compressed checkpoint.

    Experts are decoded a few at a time: as many as fit a stored chunk (16 MiB), at least one.
    Memory does not grow with the number of experts.

    Args:
      source: compressed checkpoint, local or gs://.
      folder: local folder; the checkpoint in it appears once it is whole.
      step: the training step that T5X shall see; that of the name of `source` where None, 0 where
        that is not `checkpoint_<step>`.
      dtype: "float32" keeps every value; "bfloat16" is half the size, keeps ternary experts and
        what is stored as bfloat16, leaves float32 parameters (routers) float32, and rounds 2-bit
        experts.
      progress: show a progress bar.

    Returns:
      Path of the new checkpoint.

    Raises:
      CheckpointError: no or a damaged compressed checkpoint, another dtype, or the new checkpoint
        exists already or cannot be written.
      CodecError: damaged codes.
    """
    if dtype not in get_args(NativeDtype):
        raise CheckpointError(f"dtype is {dtype!r}; give {' or '.join(get_args(NativeDtype))}")
    checkpoint = open_compressed_checkpoint(source)
    check_complete(checkpoint)
    shapes = parameter_shapes(checkpoint.config)
    if step is None:
        step = step_of_name(checkpoint.url) or 0
    writer = T5XCheckpointWriter(folder, step)
    num_experts = sum(spec.num_experts for spec in checkpoint.specs.values())
    try:
        shown = show_progress(title="dequantize", unit="experts", total=num_experts, shown=progress)
        with shown as bar:
            for name in shapes:
                kernel = name.removesuffix("/kernel")
                if kernel in checkpoint.specs:
                    experts = CodedExperts(checkpoint, kernel)
                    _write_experts(writer, name, shapes[name], experts, dtype, bar.update)
                else:
                    array = checkpoint.read_dense([name])[name]
                    if dtype == "float32":
                        array = array.astype(np.float32)
                    _check_shape(name, array.shape, shapes[name])
                    writer.create(name, array.shape, array.dtype.name)
                    writer.write(name, array)
        return writer.finish()
    except BaseException:
        writer.discard()
        raise


def _write_experts(
    writer: T5XCheckpointWriter,
    name: str,
    shape: tuple[int, ...],
    experts: CodedExperts,
    dtype: NativeDtype,
    advance: Callable[[int], object],
) -> None:
    experts.verify()
    batch = writer.create(name, shape, dtype)
    for start in range(0, shape[0], batch):
        stop = min(start + batch, shape[0])
        writer.write(name, np.stack(list(dense_experts(experts, shape, dtype, start, stop))), start)
        advance(stop - start)


def check_complete(checkpoint: CompressedCheckpoint) -> None:
    """Refuse a checkpoint that does not hold exactly the parameters of its config.

    Raises:
      CheckpointError: such a checkpoint.
    """
    held = {f"{kernel}/kernel" for kernel in checkpoint.specs} | set(checkpoint.dense_names)
    if wrong := sorted(held ^ parameter_shapes(checkpoint.config).keys()):
        raise CheckpointError(
            f"{checkpoint.url} does not hold the parameters of its config: {wrong[0]} is missing "
            "or does not belong; compress the model again"
        )


def dense_experts(
    experts: CodedExperts, shape: tuple[int, ...], dtype: NativeDtype, start: int, stop: int
) -> Iterator[Float[np.ndarray, "in out"]]:
    """Yield the Flax kernels of experts start to stop - 1, whose codes are read at once.

    Args:
      experts: of a kernel.
      shape: that the config implies for all of it, `[experts, in, out]`.
      dtype: of the result.
      start: first expert.
      stop: the expert after the last.

    Raises:
      CheckpointError: the codes are of another shape, or cannot be read.
      CodecError: damaged codes.
    """
    spec = experts.spec
    num_weights = int(np.prod(shape[1:], dtype=np.int64))
    if (spec.num_experts, spec.rows * spec.width) != (shape[0], num_weights):
        raise _wrong_shape(experts.name, (spec.num_experts, spec.width, spec.rows), shape)
    # One length of codes for all experts, so that one program decodes them.
    longest = max(experts.outline.expert_sizes, default=0)
    code_length = 1 << max(0, longest - 1).bit_length()
    coded = experts.read(start, stop)
    for i in range(stop - start):
        yield decode_kernel(codings.slice_experts(coded, i, i + 1), shape[1], code_length, dtype)


def decode_kernel(
    coded: CodedTensor, num_in: int, code_length: int, dtype: NativeDtype
) -> Float[np.ndarray, "in out"]:
    """Return the Flax kernel of a coded tensor of one expert. Reference: `models.load.dequantized`.

    Args:
      coded: one expert.
      num_in: input features; a row of codes may be a part of an output feature's weights.
      code_length: what the code array is filled up to, so that experts share a compiled program.
      dtype: of the result.
    """
    coding = codings.get_coding(coded.spec.coding)
    arrays = dict(coded.arrays)
    if coding.code_array is not None:
        codes = arrays[coding.code_array]
        arrays[coding.code_array] = np.pad(codes, (0, code_length - len(codes)))
    weights = _decoder(coded.spec, dtype)(arrays)
    return np.asarray(weights).reshape(-1, num_in).T


@functools.lru_cache(maxsize=64)
def _decoder(spec: TensorSpec, dtype: NativeDtype) -> Callable[..., jax.Array]:
    return jax.jit(lambda arrays: decode_expert_weights(spec, arrays, 0, jnp.dtype(dtype)))


def _check_shape(name: str, found: tuple[int, ...], expected: tuple[int, ...]) -> None:
    if tuple(found) != tuple(expected):
        raise _wrong_shape(name, found, expected)


def _wrong_shape(name: str, found: tuple[int, ...], expected: tuple[int, ...]) -> CheckpointError:
    return CheckpointError(
        f"{name} has shape {list(found)}, but the config implies {list(expected)}: the manifest is "
        "damaged, compress the model again"
    )
