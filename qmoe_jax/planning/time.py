"""Operations of a compression run, and an estimate of its time.

A roofline: operations over the device's rate or bytes over its bandwidth, whichever takes longer,
and beside it what GPTQ's column loop, the host and the disk take. It knows nothing of compilation,
of uneven routing, or of what runs beside it: an estimate, no promise.
"""

import dataclasses
import math

from qmoe_jax.pipeline.allocation import (
    EXPERT_SHARE,
    NUM_HESSIAN_EXAMPLES,
    NUM_KL_EXAMPLES,
    PROBE_STEPS,
)
from qmoe_jax.planning.inputs import ModelFacts, TokenFacts
from qmoe_jax.planning.public_checkpoints import Device
from qmoe_jax.planning.sizes import expert_kernel_shapes, layer_settings
from qmoe_jax.quantization.settings import CompressionSettings

# Host rates, measured on 2 cores: weights coded a second (benchmarks/results/codec.json), and rows
# of hidden states gathered or scattered, bytes a second.
_CODED_WEIGHTS_PER_SECOND = 3.5e8
_HOST_BYTES_PER_SECOND = 2e9


@dataclasses.dataclass(frozen=True)
class Work:
    """Work of one kind on the device.

    Attributes:
      flops: operations.
      num_bytes: bytes read or written in device memory.
      dtype: of the matrix products.
      steps: steps of GPTQ's column loop, one after the other.
    """

    flops: int | float
    num_bytes: int | float
    dtype: str
    steps: int = 0

    def plus(self, other: "Work") -> "Work":
        """Add work of the same dtype that is done after this."""
        return Work(
            self.flops + other.flops,
            self.num_bytes + other.num_bytes,
            self.dtype,
            self.steps + other.steps,
        )

    def seconds(self, device: Device) -> float:
        """Estimate the seconds that it takes on a device."""
        rate = device.float32_flops if self.dtype == "float32" else device.bfloat16_flops
        roofline = max(self.flops / rate, self.num_bytes / device.bytes_per_second)
        return roofline + self.steps * device.column_seconds


def device_work(
    model: ModelFacts, tokens: TokenFacts, settings: CompressionSettings
) -> dict[str, Work]:
    """Return the work by kind. Tokens are taken to spread evenly over the experts of a layer."""
    work: dict[str, Work] = {}
    for (stack, _), own in layer_settings(model.config, settings).items():
        for kind, part in _layer_work(model, tokens, own, stack).items():
            work[kind] = work[kind].plus(part) if kind in work else part
    if tokens.num_examples:
        work["dense parts"] = Work(_dense_flops(model, tokens), 0, settings.activation_dtype)
    if settings.allocation == "measured" and tokens.num_examples:
        work["allocation"] = _allocation_work(model, tokens, settings)
    if tokens.num_validation:
        config = model.config
        flops = 2 * tokens.validation_targets * config.embed_dim * config.num_embeddings
        work["validation logits"] = Work(flops, 0, "float32")
    return work


def _allocation_work(model: ModelFacts, tokens: TokenFacts, settings: CompressionSettings) -> Work:
    """Return the work of measuring an allocation: Hessians and sweeps of a sample, and the model
    over some examples for each kernel."""
    config = model.config
    calibration = max(1, tokens.num_calibration)
    shapes = list(expert_kernel_shapes(config).values())
    lattice = [
        own
        for own in layer_settings(config, settings).values()
        if own.method != "none" and own.has_steps
    ]
    kernels = len(lattice) * len(shapes) * len(PROBE_STEPS)
    experts = max(1, round(EXPERT_SHARE * config.num_experts))
    some = min(NUM_HESSIAN_EXAMPLES, calibration)
    runs = some + min(NUM_KL_EXAMPLES, calibration) * (1 + kernels)
    stacks = {"encoder": config.encoder_sparse_layers, "decoder": config.decoder_sparse_layers}
    weights = sum(out * width for out, width in shapes)
    in_experts = sum(2 * tokens.tokens[s] * weights * len(layers) for s, layers in stacks.items())
    logits = 2 * tokens.tokens["decoder"] * config.embed_dim * config.num_embeddings
    forward = (_dense_flops(model, tokens) + in_experts + logits) / tokens.num_examples * runs
    hessians = sum(
        2 * tokens.hessian_tokens[s] * EXPERT_SHARE * len(layers) * some / calibration
        for s, layers in stacks.items()
    ) * (config.embed_dim**2 + config.expert_mlp_dim**2)
    sweeps = len(lattice) * experts * sum(w**3 / 3 + 4 * w**2 * out for out, w in shapes)
    # Every run of the model reads its experts' kernels.
    batches = math.ceil(runs / settings.batch_size)
    read = 4 * batches * config.num_experts * weights * sum(map(len, stacks.values()))
    return Work(forward + hessians + sweeps, read, "float32")


