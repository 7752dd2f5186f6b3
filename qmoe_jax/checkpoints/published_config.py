"""Geometry of a published QMoE model: the `config.json` of Hugging Face's Switch Transformers.

Source: `configuration_switch_transformers.py` of Hugging Face's transformers, `sub1.py` and
`switch.py` of the QMoE code.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from qmoe_jax.checkpoints.geometry import infer_config, parameter_shapes
from qmoe_jax.config import SwitchConfig
from qmoe_jax.errors import CheckpointError

# What the model here computes; another value in a config.json is another model.
_REQUIRED = {
    "model_type": "switch_transformers",
    "dense_act_fn": "relu",
    "feed_forward_proj": "relu",
    "is_gated_act": False,
    "is_encoder_decoder": True,
    "router_bias": False,
    "layer_norm_epsilon": 1e-6,
}


def config_from_hf(fields: Mapping[str, Any]) -> SwitchConfig:
    """Config of a Hugging Face `config.json`; routing is that of the public model of the geometry.

    Sparse layers are Hugging Face's: every layer where `is_full_sparse` is given, as QMoE reads it
    (c-2048), else each i with i % step == 1, or all for a step of 1, where step is
    `encoder_sparse_step` or, without that, num_layers // num_sparse_encoder_layers.
    `expert_capacity` is not read: Hugging Face counts it per sequence.

    Raises:
      CheckpointError: a field is missing, of another type, or of another architecture.
    """
    for name, value in _REQUIRED.items():
        if fields.get(name, value) != value:
            raise CheckpointError(
                f"{name} is {fields[name]!r}, but only Switch Transformers with {name} = {value!r} "
                "can be read; the published models have it"
            )
    tied = fields.get("tie_word_embeddings", True)
    if not isinstance(tied, bool):
        raise CheckpointError(f"tie_word_embeddings is {tied!r}, expected true or false")
    num_layers = {
        "encoder": _size(fields, "num_layers"),
        "decoder": _size(fields, "num_decoder_layers"),
    }
    sparse = {}
    for stack, count in num_layers.items():
        step = 1 if "is_full_sparse" in fields else _sparse_step(fields, stack, count)
        sparse[stack] = _every(step, count)
    mlp_dim = _size(fields, "d_ff")
    geometry = SwitchConfig(
        num_embeddings=_size(fields, "vocab_size"),
        embed_dim=_size(fields, "d_model"),
        mlp_dim=mlp_dim,
        expert_mlp_dim=mlp_dim,
        num_heads=_size(fields, "num_heads"),
        head_dim=_size(fields, "d_kv"),
        num_experts=_size(fields, "num_experts"),
        num_encoder_layers=num_layers["encoder"],
        num_decoder_layers=num_layers["decoder"],
        encoder_sparse_layers=sparse["encoder"],
        decoder_sparse_layers=sparse["decoder"],
        tied_logits=tied,
        relpos_buckets=_size(fields, "relative_attention_num_buckets", 32),
    )
    return dataclasses.replace(
        infer_config(parameter_shapes(geometry)),
        relpos_max_distance=_size(fields, "relative_attention_max_distance", 128),
    )


def _size(fields: Mapping[str, Any], name: str, default: int | None = None) -> int:
    value = fields.get(name, default)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise CheckpointError(
            f"{name} is {value!r}, expected a positive integer: the file is damaged or of another "
            "architecture"
        )
    return value


def _sparse_step(fields: Mapping[str, Any], stack: str, num_layers: int) -> int:
    for name in (f"{stack}_sparse_step", f"num_sparse_{stack}_layers"):
        value = fields.get(name)
        if value is None:
            continue
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise CheckpointError(f"{name} is {value!r}, expected an integer of at least 0")
        return value if name.endswith("step") else num_layers // value if value else 0
    raise CheckpointError(
        f"neither {stack}_sparse_step nor num_sparse_{stack}_layers is given, so which layers of "
        f"the {stack} hold experts is unknown: use the config.json that belongs to the model"
    )


def _every(step: int, num_layers: int) -> tuple[int, ...]:
    if step == 0:
        return ()
    return tuple(layer for layer in range(num_layers) if step == 1 or layer % step == 1)


def config_to_hf(config: SwitchConfig) -> dict[str, Any]:
    """Fields of the `config.json` that the original's loader builds its model from.

    As in the published models, `expert_capacity` is 1024 a sequence: no token is dropped.

    Raises:
      CheckpointError: Hugging Face's Switch Transformers cannot express the geometry.
    """
    if len(config.wi_names) > 1:
        raise CheckpointError(
            f"the model has gated MLPs {config.mlp_activations}, but Hugging Face's Switch "
            "Transformers have none, so the published layout cannot hold it"
        )
    if config.mlp_dim not in (0, config.expert_mlp_dim):
        raise CheckpointError(
            f"dense MLPs are {config.mlp_dim} wide and experts {config.expert_mlp_dim}, but the "
            "published layout has one width (d_ff), so it cannot hold this model"
        )
    stacks = {
        "encoder": (config.num_encoder_layers, config.encoder_sparse_layers),
        "decoder": (config.num_decoder_layers, config.decoder_sparse_layers),
    }
    full = all(sparse == tuple(range(count)) for count, sparse in stacks.values())
    steps = {}
    for stack, (count, sparse) in stacks.items():
        steps[stack] = count // len(sparse) if sparse else 0
        # Hugging Face of the published models' time has no sparse layers at all for a step of 1.
        if not full and (steps[stack] == 1 or _every(steps[stack], count) != sparse):
            raise CheckpointError(
                f"layers {list(sparse)} of the {count} {stack} layers are sparse, but the "
                "published layout knows only all layers of both stacks or every layer i with "
                "i % step = 1, so it cannot hold this model"
            )
    fields: dict[str, Any] = {
        **_REQUIRED,
        "architectures": ["SwitchTransformersForConditionalGeneration"],
        "add_router_probs": False,
        "d_ff": config.expert_mlp_dim,
        "d_kv": config.head_dim,
        "d_model": config.embed_dim,
        "decoder_sparse_step": steps["decoder"],
        "decoder_start_token_id": 0,
        "dropout_rate": 0.1,
        "encoder_sparse_step": steps["encoder"],
        "eos_token_id": 1,
        "expert_capacity": 1024,
        "initializer_factor": 1.0,
        "num_decoder_layers": config.num_decoder_layers,
        "num_experts": config.num_experts,
        "num_heads": config.num_heads,
        "num_layers": config.num_encoder_layers,
        "num_sparse_decoder_layers": len(config.decoder_sparse_layers),
        "num_sparse_encoder_layers": len(config.encoder_sparse_layers),
        "pad_token_id": 0,
        "relative_attention_max_distance": config.relpos_max_distance,
        "relative_attention_num_buckets": config.relpos_buckets,
        "router_aux_loss_coef": 0.001,
        "router_dtype": "float32",
        "router_ignore_padding_tokens": False,
        "router_jitter_noise": 0,
        "router_z_loss_coef": 0.001,
        "tie_word_embeddings": config.tied_logits,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "vocab_size": config.num_embeddings,
    }
    # The original asks whether the field exists, not what it says.
    return fields | ({"is_full_sparse": True} if full else {})
