"""A checkpoint, native or compressed, to a Flax module and its variables."""

import dataclasses
import functools
import os
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.typing import DTypeLike

from qmoe_jax.checkpoints import names
from qmoe_jax.checkpoints.adapters import Adapters, read_adapters
from qmoe_jax.checkpoints.compressed import (
    CompressedCheckpoint,
    is_compressed_checkpoint,
    open_compressed_checkpoint,
)
from qmoe_jax.checkpoints.read_config import read_config
from qmoe_jax.checkpoints.t5x import open_t5x_checkpoint
from qmoe_jax.codec.codings import get_coding
from qmoe_jax.codec.decode import decode_expert_weights, device_arrays
from qmoe_jax.config import SwitchConfig
from qmoe_jax.errors import CheckpointError, CudaError
from qmoe_jax.models.adapters import adapter_variables
from qmoe_jax.models.layers import ADAPTERS
from qmoe_jax.models.moe import DERIVED, CodedKernels
from qmoe_jax.models.switch import SwitchTransformer
from qmoe_jax.ops.cpu.products import is_supported
from qmoe_jax.ops.cuda.fragment_products import check_fragments
from qmoe_jax.ops.cuda.fragments import are_default, derive_fragments
from qmoe_jax.ops.cuda.kernels import check_coded, derive
from qmoe_jax.ops.cuda.launcher import cuda_is_available, current_launcher
from qmoe_jax.ops.expert_parallel import (
    check_split,
    expert_mesh,
    replicate,
    split_coded,
    split_dense,
)
from qmoe_jax.ops.experts import CodedExperts
from qmoe_jax.ops.products import CUDA, check_choice


def load_switch(
    path: str | os.PathLike[str],
    activation_dtype: DTypeLike = "float32",
    expert_capacity_factor: float | None = None,
    *,
    num_devices: int = 1,
    max_group_size: int | None = None,
    train_capacity_factor: float | None = None,
    min_expert_capacity: int | None = None,
    implementation: str = "auto",
    adapters: str | os.PathLike[str] | None = None,
) -> tuple[SwitchTransformer, dict[str, Any]]:
    """Load a Switch Transformer from a native T5X or a compressed checkpoint.

    Parameters keep the dtype they are stored in and are cast at use; the codes of a compressed
    checkpoint stay codes.

    Args:
      path: folder of the checkpoint, local or gs://.
      activation_dtype: "float32", "bfloat16", or "auto": bfloat16 on accelerators, float32 on CPU.
      expert_capacity_factor: capacity factor of the experts with `enable_dropout=False`, as T5X's
        `EVAL_EXPERT_CAPACITY_FACTOR` (2.0 for the public base, large and C models); None is
        dropless: every token reaches its expert, as QMoE evaluates.
      num_devices: devices of this process to split each layer's experts over; all else is on every
        one of them.
      max_group_size: T5X's `GROUP_SIZE`; that of the public model of this geometry where None, as
        for the next two (`checkpoints.geometry.infer_config` has the rule).
      train_capacity_factor: T5X's `TRAIN_EXPERT_CAPACITY_FACTOR`.
      min_expert_capacity: minimum capacity of an expert in a token group.
      implementation: of products with codes: "xla"; "cpu", straight from stored codes on the
        host's cores; "cuda", the kernels in `kernels_cuda/`, on a GPU with CuPy installed;
        "cuda_fragments", the same, but codes of the lattice or the ternary grid are laid out once
        more for tensor cores, two bits a weight. "auto" is
        "cuda_fragments" on a GPU for codes of the lattice if that takes at most half of the
        device's free memory, "cuda" for others, "cpu" on a CPU if all codes are of codings that it
        multiplies, and "xla" elsewhere.
      adapters: an adapter file (`qmoe-jax finetune`), low-rank corrections of kernels;
        `models.adapters.merge_adapters` adds them to kernels that are no codes.

    Returns:
      The module and its variables, `{"params": ...}`. `module.apply(variables,
      encoder_input_tokens, decoder_input_tokens, decoder_target_tokens, enable_dropout=False)`
      takes int32 [batch, length] and returns float32 logits [batch, length, vocab]. On a GPU
      the variables hold `"derived"` too, which saves the kernels work and may be left out. With
      adapters they hold `"adapters"`; without it the model computes as the checkpoint alone.

    Raises:
      CheckpointError: nothing readable at `path`, or it is damaged; or adapters of another model.
      CudaError: "cuda" or "cuda_fragments" without a GPU, without CuPy, without codes, or with
        codes that their kernels do not take.
    """
    check_choice(implementation)
    corrections = None if adapters is None else read_adapters(adapters)
    if isinstance(activation_dtype, str) and activation_dtype == "auto":
        activation_dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
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
    mesh = None if num_devices == 1 else expert_mesh(num_devices)
    if mesh is not None:
        if implementation in CUDA:
            raise CudaError(
                f"num_devices is {num_devices}, but the CUDA kernels run on one device; use "
                "implementation='xla', or num_devices=1"
            )
        implementation = "xla"
    if is_compressed_checkpoint(path):
        compressed = open_compressed_checkpoint(path)
        config = dataclasses.replace(compressed.config, **overrides)
        added = _adapter_collection(corrections, config, mesh)
        coded = tuple(sorted(compressed.specs.items()))
        asked = implementation
        implementation = _choose_implementation(implementation, config, coded)
        flat = _compressed_params(compressed, config, mesh)
        variables: dict[str, Any] = {"params": names.unflatten(flat), **added}
        if implementation in CUDA:
            implementation, derived = _derive(implementation, asked, coded, flat)
            if derived:
                variables[DERIVED] = names.unflatten(derived)
        return SwitchTransformer(config, dtype, coded, implementation, mesh), variables
    if implementation in CUDA:
        raise CudaError(
            f"{path} is a native checkpoint; implementation={implementation!r} multiplies with "
            "codes and requires a compressed one. Compress it, or use implementation='xla' or "
            "'auto'."
        )
    native = open_t5x_checkpoint(path, cache_bytes=0)
    config = read_config(native, **overrides)
    added = _adapter_collection(corrections, config, mesh)
    if mesh is not None:
        check_split(config.num_experts, mesh)
    flat = {name: _on_device(name, native.read(name), mesh) for name in native.names}
    variables = {"params": names.unflatten(flat), **added}
    return SwitchTransformer(config, dtype, mesh=mesh), variables


