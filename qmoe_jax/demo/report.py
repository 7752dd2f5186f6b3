"""The demo's results: a table for the terminal, JSON, and one HTML page with plots."""

import base64
import html
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# Here and not where it is used: the demo is not to find out after minutes that it is missing.
from matplotlib.figure import Figure

from qmoe_jax import atomic_file
from qmoe_jax.evaluation.divergence import DivergenceReport
from qmoe_jax.evaluation.metrics import LossReport
from qmoe_jax.formatting import format_table
from qmoe_jax.generation.text import Filled
from qmoe_jax.outputs import is_json_object
from qmoe_jax.pipeline.report import CompressionReport

Row = dict[str, Any]

_HEAD = '<!doctype html><meta charset="utf-8"><title>qmoe-jax demo</title>'

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
    with open(file, "rb") as page:
        return page.read(len(_HEAD)) == _HEAD.encode()


def write_json(document: dict[str, Any], path: Path) -> None:
    """Write the results atomically."""
    atomic_file.write_json(path, document)


def write_html(document: dict[str, Any], path: Path) -> None:
    """Write one self-contained page: table, plots, samples."""
    head = "".join(f"<th>{html.escape(title)}</th>" for title, _, _ in _COLUMNS)
    body = "".join(
        "<tr>" + "".join(f"<td>{form.format(row[key])}</td>" for _, key, form in _COLUMNS) + "</tr>"
        for row in document["models"]
    )
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
    image = base64.b64encode(_plots(document)).decode()
    page = f"""{_HEAD}
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto }}
table {{ border-collapse: collapse }} td, th {{ padding: .3rem .8rem; text-align: right }}
td:first-child, th:first-child {{ text-align: left }} tr {{ border-bottom: 1px solid #ddd }}
img {{ max-width: 100% }}
</style>
<h1>Compressed experts against the uncompressed model</h1>
<p>{html.escape(str(document["checkpoint"]))}: {document["models"][0]["num_target_tokens"]:,}
validation target tokens, {document["num_calibration_examples"]:,} calibration examples.</p>
<table><tr>{head}</tr>{body}</table>
<ul>{units}</ul>
<img alt="KL against bits, error and zeros per layer" src="data:image/png;base64,{image}">
<h2>Filled blanks</h2>{samples}
"""
    with atomic_file.open_atomically(path) as file:
        file.write(page.encode())


def _plots(document: dict[str, Any]) -> bytes:
    """Loss against bits, relative layer error and zeros per kernel, as PNG."""
    compressed = [row for row in document["models"] if "compression" in row]
    figure = Figure(figsize=(15, 4.5), layout="constrained")
    divergence, error, zeros = figure.subplots(1, 3)

    for index, row in enumerate(compressed):
        divergence.errorbar(
            row["bits_per_weight"],
            row["kl"],
            yerr=row["kl_standard_error"],
            fmt="s" if row["name"].startswith("lattice") else "o",
            capsize=3,
            color=f"C{index}",
            label=row["name"],
        )
    divergence.set(xlabel="stored bits per expert weight", yscale="log")
    divergence.set(ylabel="KL from the uncompressed model (nats per target token)")
    divergence.set_title("Predictions against size, bars: standard error")
    divergence.legend()

    names = [kernel["name"] for kernel in compressed[0]["compression"]["kernels"]]
    labels = [name.replace("/layers_", " ").replace("/mlp/expert/", "\n") for name in names]
    for index, row in enumerate(compressed):
        kernels = row["compression"]["kernels"]
        apart = 0.8 / len(compressed)
        places = [i + (index - (len(compressed) - 1) / 2) * apart for i in range(len(names))]
        style = {"width": 0.9 * apart, "color": f"C{index}", "label": row["name"]}
        error.bar(places, [k["relative_layer_error"] or 0.0 for k in kernels], **style)
        zeros.bar(places, [k["zeros"] for k in kernels], **style)
    error.set(ylabel="|(W - Q) X|² / |W X|²", title="Layer error on calibration tokens")
    zeros.set(ylabel="share of zero weights", title="Zeros")
    for axes in (error, zeros):
        axes.set_xticks(range(len(names)), labels)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()
