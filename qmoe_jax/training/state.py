"""What a stopped run goes on from: one file, there whole or not at all."""

import dataclasses
import json
import zipfile
import zlib
from pathlib import Path
from typing import Any

import jax
import numpy as np

from qmoe_jax.atomic_file import open_atomically
from qmoe_jax.errors import CheckpointError
from qmoe_jax.training.trainable import Trained

FILE = "state.npz"


@dataclasses.dataclass
class TrainState:
    """A run between two steps.

    Attributes:
      step: steps that are done.
      trained: values of what is trained.
      optimizer: state of the optimizer, optax's tree.
      history: a JSON object for each line of the log.
    """

    step: int
    trained: Trained
    optimizer: Any
    history: list[dict[str, Any]]


def save_state(folder: Path, state: TrainState) -> None:
    """Write the state of a run.

    Raises:
      CheckpointError: it cannot be written.
    """
    leaves = jax.device_get(jax.tree.leaves((state.trained, state.optimizer)))
    arrays = {f"leaf_{i}": np.asarray(leaf) for i, leaf in enumerate(leaves)}
    header = json.dumps({"step": state.step, "history": state.history}).encode()
    try:
        with open_atomically(folder / FILE) as file:
            # pyright takes the arrays for savez's own flags.
            np.savez(file, header=np.frombuffer(header, np.uint8), **arrays)  # pyright: ignore[reportArgumentType]
    except OSError as error:
        raise CheckpointError(
            f"cannot write {folder / FILE} ({error}); free some space and run the same command "
            "again"
        ) from error


def restore_state(folder: Path, begun: TrainState) -> TrainState:
    """Return the state that an earlier run left; `begun`, the state at the start, without one.

    Raises:
      CheckpointError: the file is damaged, or of another run.
    """
    path = folder / FILE
    if not path.exists():
        return begun
    tree = (begun.trained, begun.optimizer)
    expected, structure = jax.tree.flatten(tree)
    try:
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as archive:
            header = json.loads(archive["header"].tobytes())
            leaves = [archive[f"leaf_{i}"] for i in range(len(expected))]
        step, history = int(header["step"]), list(header["history"])
    except (ValueError, OSError, EOFError, KeyError, zipfile.BadZipFile, zlib.error) as error:
        raise CheckpointError(
            f"{path} is damaged ({error}); pass overwrite=True to begin anew"
        ) from error
    for leaf, like in zip(leaves, expected, strict=True):
        if leaf.shape != np.shape(like):
            raise CheckpointError(
                f"{path} has an array of shape {leaf.shape} where this run has {np.shape(like)}; "
                "pass overwrite=True to begin anew"
            )
    trained, optimizer = jax.tree.unflatten(structure, map(jax.numpy.asarray, leaves))
    return TrainState(step, trained, optimizer, history)
