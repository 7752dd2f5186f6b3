"""A plan as text, and the list of public checkpoints."""

from qmoe_jax.planning import public_checkpoints as registry
from qmoe_jax.planning.inputs import ModelFacts
from qmoe_jax.planning.limits import format_bytes
from qmoe_jax.planning.memory import peak
from qmoe_jax.planning.plan import Plan
from qmoe_jax.planning.sizes import compressed_size, zero_share
from qmoe_jax.quantization.settings import CompressionSettings


def format_list() -> str:
    """Return the public checkpoints with parameters and sizes."""
    head = (
        f"{'name':<18}{'parameters':>20}{'layers':>8}{'embed':>7}{'mlp':>7}{'experts':>9}"
        f"{'bfloat16':>11}{'tunstall':>11}{'zeros':>7}"
    )
    lines = [head, "-" * len(head)]
    assumed = False
    for entry in registry.public_checkpoints().values():
        model = ModelFacts.from_registry(entry, "float32")
        config, zeros = model.config, zero_share(entry.config, "ternary")
        assumed |= zeros.source.startswith("assumed")
        size = compressed_size(
            config, model.shapes, model.dtypes, CompressionSettings(), {"ternary": zeros.value}
        )
        mark = "*" if zeros.source.startswith("assumed") else " "
        lines.append(
            f"{entry.name:<18}{size.parameters:>20,}"
            f"{config.num_encoder_layers + config.num_decoder_layers:>8}{config.embed_dim:>7}"
            f"{config.expert_mlp_dim:>7}{config.num_experts:>9}"
            f"{format_bytes(size.bfloat16_bytes):>11}{format_bytes(size.total):>11}"
            f"{zeros.value:>6.1%}{mark}"
        )
    if assumed:
        lines += ["", "* assumed: that of the model nearest in width among the QMoE paper's three"]
    return "\n".join(lines)


def format_plan(plan: Plan) -> str:
    """Return a plan as text of several lines."""
    return "\n\n".join(
        "\n".join(section)
        for section in (
            _model_lines(plan),
            _size_lines(plan),
            _memory_lines(plan),
            _time_lines(plan),
            _verdict_lines(plan),
        )
    )


def _row(title: str, value: str, note: str = "") -> str:
    return f"  {title:<42}{value:>12}  {note}".rstrip()


def _parts(parts: dict[str, int]) -> list[str]:
    return [_row(f"  {name}", format_bytes(size)) for name, size in parts.items() if size]


def _model_lines(plan: Plan) -> list[str]:
    model, config, tokens = plan.model, plan.model.config, plan.tokens
    count = model.num_parameters()
    sparse = (len(config.encoder_sparse_layers), len(config.decoder_sparse_layers))
    whole = sum(model.num_bytes().values())
    unknown = model.chunks is None
    stored = ", ".join(f"{format_bytes(n)} {dtype}" for dtype, n in model.num_bytes().items())
    note = "its dtype is assumed, its chunks are not known" if unknown else "whole chunks"
    if not unknown and plan.bytes_to_read > 1.001 * whole:
        note = f"{plan.bytes_to_read / whole:.2f} times its size: chunks span expert batches"
    return [
        f"{model.name}",
        _row("encoder, decoder layers", f"{config.num_encoder_layers}, {config.num_decoder_layers}",
             f"{sparse[0]}, {sparse[1]} of them sparse"),
        _row("embed, expert mlp, experts",
             f"{config.embed_dim}, {config.expert_mlp_dim}, {config.num_experts}",
             ", ".join(config.mlp_activations)),
        _row("parameters", f"{count['total']:,}", f"{count['experts']:,} in experts"),
        _row("checkpoint", format_bytes(whole), stored),
        _row("to read", format_bytes(plan.bytes_to_read), note),
        _row("examples", f"{tokens.num_examples:,}",
             f"{tokens.num_calibration:,} calibration, {tokens.num_validation:,} validation"),
        _row("tokens", f"{sum(tokens.tokens.values()):,}",
             f"{tokens.tokens['encoder']:,} + {tokens.tokens['decoder']:,}; {tokens.source}"),
    ]  # fmt: skip


def _size_lines(plan: Plan) -> list[str]:
    lines = [
        *(
            f"compressed, {grid}: {zeros.value:.1%} zeros, {zeros.source}"
            for grid, zeros in plan.zero_shares.items()
        ),
        f"  {'layout':<16}{'bits/weight':>12}{'experts':>12}{'smaller':>9}{'model':>12}"
        f"{'smaller':>9}",
    ]
    for size in plan.sizes:
        lines.append(
            f"  {size.layout:<16}{size.bits_per_weight:>12.4f}{format_bytes(size.experts):>12}"
            f"{size.expert_compression:>8.2f}x{format_bytes(size.total):>12}"
            f"{size.model_compression:>8.2f}x"
        )
    if any(size.layout == "published" for size in plan.sizes):
        lines += [
            "  published: the paper's own files. qmoe and published with the 5 % that the paper",
            "  found its code to take above independent codes, on c-2048.",
        ]
    return lines


def _memory_lines(plan: Plan) -> list[str]:
    settings, device = plan.settings, plan.resources.device
    phase, on_device = peak(plan.device)
    lines = [
        f"memory at expert_batch {settings.expert_batch}, batch_size {settings.batch_size}, "
        f"token_chunk {settings.token_chunk}, {settings.activation_dtype}",
        _row("host, at the most", format_bytes(plan.host_peak),
             "with the device's: they are one" if device.is_host else ""),
        *_parts(plan.host),
        _row("device, at the most", format_bytes(on_device), f"in: {phase}"),
        *_parts(plan.device[phase]),
        _row("largest expert_batch that fits", f"{plan.largest_expert_batch or 'none'}",
             f"of {plan.model.config.num_experts} experts a layer"),
        "",
        "disk",
        _row("output, at the most", format_bytes(sum(plan.output_disk.values()))),
        *_parts(plan.output_disk),
    ]  # fmt: skip
    if plan.buffer_disk:
        lines.append(_row("buffers", format_bytes(sum(plan.buffer_disk.values()))))
        lines += _parts(plan.buffer_disk)
    return lines


def _time_lines(plan: Plan) -> list[str]:
    device, resources = plan.resources.device, plan.resources
    flops = sum(part.flops for part in plan.work.values())
    lines = [
        f"time on {device.label}, estimated",
        f"  {device.source}",
        _row("operations", f"{flops:.3g}"),
    ]
    for kind, needed in plan.seconds.items():
        part = plan.work.get(kind)
        note = "" if part is None else f"{part.flops:.3g} operations, {part.dtype}"
        if kind == "read":
            note = f"at {resources.read_bytes_per_second / 1e9:g} GB/s, beside all else"
        lines.append(_row(kind, format_seconds(needed), note))
    lines.append(_row("in all", format_seconds(plan.total_seconds), "without compilation"))
    return lines


def _verdict_lines(plan: Plan) -> list[str]:
    if plan.problems:
        return [f"NO: {problem}" for problem in plan.problems]
    limits = {
        "host": plan.resources.host_bytes,
        "disk": plan.resources.output_disk_bytes,
    }
    if not plan.resources.device.is_host:
        limits = {"device": plan.resources.device_bytes} | limits
    known = [f"{what} {format_bytes(limit)}" for what, limit in limits.items() if limit is not None]
    return [f"The run fits ({', '.join(known) or 'nothing is known of its limits'})."]


def format_seconds(seconds: float) -> str:
    """`3.2 min`."""
    for unit, size in (("d", 86400.0), ("h", 3600.0), ("min", 60.0)):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.1f} s"
