"""Facts in `configs/`: the public checkpoints, and devices to plan for."""

import dataclasses
import difflib
import functools
import json
from typing import Any

from qmoe_jax import resources
from qmoe_jax.config import SwitchConfig
from qmoe_jax.errors import CheckpointError

CONFIGS = resources.configs()


@dataclasses.dataclass(frozen=True)
class PublicCheckpoint:
    """A public Switch checkpoint.

    Attributes:
      name: `switch_base_128`, or the Hub's `google/switch-base-128`.
      location: its folder on gs://.
      gin: its model file in `gin/`.
      config: geometry and routing.
    """

    name: str
    location: str
    gin: str
    config: SwitchConfig


@dataclasses.dataclass(frozen=True)
class Device:
    """What a time estimate and a memory check need of a device.

    Attributes:
      name: `h100`.
      label: what it is.
      memory_bytes: of its own; None where that is the host's (CPU).
      bytes_per_second: memory bandwidth.
      float32_flops: float32 operations a second in matrix products of full precision.
      bfloat16_flops: the same in bfloat16.
      link_bytes_per_second: between host and device, one way; None where they are one.
      column_seconds: of one step of GPTQ's column loop, whatever its width; 0 where it keeps up
        with the products.
      coded_weights_per_second: weights, zeros too, that are multiplied straight from stored codes a
        second, for a token an expert; None where that is not known.
      compute_capability: of an NVIDIA GPU, "9.0"; None of what runs no CUDA kernels.
      source: where the figures are from, and which of them were measured.
    """

    name: str
    label: str
    memory_bytes: int | None
    bytes_per_second: float
    float32_flops: float
    bfloat16_flops: float
    link_bytes_per_second: float | None
    column_seconds: float
    source: str
    coded_weights_per_second: float | None = None
    compute_capability: str | None = None

    @property
    def is_host(self) -> bool:
        """Whether device memory is host memory."""
        return self.memory_bytes is None


@functools.cache
def public_checkpoints() -> dict[str, PublicCheckpoint]:
    """Return the nine public Switch checkpoints by name, in the registry's order.

    Raises:
      CheckpointError: `configs/public_checkpoints.json` is missing.
    """
    return {
        entry["name"]: PublicCheckpoint(
            entry["name"], entry["location"], entry["gin"], SwitchConfig.from_json(entry["config"])
        )
        for entry in _read("public_checkpoints.json")["checkpoints"]
    }


def is_public_name(name: str) -> bool:
    """Whether a public checkpoint is called so, here or on the Hugging Face Hub."""
    return _own_name(name) in public_checkpoints()


def _own_name(name: str) -> str:
    return name.removeprefix("google/").replace("-", "_")


def public_checkpoint(name: str) -> PublicCheckpoint:
    """Return a public checkpoint.

    Args:
      name: `switch_base_128`.

    Raises:
      CheckpointError: there is none of that name; the message lists the nearest.
    """
    known = public_checkpoints()
    if not is_public_name(name):
        near = difflib.get_close_matches(_own_name(name), known, n=3) or list(known)
        raise CheckpointError(
            f"{name!r} is neither a folder nor a public checkpoint; did you mean "
            f"{' or '.join(near)}? --list prints all {len(known)}."
        )
    return known[_own_name(name)]


@functools.cache
def devices() -> dict[str, Device]:
    """Return devices by name; peaks of data sheets times the share that is assumed of them.

    Raises:
      CheckpointError: `configs/devices.json` is missing.
    """
    facts = _read("devices.json")
    shares = facts["assumed_share_of_data_sheet"]
    found = {}
    for entry in facts["devices"]:
        fields = {key: value for key, value in entry.items() if key != "measured"}
        if not entry["measured"]:
            for key, share in shares.items():
                if fields[key] is not None:
                    fields[key] = float(share * fields[key])
        found[entry["name"]] = Device(**fields)
    return found


def _read(name: str) -> Any:
    path = CONFIGS / name
    try:
        return json.loads(path.read_text("utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{path} is missing: it comes with the package and with a checkout; install "
            "qmoe-jax again"
        ) from error
