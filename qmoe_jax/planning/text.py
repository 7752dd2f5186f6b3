"""A plan as text, and the list of public checkpoints."""

from qmoe_jax.formatting import format_bytes, format_row, format_seconds, format_table
from qmoe_jax.planning.finetuning import FinetunePlan
from qmoe_jax.planning.inputs import ModelFacts
from qmoe_jax.planning.memory import peak
from qmoe_jax.planning.plan import Plan
from qmoe_jax.planning.public_checkpoints import public_checkpoints
from qmoe_jax.planning.sizes import compressed_size, zero_share
from qmoe_jax.quantization.settings import CompressionSettings
from qmoe_jax.quantization.step_search import typical_bits


def format_list() -> str:
    """Return the public checkpoints with parameters and sizes."""
    rows: list[tuple[str, ...]] = [
        (
            *("name", "parameters", "layers", "embed", "mlp", "experts", "bfloat16"),
            *("ternary", "zeros", "lattice"),
        )
    ]
    ternary, lattice = CompressionSettings(grid="ternary"), CompressionSettings(grid="lattice")
    assumed = False
    for entry in public_checkpoints().values():
        model = ModelFacts.from_registry(entry, "float32")
        config, zeros = model.config, zero_share(entry.config, "ternary")
        codes = {
            "ternary": zeros,
            "lattice": zero_share(config, "lattice", typical_bits(lattice.step)),
        }
        size, smaller = (
            compressed_size(config, model.shapes, model.dtypes, settings, codes)
            for settings in (ternary, lattice)
        )
        is_assumed = zeros.source.startswith("assumed")
        assumed |= is_assumed
        rows.append(
            (
                entry.name,
                f"{size.parameters:,}",
                f"{config.num_encoder_layers + config.num_decoder_layers}",
                f"{config.embed_dim}",
                f"{config.expert_mlp_dim}",
                f"{config.num_experts}",
                format_bytes(size.bfloat16_bytes),
                format_bytes(size.total),
                f"{zeros.value:.1%}{'*' if is_assumed else ' '}",
                format_bytes(smaller.total),
            )
        )
    widths = (18, 20, 8, 7, 7, 9, 11, 11, 7, 11)
    lines = [format_table(rows, min_widths=widths, separator="", rule="line")]
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
            _inference_lines(plan),
            _verdict_lines(plan),
        )
        if section
    )


def format_finetune_plan(plan: FinetunePlan) -> str:
    """Return a plan of fine-tuning as text of several lines."""
    model, settings, lengths = plan.model, plan.settings, plan.lengths
    held, step = sum(plan.held.values()), sum(plan.step.values())
    at_once = settings.batch_size // settings.microbatches
    note = "" if model.is_measured else "its compressed size is expected"
    limits = {"device": plan.resources.device_bytes, "disk": plan.resources.output_disk_bytes}
    if plan.resources.device.is_host:
        limits["device"] = plan.resources.host_bytes
    known = [f"{what} {format_bytes(limit)}" for what, limit in limits.items() if limit is not None]
    sections = [
        [
            f"{model.name}",
            _row("checkpoint", format_bytes(model.stored_bytes), note),
            _row("trained parameters", f"{plan.num_trained:,}", ", ".join(settings.kinds)),
            _row("examples at a time", f"{at_once}",
                 f"of a batch of {settings.batch_size}; {lengths['encoder']} + "
                 f"{lengths['decoder']} positions, {plan.activation_dtype}"),
        ],
        [
            f"memory on {plan.resources.device.label}",
            _row("at the peak", format_bytes(plan.peak)),
            _row("held from step to step", format_bytes(held)),
            *_parts(plan.held),
            _row("of a step, estimated", format_bytes(step)),
            *_parts(plan.step),
        ],
        ["disk", _row("output", format_bytes(sum(plan.disk.values()))), *_parts(plan.disk)],
        [f"NO: {problem}" for problem in plan.problems]
        or [f"The run fits ({', '.join(known) or 'nothing is known of its limits'})."],
    ]  # fmt: skip
    return "\n\n".join("\n".join(section) for section in sections)


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
    rows = [("layout", "bits/weight", "experts", "smaller", "model", "smaller")]
    for size in plan.sizes:
        rows.append(
            (
                size.layout,
                f"{size.bits_per_weight:.4f}",
                format_bytes(size.experts),
                f"{size.expert_compression:.2f}x",
                format_bytes(size.total),
                f"{size.model_compression:.2f}x",
            )
        )
    widths = (16, 12, 12, 9, 12, 9)
    lines = [
        *(
            f"compressed, {grid}: {zeros.value:.1%} zeros, {zeros.source}"
            for grid, zeros in plan.zero_shares.items()
        ),
        *(f"  {format_row(row, widths, separator='')}" for row in rows),
    ]
    lines += _part_lines(plan)
    if any(size.layout == "published" for size in plan.sizes):
        lines += [
            "  published: the paper's own files. qmoe and published with the 5 % that the paper",
            "  found its code to take above independent codes, on c-2048.",
        ]
    return lines


