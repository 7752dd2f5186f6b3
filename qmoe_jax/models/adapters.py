"""Low-rank corrections of a loaded model: into its variables, and into its kernels."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from qmoe_jax.checkpoints import names
from qmoe_jax.checkpoints.adapters import Adapters
from qmoe_jax.config import SwitchConfig
from qmoe_jax.models.layers import ADAPTERS
from qmoe_jax.ops.expert_parallel import replicate


def adapter_variables(adapters: Adapters, config: SwitchConfig, mesh: Mesh | None) -> dict:
    """Return the collection `adapters` of a model's variables.

    Raises:
      CheckpointError: they are another model's.
    """
    adapters.check(config)
    if mesh is None:
        arrays = {name: jnp.asarray(array) for name, array in adapters.arrays.items()}
        return names.unflatten(arrays)
    return names.unflatten({n: replicate(array, mesh) for n, array in adapters.arrays.items()})


def merge_adapters(variables: Mapping[str, Any]) -> dict[str, Any]:
    """Return variables with corrections added to their kernels, W + a b, in the kernels' dtypes.

    Corrections of codes stay apart, since codes are no sums: they are left in `adapters`.
    """
    params = names.flatten(variables["params"])
    left: dict[str, jax.Array] = {}
    flat = names.flatten(variables.get(ADAPTERS, {}))
    for name, a in flat.items():
        path, _, part = name.rpartition("/")
        if f"{path}/kernel" not in params:
            left[name] = a
        elif part == "a":
            kernel, b = params[f"{path}/kernel"], flat[f"{path}/b"]
            product = jnp.matmul(
                a.astype(jnp.float32), b.astype(jnp.float32), precision=jax.lax.Precision.HIGHEST
            )
            merged = kernel.astype(jnp.float32) + product
            params[f"{path}/kernel"] = merged.astype(kernel.dtype)
    rest = {name: value for name, value in variables.items() if name != ADAPTERS}
    merged_variables = {**rest, "params": names.unflatten(params)}
    return merged_variables | ({ADAPTERS: names.unflatten(left)} if left else {})
