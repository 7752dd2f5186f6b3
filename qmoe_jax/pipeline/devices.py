"""The devices of this process: experts and samples are spread over them along one mesh axis."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from qmoe_jax.ops.local_devices import local_devices

AXIS = "devices"


@dataclasses.dataclass(frozen=True)
class Devices:
    """Some of the local devices.

    Attributes:
      mesh: over the axis `AXIS`.
    """

    mesh: Mesh

    @classmethod
    def local(cls, num_devices: int | None = 1) -> "Devices":
        """Return the first so many devices of this process; all where None.

        Raises:
          ValueError: there are not so many.
        """
        return cls(Mesh(np.array(local_devices(num_devices)), (AXIS,)))

    def __len__(self) -> int:
        return self.mesh.size

    def rounded_up(self, size: int) -> int:
        """Round up to a multiple of the number of devices."""
        return -(-size // len(self)) * len(self)

    def spread(self, array: Any) -> jax.Array:
        """Put an array on the devices, its first axis divided among them.

        That axis is a multiple of their number.
        """
        if len(self) == 1:
            return jnp.asarray(array)
        return jax.device_put(array, NamedSharding(self.mesh, PartitionSpec(AXIS)))

    def replicate(self, tree: Any) -> Any:
        """Put every array of a tree on every device, whole."""
        if len(self) == 1:
            return jax.tree.map(jnp.asarray, tree)
        return jax.device_put(tree, NamedSharding(self.mesh, PartitionSpec()))
