"""The `config.json` of Hugging Face's Switch Transformers, to a config and back.

Source: `configuration_switch_transformers.py` and `modeling_switch_transformers.py` of Hugging
Face's transformers; fields of gated MLPs are those of its T5 (`configuration_t5.py`).
"""

import dataclasses
import json
import os
import pathlib
import re
from collections.abc import Collection, Mapping
from typing import Any

from qmoe_jax.checkpoints.geometry import infer_config, parameter_shapes
from qmoe_jax.config import SwitchConfig
from qmoe_jax.errors import CheckpointError

REQUIRED: dict[str, Any] = {
    "model_type": "switch_transformers",
    "is_encoder_decoder": True,
    "router_bias": False,
    "layer_norm_epsilon": 1e-6,
}
"""What the model here computes; another value in a config.json is another model."""
_RELU: dict[str, Any] = {
    "dense_act_fn": "relu",
    "feed_forward_proj": "relu",
    "is_gated_act": False,
}
_GATED: dict[str, Any] = {
    "dense_act_fn": "gelu_new",
    "feed_forward_proj": "gated-gelu",
    "is_gated_act": True,
}
# `dense_act_fn` of gated MLPs: T5 derives "gelu_new" from "gated-gelu", Switch's documentation
# names that itself.
_GATED_NAMES = ("gelu_new", "gated-gelu")
_SPARSE = re.compile(r"(encoder|decoder)\.block\.(\d+)\.layer\.\d\.mlp\.(router|experts)\.")


def read_fields(file: pathlib.Path, remedy: str) -> dict[str, Any]:
    """Read a `config.json`.

    Args:
      file: it.
      remedy: what to give where there is none, for the message.

    Raises:
      CheckpointError: it is missing or no JSON object.
    """
    try:
        fields = json.loads(file.read_text("utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{file} does not exist: {remedy}") from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file} is no JSON ({error}): copy the model again") from error
    if not isinstance(fields, dict):
        raise CheckpointError(f"{file} holds a {type(fields).__name__}, expected a JSON object")
    return fields


def is_huggingface_folder(path: str | os.PathLike[str]) -> bool:
    """Whether a path is a local folder with a file that no T5X or compressed checkpoint has."""
    folder = pathlib.Path(os.path.expanduser(path))
    try:
        return any(
            entry.name == "config.json" or entry.suffix in (".safetensors", ".bin")
            for entry in folder.iterdir()
        )
    except (OSError, ValueError):
        return False


def check_fields(fields: Mapping[str, Any], required: Mapping[str, Any]) -> None:
    """Refuse a config that says something else than what is required, or nothing of a kind.

    Raises:
      CheckpointError: such a field.
    """
    for name, value in required.items():
        if fields.get(name, value) != value:
            raise CheckpointError(
                f"{name} is {fields[name]!r}, but only Switch Transformers with {name} = {value!r} "
                "can be read; the public models have it"
            )


def config_of_weights(fields: Mapping[str, Any], tensors: Collection[str]) -> SwitchConfig:
    """Config of a Hugging Face model; routing is that of the public model of the geometry.

    Sizes are those of `config.json`. Which layers hold experts, and whether MLPs are gated, is read
    off the names of the parameters: the fields about it changed their meaning between versions.
    `expert_capacity` is not read: Hugging Face counts it per sequence.

    Args:
      fields: of `config.json`.
      tensors: names of all parameters.

    Raises:
      CheckpointError: a field is missing, of another type, or of another architecture.
    """
    check_fields(fields, REQUIRED)
    gated = any(re.search(r"\.mlp\.(experts\.expert_\d+\.)?wi_0\.weight$", n) for n in tensors)
    if gated:
        # Without the field, T5's own default for wi_0 is what can be meant.
        activation = fields.get("dense_act_fn", "gelu_new")
        if activation not in _GATED_NAMES:
            raise CheckpointError(
                f"dense_act_fn is {activation!r}, but the MLPs are gated (they have wi_0 and "
                "wi_1), of which only those with gelu ('gelu_new') can be read"
            )
    else:
        check_fields(fields, _RELU)
    sparse: dict[str, set[int]] = {"encoder": set(), "decoder": set()}
    for name in tensors:
        found = re.match(
            r"(encoder|decoder)\.block\.(\d+)\.layer\.\d\.mlp\.(router|experts)\.", name
        )
        if found:
            sparse[found[1]].add(int(found[2]))
    return config_of_sizes(
        fields, {stack: tuple(sorted(layers)) for stack, layers in sparse.items()}, gated
    )


