"""Estimates of a compressed model at work: what its device holds, and how long a token takes.

A token of one row, behind an encoder that ran: every weight that the decoder uses comes from memory
once, dense ones in float32, those of the experts reached as codes. It knows nothing of attention to
many positions, nor of what a step costs besides.
"""

import dataclasses
from collections.abc import Iterator

from qmoe_jax.codec.codings import get_coding
from qmoe_jax.codec.tensor import TensorSpec
from qmoe_jax.ops.cpu.products import CODINGS
from qmoe_jax.ops.cuda.fragments import are_default, fragment_bytes, fragment_grids
from qmoe_jax.planning.inputs import ModelFacts
from qmoe_jax.planning.public_checkpoints import Device
from qmoe_jax.planning.sizes import CompressedSize, layer_settings
from qmoe_jax.quantization.settings import CompressionSettings


@dataclasses.dataclass(frozen=True)
class MemoryAtWork:
    """Bytes on the device of a model that is loaded; activations come on top.

    Attributes:
      dense: parameters that are no codes, as stored.
      experts: stored codes with levels and lengths.
      derived: what CUDA kernels need besides, found once after loading; 0 without such kernels.
      fragments: with implementation "cuda_fragments", on top; `fragment_bytes` says how good an
        estimate. None where some codes have none, or the device does not multiply them.
      fragments_by_default: whether implementation "auto" has them.
      uncompressed: what the whole model would take in bfloat16.
    """

    dense: int
    experts: int
    derived: int
    fragments: int | None
    fragments_by_default: bool
    uncompressed: int

    @property
    def total(self) -> int:
        """All but fragments."""
        return self.dense + self.experts + self.derived


def memory_at_work(
    model: ModelFacts,
    settings: CompressionSettings,
    device: Device,
    size: CompressedSize,
    device_bytes: int | None = None,
) -> MemoryAtWork:
    """Estimate what the device holds of the compressed model.

    Args:
      model: the checkpoint.
      settings: how it is compressed.
      device: that it runs on.
      size: of the compressed model.
      device_bytes: memory that JAX may use; None where that is unknown.
    """
    held = MemoryAtWork(size.dense, size.experts, 0, None, False, size.bfloat16_bytes)
    specs = list(_specs(model, settings))
    whole = [spec for spec in specs if spec is not None]
    # One kernel that CUDA does not take, and XLA decodes them all, which needs nothing.
    interfaces = [get_coding(spec.coding).cuda for spec in whole]
    taken = [interface for interface in interfaces if interface is not None]
    if device.compute_capability is None or len(taken) < len(specs):
        return held
    derived = sum(cuda.derived_bytes(spec) for cuda, spec in zip(taken, whole, strict=True))
    held = dataclasses.replace(held, derived=derived)
    grids = fragment_grids(device.compute_capability)
    if any(get_coding(spec.coding).grid not in grids for spec in whole):
        return held
    # Loading asks before kernels' own arrays are there.
    free = None if device_bytes is None else device_bytes - size.total
    return dataclasses.replace(
        held,
        fragments=sum(map(fragment_bytes, whole)),
        fragments_by_default=are_default(whole, free),
    )


def _specs(model: ModelFacts, settings: CompressionSettings) -> Iterator[TensorSpec | None]:
    """Specs of all kernels that are codes; None for groups of columns."""
    config = model.config
    wide, narrow = config.expert_mlp_dim, config.embed_dim
    shapes = [(wide, narrow)] * len(config.wi_names) + [(narrow, wide)]
    for own in layer_settings(config, settings).values():
        for shape in shapes if own.method != "none" else ():
            spec = TensorSpec(own.coding, config.num_experts, *shape)
            yield spec if own.group_size is None else None


def seconds_a_token(
    model: ModelFacts, settings: CompressionSettings, device: Device
) -> dict[str, float] | None:
    """Estimate the seconds of a decoding step, by what is multiplied.

    Args:
      model: the checkpoint.
      settings: how it is compressed.
      device: that it runs on.

    Returns:
      Seconds by kind; None where the device's speed with these codes is not known.
    """
    if device.coded_weights_per_second is None:
        return None
    config = model.config
    embed, joined = config.embed_dim, config.num_heads * config.head_dim
    matrices = len(config.wi_names) + 1
    coded = kept = 0
    for (stack, _), own in layer_settings(config, settings).items():
        if stack == "encoder":
            continue
        weights = matrices * embed * config.expert_mlp_dim
        if own.method == "none":
            kept += weights
        elif own.coding in CODINGS and own.group_size is None:
            coded += weights
        else:
            return None
    sparse = len(config.decoder_sparse_layers)
    # Keys and values of the encoder's outputs are there already.
    attention = config.num_decoder_layers * (4 + 2) * embed * joined
    mlps = (config.num_decoder_layers - sparse) * matrices * embed * config.mlp_dim
    routers = sparse * embed * config.num_experts

    def from_memory(weights: int) -> float:
        return 4 * weights / device.bytes_per_second

    return {
        "experts from codes": coded / device.coded_weights_per_second,
        "experts kept dense": from_memory(kept),
        "attention, dense MLPs, routers": from_memory(attention + mlps + routers),
        "logits": from_memory(embed * config.num_embeddings),
    }