def _part_lines(plan: Plan) -> list[str]:
    """Where the bits of the experts go, as `inspect` shows them of a checkpoint that is there."""
    size = plan.sizes[0]
    rows = [("  of experts", "bytes", "bits/weight", "share")]
    for name, num_bytes in (*size.parts.items(), ("container", size.container)):
        if num_bytes:
            per_weight = f"{8 * num_bytes / size.expert_weights:.4f}"
            share = f"{num_bytes / size.experts:.1%}"
            rows.append((f"  {name}", format_bytes(num_bytes), per_weight, share))
    widths = (16, 12, 12, 9)
    return [f"  {format_row(row, widths, separator='')}" for row in rows] if size.experts else []


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
        _row("output, expected", format_bytes(sum(plan.output_disk.values()))),
        *_parts(plan.output_disk),
        _row("output, at the most", format_bytes(plan.most_output_disk), "whatever the weights"),
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


def _inference_lines(plan: Plan) -> list[str]:
    """Say what the output takes when it answers, and how fast it does where that is known."""
    held, device = plan.memory_at_work, plan.resources.device
    limit = plan.resources.host_bytes if device.is_host else plan.resources.device_bytes
    lines = [
        "the output at work there, estimated",
        _row("memory, activations on top", format_bytes(held.total),
             f"uncompressed in bfloat16 {format_bytes(held.uncompressed)}"),
        _row("  dense parameters", format_bytes(held.dense)),
        _row("  codes", format_bytes(held.experts)),
    ]  # fmt: skip
    if held.derived:
        lines.append(_row("  found in them for kernels", format_bytes(held.derived)))
    if held.fragments is not None:
        note = "more, with implementation='cuda_fragments'"
        note += ", as 'auto' is here" if held.fragments_by_default else ""
        lines.append(_row("  fragments", format_bytes(held.fragments), note))
    if limit is not None and held.total > limit:
        lines.append(f"  It does not fit there: JAX may use {format_bytes(limit)}.")
    parts = plan.seconds_a_token
    if parts is None:
        return lines
    rate = f"at {device.coded_weights_per_second or 0:.3g} weights/s"
    needed = sum(parts.values())
    note = f"{1 / needed:.3g} tokens/s, of one row, after its encoder"
    lines.append(_row("a token", f"{1e3 * needed:.1f} ms", note))
    for kind, own in parts.items():
        if own:
            lines.append(_row(f"  {kind}", f"{1e3 * own:.1f} ms", rate if "codes" in kind else ""))
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
    verdict = f"The run fits ({', '.join(known) or 'nothing is known of its limits'})."
    free, most = plan.resources.output_disk_bytes, plan.most_output_disk
    if free is None or most <= free:
        return [verdict]
    return [
        verdict,
        f"Its output is expected to; for weights that code badly it could take {format_bytes(most)}"
        f" and not fit the disk.",
    ]
