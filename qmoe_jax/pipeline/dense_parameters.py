"""Parameters that are not compressed: read from the source, stored in the output, counted."""

from typing import Any

import jax.numpy as jnp
import numpy as np

from qmoe_jax.checkpoints import names
from qmoe_jax.pipeline.run import Run


class DenseParameters:
    """Reads a run's dense parameters, each once.

    Attributes:
      num_bytes_read: as the source stores them.
      num_parameters: how many were stored.
      num_bits: that they take in the output.
    """

    def __init__(self, run: Run):
        """Begin with nothing read."""
        self._run = run
        self.num_bytes_read = 0
        self.num_parameters = 0
        self.num_bits = 0

    def read(self, name: str) -> np.ndarray:
        """Read a parameter and store it; return it as it is stored.

        Raises:
          CheckpointError: it is damaged, or the output cannot be written.
        """
        run = self._run
        array = run.source.read(name)
        self.num_bytes_read += array.nbytes
        dtype = run.settings.stored_dtype(name, array.dtype.name)
        array = array.astype(jnp.dtype(dtype), copy=False)
        if run.processes.is_primary:
            run.writer.write_dense(name, array)
        self.num_bits += 8 * array.nbytes
        self.num_parameters += array.size
        return array

    def read_layer(self, stack: str, layer: int) -> dict[str, Any]:
        """Read all dense parameters of a layer, as the nested dict that its module takes."""
        prefix = f"{stack}/layers_{layer}/"
        return names.unflatten(
            {
                name.removeprefix(prefix): self.read(name)
                for name in self._run.source.names
                if name.startswith(prefix) and not names.is_expert_kernel(name)
            }
        )
