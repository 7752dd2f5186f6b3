"""A checkpoint, native or compressed, to a Flax module and its variables."""

import dataclasses
import functools
import os
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from qmoe_jax.checkpoints import names
from qmoe_jax.checkpoints.compressed import is_compressed_checkpoint, open_compressed_checkpoint
from qmoe_jax.checkpoints.config import SwitchConfig
from qmoe_jax.checkpoints.t5x import open_t5x_checkpoint
from qmoe_jax.codec.decode import decode_expert_weights, device_arrays
from qmoe_jax.errors import CheckpointError
from qmoe_jax.models.switch import SwitchTransformer


def load_switch(
    path: str | os.PathLike[str],
    activation_dtype: DTypeLike = "float32",
    expert_capacity_factor: float | None = None,
    *,
    max_group_size: int | None = None,
    train_capacity_factor: float | None = None,
    min_expert_capacity: int | None = None,
) -> tuple[SwitchTransformer, dict[str, Any]]:
    """Loads a Switch Transformer from a native T5X or a compressed checkpoint.

    Parameters keep the dtype they are stored in and are cast at use; the codes of a compressed
    checkpoint stay codes.

    Args:
      path: folder of the checkpoint, local or gs://.
      activation_dtype: "float32" or "bfloat16".
      expert_capacity_factor: capacity factor of the experts with `enable_dropout=False`, as T5X's
        `EVAL_EXPERT_CAPACITY_FACTOR` (2.0 for the public base, large and C models); None is
        dropless: every token reaches its expert, as QMoE evaluates.
      max_group_size: T5X's `GROUP_SIZE`; that of the public model of this geometry where None, as
        for the next two (`checkpoints.geometry.infer_config` has the rule).
      train_capacity_factor: T5X's `TRAIN_EXPERT_CAPACITY_FACTOR`.
      min_expert_capacity: least capacity of an expert in a token group.

    Returns:
      The module, and `{"params": ...}` for `module.apply`.

    Raises:
      CheckpointError: nothing readable at `path`, or it is damaged.
    """
    dtype = jnp.dtype(activation_dtype)
    if dtype not in (jnp.float32, jnp.bfloat16):
        raise ValueError(f"activation_dtype is {dtype.name}; the model runs in float32 or bfloat16")
    if expert_capacity_factor is not None and expert_capacity_factor <= 0:
        raise ValueError(
            f"expert_capacity_factor is {expert_capacity_factor}; give a positive number, or None "
            "for dropless routing"
        )
    chosen = {
        "max_group_size": max_group_size,
        "train_capacity_factor": train_capacity_factor,
        "min_expert_capacity": min_expert_capacity,
    }
    overrides: dict[str, Any] = {name: value for name, value in chosen.items() if value is not None}
    overrides["eval_capacity_factor"] = expert_capacity_factor
    if is_compressed_checkpoint(path):
        compressed = open_compressed_checkpoint(path)
        config = dataclasses.replace(compressed.config, **overrides)
        flat: dict[str, Any] = {
            name: jnp.asarray(array) for name, array in compressed.read_dense().items()
        }
        for kernel in compressed.specs:
            for key, array in device_arrays(compressed.read_coded(kernel)).items():
                flat[f"{kernel}/{key}"] = array
        module = SwitchTransformer(config, dtype, tuple(sorted(compressed.specs.items())))
        return module, {"params": names.unflatten(flat)}
    native = open_t5x_checkpoint(path)
    config = SwitchConfig.from_checkpoint(native, **overrides)
    params = jax.tree.map(jnp.asarray, native.params())
    return SwitchTransformer(config, dtype), {"params": params}


def dequantized(
    module: SwitchTransformer, variables: Mapping[str, Any], dtype: DTypeLike = "float32"
) -> tuple[SwitchTransformer, dict[str, Any]]:
    """The same model with its codes expanded to dense expert kernels, `[experts, in, out]`.

    For where memory allows it, and as the slow twin of running on codes.

    Raises:
      CheckpointError: the model has no codes.
    """
    if not module.coded:
        raise CheckpointError("the model has no codes to expand; load a compressed checkpoint")
    flat = names.flatten(variables["params"])
    for kernel, spec in module.coded:
        arrays = {
            key.removeprefix(kernel + "/"): flat.pop(key)
            for key in [key for key in flat if key.startswith(kernel + "/")]
        }
        decode = jax.jit(functools.partial(decode_expert_weights, spec, dtype=jnp.dtype(dtype)))
        config = module.config
        num_in = config.expert_mlp_dim if kernel.endswith("/wo") else config.embed_dim
        flat[f"{kernel}/kernel"] = jnp.stack(
            [decode(arrays, e).reshape(-1, num_in).T for e in range(spec.num_experts)]
        )
    return dataclasses.replace(module, coded=()), {"params": names.unflatten(flat)}
