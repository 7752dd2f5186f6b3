"""What a result was measured on."""

import os
import platform

import jax
import numpy as np


def machine_facts() -> dict[str, str | int | None]:
    """Of this process's first device, for a result's JSON."""
    device = jax.devices()[0]
    return {
        "device": f"{device.platform} {device.device_kind}",
        "num_cpus": os.cpu_count(),
        "machine": platform.machine(),
        "jax": jax.__version__,
        "numpy": np.__version__,
    }
