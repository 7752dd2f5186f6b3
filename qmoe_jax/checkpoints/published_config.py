"""Geometry of a published QMoE model: its `config.json`, which is Hugging Face's with a field more.

Source: `sub1.py` and `switch.py` of the QMoE code; `huggingface_config` has the rest.
"""

from collections.abc import Mapping
from typing import Any

from qmoe_jax.checkpoints import huggingface_config
from qmoe_jax.checkpoints.huggingface_config import check_fields, size, sparse_at
from qmoe_jax.config import SwitchConfig
from qmoe_jax.errors import CheckpointError

_REQUIRED = {
    **huggingface_config.REQUIRED,
    "dense_act_fn": "relu",
    "feed_forward_proj": "relu",
    "is_gated_act": False,
}


def config_from_hf(fields: Mapping[str, Any]) -> SwitchConfig:
    """Config of a `config.json`; routing is that of the public model of the geometry.

    Sparse layers are Hugging Face's: every layer where `is_full_sparse` is given, as QMoE reads it
    (c-2048), else each i with i % step == 1, or all for a step of 1, where step is
    `encoder_sparse_step` or, without that, num_layers // num_sparse_encoder_layers.
    `expert_capacity` is not read: Hugging Face counts it per sequence.

    Raises:
      CheckpointError: a field is missing, of another type, or of another architecture.
    """
    check_fields(fields, _REQUIRED)
    sparse = {}
    for stack, name in (("encoder", "num_layers"), ("decoder", "num_decoder_layers")):
        count = size(fields, name)
        step = 1 if "is_full_sparse" in fields else _sparse_step(fields, stack, count)
        sparse[stack] = sparse_at(step, count)
    return huggingface_config.config_of_sizes(fields, sparse, gated=False)


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


def config_to_hf(config: SwitchConfig) -> dict[str, Any]:
    """Fields of the `config.json` that the original's loader builds its model from.

    Raises:
      CheckpointError: the published layout cannot express the geometry.
    """
    if len(config.wi_names) > 1:
        raise CheckpointError(
            f"the model has gated MLPs {config.mlp_activations}, but the published layout has "
            "none, so it cannot hold it"
        )
    fields = huggingface_config.config_to_hf(config, "bfloat16")
    stacks = {
        "encoder": (config.num_encoder_layers, config.encoder_sparse_layers),
        "decoder": (config.num_decoder_layers, config.decoder_sparse_layers),
    }
    if all(sparse == tuple(range(count)) for count, sparse in stacks.values()):
        # The original asks whether the field exists, not what it says.
        return fields | {"is_full_sparse": True}
    for stack, (count, sparse) in stacks.items():
        # Hugging Face of the published models' time has no sparse layers at all for a step of 1.
        if fields[f"{stack}_sparse_step"] == 1:
            raise CheckpointError(
                f"layers {list(sparse)} of the {count} {stack} layers are sparse, but the "
                "published layout knows only all layers of both stacks or every layer i with "
                "i % step = 1, so it cannot hold this model"
            )
    return fields
