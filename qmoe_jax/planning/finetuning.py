"""What fine-tuning will need, from metadata alone: memory of a step, and disk.

What a run holds is counted, by the very functions that make it. What a compiled step needs besides
is an estimate, held against XLA's own account of compiled steps in tests.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from qmoe_jax.checkpoints import names
from qmoe_jax.checkpoints.compressed import open_compressed_checkpoint
from qmoe_jax.checkpoints.compressed_parts import variable_shapes
from qmoe_jax.codec.codings import get_coding
from qmoe_jax.codec.outline import item_bytes
from qmoe_jax.codec.tensor import TensorSpec
from qmoe_jax.config import SwitchConfig
from qmoe_jax.formatting import format_bytes
from qmoe_jax.models.layers import ADAPTERS
from qmoe_jax.models.moe import CodedKernels
from qmoe_jax.models.switch import SwitchTransformer
from qmoe_jax.planning.inputs import ModelFacts
from qmoe_jax.planning.memory import PROGRAM_BYTES, Parts, Resources
from qmoe_jax.planning.sizes import (
    ZeroShare,
    expert_kernel_shapes,
    layer_bytes,
    layer_settings,
    zero_share,
)
from qmoe_jax.quantization.groups import stored_shape
from qmoe_jax.quantization.settings import CompressionSettings
from qmoe_jax.quantization.step_search import typical_bits
from qmoe_jax.training.optimizer import make_optimizer
from qmoe_jax.training.settings import FinetuneSettings
from qmoe_jax.training.trainable import split_variables

Shapes = dict[str, jax.ShapeDtypeStruct]
_FLOAT32 = 4
# Arrays that XLA keeps from the forward pass for the backward one, or makes there, in the dtype of
# activations: a fit to its account of 17 steps on a CPU whose sizes differed in one thing each.
# bfloat16 is partly float32 on a CPU.
_PAIR_COPIES = 3.0  # of [heads, queries, keys]: scores, probabilities, their gradients
_HIDDEN_COPIES = 7.0  # of [tokens, embed]
_MLP_COPIES = 1.5  # of [tokens, mlp], in dense MLPs
_LOGIT_COPIES = 2.25  # of [targets, vocab], float32
_DENSE_COPIES = 1.5  # of dense parameters, converted to float32
_EXPERT_COPIES = 3.0  # of one expert's kernels, float32: fetched, of the MLP, their gradients


@dataclasses.dataclass(frozen=True)
class TunedModel:
    """A checkpoint that is to be fine-tuned, as its metadata describe it.

    Attributes:
      name: folder, or name in the registry.
      config: geometry.
      coded: expert kernels that are codes.
      variables: shape and dtype of every array in memory, by '/'-joined name.
      is_measured: whether the sizes of codes are those of a checkpoint at hand.
    """

    name: str
    config: SwitchConfig
    coded: CodedKernels
    variables: Shapes
    is_measured: bool

    @classmethod
    def from_compressed(cls, path: str) -> "TunedModel":
        """Read the manifest of a compressed checkpoint.

        Raises:
          CheckpointError: none at `path`, or a damaged one.
        """
        checkpoint = open_compressed_checkpoint(path)
        coded = tuple(sorted(checkpoint.specs.items()))
        return cls(path, checkpoint.config, coded, variable_shapes(checkpoint), True)

    @classmethod
    def from_native(cls, model: ModelFacts) -> "TunedModel":
        """Take a native checkpoint as it is."""
        variables = {
            name: jax.ShapeDtypeStruct(shape, jnp.dtype(model.dtypes[name]))
            for name, shape in model.shapes.items()
        }
        return cls(model.name, model.config, (), variables, True)

    @classmethod
    def as_compressed(
        cls,
        model: ModelFacts,
        settings: CompressionSettings,
        zeros: Mapping[str, ZeroShare] | None = None,
    ) -> "TunedModel":
        """Take a native checkpoint as `compress` would leave it.

        Args:
          model: the checkpoint.
          settings: of its compression.
          zeros: expected share of zero weights, by grid; `sizes.zero_share` where there is none.
        """
        config = model.config
        variables: Shapes = {}
        coded = []
        for (stack, layer), own in layer_settings(config, settings).items():
            if own.method == "none":
                continue
            bits = typical_bits(own.step) if own.grid == "lattice" else None
            shares = {own.grid: zero_share(config, own.grid, bits), **(zeros or {})}
            kernels = expert_kernel_shapes(config)
            weights = sum(out * width for out, width in kernels.values())
            for kernel, (out, width) in kernels.items():
                path = f"{names.mlp_prefix(stack, layer)}/expert/{kernel}"
                rows, row_width = stored_shape(width, out, own.group_size)
                spec = TensorSpec(own.coding, config.num_experts, rows, row_width)
                floats = _float_arrays(spec)
                size = layer_bytes(config, own, shares) * out * width / weights
                size -= sum(_num_bytes(array) for array in floats.values())
                codes = jax.ShapeDtypeStruct((max(0, round(size)),), jnp.dtype(jnp.uint8))
                coded.append((path, spec))
                variables |= {f"{path}/{name}": array for name, array in floats.items()}
                variables[f"{path}/codes"] = codes
        kernels = {f"{path}/kernel" for path, _ in coded}
        for name, shape in model.shapes.items():
            if name not in kernels:
                dtype = settings.stored_dtype(name, model.dtypes[name])
                variables[name] = jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))
        return cls(f"{model.name}, compressed", config, tuple(coded), variables, False)

    @property
    def stored_bytes(self) -> int:
        """Bytes of all arrays: the checkpoint's size, but for headers."""
        return sum(map(_num_bytes, self.variables.values()))


