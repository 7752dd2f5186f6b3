"""Which of T5X's layouts a folder holds, and where the array of each parameter lies.

Three layouts name their arrays `target.<dotted path>`:

  t5x          `checkpoint` (flax msgpack, version 3) whose leaves are TensorStore specs, and a zarr
               array in a folder of its own beside it for each of them.
  orbax_zarr   the same folders under `state/`; the leaves of `state/checkpoint` (or, without that
               file, the keys of `state/_METADATA`) are bare names.
  orbax_ocdbt  the same names under `state/`, all of them inside one OCDBT database
               (`state/manifest.ocdbt`).

Only names are read here. Optimizer state is never looked at, except for the step.
"""

import dataclasses
import json
import os
import re
from typing import Any, Literal

import numpy as np
from flax import serialization, traverse_util

from qmoe_jax.checkpoints import names
from qmoe_jax.checkpoints.storage import Folder
from qmoe_jax.errors import CheckpointError

Layout = Literal["t5x", "orbax_zarr", "orbax_ocdbt"]

_VERSION = 3
_PLACEHOLDER = "PLACEHOLDER://"


@dataclasses.dataclass(frozen=True)
class ArrayLocation:
    """Where an array lies, and what the checkpoint's own metadata says of it.

    Attributes:
      kvstore: TensorStore key-value spec of the zarr array.
      url: what messages call that place.
      shape: recorded shape, or None where the layout records none.
      dtype: recorded dtype, or None where the layout records none.
    """

    kvstore: dict[str, Any]
    url: str
    shape: tuple[int, ...] | None = None
    dtype: str | None = None


@dataclasses.dataclass(frozen=True)
class CheckpointFiles:
    """What a checkpoint folder holds.

    Attributes:
      layout: which layout it has.
      folder: the `checkpoint_<step>` folder (its `state` folder for the Orbax layouts).
      parameters: location of the array of every parameter, by '/'-joined name.
      step: training step, the location of its scalar array, or None where nothing tells it.
    """

    layout: Layout
    folder: Folder
    parameters: dict[str, ArrayLocation]
    step: int | ArrayLocation | None


def find_checkpoint(folder: Folder) -> CheckpointFiles:
    """Find the checkpoint in `folder`: itself, its `state/`, or its latest `checkpoint_<step>/`.

    Raises:
      CheckpointError: the folder is missing or no checkpoint, or its metadata cannot be understood.
    """
    looked_for = []
    for candidate in (folder, folder.child("state")):
        looked_for += [f"{candidate.url}/checkpoint", f"{candidate.url}/_METADATA"]
        if files := _read_files(candidate):
            return files
    if folder.spec["driver"] == "file" and not os.path.isdir(folder.spec["path"]):
        raise CheckpointError(
            f"{folder.url} is not a folder: give the checkpoint_<step> folder, or its parent"
        )
    _check_native(folder)
    if steps := folder.steps():
        latest = folder.child(f"checkpoint_{steps[-1]}")
        for candidate in (latest, latest.child("state")):
            if files := _read_files(candidate):
                return files
        _check_native(latest)
        raise CheckpointError(
            f"{latest.url}, the latest checkpoint in {folder.url}, is incomplete: expected "
            "`checkpoint` or `state/_METADATA` in it. "
            f"Name another step of {list(steps)}, or copy it again."
        )
    raise CheckpointError(
        f"{folder.url} is no T5X checkpoint: looked for {', '.join(looked_for)} and "
        f"{folder.url}/checkpoint_<step>/. Give the checkpoint_<step> folder, or its parent."
    )


