"""Evaluation in shards of batches, each stored when it is done, so that a killed run goes on.

A shard is an `.npz` of what its batches sum to, one entry a batch. Results are always made from
the shards' arrays, whether just computed or found, so a resumed run ends with the same figures.
"""

import io
import time
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from qmoe_jax.atomic_file import write_atomically
from qmoe_jax.errors import CheckpointError
from qmoe_jax.evaluation.divergence import DivergenceSums
from qmoe_jax.evaluation.metrics import BatchSums
from qmoe_jax.run_folder import RunFolder

Arrays = dict[str, np.ndarray]
_SUMS = ("cross_entropy", "log_z_squared", "num_target_tokens", "num_correct")


def evaluate_shards(
    batches: Sequence[Any],
    compute: Callable[[Any], BatchSums | tuple[BatchSums, DivergenceSums]],
    folder: RunFolder | None,
    batches_per_shard: int,
    on_batch: Callable[[Any, bool], None],
) -> Arrays:
    """Return sums of all batches, stacked: found in the folder where they are, else computed.

    Args:
      batches: what `compute` takes, in order.
      compute: runs the model on a batch, and a reference beside it where there is one.
      folder: where shards are kept; None keeps none.
      batches_per_shard: batches that are stored together; a kill loses at most so many.
      on_batch: called after each batch with it and whether it was computed.

    Returns:
      The four sums of `BatchSums`, and the three of `DivergenceSums` where there is a reference,
      [batches, batch]; `router/<layer>/<name>`, [batches, ...]; and
      `seconds`, float64 [batches], and `warm`, bool [batches], False where the time includes
      compilation.

    Raises:
      CheckpointError: a shard is damaged, or one cannot be written.
    """
    shards = []
    warm = False
    for number, start in enumerate(range(0, len(batches), batches_per_shard)):
        part = batches[start : start + batches_per_shard]
        path = None if folder is None else folder.path / f"shard_{number:05d}.npz"
        if path is not None and path.exists():
            shards.append(_read_shard(path, len(part)))
            for batch in part:
                on_batch(batch, False)
            continue
        rows = []
        for batch in part:
            started = time.monotonic()
            sums = jax.device_get(compute(batch))
            timing = {"seconds": np.float64(time.monotonic() - started), "warm": np.bool_(warm)}
            rows.append(dict(_named(sums)) | timing)
            warm = True
            on_batch(batch, True)
        shards.append({name: np.stack([row[name] for row in rows]) for name in rows[0]})
        if path is not None:
            _write_shard(path, shards[-1])
    return {name: np.concatenate([shard[name] for shard in shards]) for name in shards[0]}


def router_arrays(arrays: Arrays) -> dict[str, Arrays]:
    """Return the part of `evaluate_shards` that is about routers: layer to name to array."""
    layers: dict[str, Arrays] = {}
    for key, array in arrays.items():
        if key.startswith("router/"):
            layer, _, name = key.removeprefix("router/").rpartition("/")
            layers.setdefault(layer, {})[name] = array
    return layers


def _named(
    computed: BatchSums | tuple[BatchSums, DivergenceSums],
) -> Iterator[tuple[str, np.ndarray]]:
    sums = computed if isinstance(computed, BatchSums) else computed[0]
    if not isinstance(computed, BatchSums):
        for name, value in computed[1]._asdict().items():
            yield name, np.asarray(value)
    for name in _SUMS:
        yield name, np.asarray(getattr(sums, name))
    for layer, values in sums.router.items():
        for name, value in values.items():
            yield f"router/{layer}/{name}", np.asarray(value)


def _write_shard(path: Path, arrays: Arrays) -> None:
    buffer = io.BytesIO()
    # pyright takes the arrays for savez's own flags.
    np.savez(buffer, **arrays)  # pyright: ignore[reportArgumentType]
    write_atomically(path, buffer.getvalue())


def _read_shard(path: Path, num_batches: int) -> Arrays:
    try:
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise CheckpointError(
            f"{path} is damaged ({error}); delete it, and the run computes it again"
        ) from error
    if set(_SUMS) - arrays.keys() or any(len(array) != num_batches for array in arrays.values()):
        raise CheckpointError(
            f"{path} holds other batches than the {num_batches} of this shard; delete it, and the "
            "run computes it again"
        )
    return arrays
