"""The manifest of a compressed checkpoint: what it says is held against the geometry that it gives.

Nothing is loaded by a manifest that contradicts itself: a missing or misplaced kernel is named when
the checkpoint is opened, and not by a model that computes something else.
"""

import json
import math
import re
from collections.abc import Mapping
from typing import Any

from qmoe_jax.checkpoints import names
from qmoe_jax.checkpoints.geometry import parameter_shapes
from qmoe_jax.checkpoints.stored_arrays import entry_bytes
from qmoe_jax.codec.codings import get_coding
from qmoe_jax.codec.tensor import TensorSpec
from qmoe_jax.config import SwitchConfig
from qmoe_jax.errors import CheckpointError, CodecError

FORMAT = "qmoe_jax"
FORMAT_VERSION = 2

_KEYS = {"format", "format_version", "config", "compression", "dense", "coded"}
_TENSOR_KEYS = {"spec", "arrays"}
_ENTRY_KEYS = {"file", "dtype", "shape", "checksums"}
_PACKED_KEYS = _ENTRY_KEYS | {"start"}
DENSE_PACK, CODED_PACK = "dense/packed", "coded/packed"
_DTYPES = {"uint8", "uint16", "uint32", "int32", "float16", "bfloat16", "float32", "float64"}
_SHA256 = re.compile("[0-9a-f]{64}")


def dense_file(name: str) -> str:
    """Name the array of a parameter that is kept as it is."""
    return f"dense/{name.replace('/', '.')}"


def coded_file(kernel: str, array: str) -> str:
    """Name an array of a coded expert kernel."""
    return f"coded/{kernel.replace('/', '.')}/{array}"


def parse_manifest(content: bytes) -> Any:
    """Parse JSON in UTF-8; keys that are there twice, NaN and what is infinite are no JSON.

    Raises:
      ValueError: it is none.
    """
    return json.loads(
        content.decode("utf-8"),
        object_pairs_hook=_without_repeats,
        parse_constant=_no_number,
        parse_float=_finite,
    )


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"the key {key!r} is there twice in an object")
        found[key] = value
    return found


def _finite(digits: str) -> float:
    number = float(digits)
    if math.isinf(number):
        raise ValueError(f"{digits:.40} is too large for a number")
    return number


def _no_number(name: str) -> Any:
    raise ValueError(f"{name} is no number of JSON")


def check_manifest(
    manifest: Mapping[str, Any], where: str
) -> tuple[SwitchConfig, dict[str, TensorSpec]]:
    """Check a manifest; return its config and the spec of every coded kernel.

    Args:
      manifest: as JSON gives it, its format and version checked.
      where: what messages call it.

    Raises:
      CheckpointError: it lacks something, or contradicts itself.
    """
    try:
        _require(
            manifest.keys() <= _KEYS, f"it has the unknown keys {sorted(manifest.keys() - _KEYS)}"
        )
        config = _config(manifest.get("config"))
        dense, coded = (_object(manifest.get(key), key) for key in ("dense", "coded"))
        _object(manifest.get("compression"), "compression")
        _check_layers(config, len(dense))
        shapes = parameter_shapes(config)
        _check_names(dense, coded, shapes)
        for name, entry in dense.items():
            _check_entry(name, entry, dense_file(name), DENSE_PACK)
            _require(
                tuple(entry["shape"]) == shapes[name],
                f"{name} has shape {entry['shape']}, but its config implies {list(shapes[name])}",
            )
        specs = {kernel: _check_coded(kernel, coded[kernel], shapes) for kernel in coded}
        _check_places({name: dense[name] for name in sorted(dense)})
        _check_places(
            {
                f"{kernel}/{key}": coded[kernel]["arrays"][key]
                for kernel in sorted(coded)
                for key in sorted(coded[kernel]["arrays"])
            }
        )
    except (CheckpointError, CodecError) as error:
        raise CheckpointError(
            f"{where}: {str(error).rstrip('.')}. It is damaged: copy the checkpoint again, or "
            "compress again."
        ) from error
    return config, specs


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise CheckpointError(message)


def _object(value: Any, key: str) -> dict[str, Any]:
    _require(isinstance(value, dict), f"{key!r} is {value!r:.60}, not an object")
    return value


def _config(fields: Any) -> SwitchConfig:
    return SwitchConfig.from_json(_object(fields, "config"))


def _check_layers(config: SwitchConfig, num_dense: int) -> None:
    """Refuse sizes that no manifest with so few names can have, before names are made of them."""
    layers = config.num_encoder_layers + config.num_decoder_layers
    _require(
        layers <= num_dense,
        f"its config has {layers} layers, but 'dense' names {num_dense} parameters, of which each "
        "layer has several",
    )
    for stack in ("encoder", "decoder"):
        sparse = list(getattr(config, f"{stack}_sparse_layers"))
        _require(
            sparse == sorted(set(sparse)) and max(sparse, default=-1) < _layers_of(config, stack),
            f"{stack}_sparse_layers are {sparse!s:.60}; they must rise and be below the number of "
            f"layers, {_layers_of(config, stack)}",
        )
    _require(
        len(config.mlp_activations) <= 2,
        f"its config has {len(config.mlp_activations)} mlp_activations; there are one or two",
    )


