"""What there is to run on, and the largest batch of experts that fits it."""

import dataclasses
from collections.abc import Mapping

from qmoe_jax.planning import memory as plan_memory
from qmoe_jax.planning.inputs import ModelFacts, TokenFacts
from qmoe_jax.planning.public_checkpoints import Device
from qmoe_jax.quantization.settings import CompressionSettings


@dataclasses.dataclass(frozen=True)
class Resources:
    """What there is to run on; None where it is unknown and so not checked.

    Attributes:
      device: where programs run.
      device_bytes: device memory that JAX may use; ignored where that is host memory.
      host_bytes: free host memory.
      output_disk_bytes: free space where the output goes.
      buffer_disk_bytes: free space in the folder of the buffers, where there is one.
      same_disk: whether those two are one file system.
      buffers_on_disk: hidden states are memory-mapped (`buffer_dir`).
      journal: the output is local, so that finished expert batches are kept until it is whole.
      read_bytes_per_second: from the checkpoint.
      write_bytes_per_second: to the output.
    """

    device: Device
    device_bytes: int | None = None
    host_bytes: int | None = None
    output_disk_bytes: int | None = None
    buffer_disk_bytes: int | None = None
    same_disk: bool = True
    buffers_on_disk: bool = False
    journal: bool = True
    read_bytes_per_second: float = 1e9
    write_bytes_per_second: float = 1e9


def host_memory(
    model: ModelFacts,
    tokens: TokenFacts,
    settings: CompressionSettings,
    resources: Resources,
    zeros: Mapping[str, float],
) -> dict[str, int]:
    """Parts of the host's peak, hidden states in memory or not."""
    return plan_memory.host_memory(
        model, tokens, settings, zeros=zeros, buffers_on_disk=resources.buffers_on_disk
    )


def fits_memory(
    model: ModelFacts,
    tokens: TokenFacts,
    settings: CompressionSettings,
    resources: Resources,
    zeros: Mapping[str, float],
) -> bool:
    """Whether device and host have the memory, as far as it is known."""
    on_cpu = resources.device.is_host
    on_device = plan_memory.peak(plan_memory.device_memory(model, tokens, settings, on_cpu=on_cpu))[
        1
    ]
    on_host = sum(host_memory(model, tokens, settings, resources, zeros).values())
    if on_cpu:
        on_host += on_device
    elif resources.device_bytes is not None and on_device > resources.device_bytes:
        return False
    return resources.host_bytes is None or on_host <= resources.host_bytes


def largest_expert_batch(
    model: ModelFacts,
    tokens: TokenFacts,
    settings: CompressionSettings,
    resources: Resources,
    zeros: Mapping[str, float],
) -> int:
    """Return how many experts of a layer, up to all, fit as a batch; 0 where not even one does."""

    def fits(batch: int) -> bool:
        changed = dataclasses.replace(settings, expert_batch=batch)
        return fits_memory(model, tokens, changed, resources, zeros)

    # Memory only grows with the batch: bisect between a size that fits and one that does not.
    low, high = 0, model.config.num_experts + 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def format_bytes(num_bytes: int) -> str:
    """`1.46 GB`, in powers of ten."""
    size, unit = float(num_bytes), "B"
    for larger in ("kB", "MB", "GB", "TB"):
        if size < 1000:
            break
        size, unit = size / 1000, larger
    return f"{size:.4g} {unit}"