def _adapter_collection(
    adapters: Adapters | None, config: SwitchConfig, mesh: Mesh | None
) -> dict[str, Any]:
    if adapters is None:
        return {}
    return {ADAPTERS: adapter_variables(adapters, config, mesh)}


def _compressed_params(
    compressed: CompressedCheckpoint, config: SwitchConfig, mesh: Mesh | None
) -> dict[str, Any]:
    """Array by array, so that the host holds one beside what is on the devices."""
    if mesh is not None:
        check_split(config.num_experts, mesh)
    flat: dict[str, Any] = {
        name: _on_device(name, compressed.read_dense([name])[name], mesh)
        for name in compressed.dense_names
    }
    for kernel in compressed.specs:
        coded = compressed.read_coded(kernel)
        arrays = device_arrays(coded) if mesh is None else split_coded(coded, mesh)
        flat |= {f"{kernel}/{key}": array for key, array in arrays.items()}
    return flat


def _on_device(name: str, array: np.ndarray, mesh: Mesh | None) -> jax.Array:
    if mesh is None:
        return jnp.asarray(array)
    if names.is_expert_kernel(name):
        return split_dense(array, mesh)
    return replicate(array, mesh)


def _choose_implementation(implementation: str, config: SwitchConfig, coded: CodedKernels) -> str:
    if implementation in ("xla", "cpu"):
        return implementation
    kernels = [CodedExperts(spec, {}, _in_features(config, name)) for name, spec in coded]
    if implementation == "auto" and not cuda_is_available():
        on_cpu = jax.default_backend() == "cpu" and all(map(is_supported, kernels))
        return "cpu" if on_cpu and _xla_takes({spec.coding for _, spec in coded}) else "xla"
    try:
        for kernel in kernels:
            check_coded(kernel)
        if implementation == "cuda_fragments":
            check_fragments(current_launcher(), [spec for _, spec in coded])
    except CudaError:
        if implementation == "auto":
            return "xla"
        raise
    return "cuda" if implementation == "auto" else implementation


def _in_features(config: SwitchConfig, kernel: str) -> int:
    return config.expert_mlp_dim if kernel.endswith("/wo") else config.embed_dim


def _derive(
    implementation: str,
    asked: str,
    coded: CodedKernels,
    flat: Mapping[str, Any],
) -> tuple[str, dict[str, Any]]:
    """Return what CUDA kernels need besides, by path: once, for it takes a pass over all codes.

    Also the implementation: with "auto", fragments by `are_default`.
    """
    launcher = current_launcher()
    specs = [spec for _, spec in coded]
    if asked == "auto" and are_default(specs, _free_bytes()):
        implementation = "cuda_fragments"
    derived = {}
    for kernel, spec in coded:
        arrays = {n: flat[f"{kernel}/{n}"] for n in get_coding(spec.coding).array_names}
        found = derive(launcher, spec, arrays)
        if implementation == "cuda_fragments":
            found |= derive_fragments(launcher, spec, arrays, found)
        derived |= {f"{kernel}/{name}": array for name, array in found.items()}
    return implementation, derived


def _free_bytes() -> int | None:
    """Memory that the device has left, where JAX knows it."""
    stats = jax.local_devices()[0].memory_stats() or {}
    if "bytes_limit" not in stats:
        return None
    return stats["bytes_limit"] - stats.get("bytes_in_use", 0)


def dequantized(
    module: SwitchTransformer, variables: Mapping[str, Any], dtype: DTypeLike = "float32"
) -> tuple[SwitchTransformer, dict[str, Any]]:
    """Return the same model with its codes expanded to dense expert kernels, `[experts, in, out]`.

    For where memory allows it, and as the reference of running on codes.

    Raises:
      CheckpointError: the model has no codes.
    """
    if module.mesh is not None:
        raise CheckpointError("the model's experts are split; load it on one device to expand it")
    if not module.coded:
        raise CheckpointError("the model has no codes to expand; load a compressed checkpoint")
    flat = names.flatten(variables["params"])
    for kernel, spec in module.coded:
        arrays = {
            key.removeprefix(kernel + "/"): flat.pop(key)
            for key in [key for key in flat if key.startswith(kernel + "/")]
        }
        decode = jax.jit(functools.partial(decode_expert_weights, spec, dtype=jnp.dtype(dtype)))
        num_in = _in_features(module.config, kernel)
        flat[f"{kernel}/kernel"] = jnp.stack(
            [decode(arrays, e).reshape(-1, num_in).T for e in range(spec.num_experts)]
        )
    rest = {ADAPTERS: variables[ADAPTERS]} if ADAPTERS in variables else {}
    return dataclasses.replace(module, coded=()), {"params": names.unflatten(flat), **rest}


def _xla_takes(codings: Iterable[str]) -> bool:
    """Whether XLA calls the products of codings on a CPU; if not, a warning says why."""
    from qmoe_jax.ops.cpu.targets import registered

    try:
        for coding in sorted(codings):
            registered(coding)
    except RuntimeError as error:
        warnings.warn(
            f"implementation='auto' is 'xla' here, which is slower. {error}", stacklevel=4
        )
        return False
    return True
