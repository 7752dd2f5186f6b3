"""Parameter names: '/'-joined paths here, '.'-joined in a checkpoint, nested in a Flax module."""

import re
from collections.abc import Mapping
from typing import Any

from flax import traverse_util

_LAYER = re.compile(r"(encoder|decoder)/layers_(0|[1-9]\d*)/")
_EXPERT_KERNEL = re.compile(r"(encoder|decoder)/layers_\d+/mlp/expert/(wi|wi_0|wi_1|wo)/kernel")

# What the embedding is called, `[num_embeddings, embed]`.
EMBEDDING = "token_embedder/embedding"


def to_dotted(name: str) -> str:
    """Name of a parameter's array in a checkpoint: `target.encoder.layers_1.mlp.wi.kernel`."""
    return "target." + name.replace("/", ".")


def flatten(params: Mapping[str, Any]) -> dict[str, Any]:
    """Nested dict of leaves to `{'/'-joined path: leaf}`."""
    return traverse_util.flatten_dict(dict(params), sep="/")


def unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Inverse of `flatten`: the nested dict that Flax modules take."""
    return traverse_util.unflatten_dict(dict(flat), sep="/")


def layer_of(name: str) -> tuple[str, int] | None:
    """Return `("encoder" | "decoder", layer index)` of a parameter, None outside layers."""
    match = _LAYER.match(name)
    return (match[1], int(match[2])) if match else None


def is_expert_kernel(name: str) -> bool:
    """Whether a parameter is a stack of expert kernels, `[experts, in, out]`."""
    return _EXPERT_KERNEL.fullmatch(name) is not None


def mlp_prefix(stack: str, layer: int) -> str:
    """`encoder/layers_1/mlp`: what the MLP parameters of a layer begin with."""
    return f"{stack}/layers_{layer}/mlp"


def expert_kernel(stack: str, layer: int, kernel: str) -> str:
    """`encoder/layers_1/mlp/expert/wi/kernel`; `kernel` is wi, wi_0, wi_1 or wo."""
    return f"{mlp_prefix(stack, layer)}/expert/{kernel}/kernel"


def router_kernel(stack: str, layer: int) -> str:
    """`encoder/layers_1/mlp/router/router_weights/w/kernel`, `[embed, experts]`."""
    return f"{mlp_prefix(stack, layer)}/router/router_weights/w/kernel"
