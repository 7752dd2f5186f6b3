"""Which devices of this process a computation is spread over."""

import jax


def local_devices(num_devices: int | None) -> list[jax.Device]:
    """Return the first so many devices of this process; all where None.

    Raises:
      ValueError: there are not so many.
    """
    available = jax.local_devices()
    count = len(available) if num_devices is None else num_devices
    if not 1 <= count <= len(available):
        raise ValueError(
            f"num_devices is {num_devices}; this process has {len(available)} "
            f"({available[0].platform}), so give 1 to {len(available)}"
        )
    return available[:count]
