"""Evaluations as text tables for a terminal."""

from collections.abc import Mapping, Sequence
from typing import Any

from qmoe_jax.formatting import format_table

_LOSS_COLUMNS = (("loss", "loss", "{:.4f}"),)
_GAP_COLUMNS = (("gap", "gap", "{:+.4f}"), ("+-", "gap_standard_error", "{:.4f}"))
_REFERENCE_COLUMNS = (
    ("KL", "kl", "{:.5f}"),
    ("+-", "kl_standard_error", "{:.5f}"),
    ("agreement", "agreement", "{:.2%}"),
    ("gap", "gap", "{:+.4f}"),
    ("+-", "gap_standard_error", "{:.4f}"),
)
_MODEL_COLUMNS = (
    ("accuracy", "accuracy", "{:.2%}"),
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


def summary(document: Mapping[str, Any]) -> str:
    """Return what `evaluate` returns, as tables: the checkpoints, then the routers of each."""
    models = document["models"]
    factor = document["settings"]["expert_capacity_factor"]
    routing = "dropless" if factor is None else f"capacity factor {factor:g}"
    first = models[0]
    columns = _LOSS_COLUMNS + (_GAP_COLUMNS if len(models) > 1 else ()) + _MODEL_COLUMNS
    lines = [
        f"{first['num_target_tokens']:,} target tokens of {first['num_examples']:,} examples, "
        f"{routing}, {document['settings']['activation_dtype']}",
        "",
        _table("checkpoint", [(model["name"], model) for model in models], columns),
    ]
    if first["reference"] is not None:
        path = document["settings"]["reference"]["path"]
        rows = [(model["name"], model["reference"]) for model in models]
        lines += ["", _table(f"against {path}", rows, _REFERENCE_COLUMNS)]
    for model in models:
        rows = [*model["router"]["layers"].items(), ("total", model["router"]["total"])]
        lines += ["", _table(f"routers of {model['name']}", rows, _ROUTER_COLUMNS)]
    lines += [f"\nwarning: {m['name']}: {text}" for m in models for text in m.get("warnings", ())]
    return "\n".join(lines)


def _table(
    title: str,
    rows: Sequence[tuple[str, Mapping[str, Any]]],
    columns: Sequence[tuple[str, str, str]],
) -> str:
    cells = [[title, *(heading for heading, _, _ in columns)]]
    for name, values in rows:
        cells.append([name])
        for _, key, form in columns:
            value = values[key]
            cells[-1].append("-" if value is None else form.format(value))
    return format_table(cells)
