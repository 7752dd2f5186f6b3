"""Metrics as TensorBoard events, so that a folder of evaluations is compared in TensorBoard."""

import importlib.util
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

_SUFFIX = ".qmoe_jax"
_LEFT_OUT = ("name", "checkpoint")


def check_tensorboard(wanted: bool | None) -> bool:
    """Whether to write events; None means where tensorboardX is installed.

    Raises:
      ValueError: they are wanted and tensorboardX is not installed.
    """
    installed = importlib.util.find_spec("tensorboardX") is not None
    if wanted and not installed:
        raise ValueError(
            "tensorboard=True needs tensorboardX: pip install 'qmoe-jax[tensorboard]', or pass "
            "tensorboard=False"
        )
    return installed if wanted is None else wanted


def write_tensorboard(
    folder: str | os.PathLike[str], metrics: Mapping[str, Any], *, step: int
) -> None:
    """Write the numbers of a nested mapping as scalars, `router/total/max_load`, at one step.

    Events that an earlier run of the same evaluation left in the folder are replaced; ours have
    a name of their own, so that no others are.
    """
    write_tensorboard_steps(folder, [{**metrics, "step": step}])


def write_tensorboard_steps(
    folder: str | os.PathLike[str], lines: Iterable[Mapping[str, Any]]
) -> None:
    """Write nested mappings as `write_tensorboard` does, each at its own `step`."""
    from tensorboardX import SummaryWriter  # imports PyTorch where there is one: slow

    for path in Path(folder).glob(f"events.out.tfevents.*{_SUFFIX}"):
        path.unlink()
    writer = SummaryWriter(os.fspath(folder), filename_suffix=_SUFFIX)
    try:
        for line in lines:
            metrics = {name: value for name, value in line.items() if name != "step"}
            for name, value in scalars(metrics):
                writer.add_scalar(name, value, line["step"])
    finally:
        writer.close()


def scalars(metrics: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """Return the numbers of a nested mapping under their '/'-joined names."""
    for name, value in metrics.items():
        if name in _LEFT_OUT:
            continue
        if isinstance(value, Mapping):
            yield from scalars(value, f"{prefix}{name}/")
        elif isinstance(value, int | float):
            yield prefix + name, float(value)
