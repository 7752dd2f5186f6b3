"""Peak host and device memory, and disk, of a compression run, and the largest batch that fits.

Each function names what is held at the peak, in bytes. What XLA needs beside arrays is an upper
estimate, held against its own account of the compiled programs in tests.
"""

import dataclasses
import math
from collections.abc import Iterable, Mapping

from qmoe_jax.checkpoints import names
from qmoe_jax.checkpoints.stored_arrays import CHUNK_BYTES
from qmoe_jax.codec.outline import item_bytes
from qmoe_jax.host_threads import num_threads
from qmoe_jax.pipeline.allocation import EXPERT_SHARE, HESSIAN_BYTES, NUM_KL_EXAMPLES
from qmoe_jax.pipeline.kernel_reader import MAX_CACHE_BYTES
from qmoe_jax.planning.inputs import ModelFacts, TokenFacts
from qmoe_jax.planning.public_checkpoints import Device
from qmoe_jax.planning.sizes import ZeroShare, layer_bytes, layer_settings, most_layer_bytes
from qmoe_jax.quantization import host_gptq
from qmoe_jax.quantization.settings import CompressionSettings

Parts = dict[str, int]

_FLOAT32 = 4
PROGRAM_BYTES = 10**9  # Python, JAX, compiled programs; 0.25 GB on CPU, more with CUDA's libraries
# float32 copies that GPTQ works on, per expert at once: of the kernel (the kernel itself, its
# updated block, errors, codes) and of the Hessian (damped, factor, panel, corner).
_GPTQ_COPIES = 4
_JOURNAL_HEADERS = 16384  # of the arrays of a kernel of a batch in its file
_EXPERT_RECORD = 1024  # what is known of an expert, in that file and in the record of its layer
_ATTENTION_COPIES = 3  # scores, their bias, probabilities
_HIDDEN_COPIES = 6  # residual stream, norm, query, key, value, attended


@dataclasses.dataclass(frozen=True)
class Resources:
    """What there is to run on; None where it is unknown and so not checked.

    Attributes:
      device: where programs run.
      device_bytes: device memory that JAX may use; ignored where that is host memory.
      host_bytes: free host memory.
      output_disk_bytes: free space where the output goes.
      buffer_disk_bytes: free space in the folder of the buffers, where there is one.
      same_disk: whether those two are one file system.
      buffers_on_disk: hidden states are memory-mapped (`buffer_dir`).
      journal: the output is local, so that finished expert batches are kept until it is whole.
      read_bytes_per_second: from the checkpoint.
      write_bytes_per_second: to the output.
    """

    device: Device
    device_bytes: int | None = None
    host_bytes: int | None = None
    output_disk_bytes: int | None = None
    buffer_disk_bytes: int | None = None
    same_disk: bool = True
    buffers_on_disk: bool = False
    journal: bool = True
    read_bytes_per_second: float = 1e9
    write_bytes_per_second: float = 1e9


def hidden_state_bytes(model: ModelFacts, tokens: TokenFacts) -> dict[str, int]:
    """Return the list buffers, by stack."""
    return {s: n * model.config.embed_dim * _FLOAT32 for s, n in tokens.tokens.items()}


def batch_weights(model: ModelFacts, expert_batch: int) -> int:
    """Return the number of weights of a batch of experts of one layer."""
    config = model.config
    batch = min(expert_batch, config.num_experts)
    return batch * (len(config.wi_names) + 1) * config.embed_dim * config.expert_mlp_dim


