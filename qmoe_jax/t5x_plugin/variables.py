"""What T5X asks of a model's variables before it has them: shapes and axes."""

import os
from typing import Any

import jax
import jax.numpy as jnp
from flax.linen.partitioning import AxisMetadata

from qmoe_jax.checkpoints import names
from qmoe_jax.checkpoints.compressed import is_compressed_checkpoint, open_compressed_checkpoint
from qmoe_jax.checkpoints.compressed_parts import variable_shapes
from qmoe_jax.checkpoints.t5x import open_t5x_checkpoint

Shapes = dict[str, jax.ShapeDtypeStruct]


def checkpoint_shapes(path: str | os.PathLike[str]) -> Shapes:
    """Shape and dtype of each array of `load_switch(path)`, by '/'-joined name, from metadata.

    Args:
      path: compressed or native checkpoint, local or gs://.

    Raises:
      CheckpointError: nothing readable at `path`.
    """
    if is_compressed_checkpoint(path):
        return variable_shapes(open_compressed_checkpoint(path))
    native = open_t5x_checkpoint(path)
    return {
        name: jax.ShapeDtypeStruct(native.shapes[name], native.dtypes[name])
        for name in native.names
    }


def placeholder_variables(shapes: Shapes) -> dict[str, Any]:
    """Variables as T5X wants them of `get_initial_variables`: `params` and `params_axes`.

    T5X only looks at their shapes (under `jax.eval_shape`) and at the axes. The values are zeros,
    and no model: codes have no random initialisation.

    No axis is named, so that T5X replicates every array: the arrays of codes cannot be cut at
    places that T5X's partitioner would choose.
    """
    params = {name: jnp.zeros(shape.shape, shape.dtype) for name, shape in shapes.items()}
    axes = {f"{name}_axes": AxisMetadata((None,) * len(shapes[name].shape)) for name in shapes}
    return {"params": names.unflatten(params), "params_axes": names.unflatten(axes)}
