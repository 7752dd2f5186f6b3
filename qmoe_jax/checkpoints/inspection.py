"""What a checkpoint holds, native or compressed, and where its bits go."""

import math
import os
from collections.abc import Iterable, Mapping
from typing import Any

from qmoe_jax.checkpoints import names
from qmoe_jax.checkpoints.compressed import is_compressed_checkpoint, open_compressed_checkpoint
from qmoe_jax.checkpoints.geometry import parameter_shapes
from qmoe_jax.checkpoints.read_config import read_config
from qmoe_jax.checkpoints.t5x import open_t5x_checkpoint
from qmoe_jax.codec import stats
from qmoe_jax.codec.codings import get_coding
from qmoe_jax.codec.tensor import CodedTensor
from qmoe_jax.progress import progress as show_progress

BFLOAT16_BYTES = 2


def inspect_checkpoint(path: str | os.PathLike[str], progress: bool = False) -> dict[str, Any]:
    """Return what `path` holds, as a JSON object.

    Both kinds have `kind` ("compressed" or "native"), `path`, `config`, and `parameters` and
    `num_bytes`, each with `experts`, `dense` and `total`. A compressed one has also

      compression: how it was made, as recorded.
      kernels: for each expert kernel `name`, `coding`, `num_experts`, `out_features`,
        `in_features`, `bits`, which is that of `codec.stats.bits`, and `parts`: for each part of
        what is stored its `name`, `kind` (codes, levels or lengths) and `bits`.
      experts: `bits` over all kernels (codes, levels, offsets, total, bits_per_weight, zero_share,
        entropy_share), `parts` likewise, and `compression` against bfloat16.
      container: bytes on disk beside arrays: the manifest, metadata, filler of chunks.
      model: `compression` of the whole model against bfloat16.

    and a native one `layout`, `step` and `dtypes`, the number of parameters of each dtype.

    Args:
      path: folder of the checkpoint, local or gs://.
      progress: show a progress bar on stderr.

    Raises:
      CheckpointError: nothing readable at `path`, or it is damaged.
      CodecError: damaged codes.
    """
    return _compressed(path, progress) if is_compressed_checkpoint(path) else _native(path)


def _compressed(path: str | os.PathLike[str], progress: bool) -> dict[str, Any]:
    checkpoint = open_compressed_checkpoint(path)
    kernels = []
    kernel_names = sorted(checkpoint.specs)
    for name in show_progress(kernel_names, title="reading", unit="kernels", shown=progress):
        coded = checkpoint.read_coded(name)
        kernels.append(
            {
                "name": name,
                "coding": coded.spec.coding,
                "num_experts": coded.spec.num_experts,
                "out_features": coded.spec.rows,
                "in_features": coded.spec.width,
                "bits": stats.bits(coded),
                "parts": _parts(coded),
            }
        )
    parameters = _split(parameter_shapes(checkpoint.config))
    num_bytes = checkpoint.num_bytes()
    stored = {"experts": num_bytes["coded"], "dense": num_bytes["dense"]}
    stored["total"] = stored["experts"] + stored["dense"]
    return {
        "kind": "compressed",
        "path": checkpoint.url,
        "config": checkpoint.config.to_json(),
        "compression": dict(checkpoint.compression),
        "parameters": parameters,
        "num_bytes": stored,
        "kernels": kernels,
        "experts": {
            "bits": _sum_of_bits(kernels),
            "parts": _sum_of_parts(kernels),
            "compression": ratio(BFLOAT16_BYTES * parameters["experts"], stored["experts"]),
        },
        "container": checkpoint.container_bytes(),
        "model": {"compression": ratio(BFLOAT16_BYTES * parameters["total"], stored["total"])},
    }


def _parts(coded: CodedTensor) -> list[dict[str, Any]]:
    """Parts of a tensor, its code array's first; those without bits, too."""
    kinds = get_coding(coded.spec.coding).array_kinds
    return [
        {"name": name, "kind": kinds.get(name, "codes"), "bits": bits}
        for name, bits in stats.bits_by_part(coded).items()
    ]


def _sum_of_parts(kernels: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Parts of all kernels by name, in the order in which they first come."""
    sums: dict[str, dict[str, Any]] = {}
    for kernel in kernels:
        for part in kernel["parts"]:
            entry = sums.setdefault(part["name"], part | {"bits": 0})
            entry["bits"] += part["bits"]
    return list(sums.values())


def _sum_of_bits(kernels: Iterable[Mapping[str, Any]]) -> dict[str, int | float]:
    """Totals of the kernels' `bits`, and the quotients of the totals."""
    sums: dict[str, int | float] = {"codes": 0, "levels": 0, "offsets": 0, "total": 0}
    weights, zeros, needed = 0, 0.0, 0.0
    for kernel in kernels:
        bits = kernel["bits"]
        for part in sums:
            sums[part] += bits[part]
        count = kernel["num_experts"] * kernel["out_features"] * kernel["in_features"]
        weights += count
        zeros += bits["zero_share"] * count
        needed += bits["entropy"] * count
    return sums | {
        "bits_per_weight": ratio(sums["total"], weights),
        "code_bits_per_weight": ratio(sums["codes"], weights),
        "zero_share": ratio(zeros, weights),
        "entropy": ratio(needed, weights),
        "entropy_share": ratio(needed, sums["total"]),
    }


def _native(path: str | os.PathLike[str]) -> dict[str, Any]:
    checkpoint = open_t5x_checkpoint(path)
    config = read_config(checkpoint)
    num_bytes = {"experts": 0, "dense": 0, "total": 0}
    dtypes: dict[str, int] = {}
    for name, shape in checkpoint.shapes.items():
        dtype = checkpoint.dtypes[name]
        size = math.prod(shape)
        dtypes[dtype.name] = dtypes.get(dtype.name, 0) + size
        num_bytes["experts" if names.is_expert_kernel(name) else "dense"] += size * dtype.itemsize
        num_bytes["total"] += size * dtype.itemsize
    return {
        "kind": "native",
        "path": checkpoint.url,
        "config": config.to_json(),
        "layout": checkpoint.layout,
        "step": checkpoint.step,
        "dtypes": dtypes,
        "parameters": _split(checkpoint.shapes),
        "num_bytes": num_bytes,
    }


def _split(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
    """Return the number of parameters."""
    counts = {"experts": 0, "dense": 0}
    for name, shape in shapes.items():
        counts["experts" if names.is_expert_kernel(name) else "dense"] += math.prod(shape)
    return counts | {"total": sum(counts.values())}


def ratio(a: int | float, b: int | float) -> float:
    """Divide; 0 where there is nothing to divide by."""
    return a / b if b else 0.0
