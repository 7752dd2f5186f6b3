"""Sizes of kernel launches, by device: `configs/kernel_launch.json`, else the defaults here.

`benchmarks/tune_kernels.py` writes the file. It has an object a device, by its name ("NVIDIA H100
80GB HBM3"), by its compute capability ("compute capability 9.0"), or "default": the first that is
there counts. Each has an object a coding, with the fields of `LaunchSettings`; what it leaves out
is as here.
"""

import dataclasses
import functools
import json
from pathlib import Path
from typing import Any

from qmoe_jax import resources
from qmoe_jax.atomic_file import write_json
from qmoe_jax.codec.codings import coding_names, get_coding


@dataclasses.dataclass(frozen=True)
class Launch:
    """How rows are spread.

    Attributes:
      threads: threads of a block: a multiple of 32, at most 256.
      rows_per_block: rows of codes that a block takes.
      rows_per_warp: rows that a warp takes at a time, 1 or 4, in products of codings that leave the
        choice (`CudaInterface.rows_per_warp`).
    """

    threads: int
    rows_per_block: int
    rows_per_warp: int = 1

    def __post_init__(self) -> None:
        right = (
            self.threads in range(32, 257, 32)
            and self.rows_per_block >= 1
            and self.rows_per_warp in (1, 4)
        )
        if not right:
            raise ValueError(
                f"{self}: threads must be a multiple of 32 up to 256, rows_per_block at least 1, "
                f"rows_per_warp 1 or 4. Run benchmarks/tune_kernels.py anew, or mend "
                f"{settings_path()}."
            )


@dataclasses.dataclass(frozen=True)
class LaunchSettings:
    """What a coding's launches are like on a device. The defaults are those tuned for an H200
    with "tunstall", but for `few_tokens`, `fused_tokens`: estimates.

    Attributes:
      few: products of at most `few_tokens` tokens: few blocks, so little work for each.
      many: products of more tokens.
      few_tokens: see `few`.
      expand: expansion to dense kernels.
      fused_tokens_per_expert: with more tokens than that for each expert of the layer, on average,
        experts are expanded and multiplied by XLA; where no tensor cores do the product.
      matmul_tokens_per_expert: with at least that many tokens for each expert, on average, tensor
        cores do the product, where they can (`kernels.has_matmul`). Where no settings are written
        the coding says how many (`default_settings`).
      matmul_most_per_expert: what `fused_tokens_per_expert` is there.
      fused_tokens: the same with more tokens in all, whose hidden layer is in memory at once.
      fragment_blocks: products with fragments have as few warps share rows as make that many
        blocks; with tiles of 32 tokens half as many, with 64 a quarter. An estimate.
      fragment_warps: warps of a block of these products at most: 1, 2, 4 or 8. An estimate.
    """

    few: Launch = Launch(256, 8, 1)
    many: Launch = Launch(256, 128, 4)
    few_tokens: int = 16
    expand: Launch = Launch(128, 8)
    fused_tokens_per_expert: int = 16
    matmul_tokens_per_expert: int = 16
    matmul_most_per_expert: int = 64
    fused_tokens: int = 8192
    fragment_blocks: int = 1024
    fragment_warps: int = 8

    def __post_init__(self) -> None:
        if self.fragment_blocks < 1 or self.fragment_warps not in (1, 2, 4, 8):
            raise ValueError(
                f"fragment_blocks is {self.fragment_blocks} and fragment_warps "
                f"{self.fragment_warps}; they must be at least 1, and 1, 2, 4 or 8. Run "
                f"benchmarks/tune_kernels.py anew, or mend {settings_path()}."
            )


def settings_path() -> Path:
    """Path of the file, whether it exists or not."""
    return resources.configs() / "kernel_launch.json"


def launch_settings(device_name: str, compute_capability: str, coding: str) -> LaunchSettings:
    """Return settings of a coding on a device.

    Args:
      device_name: as the driver names it.
      compute_capability: "9.0".
      coding: "tunstall" and so on.

    Raises:
      ValueError: the file is damaged.
    """
    devices = _read(settings_path())
    for key in (device_name, f"compute capability {compute_capability}", "default"):
        if key in devices:
            return devices[key].get(coding, default_settings(coding))
    return default_settings(coding)


def default_settings(coding: str) -> LaunchSettings:
    """Return a coding's settings where none are written."""
    interface = get_coding(coding).cuda
    matmul = interface.matmul if interface else None
    if matmul is None:
        return LaunchSettings()
    return LaunchSettings(matmul_tokens_per_expert=matmul.tokens_per_expert)


@functools.cache
def _read(path: Path) -> dict[str, dict[str, LaunchSettings]]:
    if not path.exists():
        return {}
    try:
        content = json.loads(path.read_text())
        return {
            device: {coding: settings_from_json(fields) for coding, fields in codings.items()}
            for device, codings in content["devices"].items()
        }
    except (TypeError, KeyError, AttributeError, ValueError) as error:
        raise ValueError(f"{path} is not as it should be: {error!r}") from error


def settings_from_json(fields: dict[str, Any]) -> LaunchSettings:
    """Return settings of a coding from the file's object.

    Raises:
      TypeError: an unknown field.
      ValueError: a value out of range.
    """
    launches = {"few", "many", "expand"}
    values: dict[str, Any] = {
        name: Launch(**value) if name in launches else value for name, value in fields.items()
    }
    return LaunchSettings(**values)


def write_settings(
    device_name: str, settings: dict[str, LaunchSettings], path: Path | None = None
) -> None:
    """Set a device's object in the file, whole or not at all.

    Args:
      device_name: as the driver names it.
      settings: by coding.
      path: the file; `settings_path` where None.
    """
    path = path or settings_path()
    with_kernels = [name for name in coding_names() if get_coding(name).cuda]
    if unknown := set(settings) - set(with_kernels):
        raise ValueError(f"settings for {sorted(unknown)}; codings are {', '.join(with_kernels)}.")
    content = json.loads(path.read_text()) if path.exists() else {"devices": {}}
    content["devices"][device_name] = {
        coding: dataclasses.asdict(chosen) for coding, chosen in settings.items()
    }
    write_json(path, content, indent=2, sort_keys=True)
    _read.cache_clear()