def config_of_sizes(
    fields: Mapping[str, Any], sparse: Mapping[str, tuple[int, ...]], gated: bool
) -> SwitchConfig:
    """Config from the sizes in a `config.json`.

    Args:
      fields: of `config.json`.
      sparse: layers that hold experts, of "encoder" and "decoder".
      gated: whether MLPs are.

    Raises:
      CheckpointError: a size is missing or of another type, or no layer holds experts.
    """
    tied = fields.get("tie_word_embeddings", True)
    if not isinstance(tied, bool):
        raise CheckpointError(f"tie_word_embeddings is {tied!r}, expected true or false")
    mlp_dim = size(fields, "d_ff")
    geometry = SwitchConfig(
        num_embeddings=size(fields, "vocab_size"),
        embed_dim=size(fields, "d_model"),
        mlp_dim=mlp_dim,
        expert_mlp_dim=mlp_dim,
        num_heads=size(fields, "num_heads"),
        head_dim=size(fields, "d_kv"),
        num_experts=size(fields, "num_experts"),
        num_encoder_layers=size(fields, "num_layers"),
        num_decoder_layers=size(fields, "num_decoder_layers"),
        encoder_sparse_layers=sparse["encoder"],
        decoder_sparse_layers=sparse["decoder"],
        mlp_activations=("gelu", "linear") if gated else ("relu",),
        tied_logits=tied,
        relpos_buckets=size(fields, "relative_attention_num_buckets", 32),
    )
    return dataclasses.replace(
        infer_config(parameter_shapes(geometry)),
        relpos_max_distance=size(fields, "relative_attention_max_distance", 128),
    )


def size(fields: Mapping[str, Any], name: str, default: int | None = None) -> int:
    """Return a positive integer of a config.

    Raises:
      CheckpointError: it is none.
    """
    value = fields.get(name, default)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise CheckpointError(
            f"{name} is {value!r}, expected a positive integer: the file is damaged or of another "
            "architecture"
        )
    return value


def sparse_at(step: int, num_layers: int) -> tuple[int, ...]:
    """Layers that hold experts: each i with i % step == 1, all for a step of 1, none for 0."""
    if step == 0:
        return ()
    return tuple(layer for layer in range(num_layers) if step == 1 or layer % step == 1)


def config_to_hf(config: SwitchConfig, dtype: str) -> dict[str, Any]:
    """Fields of the `config.json` that transformers builds the model from.

    As in the published QMoE models, `expert_capacity` is 1024 a sequence: no token is dropped.

    Args:
      config: of the model.
      dtype: of its parameters, "float32" or "bfloat16".

    Raises:
      CheckpointError: Hugging Face's Switch Transformers cannot express the geometry.
    """
    if config.mlp_dim not in (0, config.expert_mlp_dim):
        raise CheckpointError(
            f"dense MLPs are {config.mlp_dim} wide and experts {config.expert_mlp_dim}, but "
            "Hugging Face's layout has one width (d_ff), so it cannot hold this model"
        )
    steps = {}
    for stack, count, sparse in (
        ("encoder", config.num_encoder_layers, config.encoder_sparse_layers),
        ("decoder", config.num_decoder_layers, config.decoder_sparse_layers),
    ):
        steps[stack] = count // len(sparse) if sparse else 0
        if sparse_at(steps[stack], count) != sparse:
            raise CheckpointError(
                f"layers {list(sparse)} of the {count} {stack} layers are sparse, but Hugging "
                "Face's layout knows only all layers or every layer i with i % step = 1, so it "
                "cannot hold this model"
            )
    return {
        **REQUIRED,
        **(_GATED if len(config.wi_names) > 1 else _RELU),
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
        "torch_dtype": dtype,
        "use_cache": True,
        "vocab_size": config.num_embeddings,
    }


MARK = {"written_by": "qmoe_jax"}
"""In the config.json of folders that this package exports, which it may therefore replace."""


def carries_mark(folder: pathlib.Path) -> bool:
    """Whether a folder was exported by this package; one from elsewhere lacks the mark."""
    try:
        fields = json.loads((folder / "config.json").read_bytes())
    except (OSError, ValueError):
        return False
    return isinstance(fields, dict) and fields.items() >= MARK.items()
