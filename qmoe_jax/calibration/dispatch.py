"""Which rows of the list buffer go to which expert, and which of them enter its Hessian."""

import dataclasses

import numpy as np
from jaxtyping import Bool, Int


@dataclasses.dataclass(frozen=True)
class Dispatch:
    """The tokens of every expert of one layer.

    Attributes:
      rows: row numbers of the list buffer, sorted by expert and, within it, in buffer order.
      starts: int64 [experts + 1]; the tokens of expert e are rows[starts[e]:starts[e + 1]].
      hessian_rows: the same for the tokens that enter Hessians.
      hessian_starts: int64 [experts + 1].
      max_hessian_tokens: no expert's Hessian sees more tokens than this.
    """

    rows: Int[np.ndarray, "tokens"]
    starts: Int[np.ndarray, "experts_plus_1"]
    hessian_rows: Int[np.ndarray, "hessian_tokens"]
    hessian_starts: Int[np.ndarray, "experts_plus_1"]
    max_hessian_tokens: int

    def tokens_of(self, expert: int) -> Int[np.ndarray, "tokens"]:
        """Rows of all tokens of an expert."""
        return self.rows[self.starts[expert] : self.starts[expert + 1]]

    def hessian_tokens_of(self, expert: int) -> Int[np.ndarray, "tokens"]:
        """Rows of the tokens of an expert that enter its Hessian."""
        return self.hessian_rows[self.hessian_starts[expert] : self.hessian_starts[expert + 1]]


def _by_expert(
    expert_index: Int[np.ndarray, "tokens"], rows: Int[np.ndarray, "rows"], num_experts: int
) -> tuple[np.ndarray, np.ndarray]:
    order = np.argsort(expert_index[rows], kind="stable")
    counts = np.bincount(expert_index[rows], minlength=num_experts)
    return rows[order], np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])


def dispatch_tokens(
    expert_index: Int[np.ndarray, "tokens"],
    enters_hessian: Bool[np.ndarray, "tokens"],
    *,
    num_experts: int,
    max_tokens_factor: float,
) -> Dispatch:
    """Sort tokens by expert; caps what enters a Hessian (QMoE section 3.3).

    Args:
      expert_index: expert of every row of the list buffer.
      enters_hessian: calibration tokens that predict no sentinel; False for validation tokens.
      num_experts: number of experts.
      max_tokens_factor: an expert's Hessian sees at most this multiple of the mean number of
        eligible tokens per expert: the first ones in buffer order.
    """
    rows, starts = _by_expert(expert_index, np.arange(len(expert_index)), num_experts)
    eligible, eligible_starts = _by_expert(
        expert_index, np.flatnonzero(enters_hessian), num_experts
    )
    cap = max(1, int(max_tokens_factor * len(eligible) / num_experts))
    place = np.arange(len(eligible)) - np.repeat(eligible_starts[:-1], np.diff(eligible_starts))
    hessian_rows = eligible[place < cap]
    counts = np.minimum(np.diff(eligible_starts), cap)
    return Dispatch(
        rows=rows,
        starts=starts,
        hessian_rows=hessian_rows,
        hessian_starts=np.concatenate([[0], np.cumsum(counts, dtype=np.int64)]),
        max_hessian_tokens=cap,
    )