def _check_native(folder: Folder) -> None:
    """Refuse what this package itself wrote, and what it converts, by its name.

    Raises:
      CheckpointError: the folder holds a compressed checkpoint, an output that is unfinished, or a
        Hugging Face model.
    """
    if folder.read("manifest.json") is not None:
        raise CheckpointError(
            f"{folder.url} is a compressed checkpoint; a native one is needed here. Give the one "
            "that it was made from, or make one of it: qmoe-jax dequantize."
        )
    if folder.name.endswith(".partial"):
        raise CheckpointError(
            f"{folder.url} is unfinished: the command that was writing it goes on with it when it "
            "is started again."
        )
    if b'"model_type"' in (folder.read("config.json") or b""):
        raise CheckpointError(
            f"{folder.url} is a Hugging Face folder; a T5X checkpoint is needed here. Make one of "
            "it: qmoe-jax convert huggingface. A published QMoE model: convert published import."
        )


def _read_files(folder: Folder) -> CheckpointFiles | None:
    """Read the metadata of the checkpoint in exactly `folder`; None where there is none."""
    packed = folder.read("checkpoint")
    if packed is not None:
        tree = _unpack(packed, f"{folder.url}/checkpoint")
        if "optimizer" in tree:
            return _t5x_files(folder, tree)
        return _orbax_files(folder, *_names_of_placeholders(folder, tree))
    metadata = folder.read("_METADATA")
    if metadata is not None:
        return _orbax_files(folder, *_names_of_metadata(folder, metadata))
    return None


def _unpack(packed: bytes, url: str) -> dict[str, Any]:
    try:
        tree = serialization.msgpack_restore(packed)
    except Exception as error:
        raise CheckpointError(
            f"{url} ({len(packed)} bytes) is no readable flax msgpack file: {error}. "
            "It is truncated or corrupt: copy it again."
        ) from error
    if not isinstance(tree, dict) or not tree.keys() & {"optimizer", "target"}:
        found = sorted(tree) if isinstance(tree, dict) else type(tree).__name__
        raise CheckpointError(
            f"{url} holds {found}, expected the keys 'optimizer' and 'version' (T5X) or 'target' "
            "(Orbax): it was not written by T5X."
        )
    return tree


def _t5x_files(folder: Folder, tree: dict[str, Any]) -> CheckpointFiles:
    url = f"{folder.url}/checkpoint"
    if tree.get("version") != _VERSION:
        raise CheckpointError(
            f"{url} has version {tree.get('version')}, expected {_VERSION}: "
            "load it with the T5X that wrote it and save it again with a current one."
        )
    optimizer = tree["optimizer"]
    if not isinstance(optimizer, dict) or not isinstance(optimizer.get("target"), dict):
        raise CheckpointError(f"{url} has no parameters: expected a dict 'optimizer/target'.")
    leaves = traverse_util.flatten_dict(
        optimizer["target"], is_leaf=lambda _, node: "driver" in node, sep="/"
    )
    parameters = {name: _t5x_location(folder, name, leaf) for name, leaf in leaves.items()}
    return CheckpointFiles("t5x", folder, parameters, _inline_step(folder, optimizer))


def _t5x_location(folder: Folder, name: str, leaf: Any) -> ArrayLocation:
    """Normalise a TensorStore spec as T5X recorded it.

    Neither the recorded kvstore driver nor its bucket is used: T5X writes `gcs` with a dummy bucket
    or `gfile` for what may since have been copied anywhere. Chunks and compressor are not used
    either; the array's own `.zarray` knows them.
    """
    url = f"{folder.url}/checkpoint"
    if not isinstance(leaf, dict):
        raise CheckpointError(
            f"parameter {name} in {url} is a {type(leaf).__name__}, expected a TensorStore spec: "
            "save the model with logical axes, so that T5X writes every parameter as an array."
        )
    if leaf["driver"] != "zarr":
        raise CheckpointError(
            f"parameter {name} in {url} has driver {leaf['driver']!r}, expected 'zarr'."
        )
    try:
        # Before TensorStore 0.1.14 the path stood beside the kvstore, not in it.
        path = leaf["kvstore"].get("path") or leaf["path"]
        shape = tuple(int(size) for size in leaf["metadata"]["shape"])
        dtype = leaf.get("dtype")
        # T5X always writes an array beside the `checkpoint` file.
        array = path.rstrip("/").rpartition("/")[2]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(
            f"parameter {name} in {url} has a malformed TensorStore spec {leaf}: expected "
            "kvstore.path (or path) and metadata.shape. Copy the file again."
        ) from error
    child = folder.child(array)
    return ArrayLocation(child.spec, child.url, shape, dtype)


