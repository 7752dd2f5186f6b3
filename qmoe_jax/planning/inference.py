"""An estimate of how long a compressed model takes for a generated token.

Of one row, behind an encoder that ran: every weight that the decoder uses comes from memory once,
dense ones in float32, those of the experts reached as codes. It knows nothing of attention to many
positions, nor of what a step costs besides.
"""

from qmoe_jax.ops.cpu.products import CODINGS
from qmoe_jax.planning.inputs import ModelFacts
from qmoe_jax.planning.public_checkpoints import Device
from qmoe_jax.planning.sizes import layer_settings
from qmoe_jax.quantization.settings import CompressionSettings


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