def _layer_work(
    model: ModelFacts,
    tokens: TokenFacts,
    settings: CompressionSettings,
    stack: str,
) -> dict[str, Work]:
    """Return the work of the experts of one sparse layer, by kind."""
    config = model.config
    experts, num_wi = config.num_experts, len(config.wi_names)
    embed, mlp = config.embed_dim, config.expert_mlp_dim
    weights = (num_wi + 1) * embed * mlp
    shapes = list(expert_kernel_shapes(config).values())
    gptq, activation = settings.method == "gptq", settings.activation_dtype

    def padded(count: int) -> tuple[int, int]:
        """Return the tokens that are computed, filled up to chunks, and all experts' chunks."""
        chunks = experts * math.ceil(count / experts / settings.token_chunk)
        return chunks * settings.token_chunk, chunks

    work: dict[str, Work] = {}
    if settings.method != "none" and tokens.num_calibration:
        entering, chunks = padded(tokens.hessian_tokens[stack])
        moves = settings.moves_wo
        hidden = (2 if moves else 1) * num_wi * embed * mlp
        work["wo's inputs"] = Work(2 * entering * hidden, 4 * chunks * hidden, activation)
        # Sums of Hessians are read, added to and written with every chunk.
        squares = embed**2 + mlp**2
        work["Hessians"] = Work(2 * entering * squares, 3 * 4 * chunks * squares, "float32")
        if moves:
            missing = embed * mlp
            sums = Work(4 * entering * missing, 3 * 4 * chunks * missing, "float32")
            solve = Work(
                experts * (mlp**3 / 3 + 2 * mlp**2 * embed), experts * 4 * 2 * mlp**2, "float32"
            )
            work["wo moved"] = Work(
                sums.flops + solve.flops, sums.num_bytes + solve.num_bytes, "float32"
            )
        # H W for the energies; without GPTQ once more for the errors.
        products = sum(2 * width**2 * out for out, width in shapes)
        work["layer errors"] = Work(experts * products * (1 if gptq else 2), 0, "float32")
    if gptq:
        work["Cholesky"] = Work(
            experts * sum(width**3 / 3 for _, width in shapes),
            experts * 4 * sum(2 * width**2 for _, width in shapes),
            "float32",
        )
        work["sweep"] = Work(
            experts * sum(width**2 * out for out, width in shapes),
            experts * 4 * 4 * weights,
            "float32",
            math.ceil(experts / settings.expert_batch) * sum(width for _, width in shapes),
        )
    if tokens.num_examples:
        passing, chunks = padded(tokens.tokens[stack])
        work["experts' outputs"] = Work(2 * passing * weights, 4 * chunks * weights, activation)
    return work


def _dense_flops(model: ModelFacts, tokens: TokenFacts) -> int | float:
    config = model.config
    embed, joined = config.embed_dim, config.num_heads * config.head_dim
    encoder, decoder = tokens.tokens["encoder"], tokens.tokens["decoder"]
    lengths = tokens.lengths
    projections = 2 * 4 * embed * joined
    dense_mlp = 2 * (len(config.wi_names) + 1) * embed * config.mlp_dim
    router = 2 * embed * config.num_experts

    def scores(queries: int, keys: int) -> int:
        return 2 * 2 * queries * keys * joined

    def mlps(count: int, num_layers: int, sparse: int) -> int:
        return count * ((num_layers - sparse) * dense_mlp + sparse * router)

    in_encoder = encoder * projections + scores(encoder, lengths["encoder"])
    in_decoder = (
        decoder * projections + scores(decoder, lengths["decoder"])  # itself
        + (decoder + encoder) * projections / 2 + scores(decoder, lengths["encoder"])  # the encoder
    )  # fmt: skip
    return (
        config.num_encoder_layers * in_encoder
        + config.num_decoder_layers * in_decoder
        + mlps(encoder, config.num_encoder_layers, len(config.encoder_sparse_layers))
        + mlps(decoder, config.num_decoder_layers, len(config.decoder_sparse_layers))
    )


def seconds_by_kind(
    model: ModelFacts,
    tokens: TokenFacts,
    settings: CompressionSettings,
    device: Device,
    *,
    bytes_to_read: int,
    bytes_to_write: int,
    read_bytes_per_second: float,
    write_bytes_per_second: float,
) -> dict[str, float]:
    """Estimate the seconds by kind, `read` first; the device's kinds are those of `device_work`."""
    config = model.config
    work = device_work(model, tokens, settings)
    weights = model.num_parameters()["experts"]
    # Bytes of hidden states that are fetched and put back: in every layer for its dense part, and
    # in sparse ones for Hessians and outputs.
    row = 4 * config.embed_dim
    moved = 0
    stacks = (
        ("encoder", config.num_encoder_layers, len(config.encoder_sparse_layers)),
        ("decoder", config.num_decoder_layers, len(config.decoder_sparse_layers)),
    )
    for stack, num_layers, sparse in stacks:
        count = tokens.tokens[stack]
        moved += row * (2 * count * (num_layers + sparse) + tokens.hessian_tokens[stack] * sparse)
    found = {"read": bytes_to_read / read_bytes_per_second}
    found |= {kind: part.seconds(device) for kind, part in work.items()}
    if device.link_bytes_per_second is not None:
        # float32 kernels go there, codes come back and go there again.
        found["to and from the device"] = (moved + 6 * weights) / device.link_bytes_per_second
    found["hidden states in host memory"] = moved / _HOST_BYTES_PER_SECOND
    found["coding"] = weights / _CODED_WEIGHTS_PER_SECOND
    found["write"] = bytes_to_write / write_bytes_per_second
    return found


def total_seconds(parts: dict[str, float]) -> float:
    """Return the seconds of a run: it reads beside everything else; the rest is in turn."""
    return max(parts["read"], sum(parts.values()) - parts["read"])
