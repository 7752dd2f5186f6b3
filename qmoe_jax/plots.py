"""The one style of this project's plots, and figures as SVG that stands inside a page.

matplotlib is imported when a figure is made, and is needed for nothing else.
"""

import html
import importlib.util
import io
import re
from collections.abc import Sequence
from typing import Any

# Of Okabe and Ito, told apart by the colour-blind too.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#444444")
STYLE = {
    "font.size": 9.0,
    "axes.titlesize": 10.0,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "lines.linewidth": 1.4,
    "lines.markersize": 5.0,
    "errorbar.capsize": 3.0,
    "svg.fonttype": "none",  # letters stay letters
    "svg.hashsalt": "qmoe_jax",  # equal figures are equal files
}
MISSING = "Plots are left out: matplotlib is not installed. pip install 'qmoe-jax[plots]'"
_MOST_LABELS = 24


def can_plot() -> bool:
    """Whether matplotlib is installed."""
    return importlib.util.find_spec("matplotlib") is not None


def style() -> Any:
    """Return a context in which figures are made and drawn on: matplotlib asks for it at each."""
    import matplotlib
    from cycler import cycler

    settings: Any = STYLE | {"axes.prop_cycle": cycler(color=COLOURS)}
    return matplotlib.rc_context(settings)


def new_figure(columns: int, *, width: float = 5.2, height: float = 3.4) -> tuple[Any, list[Any]]:
    """Make a figure of axes side by side, inside `style`; return it and the axes.

    Args:
      columns: number of axes.
      width: of each, in inches.
      height: in inches.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(columns * width, height), layout="constrained")
    return figure, list(figure.subplots(1, columns, squeeze=False)[0])


def to_svg(figure: Any, description: str) -> str:
    """Return a figure as an `<svg>` element that is as wide as the page allows.

    Args:
      figure: of `new_figure`.
      description: what it shows, for those who do not see it.
    """
    buffer = io.StringIO()
    with style():
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    label = html.escape(description, quote=True)
    return re.sub(r"^<svg ", f'<svg role="img" aria-label="{label}" ', svg)


def name_bars(axes: Any, labels: Sequence[str]) -> None:
    """Name bars at 0, 1, 2, ...; of many only some, so that names do not overlap."""
    every = -(-len(labels) // _MOST_LABELS)
    places = range(0, len(labels), every)
    upright = len(labels) > 6
    axes.set_xticks(
        list(places),
        [labels[i] for i in places],
        rotation=90 if upright else 0,
        fontsize=7 if upright else 8,
    )
    axes.grid(False, axis="x")


def against_size(axes: Any, models: Sequence[dict[str, Any]], value: str, error: str) -> None:
    """Draw a figure of several models against their sizes, with bars of its standard error.

    Args:
      axes: to draw on; labels of the axes are the caller's.
      models: a dict each of `name`, `size` and the two below.
      value: key of what is drawn.
      error: key of its standard error.
    """
    for index, model in enumerate(models):
        axes.errorbar(
            model["size"],
            model[value],
            yerr=model[error],
            fmt="s" if model["name"].startswith("lattice") else "o",
            color=COLOURS[index % len(COLOURS)],
            label=model["name"],
        )
    sizes = [model["size"] for model in models]
    if max(sizes) > 4 * min(sizes) > 0:
        axes.set_xscale("log")
    axes.legend()


def kernel_label(name: str) -> str:
    """Short name of an expert kernel: `enc 1 wi` of `encoder/layers_1/mlp/expert/wi`."""
    stack, layer, *_, kernel = name.split("/")
    return f"{stack[:3]} {layer.removeprefix('layers_')} {kernel}"
