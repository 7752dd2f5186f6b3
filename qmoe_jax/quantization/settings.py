"""What can be chosen in a compression run, checked before work starts."""

import dataclasses
import fnmatch
import re
from collections.abc import Iterable, Mapping
from typing import Any

from qmoe_jax.codec.codings import codings_of_grid
from qmoe_jax.quantization.expert_batch import METHODS
from qmoe_jax.quantization.grids import Grid, Ternary, TwoBit
from qmoe_jax.quantization.lattice import Lattice, refuse_groups

GRIDS: dict[str, Grid] = {"ternary": Ternary(), "2bit": TwoBit(), "lattice": Lattice()}
"""Grids by name; `codec.codings.codings_of_grid` has the codings that store their codes."""

KERNELS = ("wi", "wi_0", "wi_1", "wo")
"""Names of an expert's kernels: wi, or wi_0 and wi_1 of gated experts; and wo."""

# What `layer_overrides` may change.
OVERRIDABLE = (
    "grid",
    "step",
    "expert_coding",
    "method",
    "damping",
    "act_order",
    "true_sequential",
    "move_wo",
    "group_size",
)


@dataclasses.dataclass(frozen=True)
class CompressionSettings:
    """Settings of a compression run; recorded in the compressed checkpoint.

    Attributes:
      grid: "lattice", steps of the input features; or the paper's "ternary" or "2bit", levels of a
        row.
      step: of the lattice, in units of a kernel's weights (c of `quantization.lattice`): about
        0.88 bit a weight at 3, 0.65 at 4, 0.51 at 5. On the demo model 4 has the loss gap of the
        paper's ternary and two thirds of its KL; its KL is that of 4.7.
      target_bits_per_weight: what lattice codes and their side information shall take on average,
        within 1 %; steps are searched during the run, and `step` and `kernel_steps` then say only
        how kernels' steps are to each other. None takes them as they are.
      target_size: the same for all arrays of the output, dense ones included: bytes, or text as
        "12GB" (powers of 1000) or "12GiB" (of 1024).
      allocation: "uniform", one step for all kernels but those in `kernel_steps`; or "measured",
        steps by what an error in a kernel does to the predictions (`pipeline.allocation`), which
        needs the uncompressed model in memory. Without a target it takes the bits of `step`.
      kernel_steps: other steps for some kernels: a pattern as "encoder/layers_1/wo" or "*/wi" to a
        step. Of several patterns that match, later ones win.
      expert_coding: how codes are stored: "tunstall" or "qmoe" (the paper's dictionary) for
        ternary, "tunstall_2bit" or "packed2" for 2bit, "lattice" for the lattice; "auto" is
        the first of each.
      method: "gptq", "rtn" (round to nearest, the baseline), or "none" (experts stay dense).
      skip: "encoder" or "decoder" leaves the experts of that stack dense; "" skips nothing.
      layer_overrides: other settings for some sparse layers: a pattern as "decoder/layers_1" or
        "encoder/*" to the fields that differ, of those that concern quantization
        (`OVERRIDABLE`). Of several patterns that match, later ones win.
      damping: share of a Hessian's mean diagonal that is added to its diagonal (`percdamp` in the
        paper's code).
      act_order: quantize input features by falling Hessian diagonal.
      true_sequential: measure wo's inputs behind the already quantized wi of the same expert.
      move_wo: quantize wo to put out what the exact expert does, behind the quantized wi
        (`quantization.moved_kernel`), instead of what wo itself would there; then true_sequential
        changes nothing. None does so for the lattice, and not for the paper's grids.
      group_size: input features that share a pair of levels; None is the whole row, as the paper
        has it. It divides the widths of the model.
      max_tokens_factor: an expert's Hessian sees at most this multiple of the mean tokens per
        expert; all tokens pass through the expert.
      premask_sentinels: leave sentinel inputs, and decoder positions that predict a sentinel or
        stand last, out of Hessians, as the paper does. None does so for its grids, and not for the
        lattice: what reaches experts there counts too.
      activation_dtype: "float32" or "bfloat16", of the activations during calibration.
      dense_dtype: "bfloat16" (as the paper; routers and norms keep their dtype) or "source", for
        the parameters that are not compressed.
      expert_batch: experts that are quantized together.
      batch_size: samples that go through the dense part of a layer together.
      token_chunk: tokens of each expert that are multiplied together.
    """

    grid: str = "lattice"
    step: float = 4.0
    target_bits_per_weight: float | None = None
    target_size: str | int | None = None
    allocation: str = "uniform"
    kernel_steps: Mapping[str, float] = dataclasses.field(default_factory=dict)
    expert_coding: str = "auto"
    method: str = "gptq"
    skip: str = ""
    layer_overrides: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
    damping: float = 0.1
    act_order: bool = False
    true_sequential: bool = False
    move_wo: bool | None = None
    group_size: int | None = None
    max_tokens_factor: float = 4.0
    premask_sentinels: bool | None = None
    activation_dtype: str = "float32"
    dense_dtype: str = "bfloat16"
    expert_batch: int = 16
    batch_size: int = 32
    token_chunk: int = 256

    def __post_init__(self) -> None:
        _one_of("grid", self.grid, tuple(GRIDS))
        _one_of("expert_coding", self.expert_coding, ("auto", *codings_of_grid(self.grid)))
        _one_of("method", self.method, (*METHODS, "none"))
        _one_of("skip", self.skip, ("", "encoder", "decoder"))
        for pattern, fields in self.layer_overrides.items():
            if unknown := sorted(set(fields) - set(OVERRIDABLE)):
                raise ValueError(
                    f"layer_overrides[{pattern!r}] has {', '.join(unknown)}; a layer may override "
                    f"{', '.join(OVERRIDABLE)}"
                )
            self._for_one(fields)  # refuses bad values
        _one_of("activation_dtype", self.activation_dtype, ("float32", "bfloat16"))
        _one_of("dense_dtype", self.dense_dtype, ("bfloat16", "source"))
        for name, least in (("step", 0.0), ("damping", 0.0), ("max_tokens_factor", 0.0)):
            if not getattr(self, name) > least:
                raise ValueError(f"{name} is {getattr(self, name)!r}; it must be above {least}")
        if self.group_size is not None and self.group_size < 1:
            raise ValueError(f"group_size is {self.group_size}; it must be at least 1, or None")
        target = self.target_bits_per_weight
        if target is not None and not 0 < target <= 6:
            raise ValueError(
                f"target_bits_per_weight is {target!r}; it must be above 0 and at most 6"
            )
        if target is not None and not self.has_steps:
            raise ValueError(
                f'target_bits_per_weight is {target!r}, but no layer has grid="lattice"; the other '
                "grids take what they take"
            )
        if self.target_size is not None:
            size_in_bytes(self.target_size)  # refuses what is none
            if target is not None:
                raise ValueError(
                    f"target_bits_per_weight is {target!r} and target_size is "
                    f"{self.target_size!r}; give one of the two"
                )
            if not self.has_steps:
                raise ValueError(
                    f'target_size is {self.target_size!r}, but no layer has grid="lattice"; the '
                    "other grids take what they take"
                )
        _one_of("allocation", self.allocation, ("uniform", "measured"))
        if self.allocation == "measured":
            if not self.has_steps:
                raise ValueError(
                    'allocation is "measured", but no layer has grid="lattice"; the other grids '
                    "have no steps"
                )
            if self.kernel_steps:
                raise ValueError(
                    f'allocation is "measured" and kernel_steps is {dict(self.kernel_steps)}; '
                    'leave one of the two out ("uniform" takes kernel_steps as they are)'
                )
        for pattern, step in self.kernel_steps.items():
            if not step > 0:
                raise ValueError(f"kernel_steps[{pattern!r}] is {step!r}; it must be above 0")
        if self.quantization_grid.has_steps:
            refuse_groups(self.group_size)
        for name in ("expert_batch", "batch_size", "token_chunk"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)!r}; it must be at least 1")

    @property
    def quantization_grid(self) -> Grid:
        """The grid that `grid` names."""
        return GRIDS[self.grid]

    @property
    def moves_wo(self) -> bool:
        """Whether `move_wo` is in force: only GPTQ has the tokens for it."""
        wanted = self.quantization_grid.has_steps if self.move_wo is None else self.move_wo
        return wanted and self.method == "gptq"

    @property
    def premasks_sentinels(self) -> bool:
        """Whether `premask_sentinels` is in force; of all layers, so by the grid of the run."""
        if self.premask_sentinels is None:
            return not self.quantization_grid.has_steps
        return self.premask_sentinels

    @property
    def coding(self) -> str:
        """The coding that stores the grid's codes."""
        if self.expert_coding == "auto":
            return codings_of_grid(self.grid)[0]
        return self.expert_coding

    def for_layer(self, stack: str, layer: int) -> "CompressionSettings":
        """Return the settings of one sparse layer; its `kernel_steps` are by kernel name."""
        name = f"{stack}/layers_{layer}"
        fields: dict[str, Any] = {}
        if self.skip == stack:
            fields["method"] = "none"
        for pattern, changes in self.layer_overrides.items():
            if fnmatch.fnmatchcase(name, pattern):
                fields |= changes
        steps = {
            kernel: step
            for pattern, step in self.kernel_steps.items()
            for kernel in KERNELS
            if fnmatch.fnmatchcase(f"{name}/{kernel}", pattern)
        }
        return self._for_one(fields | {"skip": "", "kernel_steps": steps})

    def _for_one(self, fields: Mapping[str, Any]) -> "CompressionSettings":
        """Return settings with other fields and without overrides; a target is of the whole run."""
        whole = {"target_bits_per_weight": None, "target_size": None, "allocation": "uniform"}
        return dataclasses.replace(self, layer_overrides={}, **whole, **fields)

    def step_of(self, kernel: str) -> float:
        """Return the step of a kernel, in the settings of its layer (`for_layer`)."""
        return self.kernel_steps.get(kernel, self.step)

    def check_layers(self, layers: Iterable[tuple[str, int]]) -> None:
        """Refuse overrides that concern no sparse layer, and settings that compress none.

        Args:
          layers: (stack, layer) of all sparse layers.

        Raises:
          ValueError: a pattern matches no sparse layer, or no layer is left to compress.
        """
        names = [f"{stack}/layers_{layer}" for stack, layer in layers]
        for pattern in self.layer_overrides:
            if not any(fnmatch.fnmatchcase(name, pattern) for name in names):
                raise ValueError(
                    f"layer_overrides has {pattern!r}, which matches no sparse layer; they are "
                    f"{', '.join(names)}"
                )
        for pattern in self.kernel_steps:
            if not any(
                fnmatch.fnmatchcase(f"{name}/{kernel}", pattern)
                for name in names
                for kernel in KERNELS
            ):
                raise ValueError(
                    f"kernel_steps has {pattern!r}, which matches no kernel of a sparse layer; "
                    f"they are wi (or wi_0, wi_1) and wo of {', '.join(names)}"
                )
        if all(self.for_layer(stack, layer).method == "none" for stack, layer in layers):
            raise ValueError(
                'no layer is left to compress: method "none" or skip takes them all; '
                "compress at least one"
            )

    def stored_dtype(self, name: str, source_dtype: str) -> str:
        """Return the dtype that a parameter which is not compressed is stored in, by name.

        Routers decide and norms are small: both keep what they have.

        Args:
          name: '/'-joined.
          source_dtype: what the checkpoint has it in.
        """
        keeps = self.dense_dtype == "source" or name.endswith("/scale") or "/router/" in name
        return source_dtype if keeps else "bfloat16"

    @property
    def has_steps(self) -> bool:
        """Whether some layer may be quantized to the lattice."""
        grids = {self.grid} | {f.get("grid") for f in self.layer_overrides.values()}
        return any(GRIDS[grid].has_steps for grid in grids if grid is not None)

    @property
    def needs_tokens(self) -> bool:
        """Whether some layer may be quantized with GPTQ, or predictions are looked at."""
        methods = {self.method} | {f.get("method") for f in self.layer_overrides.values()}
        return "gptq" in methods or self.allocation == "measured"

    def to_json(self) -> dict[str, Any]:
        """All fields."""
        return dataclasses.asdict(self)


def _one_of(name: str, value: object, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} is {value!r}; choose one of {', '.join(map(repr, allowed))}")


_UNITS = {"": 1, "B": 1} | {
    f"{prefix}{unit}": base ** (power + 1)
    for unit, base in (("B", 1000), ("iB", 1024))
    for power, prefix in enumerate("KMGTP")
}


def size_in_bytes(size: str | int) -> int:
    """Return a size in bytes: a number, or text as "12GB" or "1.5 TiB".

    Raises:
      ValueError: it is neither, or not above 0.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", str(size))
    units = {unit.lower(): count for unit, count in _UNITS.items()}
    count = 0
    if found and found[2].lower() in units and not isinstance(size, bool):
        count = round(float(found[1]) * units[found[2].lower()])
    if count <= 0:
        raise ValueError(
            f'target_size is {size!r}; it must be bytes above 0, or text as "12GB" or "12GiB"'
        )
    return count