def host_memory(
    model: ModelFacts,
    tokens: TokenFacts,
    settings: CompressionSettings,
    *,
    buffers_on_disk: bool,
) -> Parts:
    """Return what the host holds at its peak: in the decoder, when a batch of experts is done.

    Args:
      model: the checkpoint.
      tokens: what flows through it.
      settings: of the run.
      buffers_on_disk: hidden states are memory-mapped.
    """
    config = model.config
    batch = min(settings.expert_batch, config.num_experts)
    weights = batch_weights(model, settings.expert_batch)
    rows = max(tokens.tokens.values())
    file_bytes = 4 * (tokens.file_lengths["encoder"] + 3 * tokens.file_lengths["decoder"])
    expert_bytes = sum(math.prod(model.shapes[n]) for n in model.expert_names)
    coded = most_coded_layer_bytes(model, settings) * batch // config.num_experts
    batch_rows = settings.batch_size * max(tokens.lengths.values()) * config.embed_dim
    chunk_rows = batch * settings.token_chunk * config.embed_dim
    # Kernels become float32 as they are read.
    kernels = _FLOAT32 * weights
    parts = {
        "program": PROGRAM_BYTES,
        "dense parameters of a layer, embedding": _resident_dense(model),
        "chunks of the checkpoint": min(MAX_CACHE_BYTES, expert_bytes * model.expert_itemsize())
        + model.largest_chunk_bytes(),
        "kernels of an expert batch": kernels,
        "kernels of the next, prefetched": kernels,
        # A byte a weight as they come from the device, and again where they are padded for it.
        "codes of an expert batch": 2 * weights,
        # As they will be stored, and twice more as the journal's file.
        "coded expert batch": 3 * coded,
        "chunks of the output": 2 * CHUNK_BYTES,
    }
    if tokens.num_examples:
        hidden = sum(hidden_state_bytes(model, tokens).values())
        parts |= {
            "hidden states": 0 if buffers_on_disk else hidden,
            # Calibration as read, and joined with validation.
            "tokens": 2 * tokens.num_examples * file_bytes,
            # Expert and gate, rows sorted by expert twice over, and what sorting takes.
            "routing": rows * (4 + 4 + 8 + 8 + 16),
            "rows on their way to the device": 3 * _FLOAT32 * max(batch_rows, chunk_rows),
        }
    return parts


def coded_layer_bytes(
    model: ModelFacts, settings: CompressionSettings, zeros: Mapping[str, ZeroShare]
) -> int:
    """Return the coded bytes of the largest sparse layer."""
    layers = layer_settings(model.config, settings).values()
    return round(max(layer_bytes(model.config, own, zeros) for own in layers))


def most_coded_layer_bytes(model: ModelFacts, settings: CompressionSettings) -> int:
    """Bound the coded bytes of the largest sparse layer, whatever its weights."""
    layers = layer_settings(model.config, settings).values()
    return max(most_layer_bytes(model.config, own) for own in layers)


def most_journal_bytes(model: ModelFacts, settings: CompressionSettings) -> int:
    """Bound the bytes of the batches of one layer that wait for the rest of it."""
    config = model.config
    batches = math.ceil(config.num_experts / settings.expert_batch)
    kernels = batches * (len(config.wi_names) + 1)
    records = kernels * _JOURNAL_HEADERS + config.num_experts * _EXPERT_RECORD
    return most_coded_layer_bytes(model, settings) + records


