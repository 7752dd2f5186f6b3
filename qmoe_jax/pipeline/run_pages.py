"""A compression run for people: one HTML page and a model card, beside its output.

Neither is part of the compressed checkpoint, whose bytes depend on no time and no command.
"""

import html
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from qmoe_jax import page, plots
from qmoe_jax.checkpoints.storage import write_file
from qmoe_jax.formatting import format_bytes, format_memory, format_seconds
from qmoe_jax.outputs import output_file
from qmoe_jax.pipeline.report import CompressionReport, KernelReport

_KIND = "compression report"
_PAGE, _CARD = ".report.html", ".model_card.md"
_CARD_HEAD = "<!-- qmoe_jax model card -->"
_LEGEND = (
    "Layer error is |(W - Q) X|² / |W X|² over the calibration tokens of all experts. Weight error "
    "is |W - Q|² / |W|²: GPTQ moves weights where tokens do not notice, so it may be above 1 where "
    "the layer error is small. Bits are stored bits a weight. Fallbacks are experts that were "
    "rounded to nearest because no token reached them, or because their Hessian was singular or "
    "not finite."
)
# What a kernel's experts got instead of GPTQ, and why.
_FALLBACKS = (
    ("no tokens", "experts_without_tokens"),
    ("singular", "singular_hessians"),
    ("not finite", "nonfinite_experts"),
)


def page_paths(output: str | os.PathLike[str]) -> tuple[str, str]:
    """Return where the page and the model card of an output are: beside it."""
    path = os.fspath(output).rstrip("/")
    return path + _PAGE, path + _CARD


def check_pages(output: str | os.PathLike[str]) -> None:
    """Refuse to begin a run whose page or card would replace a file of another kind.

    Raises:
      CheckpointError: such a file, or a path that cannot be written.
    """
    if "://" in os.fspath(output):
        return
    at, card = page_paths(output)
    output_file(at, "the report", lambda file: page.is_page(file, _KIND))
    output_file(card, "the model card", _is_card)


def _is_card(file: Path) -> bool:
    with open(file, "rb") as content:
        return content.read(len(_CARD_HEAD)) == _CARD_HEAD.encode()


def write_pages(
    report: CompressionReport,
    *,
    checkpoint: str,
    command: str | None = None,
) -> tuple[str, str]:
    """Write both, local or gs://; return their paths.

    Args:
      report: of the run; `report.output` says where.
      checkpoint: what was compressed.
      command: that made it; None where there was none.

    Raises:
      CheckpointError: they cannot be written.
    """
    at, card = page_paths(report.output)
    facts = _facts(report, checkpoint)
    write_file(at, html_page(report, facts, command).encode())
    write_file(card, model_card(report, facts, command).encode())
    return at, card


def _facts(report: CompressionReport, checkpoint: str) -> list[tuple[str, str]]:
    """Names and values that both show."""
    stored = (report.expert_bits + report.dense_bits) // 8
    half = 2 * (report.expert_weights + report.dense_parameters)
    facts = [
        ("compressed from", checkpoint),
        ("method", f"{report.settings.get('method')}, grid {report.settings.get('grid')}"),
        ("expert weights", f"{report.expert_weights:,}"),
        ("stored bits per expert weight", f"{report.bits_per_weight:.3f}, everything counted"),
        ("experts", f"{report.expert_compression:.2f} times smaller than bfloat16"),
        (
            "whole model",
            f"{format_bytes(stored)}, {report.model_compression:.2f} times smaller than the "
            f"{format_bytes(half)} of bfloat16",
        ),
        ("zero expert weights", f"{report.zeros:.1%}"),
    ]
    if report.divergence is not None:
        found = report.divergence.to_json()
        tokens = int(report.divergence.losses.num_target_tokens.sum())
        facts += [
            (
                "KL from the uncompressed model",
                f"{found['kl']:.5f} ± {found['kl_standard_error']:.5f} nats per target token "
                f"(standard error; {tokens:,} target tokens of {report.divergence_text} text)",
            ),
            (
                "loss above the uncompressed model",
                f"{found['gap']:+.4f} ± {found['gap_standard_error']:.4f} nats per target token "
                "(paired standard error, the same tokens)",
            ),
        ]
    if report.validation is not None:
        facts.append(("validation loss", f"{report.validation.loss:.4f} nats per target token"))
    if report.divergence is None:
        facts.append(
            (
                "KL from the uncompressed model",
                "not measured; qmoe-jax evaluate with REFERENCE measures it",
            )
        )
    return [
        *facts,
        ("time", format_seconds(report.seconds)),
        ("host memory", f"at most {format_memory(report.peak_host_bytes, 'GiB')}"),
        ("read of the checkpoint", format_bytes(report.bytes_read)),
    ]


def html_page(
    report: CompressionReport, facts: Sequence[tuple[str, str]], command: str | None
) -> str:
    """Return the page: sizes, plots, a row a kernel, settings, the command.

    Args:
      report: of the run.
      facts: names and values for its head.
      command: that made it, or None.
    """
    parts = [page.html_table([("", ""), *facts])]
    parts += [page.warning(text) for text in report.warnings()]
    parts.append("<h2>Layers</h2>")
    parts += _styled_plots(report) if plots.can_plot() else [f"<p>{html.escape(plots.MISSING)}</p>"]
    parts.append(page.html_table(_kernel_rows(report.kernels)))
    parts.append(f"<p>{html.escape(_LEGEND)}</p>")
    settings = [(name, repr(value)) for name, value in sorted(report.settings.items())]
    parts += ["<h2>Settings</h2>", page.html_table([("setting", "value"), *settings])]
    if command is not None:
        parts.append(f"<h2>Command</h2><pre>{html.escape(command)}</pre>")
    return page.page(_KIND, f"Compressed: {os.path.basename(report.output.rstrip('/'))}", parts)