@dataclasses.dataclass(frozen=True)
class FinetunePlan:
    """What a run will need, in bytes.

    Attributes:
      model: the checkpoint.
      settings: of the run.
      lengths: of the arrays of tokens, by stack.
      activation_dtype: "float32" or "bfloat16".
      resources: what there is.
      num_trained: parameters that are trained.
      held: what is in memory from the first step to the last.
      step: what a step needs besides, at its peak; an estimate.
      disk: what the output folder holds at its peak.
      problems: why the run cannot fit, a sentence each; empty where it can.
    """

    model: TunedModel
    settings: FinetuneSettings
    lengths: Mapping[str, int]
    activation_dtype: str
    resources: Resources
    num_trained: int
    held: Parts
    step: Parts
    disk: Parts
    problems: tuple[str, ...]

    @property
    def peak(self) -> int:
        """Bytes of device memory."""
        return sum(self.held.values()) + sum(self.step.values())

    def to_json(self) -> dict[str, Any]:
        """Return everything as a JSON object."""
        return {
            "model": self.model.name,
            "config": self.model.config.to_json(),
            "stored_bytes": self.model.stored_bytes,
            "settings": self.settings.to_json(),
            "lengths": dict(self.lengths),
            "activation_dtype": self.activation_dtype,
            "resources": dataclasses.asdict(self.resources),
            "num_trained": self.num_trained,
            "held_memory": self.held,
            "step_memory": self.step,
            "memory_peak": self.peak,
            "disk": self.disk,
            "fits": not self.problems,
            "problems": list(self.problems),
        }


def plan_finetuning(
    model: TunedModel,
    settings: FinetuneSettings,
    lengths: Mapping[str, int],
    resources: Resources,
    *,
    activation_dtype: str = "float32",
) -> FinetunePlan:
    """Plan a run on one device.

    Args:
      model: the checkpoint.
      settings: of the run.
      lengths: positions of an example, "encoder" and "decoder".
      resources: what there is to run on.
      activation_dtype: "float32" or "bfloat16".

    Raises:
      ValueError: a kind that the model has not, or a pattern without a kernel.
    """
    held, num_trained, corrections = held_memory(model, settings)
    step = step_memory(
        model,
        settings,
        lengths,
        num_trained=num_trained,
        activation_dtype=activation_dtype,
        on_host=resources.device.is_host,
    )
    disk = {
        "checkpoint": model.stored_bytes,
        "state to go on from": held["trained, float32"] + held["optimizer"],
        "corrections apart": corrections,
    }
    plan = FinetunePlan(
        model, settings, lengths, activation_dtype, resources, num_trained, held, step, disk, ()
    )
    return dataclasses.replace(plan, problems=tuple(_problems(plan)))


def held_memory(model: TunedModel, settings: FinetuneSettings) -> tuple[Parts, int, int]:
    """Return what a run holds between steps, the number of parameters it trains, adapters' bytes.

    Raises:
      ValueError: a kind that the model has not, or a pattern without a kernel.
    """
    module = SwitchTransformer(model.config, jnp.dtype(jnp.float32), model.coded)
    optimizer = make_optimizer(settings)

    def begin(params: Mapping[str, Array]) -> Any:
        parts = split_variables(module, {"params": names.unflatten(params)}, settings)
        return parts.trained, parts.frozen, optimizer.init(parts.trained)

    trained, frozen, state = jax.eval_shape(begin, model.variables)
    frozen_bytes = sum(map(_num_bytes, frozen.values()))
    of_codes = tuple(f"params/{kernel}/" for kernel, _ in model.coded)
    codes = sum(_num_bytes(a) for name, a in frozen.items() if name.startswith(of_codes))
    held = {
        "experts, as codes": codes,
        "frozen parameters, as stored": frozen_bytes - codes,
        "trained, float32": sum(map(_num_bytes, trained.values())),
        "optimizer": sum(map(_num_bytes, jax.tree.leaves(state))),
    }
    corrections = sum(_num_bytes(a) for n, a in trained.items() if n.startswith(f"{ADAPTERS}/"))
    return held, sum(math.prod(array.shape) for array in trained.values()), corrections