def device_memory(
    model: ModelFacts, tokens: TokenFacts, settings: CompressionSettings, *, on_cpu: bool
) -> dict[str, Parts]:
    """Return what one device holds in each phase; the largest phase is the peak."""
    config = model.config
    batch = min(settings.expert_batch, config.num_experts)
    embed, mlp, num_wi = config.embed_dim, config.expert_mlp_dim, len(config.wi_names)
    kernels = _FLOAT32 * batch_weights(model, settings.expert_batch)
    activation = item_bytes(settings.activation_dtype)
    # float32 kernels are cast inside the program, the hidden layer's all at once.
    cast = 0 if activation == _FLOAT32 else activation * batch * num_wi * embed * mlp
    row = embed * (_FLOAT32 + activation) + mlp * (num_wi + 1) * activation
    chunk = batch * settings.token_chunk
    hessians = {"wi": _FLOAT32 * batch * embed**2, "wo": _FLOAT32 * batch * mlp**2}
    missing = _FLOAT32 * batch * embed * mlp
    layers = [own for own in layer_settings(config, settings).values() if own.method != "none"]
    calibrated = tokens.num_calibration > 0
    # wo's sums behind the quantized input kernels, which are there beside the original ones.
    moves = any(own.moves_wo for own in layers)
    if moves or any(own.true_sequential for own in layers):
        kernels += _FLOAT32 * batch * num_wi * embed * mlp
    phases: dict[str, Parts] = {}
    if calibrated:
        phases["Hessians"] = {
            "kernels": kernels + cast,
            "Hessians": sum(hessians.values()),
            "product that is added": max(hessians.values()),
            "tokens": chunk * (row + 2 * _FLOAT32 * max(embed, mlp)),
        }
        if moves:
            # Another hidden layer, and the outputs that are missing.
            phases["Hessians"]["what wo misses"] = 2 * missing
            phases["Hessians"]["tokens"] += chunk * (2 * _FLOAT32 * mlp + _FLOAT32 * embed)
            # One factorisation at a time.
            phases["move wo"] = {
                "kernels": kernels + missing,
                "sums": sum(hessians.values()) + missing,
                "least squares": _FLOAT32 * (3 * mlp**2 + 3 * embed * mlp),
            }
    phases["quantize"] = _largest(
        _quantize(model, batch, own.method, kernels, hessians if calibrated else {}, kernel, on_cpu)
        for kernel in ("wi", "wo")
        for own in layers
    )
    if tokens.num_examples:
        phases["run experts"] = {
            "kernels": kernels + cast,
            "codes": batch * embed * mlp,
            "tokens": chunk * (row + embed * (activation + 2 * _FLOAT32)),
        }
        phases |= _dense_phases(model, tokens, settings, activation)
    if settings.allocation == "measured":
        phases["allocation"] = _allocation(model, tokens, settings)
    return phases


