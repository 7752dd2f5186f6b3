"""The demo's results: a table for the terminal, JSON, and one HTML page with plots."""

import html
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# Here, where it is not used: the demo is not to find out after minutes that it is missing.
import matplotlib.figure  # noqa: F401

from qmoe_jax import atomic_file, page, plots
from qmoe_jax.evaluation.divergence import DivergenceReport
from qmoe_jax.evaluation.metrics import LossReport
from qmoe_jax.formatting import format_table
from qmoe_jax.generation.text import Filled
from qmoe_jax.outputs import is_json_object
from qmoe_jax.pipeline.report import CompressionReport

Row = dict[str, Any]

_KIND = "demo report"

_COLUMNS = (
    ("model", "name", "{}"),
    ("loss", "loss", "{:.4f}"),
    ("gap", "gap", "{:+.4f}"),
    ("+-", "gap_standard_error", "{:.4f}"),
    ("KL", "kl", "{:.5f}"),
    ("bits/weight", "bits_per_weight", "{:.3f}"),
    ("experts", "expert_compression", "{:.2f}x"),
    ("model size", "model_compression", "{:.2f}x"),
    ("zeros", "zeros", "{:.1%}"),
    ("seconds", "seconds", "{:.1f}"),
)


def _samples(filled: Sequence[Filled]) -> list[dict[str, str]]:
    return [{"prompt": f.prompt, "generated": f.generated, "text": f.text} for f in filled]


def baseline_row(loss: LossReport, filled: Sequence[Filled], seconds: float) -> Row:
    """Return the row of the uncompressed model.

    Args:
      loss: on the validation tokens.
      filled: the prompts with their blanks filled.
      seconds: of loading, evaluating and generating.
    """
    return {
        "name": "uncompressed",
        "loss": loss.loss,
        "accuracy": loss.accuracy,
        "num_target_tokens": int(loss.num_target_tokens.sum()),
        "gap": 0.0,
        "gap_standard_error": 0.0,
        "kl": 0.0,
        "kl_standard_error": 0.0,
        "agreement": 1.0,
        "bits_per_weight": 16.0,
        "expert_compression": 1.0,
        "model_compression": 1.0,
        "zeros": 0.0,
        "seconds": seconds,
        "samples": _samples(filled),
    }


def variant_row(
    name: str,
    report: CompressionReport,
    divergence: DivergenceReport,
    filled: Sequence[Filled],
) -> Row:
    """Return the row of a compressed model; its `seconds` are those of the compression alone.

    Args:
      name: in the table.
      report: of its compression.
      divergence: from the uncompressed model on the validation tokens.
      filled: the prompts with their blanks filled.
    """
    loss = divergence.losses
    compression = report.to_json()
    compression.pop("output")
    return {
        "name": name,
        "loss": loss.loss,
        "accuracy": loss.accuracy,
        "num_target_tokens": int(loss.num_target_tokens.sum()),
        **divergence.to_json(),
        "bits_per_weight": report.bits_per_weight,
        "expert_compression": report.expert_compression,
        "model_compression": report.model_compression,
        "zeros": report.zeros,
        "seconds": report.seconds,
        "compression": compression,
        "samples": _samples(filled),
    }


def document(rows: list[Row], **facts: Any) -> dict[str, Any]:
    """Return all results as one JSON object: `facts`, units, and the rows as `models`."""
    return {
        "units": {
            "loss": "nats per target token, dropless routing",
            "gap": "loss above the uncompressed model on the same tokens, with paired standard "
            "error",
            "kl": "nats per target token from the uncompressed model's predictions",
            "agreement": "share of target tokens at which both find the same token most probable",
            "bits_per_weight": "stored bits per expert weight: codes, levels and offsets",
            "expert_compression": "bfloat16 size over stored size of the experts",
            "model_compression": "bfloat16 size over stored size of the whole model",
            "zeros": "share of expert weights that are exactly zero",
            "seconds": "of compression; of evaluation for the uncompressed model",
        },
        **facts,
        "models": rows,
    }