def _layers_of(config: SwitchConfig, stack: str) -> int:
    return getattr(config, f"num_{stack}_layers")


def _check_names(
    dense: Mapping[str, Any], coded: Mapping[str, Any], shapes: Mapping[str, Any]
) -> None:
    """Every parameter of the geometry is there once, dense or (expert kernels) as codes."""
    kernels = {f"{kernel}/kernel" for kernel in coded}
    _require(
        all(name in shapes and names.is_expert_kernel(name) for name in kernels),
        f"{_first(n for n in kernels if n not in shapes or not names.is_expert_kernel(n))} is "
        "coded, but is no expert kernel of its config",
    )
    found = kernels | dense.keys()
    _require(not shapes.keys() - found, f"{_first(shapes.keys() - found)} is missing")
    _require(
        not found - shapes.keys(),
        f"{_first(found - shapes.keys())} does not belong to its config",
    )
    both = kernels & dense.keys()
    _require(not both, f"{_first(both)} is there twice, dense and coded")


def _first(found: Any) -> str:
    return min(found, default="")


def _check_coded(kernel: str, tensor: Any, shapes: Mapping[str, tuple[int, ...]]) -> TensorSpec:
    """Check the spec and the array entries of a coded kernel."""
    tensor = _object(tensor, kernel)
    _require(
        tensor.keys() <= _TENSOR_KEYS,
        f"{kernel} has the unknown keys {sorted(tensor.keys() - _TENSOR_KEYS)}",
    )
    spec = TensorSpec.from_json(_object(tensor.get("spec"), f"{kernel}/spec"))
    num_experts, num_in, num_out = shapes[f"{kernel}/kernel"]
    _require(
        spec.num_experts == num_experts,
        f"{kernel} has {spec.num_experts} experts, but its config {num_experts}",
    )
    _require(
        num_in % spec.width == 0 and spec.rows == num_out * (num_in // spec.width),
        f"{kernel} has {spec.rows} rows of {spec.width} weights, but its config implies "
        f"{num_out} output features of {num_in}",
    )
    arrays = _object(tensor.get("arrays"), f"{kernel}/arrays")
    wanted = set(get_coding(spec.coding).array_names)
    _require(
        arrays.keys() == wanted,
        f"{kernel} has the arrays {sorted(arrays)}; {spec.coding!r} requires {sorted(wanted)}",
    )
    for key, entry in arrays.items():
        _check_entry(f"{kernel}/{key}", entry, coded_file(kernel, key), CODED_PACK)
        _require(
            max(entry["shape"], default=0) <= 2**31,
            f"{kernel}/{key} has the shape {entry['shape']}; decoders count up to 2^31",
        )
    return spec


def _check_places(entries: Mapping[str, Mapping[str, Any]]) -> None:
    """Packed arrays lie in the order of their names, one after another."""
    stop = 0
    for what, entry in entries.items():
        if "start" in entry:
            # As with files: entries that changed places would load, and compute something else.
            _require(
                type(entry["start"]) is int and entry["start"] == stop,
                f"{what} is packed from byte {entry['start']!r:.40} on, but belongs at {stop}",
            )
            stop += entry_bytes(entry)
    _require(stop < 2**60, f"packed arrays have {stop} bytes, which no memory holds")


def _check_entry(what: str, entry: Any, file: str, pack: str) -> None:
    """Check what an array's entry says, but for what only its file or other entries can tell."""
    entry = _object(entry, what)
    keys, file = (_PACKED_KEYS, pack) if "start" in entry else (_ENTRY_KEYS, file)
    _require(entry.keys() == keys, f"{what} has {sorted(entry)}, not {sorted(keys)}")
    # Two kernels whose entries changed places would load, and compute something else.
    _require(entry["file"] == file, f"{what} lies in {entry['file']!r}, but belongs in {file!r}")
    known = isinstance(entry["dtype"], str) and entry["dtype"] in _DTYPES
    _require(known, f"{what} has the dtype {entry['dtype']!r}")
    shape = entry["shape"]
    _require(
        isinstance(shape, list) and all(type(n) is int and 0 <= n < 2**63 for n in shape),
        f"{what} has the shape {shape!r}",
    )
    _require(math.prod(shape) < 2**60, f"{what} has the shape {shape}, which no memory holds")
    checksums = entry["checksums"]
    well_formed = (
        isinstance(checksums, list)
        and len(checksums) > 0
        and all(
            isinstance(pair, list)
            and len(pair) == 2
            and type(pair[0]) is int
            and isinstance(pair[1], str)
            and _SHA256.fullmatch(pair[1])
            for pair in checksums
        )
    )
    _require(well_formed, f"{what} has the checksums {checksums!r:.80}")
    stops = [pair[0] for pair in checksums]
    length = shape[0] if shape else 1
    _require(
        stops == sorted(set(stops)) and stops[0] >= 0 and stops[-1] == length,
        f"the checksums of {what} end at {stops}, but it has {length} entries",
    )
