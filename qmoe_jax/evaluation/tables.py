"""Evaluations as text tables for a terminal."""

from collections.abc import Mapping, Sequence
from typing import Any

from qmoe_jax.formatting import format_bytes, format_table

_LOSS_COLUMNS = (("loss", "loss", "{:.4f}"),)
_GAP_COLUMNS = (("gap", "gap", "{:+.4f}"), ("+-", "gap_standard_error", "{:.4f}"))
_REFERENCE_COLUMNS = (
    ("KL", "kl", "{:.5f}"),
    ("+-", "kl_standard_error", "{:.5f}"),
    ("agreement", "agreement", "{:.2%}"),
    ("gap", "gap", "{:+.4f}"),
    ("+-", "gap_standard_error", "{:.4f}"),
)
_KL_COLUMNS = (("KL", "kl", "{:.5f}"),)
_MODEL_COLUMNS = (
    ("accuracy", "accuracy", "{:.2%}"),
    ("size", "size", "{}"),
    ("bits/weight", "bits_per_weight", "{:.3f}"),
    ("tokens/s", "target_tokens_per_second", "{:,.0f}"),
)
_ROUTER_COLUMNS = (
    ("tokens", "num_tokens", "{:,}"),
    ("dropped", "dropped_fraction", "{:.2%}"),
    ("max load", "max_load", "{:.2f}x"),
    ("unused", "unused_experts", "{:.1%}"),
    ("confidence", "confidence", "{:.3f}"),
    ("aux loss", "auxiliary_loss", "{:.3f}"),
    ("z loss", "router_z_loss", "{:.2f}"),
)


def summary(document: Mapping[str, Any], *, routers: bool = True) -> str:
    """Return what `evaluate` returns, as tables: the checkpoints, then the routers of each.

    Args:
      document: of `evaluate`.
      routers: whether to show the tables of routers.
    """
    models = document["models"]
    lines = [heading(document), "", format_table(model_rows(document))]
    if models[0]["reference"] is not None:
        path = document["settings"]["reference"]["path"]
        rows = [(model["name"], model["reference"]) for model in models]
        lines += ["", format_table(_rows(f"against {path}", rows, _REFERENCE_COLUMNS))]
    for model in models if routers else ():
        lines += ["", format_table(router_rows(model))]
    lines += [f"\nwarning: {m['name']}: {text}" for m in models for text in m.get("warnings", ())]
    return "\n".join(lines)


def heading(document: Mapping[str, Any]) -> str:
    """Say in a line what was evaluated, and how."""
    first, settings = document["models"][0], document["settings"]
    factor = settings["expert_capacity_factor"]
    routing = "dropless" if factor is None else f"capacity factor {factor:g}"
    return (
        f"{first['num_target_tokens']:,} target tokens of {first['num_examples']:,} examples, "
        f"{routing}, {settings['activation_dtype']}"
    )


def model_rows(document: Mapping[str, Any]) -> list[list[str]]:
    """Return the table of the checkpoints, headings first."""
    models = document["models"]
    compared = models[0]["reference"] is not None
    columns = (
        _LOSS_COLUMNS
        + (_GAP_COLUMNS if len(models) > 1 else ())
        + (_KL_COLUMNS if compared else ())
        + _MODEL_COLUMNS
    )
    rows = []
    for model in models:
        size = model.get("num_bytes")
        told = {"size": None if size is None else format_bytes(size)}
        told["kl"] = model["reference"]["kl"] if compared else None
        rows.append((model["name"], {**model, **told}))
    return _rows("checkpoint", rows, columns)


def router_rows(model: Mapping[str, Any]) -> list[list[str]]:
    """Return the table of a checkpoint's routers, headings first."""
    rows = [*model["router"]["layers"].items(), ("total", model["router"]["total"])]
    return _rows(f"routers of {model['name']}", rows, _ROUTER_COLUMNS)


def _rows(
    title: str,
    rows: Sequence[tuple[str, Mapping[str, Any]]],
    columns: Sequence[tuple[str, str, str]],
) -> list[list[str]]:
    cells = [[title, *(heading for heading, _, _ in columns)]]
    for name, values in rows:
        cells.append([name])
        for _, key, form in columns:
            value = values[key]
            cells[-1].append("-" if value is None else form.format(value))
    return cells
