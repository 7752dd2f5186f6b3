"""An evaluation as one HTML page: its tables, and losses against sizes."""

import html
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qmoe_jax import page, plots
from qmoe_jax.evaluation.tables import heading, model_rows, router_rows

PAGE = "report.html"
_KIND = "evaluation report"
# KL of a model from itself, in float32: 1e-11 to 1e-8.
_ROUNDING = 1e-7


def is_evaluation_page(file: Path) -> bool:
    """Whether a file is what `html_page` returns."""
    return page.is_page(file, _KIND)


def html_page(document: Mapping[str, Any]) -> str:
    """Return what `evaluate` returns as a page that needs nothing else.

    Args:
      document: of `evaluate`.
    """
    models = document["models"]
    parts = [f"<p>{html.escape(heading(document))}</p>", page.html_table(model_rows(document))]
    parts += [
        page.warning(f"{model['name']}: {text}")
        for model in models
        for text in model.get("warnings", ())
    ]
    if len(models) > 1:
        parts.append(_plot(models) if plots.can_plot() else f"<p>{html.escape(plots.MISSING)}</p>")
    parts.append("<h2>Routers</h2>")
    parts += [page.html_table(router_rows(model)) for model in models]
    return page.page(_KIND, "Evaluation", parts)


def _plot(models: list[dict[str, Any]]) -> str:
    """Loss above the first model against size; beside it KL, where a reference was given."""
    points = [
        {
            "name": model["name"],
            "size": model["num_bytes"] / 1e6,
            "gap": model["gap"],
            "gap_error": model["gap_standard_error"],
            **{key: (model["reference"] or {}).get(key) for key in ("kl", "kl_standard_error")},
        }
        for model in models
    ]
    # The reference itself is at 0 but for rounding, and a logarithmic axis would show that alone.
    far = [point for point in points if (point["kl"] or 0.0) > _ROUNDING]
    with plots.style():
        figure, (gap, *others) = plots.new_figure(2 if far else 1)
        plots.against_size(gap, points, "gap", "gap_error")
        gap.set(
            title="Loss against size, bars: paired standard error",
            xlabel="stored parameters (MB)",
            ylabel=f"nats per target token above {models[0]['name']}",
        )
        for axes in others:
            plots.against_size(axes, far, "kl", "kl_standard_error")
            axes.set(
                title="KL against size, bars: standard error",
                xlabel="stored parameters (MB)",
                ylabel="nats per target token from the reference",
                yscale="log",
            )
        return plots.to_svg(figure, "loss and KL of each checkpoint against its size")
