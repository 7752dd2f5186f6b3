"""Reads expert kernels batch by batch, one batch ahead of the work."""

import math
import time
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
from jaxtyping import Float

from qmoe_jax.checkpoints import names
from qmoe_jax.checkpoints.t5x import T5XCheckpoint
from qmoe_jax.config import SwitchConfig
from qmoe_jax.pipeline.schedule import BatchKey

Kernels = dict[str, Float[np.ndarray, "experts in out"]]


MAX_CACHE_BYTES = 512 * 2**20


def cache_bytes(source: T5XCheckpoint, config: SwitchConfig, step: int) -> int:
    """How much memory for decoded chunks saves reading any chunk of expert kernels twice.

    None, where batches of experts end where chunks end; else the chunks of a layer's kernels that
    hold one expert, unless that is over `MAX_CACHE_BYTES`.

    Args:
      source: the native checkpoint.
      config: its geometry.
      step: experts of a batch.
    """
    largest = 0
    for stack, layer in config.sparse_layers:
        needed = 0
        for kernel in (*config.wi_names, "wo"):
            name = names.expert_kernel(stack, layer, kernel)
            chunk, shape = source.chunk_shape(name), source.shapes[name]
            if step % chunk[0] and chunk[0] > 1:
                covered = [-(-n // c) * c for n, c in zip(shape[1:], chunk[1:], strict=True)]
                needed += chunk[0] * math.prod(covered) * source.dtypes[name].itemsize
        largest = max(largest, needed)
    return largest if largest <= MAX_CACHE_BYTES else 0


class KernelReader:
    """The kernels of the batches that a run computes, in the order of its schedule.

    A context manager: inside, a thread reads the next batch while the device works on one, across
    layers too. At most two batches are held.

    Attributes:
      num_bytes: bytes of kernels read so far, as they are stored.
      seconds: time that reading them took, in the thread.
    """

    def __init__(
        self, source: T5XCheckpoint, kernel_names: tuple[str, ...], reads: Iterable[BatchKey]
    ):
        """Note what will be read; nothing is yet.

        Args:
          source: the native checkpoint.
          kernel_names: `wi` or `wi_0` and `wi_1`, and `wo`.
          reads: all batches that `take` will be asked for, in order (`schedule.kernel_reads`).
        """
        self._source = source
        self._kernel_names = kernel_names
        self._reads = iter(reads)
        self._thread: ThreadPoolExecutor | None = None
        self._next: tuple[BatchKey, Future[Kernels]] | None = None
        self.num_bytes = 0
        self.seconds = 0.0

    def __enter__(self) -> "KernelReader":
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="kernel_reader")
        self._read_ahead()
        return self

    def __exit__(self, *exception: object) -> None:
        assert self._thread is not None
        self._thread.shutdown(wait=True, cancel_futures=True)

    def take(self, key: BatchKey) -> Kernels:
        """Return the kernels of the next batch, float32 by name; begin to read the one after.

        Raises:
          CheckpointError: they are damaged or unreachable.
          ValueError: `key` is not the next of the schedule.
        """
        if self._next is None or self._next[0] != key:
            expected = None if self._next is None else self._next[0]
            raise ValueError(f"{key} was asked for, but the schedule's next read is {expected}")
        kernels = self._next[1].result()
        self._read_ahead()
        return kernels

    def _read_ahead(self) -> None:
        assert self._thread is not None
        key = next(self._reads, None)
        self._next = None if key is None else (key, self._thread.submit(self._read, key))

    def _read(self, key: BatchKey) -> Kernels:
        started = time.monotonic()
        kernels = {}
        for name in self._kernel_names:
            stored = self._source.read_experts(
                names.expert_kernel(key.stack, key.layer, name), key.start, key.stop
            )
            self.num_bytes += stored.nbytes
            kernels[name] = stored.astype(np.float32, copy=False)
        self.seconds += time.monotonic() - started
        return kernels