def _orbax_files(
    folder: Folder, parameters: dict[str, str], step: str | int | None
) -> CheckpointFiles:
    """`parameters` and `step` give array names (or a step itself), without their folder."""
    ocdbt = folder.read("manifest.ocdbt") is not None

    def locate(array: str) -> ArrayLocation:
        url = f"{folder.url}/{array}"
        if not ocdbt:
            return ArrayLocation(folder.child(array).spec, url)
        kvstore = {"driver": "ocdbt", "base": folder.spec, "path": f"{array}/"}
        return ArrayLocation(kvstore, f"{url} (OCDBT)")

    return CheckpointFiles(
        layout="orbax_ocdbt" if ocdbt else "orbax_zarr",
        folder=folder,
        parameters={name: locate(array) for name, array in parameters.items()},
        step=locate(step) if isinstance(step, str) else step,
    )


def _names_of_placeholders(
    folder: Folder, tree: dict[str, Any]
) -> tuple[dict[str, str], str | int | None]:
    """Array names from the leaves of Orbax's msgpack file: `PLACEHOLDER://target.<dotted path>`."""
    arrays = {}
    for name, leaf in names.flatten(tree["target"]).items():
        if not isinstance(leaf, str) or not leaf.startswith(_PLACEHOLDER):
            raise CheckpointError(
                f"parameter {name} in {folder.url}/checkpoint is a {type(leaf).__name__}, expected "
                f"a string {_PLACEHOLDER}<array>: copy the checkpoint again."
            )
        arrays[name] = leaf.removeprefix(_PLACEHOLDER)
    step = tree.get("state", {}).get("step")
    if isinstance(step, str):
        return arrays, step.removeprefix(_PLACEHOLDER)
    return arrays, _inline_step(folder, tree)


def _names_of_metadata(folder: Folder, metadata: bytes) -> tuple[dict[str, str], str | int | None]:
    """Array names from the keys of Orbax's `_METADATA`."""
    url = f"{folder.url}/_METADATA"
    try:
        content = json.loads(metadata)
        paths = [
            [str(key["key"]) for key in entry["key_metadata"]]
            for entry in content["tree_metadata"].values()
        ]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{url} ({len(metadata)} bytes) is not Orbax's JSON with 'tree_metadata' "
            f"({type(error).__name__}: {error}): it is truncated or corrupt, copy it again."
        ) from error
    if content.get("use_zarr3"):
        raise CheckpointError(
            f"{url} says use_zarr3, expected zarr v2 arrays, which are what T5X writes: "
            "save the checkpoint without zarr3."
        )
    arrays = {"/".join(path[1:]): ".".join(path) for path in paths if path[0] == "target"}
    if not arrays:
        raise CheckpointError(
            f"{url} names no parameters: expected keys that begin with 'target'. "
            "It was not written by T5X."
        )
    step = "state.step" if ["state", "step"] in paths else step_of_name(folder.url)
    return arrays, step


def _inline_step(folder: Folder, tree: dict[str, Any]) -> int | None:
    """Return the int32 scalar `state/step` of a msgpack tree, else what the folder's name says."""
    try:
        return int(np.asarray(tree["state"]["step"]).item())
    except (KeyError, TypeError, ValueError):
        return step_of_name(folder.url)


def step_of_name(url: str) -> int | None:
    """Return the training step in a folder's name, None where it has none.

    Args:
      url: ends in `checkpoint_<step>`, as T5X names folders, or in the `state` of Orbax in it.
    """
    match = re.search(r"(?:^|/)checkpoint_(\d+)(?:/state)?/?$", url)
    return int(match[1]) if match else None
