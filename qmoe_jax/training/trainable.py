"""A model's variables in two: what is trained, as float32, and what stays as it is."""

import dataclasses
import fnmatch
import zlib
from collections.abc import Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from qmoe_jax.checkpoints import names
from qmoe_jax.checkpoints.geometry import parameter_shapes
from qmoe_jax.codec.codings import get_coding
from qmoe_jax.config import SwitchConfig
from qmoe_jax.models.layers import ADAPTERS
from qmoe_jax.models.switch import SwitchTransformer
from qmoe_jax.ops.expert_parallel import replicate
from qmoe_jax.training.settings import DENSE_KERNELS, FinetuneSettings

# By "params/PATH" or "adapters/PATH".
Trained = dict[str, Float[Array, "..."]]


@dataclasses.dataclass(frozen=True)
class Parts:
    """Variables in two.

    Attributes:
      trained: float32 copies of what is trained.
      frozen: the rest, by "collection/path".
      dtypes: what trained parameters are stored as.
    """

    trained: Trained
    frozen: dict[str, Array]
    dtypes: Mapping[str, np.dtype]


def split_variables(
    module: SwitchTransformer, variables: Mapping[str, Any], settings: FinetuneSettings
) -> Parts:
    """Choose what is trained; adapters that are not there yet begin as corrections of nothing.

    Raises:
      ValueError: a kind that the model has not, or a pattern without a kernel.
    """
    flat = names.flatten(variables)
    chosen: set[str] = set()
    for kind in settings.kinds:
        if kind != "lora":
            chosen |= _of_kind(module, flat, kind)
    trained = {name: _unsplit(module, name, flat.pop(name)) for name in sorted(chosen)}
    dtypes = {name: np.dtype(variables_dtype) for name, variables_dtype in _dtypes(variables)}
    held = {name: flat.pop(name) for name in list(flat) if name.startswith(f"{ADAPTERS}/")}
    if "lora" in settings.kinds:
        trained |= held or _new_adapters(module, settings)
        if module.mesh is not None:
            trained = {name: replicate(array, module.mesh) for name, array in trained.items()}
    else:
        flat |= held
    return Parts(trained, flat, {name: dtypes[name] for name in chosen})


@dataclasses.dataclass(frozen=True)
class CodeArray:
    """How a trained array of codes lies in a model's variables.

    Attributes:
      dtype: of storage; values are rounded to it, and gradients pass.
      shape: with the devices in front where experts are split over them.
    """

    dtype: np.dtype
    shape: tuple[int, ...]


def join_variables(
    trained: Mapping[str, Array | np.ndarray],
    frozen: Mapping[str, Array],
    coded: Mapping[str, CodeArray],
) -> dict[str, Any]:
    """Return the variables of a module.

    Args:
      trained: of `split_variables`, or later values.
      frozen: of `split_variables`, or all variables, of which those above take the place.
      coded: of `code_arrays`.
    """
    lying = {
        name: array.reshape(coded[name].shape).astype(coded[name].dtype) if name in coded else array
        for name, array in trained.items()
    }
    return names.unflatten({**frozen, **lying})


