"""The processes of a run (`jax.distributed`): who owns what, and what they tell one another.

Every method that communicates is called by all processes, in the same order. With one process
nothing is communicated and nothing is copied.
"""

import functools
import json
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Float, Shaped

from qmoe_jax.pipeline import schedule

_AXIS = "processes"


class Processes:
    """All processes of the JAX runtime.

    Attributes:
      index: number of this one.
      count: how many there are.
    """

    def __init__(self) -> None:
        self.index = jax.process_index()
        self.count = jax.process_count()

    @property
    def is_primary(self) -> bool:
        """Whether this process writes what is written once."""
        return self.index == 0

    def share(self, total: int, index: int | None = None) -> range:
        """Return the contiguous part of 0 to total - 1 that a process owns; this one where None."""
        return schedule.share(total, self.index if index is None else index, self.count)

    def barrier(self, name: str) -> None:
        """Wait until all processes have come to it."""
        if self.count > 1:
            multihost_utils.sync_global_devices(name)

    def gather_json(self, value: Any) -> list[Any]:
        """Return what each process has to say, in their order; JSON values."""
        if self.count == 1:
            return [value]
        content = np.frombuffer(json.dumps(value).encode(), np.uint8)
        return [json.loads(part.tobytes()) for part in self.gather(content)]

    def gather(self, array: Shaped[np.ndarray, "rows *rest"]) -> list[np.ndarray]:
        """Gather the arrays of all processes, in order; they differ in the first axis at most."""
        if self.count == 1:
            return [array]
        # As bytes: JAX would turn 64-bit numbers into 32-bit ones.
        flat = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        lengths = multihost_utils.process_allgather(np.array([flat.size], np.uint32))
        lengths = np.asarray(lengths).reshape(-1)
        padded = np.zeros(_round_up(int(lengths.max())), np.uint8)
        padded[: flat.size] = flat
        gathered = np.asarray(multihost_utils.process_allgather(padded)).reshape(self.count, -1)
        shape = (-1, *array.shape[1:])
        return [
            part[:length].view(array.dtype).reshape(shape)
            for part, length in zip(gathered, lengths.tolist(), strict=True)
        ]

    def exchange(
        self, parts: Sequence[Float[np.ndarray, "_ dim"]], capacity: int
    ) -> Float[np.ndarray, "processes capacity dim"]:
        """Send parts[p] to process p; return what each process has sent here.

        Args:
          parts: float32, at most `capacity` rows each.
          capacity: the same in all processes; few different values, since each is compiled.

        Returns:
          By sender, padded with zeros.
        """
        dim = parts[0].shape[1]
        send = np.zeros((1, self.count, capacity, dim), np.float32)
        for process, part in enumerate(parts):
            send[0, process, : len(part)] = part
        if self.count == 1:
            return send[0]
        mesh = _process_mesh()
        sharding = NamedSharding(mesh, PartitionSpec(_AXIS))
        whole = jax.make_array_from_process_local_data(
            sharding, send, (self.count, *send.shape[1:])
        )
        received = _all_to_all(mesh)(whole)
        return np.asarray(received.addressable_shards[0].data)[0]


def round_up_capacity(rows: int) -> int:
    """Return a capacity for `exchange` from few possible ones."""
    return _round_up(rows)


def _round_up(size: int) -> int:
    """Return the next power of two, at least 64."""
    return max(64, 1 << max(size - 1, 0).bit_length())


@functools.cache
def _process_mesh() -> Mesh:
    """Return the first device of each process."""
    first: dict[int, Any] = {}
    for device in jax.devices():
        first.setdefault(device.process_index, device)
    return Mesh(np.array([first[index] for index in sorted(first)]), (_AXIS,))


@functools.cache
def _all_to_all(mesh: Mesh) -> Any:
    def local(x: jax.Array) -> jax.Array:
        return jax.lax.all_to_all(x, _AXIS, split_axis=1, concat_axis=1, tiled=True)

    spec = PartitionSpec(_AXIS)
    return jax.jit(jax.shard_map(local, mesh=mesh, in_specs=spec, out_specs=spec))
