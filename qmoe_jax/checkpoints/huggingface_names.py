"""Names in Hugging Face's Switch Transformers, which the published QMoE models have too, and ours.

Source: `modeling_switch_transformers.py` of Hugging Face's transformers and `sub1.py` of the QMoE
code; gated MLPs, which neither has, are named as in its T5 (`modeling_t5.py`). PyTorch weights are
`[out, in]`, Flax kernels `[in, out]`; the position bias is `[buckets, heads]` there,
`[heads, buckets]` here.
"""

from typing import NamedTuple

from qmoe_jax.checkpoints import names
from qmoe_jax.checkpoints.geometry import parameter_shapes
from qmoe_jax.config import SwitchConfig
from qmoe_jax.errors import CheckpointError

HF_EMBEDDING = "shared.weight"
"""`[vocab, embed]`."""
HF_EMBEDDING_COPIES = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
"""Hugging Face's further names for `shared.weight`."""
HF_LOGITS = "lm_head.weight"
"""`[vocab, embed]`; one more copy of the embedding where the logits are tied."""

_ATTENTIONS = {
    "attention": "layer.0.SelfAttention",
    "self_attention": "layer.0.SelfAttention",
    "encoder_decoder_attention": "layer.1.EncDecAttention",
}
_PROJECTIONS = {"query": "q", "key": "k", "value": "v", "out": "o"}
_ATTENTION_NORMS = {
    "pre_attention_layer_norm": "layer.0.layer_norm.weight",
    "pre_self_attention_layer_norm": "layer.0.layer_norm.weight",
    "pre_cross_attention_layer_norm": "layer.1.layer_norm.weight",
}
_MLP_SUBLAYER = {"encoder": "layer.1", "decoder": "layer.2"}
_OUTSIDE_BLOCKS = {
    names.EMBEDDING: (HF_EMBEDDING, False),
    "decoder/logits_dense/kernel": (HF_LOGITS, True),
    "encoder/encoder_norm/scale": ("encoder.final_layer_norm.weight", False),
    "decoder/decoder_norm/scale": ("decoder.final_layer_norm.weight", False),
    **{
        f"{stack}/relpos_bias/rel_embedding": (
            f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
            True,
        )
        for stack in ("encoder", "decoder")
    },
}


class HfParameter(NamedTuple):
    """A Hugging Face parameter, and whether its two axes are swapped against ours."""

    name: str
    transposed: bool


def dense_parameters(config: SwitchConfig) -> dict[str, HfParameter]:
    """Hugging Face's parameter for each of ours that is no expert kernel, by our sorted names.

    Raises:
      CheckpointError: a parameter has none.
    """
    return {
        name: _hf_parameter(name)
        for name in parameter_shapes(config)
        if not names.is_expert_kernel(name)
    }


def _hf_parameter(name: str) -> HfParameter:
    if name in _OUTSIDE_BLOCKS:
        return HfParameter(*_OUTSIDE_BLOCKS[name])
    stack, layer, *rest = name.split("/")
    block = f"{stack}.block.{layer.removeprefix('layers_')}"
    match rest:
        case [attention, projection, "kernel"] if attention in _ATTENTIONS:
            inner = f"{_ATTENTIONS[attention]}.{_PROJECTIONS[projection]}.weight"
            return HfParameter(f"{block}.{inner}", True)
        case [norm, "scale"] if norm in _ATTENTION_NORMS:
            return HfParameter(f"{block}.{_ATTENTION_NORMS[norm]}", False)
        case ["pre_mlp_layer_norm", "scale"]:
            return HfParameter(f"{block}.{_MLP_SUBLAYER[stack]}.layer_norm.weight", False)
        case ["mlp", "router", *_]:
            return HfParameter(f"{block}.{_MLP_SUBLAYER[stack]}.mlp.router.classifier.weight", True)
        case ["mlp", "wi" | "wi_0" | "wi_1" | "wo" as kernel, "kernel"]:
            return HfParameter(f"{block}.{_MLP_SUBLAYER[stack]}.mlp.{kernel}.weight", True)
    raise CheckpointError(
        f"parameter {name} has no counterpart in Hugging Face's Switch Transformers, so the "
        "layout cannot hold it: keep the checkpoint in this project's layout"
    )


def embedding_copies(config: SwitchConfig) -> tuple[str, ...]:
    """Hugging Face's names, beside `shared.weight`, that hold the token embedding."""
    return (*HF_EMBEDDING_COPIES, *((HF_LOGITS,) if config.tied_logits else ()))


def sparse_layers(config: SwitchConfig) -> tuple[tuple[str, int], ...]:
    """(stack, layer) of the sparse layers in the order of the `exp*.pt` files."""
    return (
        *(("encoder", layer) for layer in config.encoder_sparse_layers),
        *(("decoder", layer) for layer in config.decoder_sparse_layers),
    )


def expert_kernel(stack: str, layer: int, expert: int, kernel: str) -> str:
    """Hugging Face's module of an expert kernel: `....mlp.experts.expert_0.wi`."""
    experts = f"{stack}.block.{layer}.{_MLP_SUBLAYER[stack]}.mlp.experts"
    return f"{experts}.expert_{expert}.{kernel}"


def expert_weights(name: str, num_experts: int) -> list[str]:
    """Hugging Face's parameters, `[out, in]` each, for our stack of expert kernels of a layer."""
    stack, layer, _, _, kernel, _ = name.split("/")
    index = int(layer.removeprefix("layers_"))
    return [f"{expert_kernel(stack, index, e, kernel)}.weight" for e in range(num_experts)]
