"""A compressed checkpoint with its codes stored in another coding: the same weights, no new run."""

import copy
import dataclasses
import functools
import os
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jaxtyping import UInt8

from qmoe_jax.checkpoints.compressed import CompressedCheckpoint, open_compressed_checkpoint
from qmoe_jax.checkpoints.compressed_parts import CodedExperts
from qmoe_jax.checkpoints.compressed_writer import CompressedCheckpointWriter
from qmoe_jax.codec import codings
from qmoe_jax.codec.decode import decode_expert
from qmoe_jax.codec.encode import encode
from qmoe_jax.codec.outline import CodedOutline
from qmoe_jax.codec.tensor import CodedTensor, TensorSpec
from qmoe_jax.errors import CheckpointError, CodecError
from qmoe_jax.progress import progress as show_progress

_EXPERT_BATCH = 16  # encoded together; no stored byte depends on it


def recode_checkpoint(
    source: str | os.PathLike[str],
    output: str | os.PathLike[str],
    coding: str,
    *,
    overwrite: bool = False,
    progress: bool = True,
) -> None:
    """Store the experts of a compressed checkpoint in another coding of their grid.

    Codes and levels stay what they are, so the model computes the same to the bit; the output is
    that of a run with `expert_coding`. One kernel at a time is in memory, as it will be stored.
    What was encoded is decoded and compared before it is written.

    Args:
      source: the compressed checkpoint, local or gs://.
      output: local folder or gs:// prefix; visible once it is whole.
      coding: name of the coding. Kernels of the other grid, where there are any, stay as they are.
      overwrite: replace a compressed checkpoint at `output`.
      progress: show a progress bar.

    Raises:
      CheckpointError: no or a damaged compressed checkpoint, no kernel that the coding could store
        or all have it already, or something is at `output`.
      CodecError: an unknown coding, or damaged codes.
    """
    checkpoint = open_compressed_checkpoint(source)
    changed = _kernels_to_change(checkpoint, coding)
    writer = CompressedCheckpointWriter(output, overwrite=overwrite, inputs=[source])
    for name in checkpoint.dense_names:
        writer.write_dense(name, checkpoint.read_dense([name])[name])
    num_experts = sum(spec.num_experts for spec in checkpoint.specs.values())
    with show_progress(total=num_experts, title="recode", unit="experts", shown=progress) as bar:
        for name in checkpoint.specs:
            experts = CodedExperts(checkpoint, name)
            experts.verify()
            _write(writer, name, experts, coding if name in changed else None, bar.update)
    writer.finish(checkpoint.config, _recorded(checkpoint.compression, coding))


def _kernels_to_change(checkpoint: CompressedCheckpoint, coding: str) -> set[str]:
    """Return the kernels that are to be stored in another coding than they are."""
    grid = codings.get_coding(coding).grid
    stored = {name: spec.coding for name, spec in checkpoint.specs.items()}
    fitting = {n for n, own in stored.items() if codings.get_coding(own).grid == grid}
    changed = {name for name in fitting if stored[name] != coding}
    if changed:
        return changed
    names = ", ".join(sorted(set(stored.values())))
    if fitting:
        raise CheckpointError(
            f"the experts of {checkpoint.url} have the coding {coding} already; use it as it is"
        )
    grids = {codings.get_coding(own).grid for own in stored.values()}
    known = ", ".join(c for g in sorted(grids) for c in codings.codings_of_grid(g))
    raise CheckpointError(
        f"the experts of {checkpoint.url} have the coding {names}, whose codes {coding} cannot "
        f"store; choose one of {known}, or compress the model again with grid={grid!r}"
    )


def _write(
    writer: CompressedCheckpointWriter,
    name: str,
    experts: CodedExperts,
    coding: str | None,
    advance: Callable[[int], object],
) -> None:
    """Write a kernel in a coding; None is the one that it has."""
    if coding is None:
        writer.create_coded(name, experts.outline)
        batches = (coded for _, coded in experts.each(_EXPERT_BATCH))
        part = writer.write_coded_part(name, experts.outline, 0, batches)
        writer.register_coded(name, experts.outline, [part])
        advance(experts.spec.num_experts)
        return
    recoded = []
    for _, coded in experts.each(_EXPERT_BATCH):
        recoded.append(_recode(coded, coding, name))
        advance(coded.spec.num_experts)
    outline = CodedOutline.join([CodedOutline.of(batch) for batch in recoded])
    writer.create_coded(name, outline)
    part = writer.write_coded_part(name, outline, 0, recoded)
    writer.register_coded(name, outline, [part])


def _recode(coded: CodedTensor, coding: str, name: str) -> CodedTensor:
    codes = _codes(coded)
    recoded = encode(codes, coded.arrays["levels"], coding)
    if not np.array_equal(_codes(recoded), codes):
        raise CodecError(
            f"{name}: codes in {coding} decode to others than they were made from; keep the "
            "checkpoint as it is, and report this"
        )
    return recoded


def _codes(coded: CodedTensor) -> UInt8[np.ndarray, "experts rows width"]:
    """Decode all codes, expert by expert."""
    coding = codings.get_coding(coded.spec.coding)
    # Round lengths for all batches and kernels, so that few programs are compiled.
    length = _round_up(max(CodedOutline.of(coded).expert_sizes, default=0))
    most = 2 * coded.spec.width + 64  # that a spec may have
    bound = min(_round_up(coded.spec.max_row_codewords), most)
    spec = dataclasses.replace(coded.spec, num_experts=1, max_row_codewords=bound)
    decoded = []
    for expert in range(coded.spec.num_experts):
        one = codings.slice_experts(coded, expert, expert + 1)
        arrays = dict(one.arrays)
        if coding.code_array is not None:
            words = arrays[coding.code_array]
            arrays[coding.code_array] = np.pad(words, (0, length - len(words)))
        decoded.append(np.asarray(_decoder(spec)(arrays)))
    return np.stack(decoded)


def _round_up(count: int) -> int:
    return 1 << (count - 1).bit_length() if count > 0 else 0


@functools.lru_cache(maxsize=64)
def _decoder(spec: TensorSpec) -> Callable[..., jax.Array]:
    return jax.jit(lambda arrays: decode_expert(spec, arrays, 0))


def _recorded(compression: Mapping[str, Any], coding: str) -> dict[str, Any]:
    """Return how the output was made: as a run that chose the coding would have it."""
    made = copy.deepcopy(dict(compression))
    settings = made.get("settings")
    if settings is None:  # imported from another layout
        return made
    grid = codings.get_coding(coding).grid
    own = settings.get("grid")
    if own == grid:
        settings["expert_coding"] = coding
    for fields in settings.get("layer_overrides", {}).values():
        if fields.get("grid", own) == grid and fields.keys() & {"grid", "expert_coding"}:
            fields["expert_coding"] = coding
    return made