def model_card(
    report: CompressionReport, facts: Sequence[tuple[str, str]], command: str | None
) -> str:
    """Return the model card, in Markdown.

    Args:
      report: of the run.
      facts: names and values.
      command: that made it, or None.
    """
    name = os.path.basename(report.output.rstrip("/"))
    lines = [
        _CARD_HEAD,
        f"# {name}",
        "",
        "A Switch Transformer whose experts are compressed by qmoe-jax. It loads with "
        f'`qmoe_jax.load_switch("{name}")`; `qmoe-jax infer`, `evaluate` and `dequantize` take it.',
        "",
        page.markdown_table([("", ""), *facts]),
        "",
        "## Layers",
        "",
        page.markdown_table(_kernel_rows(report.kernels)),
        "",
        _LEGEND,
    ]
    if warnings := report.warnings():
        lines += ["", "## Warnings", "", *(f"- {warning}" for warning in warnings)]
    if command is not None:
        lines += ["", "## How it was made", "", "```sh", command, "```"]
    settings = ", ".join(f"`{key}={value!r}`" for key, value in sorted(report.settings.items()))
    return "\n".join([*lines, "", f"Settings: {settings}", ""])


def _kernel_rows(kernels: Sequence[KernelReport]) -> list[tuple[str, ...]]:
    headings = (
        "kernel",
        "layer error",
        "weight error",
        "zeros",
        "codes",
        "levels",
        "lengths",
        "bits",
        "tokens an expert",
        "fallbacks",
    )
    return [headings, *map(_kernel_row, kernels)]


def _kernel_row(kernel: KernelReport) -> tuple[str, ...]:
    counts = kernel.token_counts
    parts = (kernel.bits[name] / kernel.num_weights for name in ("codes", "levels", "offsets"))
    told = [f"{getattr(kernel, key)} {why}" for why, key in _FALLBACKS if getattr(kernel, key)]
    error = kernel.relative_layer_error
    return (
        kernel.name,
        "-" if error is None else f"{error:.5f}",
        f"{kernel.relative_weight_error:.5f}",
        f"{kernel.zeros:.1%}",
        *(f"{bits:.3f}" for bits in parts),
        f"{kernel.bits['total'] / kernel.num_weights:.3f}",
        f"{min(counts):,.0f} to {max(counts):,.0f}" if any(counts) else "-",
        f"of {kernel.num_experts}: {', '.join(told)}" if told else "none",
    )


def _styled_plots(report: CompressionReport) -> list[str]:
    with plots.style():
        return _plots(report)


def _plots(report: CompressionReport) -> list[str]:
    """Error, zeros and bits of each kernel; tokens of each expert."""
    kernels = report.kernels
    labels = [plots.kernel_label(kernel.name) for kernel in kernels]
    places = list(range(len(kernels)))
    figure, (error, zeros) = plots.new_figure(2)
    errors = [kernel.relative_layer_error for kernel in kernels]
    if any(errors):
        error.bar(places, [e or 0.0 for e in errors], color=plots.COLOURS[0])
        error.set(title="Layer error on calibration tokens", ylabel="|(W - Q) X|² / |W X|²")
    else:
        error.bar(places, [k.relative_weight_error for k in kernels], color=plots.COLOURS[0])
        error.set(title="Weight error (no calibration)", ylabel="|W - Q|² / |W|²")
    heights = [bar.get_height() for bar in error.patches if bar.get_height() > 0]
    if heights and max(heights) > 20 * min(heights):
        error.set_yscale("log")  # on a linear one the small bars would vanish
    zeros.bar(places, [kernel.zeros for kernel in kernels], color=plots.COLOURS[2])
    zeros.set(title="Zero weights", ylabel="share of the weights", ylim=(0, 1))
    for axes in (error, zeros):
        plots.name_bars(axes, labels)
    found = [plots.to_svg(figure, "layer error and share of zeros of each kernel")]

    figure, (bits, tokens) = plots.new_figure(2)
    below = [0.0] * len(kernels)
    parts = (("codes", "codes"), ("levels", "levels or steps"), ("offsets", "lengths"))
    for index, (part, label) in enumerate(parts):
        own = [kernel.bits[part] / kernel.num_weights for kernel in kernels]
        bits.bar(places, own, bottom=below, color=plots.COLOURS[index], label=label)
        below = [a + b for a, b in zip(below, own, strict=True)]
    bits.set(title="Stored bits by part", ylabel="bits a weight")
    bits.set_ylim(0, 1.25 * max(below))
    bits.legend(ncols=3, loc="upper center")
    plots.name_bars(bits, labels)
    _draw_tokens(tokens, kernels, plots.kernel_label)
    return [*found, plots.to_svg(figure, "stored bits of each kernel, tokens of each expert")]


def _draw_tokens(axes: Any, kernels: Sequence[KernelReport], name: Callable[[str], str]) -> None:
    """Draw the tokens of each layer's experts, most first; wi and wo of a layer see the same."""
    layers = {k.name.rpartition("/")[0]: k for k in kernels if any(k.token_counts)}
    for layer, kernel in layers.items():
        counts = sorted(kernel.token_counts, reverse=True)
        label = name(f"{layer}/x").removesuffix(" x")
        axes.plot(range(1, len(counts) + 1), counts, marker=".", label=label)
    axes.set(title="Calibration tokens of each expert", xlabel="expert, most tokens first")
    if not layers:
        axes.text(0.5, 0.5, "no calibration", transform=axes.transAxes, ha="center")
        return
    axes.set_yscale("symlog", linthresh=1)  # an expert without tokens is seen, at 0
    axes.set_ylim(bottom=0)
    if len(layers) <= 8:
        axes.legend()
