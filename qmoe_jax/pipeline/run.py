"""What a run has: everything that its parts share, made once and never changed."""

import dataclasses
from collections.abc import Callable

from qmoe_jax.checkpoints.compressed_writer import CompressedCheckpointWriter
from qmoe_jax.checkpoints.t5x import T5XCheckpoint
from qmoe_jax.config import SwitchConfig
from qmoe_jax.pipeline.devices import Devices
from qmoe_jax.pipeline.journal import Journal
from qmoe_jax.pipeline.processes import Processes
from qmoe_jax.progress import Progress
from qmoe_jax.quantization.settings import CompressionSettings


@dataclasses.dataclass(frozen=True)
class Run:
    """A compression run.

    Attributes:
      source: the native checkpoint.
      config: its geometry.
      settings: of the run; a layer may override some.
      writer: the output.
      journal: what is finished.
      devices: of this process.
      processes: that take part.
      progress: shows how far a loop is: `progress.progress`, or one that shows nothing.
    """

    source: T5XCheckpoint
    config: SwitchConfig
    settings: CompressionSettings
    writer: CompressedCheckpointWriter
    journal: Journal
    devices: Devices
    processes: Processes
    progress: Callable[..., Progress]

    @property
    def kernel_names(self) -> tuple[str, ...]:
        """`wi`, or `wi_0` and `wi_1`; and `wo`."""
        return (*self.config.wi_names, "wo")

    @property
    def batch_size(self) -> int:
        """Experts that a process works on at a time."""
        return self.settings.expert_batch * len(self.devices)

    @property
    def experts(self) -> range:
        """This process's experts of every layer."""
        return self.processes.share(self.config.num_experts)

    @property
    def padded_batch_size(self) -> int:
        """Experts of the compiled programs: a batch, or all where there are fewer, filled up."""
        return self.devices.rounded_up(min(self.batch_size, max(1, len(self.experts))))
