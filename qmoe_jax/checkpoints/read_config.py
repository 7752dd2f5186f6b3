"""The config of a checkpoint, native or compressed."""

import dataclasses
import os
from typing import Any

from qmoe_jax.checkpoints.compressed import is_compressed_checkpoint, open_compressed_checkpoint
from qmoe_jax.checkpoints.geometry import infer_config
from qmoe_jax.checkpoints.t5x import T5XCheckpoint, open_t5x_checkpoint
from qmoe_jax.config import ROUTING_FIELDS, SwitchConfig


def read_config(source: str | os.PathLike[str] | T5XCheckpoint, **overrides: Any) -> SwitchConfig:
    """Read the config of a checkpoint; no weight is read.

    Of a native T5X checkpoint the geometry is read off names and shapes, and the routing fields
    are those of flaxformer's gin files (`geometry.infer_config` has the rule). Of a compressed
    checkpoint (a folder with a `manifest.json`) it is read as recorded.

    Args:
      source: path of either kind of checkpoint, local or gs://, or an opened native one.
      **overrides: values for the fields that no checkpoint determines: relpos_max_distance,
        max_group_size, train_capacity_factor, eval_capacity_factor, min_expert_capacity.

    Raises:
      CheckpointError: no checkpoint there, or its parameters do not fit one geometry.
      ValueError: an override of anything else.
    """
    if wrong := sorted(overrides.keys() - set(ROUTING_FIELDS)):
        raise ValueError(
            f"{', '.join(wrong)} cannot be overridden: only {', '.join(ROUTING_FIELDS)} are "
            "not determined by the checkpoint."
        )
    if isinstance(source, T5XCheckpoint):
        config = infer_config(source.shapes)
    elif is_compressed_checkpoint(source):
        config = open_compressed_checkpoint(source).config
    else:
        config = infer_config(open_t5x_checkpoint(source).shapes)
    return dataclasses.replace(config, **overrides)
