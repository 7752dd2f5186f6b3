"""What can be chosen in a compression run, checked before work starts."""

import dataclasses
from typing import Any

from qmoe_jax.quantization.expert_batch import METHODS
from qmoe_jax.quantization.grids import Grid, Ternary, TwoBit

# name -> (grid, the codings that store its codes, the smallest first)
GRIDS: dict[str, tuple[Grid, tuple[str, ...]]] = {
    "ternary": (Ternary(), ("tunstall", "qmoe")),
    "2bit": (TwoBit(), ("tunstall_2bit", "packed2")),
}


@dataclasses.dataclass(frozen=True)
class CompressionSettings:
    """Settings of a compression run; recorded in the compressed checkpoint.

    Attributes:
      grid: "ternary" or "2bit".
      expert_coding: how codes are stored: "tunstall" or "qmoe" (the paper's dictionary) for
        ternary, "tunstall_2bit" or "packed2" for 2bit; "auto" is the first of each.
      method: "gptq", or "rtn" (round to nearest, the baseline).
      damping: share of a Hessian's mean diagonal that is added to its diagonal (`percdamp` in the
        paper's code).
      act_order: quantize input features by falling Hessian diagonal.
      true_sequential: measure wo's inputs behind the already quantized wi of the same expert.
      max_tokens_factor: an expert's Hessian sees at most this multiple of the mean tokens per
        expert; all tokens pass through the expert.
      premask_sentinels: leave sentinel inputs, and decoder positions that predict a sentinel or
        stand last, out of Hessians.
      activation_dtype: "float32" or "bfloat16", of the activations during calibration.
      dense_dtype: "bfloat16" (as the paper; routers and norms keep their dtype) or "source", for
        the parameters that are not compressed.
      expert_batch: experts that are quantized together.
      batch_size: samples that go through the dense part of a layer together.
      token_chunk: tokens of each expert that are multiplied together.
    """

    grid: str = "ternary"
    expert_coding: str = "auto"
    method: str = "gptq"
    damping: float = 0.1
    act_order: bool = False
    true_sequential: bool = False
    max_tokens_factor: float = 4.0
    premask_sentinels: bool = True
    activation_dtype: str = "float32"
    dense_dtype: str = "bfloat16"
    expert_batch: int = 16
    batch_size: int = 32
    token_chunk: int = 256

    def __post_init__(self) -> None:
        _one_of("grid", self.grid, tuple(GRIDS))
        _one_of("expert_coding", self.expert_coding, ("auto", *GRIDS[self.grid][1]))
        _one_of("method", self.method, METHODS)
        _one_of("activation_dtype", self.activation_dtype, ("float32", "bfloat16"))
        _one_of("dense_dtype", self.dense_dtype, ("bfloat16", "source"))
        for name, least in (("damping", 0.0), ("max_tokens_factor", 0.0)):
            if not getattr(self, name) > least:
                raise ValueError(f"{name} is {getattr(self, name)!r}; it must be above {least}")
        for name in ("expert_batch", "batch_size", "token_chunk"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)!r}; it must be at least 1")

    @property
    def quantization_grid(self) -> Grid:
        """The grid that `grid` names."""
        return GRIDS[self.grid][0]

    @property
    def coding(self) -> str:
        """The coding that stores the grid's codes."""
        return GRIDS[self.grid][1][0] if self.expert_coding == "auto" else self.expert_coding

    def to_json(self) -> dict[str, Any]:
        """All fields."""
        return dataclasses.asdict(self)


def _one_of(name: str, value: object, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} is {value!r}; choose one of {', '.join(map(repr, allowed))}")
