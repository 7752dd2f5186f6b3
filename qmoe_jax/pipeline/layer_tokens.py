"""The tokens of one sparse layer: where they lie, where they go, how they get there and back.

Rows are numbered through all processes: those of process 0 first. Every process knows the whole
routing, and therefore, without asking, which rows any process needs from any other.
"""

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np
from jaxtyping import Bool, Float, Int

from qmoe_jax.calibration.dispatch import Dispatch
from qmoe_jax.calibration.list_buffer import ListBuffer
from qmoe_jax.pipeline.processes import Processes, round_up_capacity


@dataclasses.dataclass(frozen=True)
class TokenChunk:
    """Some tokens of every expert of a batch, padded to one shape.

    Attributes:
      rows: numbers of rows, [experts, chunk]; 0 where padded.
      real: which of them are tokens, bool [experts, chunk].
    """

    rows: Int[np.ndarray, "experts chunk"]
    real: Bool[np.ndarray, "experts chunk"]


def token_chunks(tokens: Sequence[Int[np.ndarray, "_"]], chunk: int) -> Iterator[TokenChunk]:
    """Walk through the tokens of all experts side by side, `chunk` of each at a time."""
    longest = max((len(t) for t in tokens), default=0)
    for start in range(0, longest, chunk):
        rows = np.zeros((len(tokens), chunk), np.int64)
        real = np.zeros((len(tokens), chunk), bool)
        for expert, all_rows in enumerate(tokens):
            part = all_rows[start : start + chunk]
            rows[expert, : len(part)] = part
            real[expert, : len(part)] = True
        yield TokenChunk(rows, real)


@dataclasses.dataclass(frozen=True)
class LayerTokens:
    """The residual stream of one sparse layer, and its routing.

    Attributes:
      buffer: this process's rows; outputs of the experts replace them.
      dispatch: which rows, of all processes, go where.
      gate: router probability of every row of all processes.
      processes: who takes part.
      first_rows: number of the first row of each process, and the number of all rows.
    """

    buffer: ListBuffer
    dispatch: Dispatch
    gate: Float[np.ndarray, "rows"]
    processes: Processes
    first_rows: Int[np.ndarray, "processes_plus_1"]

    def chunks(
        self, batches: Sequence[range], chunk: int, *, hessian: bool
    ) -> Iterator[list[TokenChunk]]:
        """Walk through the tokens of each process's batch of experts, in step.

        Args:
          batches: experts of each process; an empty range takes part without tokens.
          chunk: tokens of an expert at a time.
          hessian: those that enter Hessians, or all.

        Yields:
          A chunk for each process.
        """
        tokens_of = self.dispatch.hessian_tokens_of if hessian else self.dispatch.tokens_of
        walks = [token_chunks([tokens_of(expert) for expert in b], chunk) for b in batches]
        empty = [
            TokenChunk(np.zeros((len(b), chunk), np.int64), np.zeros((len(b), chunk), bool))
            for b in batches
        ]
        while True:
            step = [next(walk, None) for walk in walks]
            if all(part is None for part in step):
                return
            yield [part or nothing for part, nothing in zip(step, empty, strict=True)]

    def gather(self, chunks: Sequence[TokenChunk]) -> Float[np.ndarray, "experts chunk dim"]:
        """Return the rows of this process's chunk, whoever holds them; anything where padded."""
        mine = chunks[self.processes.index]
        if self.processes.count == 1:
            return self.buffer.rows[mine.rows]
        wanted = [chunk.rows[chunk.real] for chunk in chunks]
        parts = [self.buffer.rows[self._held_here(rows)] for rows in wanted]
        received = self.processes.exchange(parts, self._capacity(wanted))
        rows = np.zeros((len(wanted[self.processes.index]), self.buffer.rows.shape[1]), np.float32)
        for process, places in enumerate(self._places(wanted[self.processes.index])):
            rows[places] = received[process, : len(places)]
        gathered = np.zeros((*mine.rows.shape, rows.shape[1]), np.float32)
        gathered[mine.real] = rows
        return gathered

    def scatter(
        self, chunks: Sequence[TokenChunk], outputs: Float[np.ndarray, "experts chunk dim"]
    ) -> None:
        """Put outputs where `gather` took inputs; padding is left out."""
        mine = chunks[self.processes.index]
        if self.processes.count == 1:
            self.buffer.rows[mine.rows[mine.real]] = outputs[mine.real]
            return
        wanted = [chunk.rows[chunk.real] for chunk in chunks]
        rows = outputs[mine.real]
        parts = [rows[places] for places in self._places(wanted[self.processes.index])]
        received = self.processes.exchange(parts, self._capacity(wanted))
        for process, asked in enumerate(wanted):
            here = self._held_here(asked)
            self.buffer.rows[here] = received[process, : len(here)]

    def _owners(self, rows: Int[np.ndarray, "_"]) -> Int[np.ndarray, "_"]:
        return np.searchsorted(self.first_rows, rows, side="right") - 1

    def _held_here(self, rows: Int[np.ndarray, "_"]) -> Int[np.ndarray, "_"]:
        """Those of some rows that lie in this process, as numbers of its buffer."""
        index = self.processes.index
        return rows[self._owners(rows) == index] - self.first_rows[index]

    def _places(self, rows: Int[np.ndarray, "_"]) -> list[np.ndarray]:
        """Which of some rows lie in each process."""
        owners = self._owners(rows)
        return [np.flatnonzero(owners == process) for process in range(self.processes.count)]

    def _capacity(self, wanted: Sequence[Int[np.ndarray, "_"]]) -> int:
        """Enough for what any process holds of what any other wants: the same in all of them."""
        count = self.processes.count
        most = max(np.bincount(self._owners(rows), minlength=count).max() for rows in wanted)
        return round_up_capacity(int(most))