def code_arrays(module: SwitchTransformer, parts: Parts) -> dict[str, CodeArray]:
    """Return the trained arrays that belong to codes, by name."""
    found = {}
    for name in parts.dtypes:
        if name.startswith(_coded_paths(module)):
            count, *rest = parts.trained[name].shape
            if module.mesh is not None:
                rest = [count // module.mesh.size, *rest]
                count = module.mesh.size
            found[name] = CodeArray(parts.dtypes[name], (count, *rest))
    return found


def _coded_paths(module: SwitchTransformer) -> tuple[str, ...]:
    return tuple(f"params/{kernel}/" for kernel, _ in module.coded)


def gradient_masks(module: SwitchTransformer, parts: Parts) -> dict[str, Array]:
    """Return factors of gradients: 0 where a trained array has parts that must stay.

    The second level of 2-bit codes is their zero, a code: others would stand for other weights.
    """
    masks = {}
    for kernel, spec in module.coded:
        name = f"params/{kernel}/levels"
        if name in parts.trained and get_coding(spec.coding).grid == "2bit":
            masks[name] = jnp.array([1.0, 0.0], jnp.float32)
    return masks


def _unsplit(module: SwitchTransformer, name: str, array: Array) -> Float[Array, "..."]:
    """Return what is trained: float32, and an array of codes as one device would have it.

    So optimizers, whose sums follow shapes, do the same on any number of devices.
    """
    if module.mesh is not None:
        if name.startswith(_coded_paths(module)):
            array = array.reshape(-1, *array.shape[2:])
        array = replicate(array, module.mesh)
    return array.astype(jnp.float32)


def _dtypes(variables: Mapping[str, Any]) -> list[tuple[str, Any]]:
    return [(name, array.dtype) for name, array in names.flatten(variables).items()]


def _of_kind(module: SwitchTransformer, flat: Mapping[str, Array], kind: str) -> set[str]:
    params = {name for name in flat if name.startswith("params/")}
    of_codes = {name for name in params if name.startswith(_coded_paths(module))}
    experts = {n for n in params if names.is_expert_kernel(n.removeprefix("params/"))}
    if kind == "dense":
        return params - of_codes - experts
    if kind == "norms":
        return {name for name in params if name.endswith("_norm/scale")}
    if kind == "gains":
        found = {n for n in of_codes if jnp.issubdtype(flat[n].dtype, jnp.floating)}
    else:
        found = experts
    if not found:
        raise _has_none(kind)
    return found


def check_trainable(
    config: SwitchConfig, coded: Collection[str], settings: FinetuneSettings
) -> None:
    """Refuse to train what a model has not, before it is loaded.

    Args:
      config: geometry of the model.
      coded: paths of the expert kernels that are codes, `decoder/layers_1/mlp/expert/wi`.
      settings: what is to be trained.

    Raises:
      ValueError: a kind that the model has not, or a pattern without a kernel.
    """
    kernels = {f"{path}/kernel" for path in coded}
    dense_experts = {n for n in parameter_shapes(config) if names.is_expert_kernel(n)} - kernels
    if "gains" in settings.kinds and not coded:
        raise _has_none("gains")
    if "experts" in settings.kinds and not dense_experts:
        raise _has_none("experts")
    if "lora" in settings.kinds:
        _corrected_kernels(config, settings)


def _has_none(kind: str) -> ValueError:
    remedy = {
        "gains": "compress the checkpoint first, or train 'experts'",
        "experts": "its codes stay as they are; train 'gains', 'dense' or 'lora'",
    }[kind]
    return ValueError(f"trainable is {kind!r}, and the checkpoint has none: {remedy}")


def _corrected_kernels(config: SwitchConfig, settings: FinetuneSettings) -> list[str]:
    """Return the paths of the kernels that `lora_kernels` names, sorted."""
    kernels = [
        name.removesuffix("/kernel")
        for name in parameter_shapes(config)
        if name.endswith("/kernel") and not name.endswith("/router_weights/w/kernel")
    ]
    # Models without dense MLPs or gates have no kernels for some of the default patterns.
    is_default = tuple(settings.lora_kernels) == DENSE_KERNELS
    chosen: set[str] = set()
    for pattern in settings.lora_kernels:
        found = fnmatch.filter(kernels, pattern)
        if not found and not is_default:
            raise ValueError(
                f"lora_kernels has {pattern!r}, which is no kernel of the model; kernels are "
                f"{kernels[0]}, {kernels[-1]} and the like"
            )
        chosen |= set(found)
    return sorted(chosen)


def _new_adapters(module: SwitchTransformer, settings: FinetuneSettings) -> Trained:
    """Return corrections a b with a random and b 0."""
    shapes = parameter_shapes(module.config)
    key = jax.random.key(settings.seed)
    adapters: Trained = {}
    for kernel in _corrected_kernels(module.config, settings):
        *experts, num_in, num_out = shapes[f"{kernel}/kernel"]
        if experts and settings.lora_shared:
            experts = [1]
        # By name, so that a kernel's correction begins alike whichever others there are.
        own = jax.random.fold_in(key, zlib.crc32(kernel.encode()))
        a = jax.random.normal(own, (*experts, num_in, settings.lora_rank)) / np.sqrt(num_in)
        adapters[f"{ADAPTERS}/{kernel}/a"] = a.astype(jnp.float32)
        adapters[f"{ADAPTERS}/{kernel}/b"] = jnp.zeros((*experts, settings.lora_rank, num_out))
    return adapters