def _allocation(model: ModelFacts, tokens: TokenFacts, settings: CompressionSettings) -> Parts:
    """Return what is held while an allocation is measured: the whole model, among others."""
    config = model.config
    experts = max(1, round(EXPERT_SHARE * config.num_experts))
    squares = config.embed_dim**2 + config.expert_mlp_dim**2
    layer = _FLOAT32 * experts * squares
    layers = min(len(config.sparse_layers), max(1, HESSIAN_BYTES // layer))
    kernel = config.embed_dim * config.expert_mlp_dim
    logits = _FLOAT32 * tokens.lengths["decoder"] * config.num_embeddings
    return {
        "uncompressed model": sum(model.num_bytes().values()),
        "kernel of all experts, some quantized": _FLOAT32 * config.num_experts * kernel,
        "Hessians": layers * layer,
        "experts that are quantized": 4 * _FLOAT32 * experts * kernel,
        "logits": (NUM_KL_EXAMPLES + 3 * settings.batch_size) * logits,
    }


def _quantize(
    model: ModelFacts,
    batch: int,
    method: str,
    kernels: int,
    hessians: dict[str, int],
    kernel: str,
    on_cpu: bool,
) -> Parts:
    width, out = model.config.embed_dim, model.config.expert_mlp_dim
    if kernel == "wo":
        width, out = out, width
    parts = {"kernels": kernels}
    if hessians:
        # The sums of both, and one of them divided by its counts.
        parts["Hessians"] = sum(hessians.values()) + hessians[kernel]
    if method != "gptq":
        parts["rounding"] = _FLOAT32 * (1 if on_cpu else batch) * 3 * width * out
    elif on_cpu:
        parts["GPTQ"] = host_gptq.workspace_bytes(width, out, min(batch, num_threads()))
    else:
        parts["GPTQ"] = gptq_workspace(width, out, batch)
    parts["codes"] = 2 * batch * width * out
    return parts


def gptq_workspace(width: int, out: int, experts_at_once: int) -> int:
    """Return the temporary bytes of XLA's GPTQ program, `[width, out]` kernels."""
    return _FLOAT32 * experts_at_once * _GPTQ_COPIES * (width * out + width**2)


def _dense_phases(
    model: ModelFacts, tokens: TokenFacts, settings: CompressionSettings, activation: int
) -> dict[str, Parts]:
    config = model.config
    encoder, decoder = tokens.lengths["encoder"], tokens.lengths["decoder"]
    longest = max(encoder, decoder)
    joined = max(config.embed_dim, config.num_heads * config.head_dim)
    pairs = max(encoder * encoder, decoder * encoder, decoder * decoder)
    hidden = settings.batch_size * longest * joined
    mlp = settings.batch_size * longest * config.mlp_dim * (len(config.wi_names) + 1)
    phases = {
        "dense pass": {
            "parameters of a layer": _largest_layer(model),
            "hidden states": hidden * (2 * _FLOAT32 + _HIDDEN_COPIES * activation),
            "attention": _ATTENTION_COPIES * _FLOAT32 * settings.batch_size * config.num_heads
            * pairs,
            "hidden layer": mlp * activation,
        },
        "embed": {
            "embedding": _embedding_bytes(model),
            "hidden states": 2 * _FLOAT32 * hidden,
        },
    }  # fmt: skip
    if tokens.num_validation:
        targets = settings.batch_size * decoder
        phases["validation loss"] = {
            "embedding": _embedding_bytes(model),
            "hidden states": _FLOAT32 * targets * config.embed_dim,
            "logits": 2 * _FLOAT32 * targets * config.num_embeddings,
        }
    return phases


def peak(phases: dict[str, Parts]) -> tuple[str, int]:
    """Return the largest phase, and its bytes."""
    return max(((name, sum(parts.values())) for name, parts in phases.items()), key=lambda p: p[1])


def disk(
    model: ModelFacts,
    tokens: TokenFacts,
    settings: CompressionSettings,
    output_bytes: int,
    *,
    zeros: Mapping[str, ZeroShare],
    buffers_on_disk: bool,
    journal: bool,
) -> tuple[Parts, Parts]:
    """Return bytes at the output, and in the buffers' folder, at the end of the last layer.

    The journal holds the batches of one layer, until they are in the output.
    """
    output = {"compressed checkpoint": output_bytes}
    if journal:
        output["journal"] = coded_layer_bytes(model, settings, zeros)
    buffers: Parts = {}
    if buffers_on_disk:
        buffers = {f"{s} states": n for s, n in hidden_state_bytes(model, tokens).items()}
    return output, buffers


def fits_memory(
    model: ModelFacts,
    tokens: TokenFacts,
    settings: CompressionSettings,
    resources: Resources,
) -> bool:
    """Whether device and host have the memory, as far as it is known."""
    on_cpu = resources.device.is_host
    _, on_device = peak(device_memory(model, tokens, settings, on_cpu=on_cpu))
    buffers_on_disk = resources.buffers_on_disk
    parts = host_memory(model, tokens, settings, buffers_on_disk=buffers_on_disk)
    on_host = sum(parts.values())
    if on_cpu:
        on_host += on_device
    elif resources.device_bytes is not None and on_device > resources.device_bytes:
        return False
    return resources.host_bytes is None or on_host <= resources.host_bytes


def largest_expert_batch(
    model: ModelFacts,
    tokens: TokenFacts,
    settings: CompressionSettings,
    resources: Resources,
) -> int:
    """Return how many experts of a layer, up to all, fit as a batch; 0 where not even one does."""

    def fits(batch: int) -> bool:
        changed = dataclasses.replace(settings, expert_batch=batch)
        return fits_memory(model, tokens, changed, resources)

    # Memory only grows with the batch: bisect between a size that fits and one that does not.
    low, high = 0, model.config.num_experts + 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _resident_dense(model: ModelFacts) -> int:
    return _embedding_bytes(model) + _largest_layer(model)


def _embedding_bytes(model: ModelFacts) -> int:
    return math.prod(model.shapes[names.EMBEDDING]) * item_bytes(model.dtypes[names.EMBEDDING])


def _largest_layer(model: ModelFacts) -> int:
    layers: dict[tuple[str, int], int] = {}
    for name, shape in model.shapes.items():
        layer = names.layer_of(name)
        if layer and not names.is_expert_kernel(name):
            num_bytes = math.prod(shape) * item_bytes(model.dtypes[name])
            layers[layer] = layers.get(layer, 0) + num_bytes
    return max(layers.values())


def _largest(candidates: Iterable[Parts]) -> Parts:
    return max(candidates, key=lambda parts: sum(parts.values()))