def table(document: dict[str, Any]) -> str:
    """Return the results as a text table."""
    cells = [[title for title, _, _ in _COLUMNS]]
    for row in document["models"]:
        cells.append([form.format(row[key]) for _, key, form in _COLUMNS])
    first = document["models"][0]
    lines = [
        format_table(cells),
        f"\n{first['num_target_tokens']:,} validation target tokens, "
        f"{document['num_calibration_examples']:,} calibration examples, "
        f"{document['seconds']:.0f} seconds in all.",
    ]
    for row in document["models"]:
        lines.append(f"\n{row['name']}:")
        lines += [f"  {sample['text']}" for sample in row["samples"]]
    return "\n".join(lines)


def is_json_report(file: Path) -> bool:
    """Whether a file is what `write_json` writes."""
    return is_json_object(file, ("units", "models"))


def is_html_report(file: Path) -> bool:
    """Whether a file is what `write_html` writes."""
    return page.is_page(file, _KIND)


def write_json(document: dict[str, Any], path: Path) -> None:
    """Write the results atomically."""
    atomic_file.write_json(path, document)


def write_html(document: dict[str, Any], path: Path) -> None:
    """Write one self-contained page: table, plots, samples."""
    rows = [[title for title, _, _ in _COLUMNS]]
    rows += [[form.format(row[key]) for _, key, form in _COLUMNS] for row in document["models"]]
    units = "".join(
        f"<li><b>{html.escape(name)}</b>: {html.escape(text)}</li>"
        for name, text in document["units"].items()
    )
    samples = "".join(
        f"<h3>{html.escape(row['name'])}</h3><ul>"
        + "".join(f"<li>{html.escape(sample['text'])}</li>" for sample in row["samples"])
        + "</ul>"
        for row in document["models"]
    )
    parts = [
        f"<p>{html.escape(str(document['checkpoint']))}: "
        f"{document['models'][0]['num_target_tokens']:,} validation target tokens, "
        f"{document['num_calibration_examples']:,} calibration examples.</p>",
        page.html_table(rows),
        f"<ul>{units}</ul>",
        *_plots(document),
        f"<h2>Filled blanks</h2>{samples}",
    ]
    content = page.page(_KIND, "Compressed experts against the uncompressed model", parts)
    with atomic_file.open_atomically(path) as file:
        file.write(content.encode())


def _plots(document: dict[str, Any]) -> list[str]:
    """KL and loss against bits, relative layer error and zeros per kernel."""
    compressed = [row for row in document["models"] if "compression" in row]
    points = [row | {"size": row["bits_per_weight"]} for row in compressed]
    with plots.style():
        figure, (divergence, gap) = plots.new_figure(2, height=4.0)
        plots.against_size(divergence, points, "kl", "kl_standard_error")
        divergence.set(
            title="KL against size, bars: standard error",
            xlabel="stored bits per expert weight",
            ylabel="nats per target token",
            yscale="log",
        )
        plots.against_size(gap, points, "gap", "gap_standard_error")
        gap.set(
            title="Loss above uncompressed, bars: paired standard error",
            xlabel="stored bits per expert weight",
            ylabel="nats per target token",
            yscale="log" if all(row["gap"] > 0 for row in compressed) else "linear",
        )
        found = [plots.to_svg(figure, "KL and loss against bits")]

        figure, (error, zeros) = plots.new_figure(2)
        names = [kernel["name"] for kernel in compressed[0]["compression"]["kernels"]]
        for index, row in enumerate(compressed):
            kernels = row["compression"]["kernels"]
            apart = 0.8 / len(compressed)
            places = [i + (index - (len(compressed) - 1) / 2) * apart for i in range(len(names))]
            look = {"width": 0.9 * apart, "color": plots.COLOURS[index % len(plots.COLOURS)]}
            error.bar(places, [k["relative_layer_error"] or 0.0 for k in kernels], **look)
            zeros.bar(places, [k["zeros"] for k in kernels], label=row["name"], **look)
        error.set(ylabel="|(W - Q) X|² / |W X|²", yscale="log")
        error.set_title("Layer error on calibration tokens")
        zeros.set(ylabel="share of zero weights", title="Zeros", ylim=(0, 1.5))
        zeros.legend(ncols=2, fontsize=7, loc="upper center")
        for axes in (error, zeros):
            plots.name_bars(axes, [plots.kernel_label(name) for name in names])
        return [*found, plots.to_svg(figure, "layer error and share of zeros of each kernel")]