def step_memory(
    model: TunedModel,
    settings: FinetuneSettings,
    lengths: Mapping[str, int],
    *,
    num_trained: int,
    activation_dtype: str,
    on_host: bool,
) -> Parts:
    """Estimate what a step needs beside `held_memory`, at its peak.

    Args:
      model: the checkpoint.
      settings: of the run.
      lengths: positions of an example, "encoder" and "decoder".
      num_trained: parameters that are trained.
      activation_dtype: "float32" or "bfloat16".
      on_host: the device is a CPU.
    """
    config = model.config
    rows = settings.batch_size // settings.microbatches
    encoder, decoder = lengths["encoder"], lengths["decoder"]
    layers = {"encoder": config.num_encoder_layers, "decoder": config.num_decoder_layers}
    sparse = {
        "encoder": len(config.encoder_sparse_layers),
        "decoder": len(config.decoder_sparse_layers),
    }
    bytes_each: float = item_bytes(activation_dtype)
    if on_host:
        bytes_each = (bytes_each + _FLOAT32) / 2
    pairs = layers["encoder"] * encoder**2 + layers["decoder"] * decoder * (decoder + encoder)
    # A layer of the decoder has another attention, with keys and values of the encoder's length.
    tokens = layers["encoder"] * encoder + layers["decoder"] * (1.5 * decoder + 0.25 * encoder)
    dense_mlp = sum((layers[s] - sparse[s]) * lengths[s] for s in layers)
    sent = sum(sparse[s] * lengths[s] for s in layers)
    kernel = (len(config.wi_names) + 1) * config.embed_dim * config.expert_mlp_dim
    dense = sum(
        math.prod(array.shape)
        for name, array in model.variables.items()
        if "/expert/" not in name and not name.startswith(ADAPTERS)
    )
    activations = bytes_each * rows * (
        _PAIR_COPIES * config.num_heads * pairs
        + config.embed_dim * (_HIDDEN_COPIES * tokens + sent)
        + _MLP_COPIES * config.mlp_dim * len(config.wi_names) * dense_mlp
    )  # fmt: skip
    gradients = _FLOAT32 * num_trained * (1 if settings.microbatches == 1 else 2)
    return {
        "gradients": gradients,
        "activations": round(activations),
        "logits": round(_LOGIT_COPIES * _FLOAT32 * rows * decoder * config.num_embeddings),
        "dense parameters, converted": round(_DENSE_COPIES * _FLOAT32 * dense),
        "one expert, expanded": round(_EXPERT_COPIES * _FLOAT32 * kernel),
    }


def _float_arrays(spec: TensorSpec) -> Shapes:
    """Return the arrays of codes that can be trained: levels of rows, or an origin an expert."""
    if get_coding(spec.coding).grid == "lattice":
        return {"origins": jax.ShapeDtypeStruct((spec.num_experts,), jnp.dtype(jnp.float32))}
    shape = (spec.num_experts, spec.rows, 2)
    return {"levels": jax.ShapeDtypeStruct(shape, jnp.dtype(jnp.bfloat16))}


def _num_bytes(array: Any) -> int:
    return math.prod(array.shape) * np.dtype(array.dtype).itemsize


def _problems(plan: FinetunePlan) -> list[str]:
    resources, device = plan.resources, plan.resources.device
    needed, limit, where = plan.peak, resources.device_bytes, f"JAX may use of the {device.label}"
    if device.is_host:
        needed, limit, where = needed + PROGRAM_BYTES, resources.host_bytes, "are free"
    problems = []
    if limit is not None and needed > limit:
        remedy = "Give more microbatches"
        if plan.activation_dtype == "float32":
            remedy += ', or activation_dtype "bfloat16"'
        if sum(plan.held.values()) > limit:
            remedy = "Train less, or split the experts over devices"
        problems.append(
            f"memory: a step needs {format_bytes(needed)}, and {format_bytes(limit)} {where}. "
            f"{remedy}."
        )
    disk, free = sum(plan.disk.values()), resources.output_disk_bytes
    if free is not None and disk > free:
        problems.append(
            f"disk: the output needs {format_bytes(disk)}, and {format_bytes(free)} are free. "
            "Choose another disk or make room."
        )
    return problems
