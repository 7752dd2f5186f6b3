"""The bits that a run may still spend, and the step that each kernel gets of them.

A target is met in one pass over the model. What is left is spread over the weights that are left:
with one step for all, evenly; with steps by kernel, in the ratio of those. The step at which a
kernel takes its part is searched on a few experts when its first batch comes, and follows from the
batch before for the others; what a batch took more or less than its part, the next ones make up
for. The last batch of all has none behind it: its kernels are searched on all of its experts, and
what the first of them is measured to take is counted before the next one's part. A process
budgets for its own experts. All of it follows from what the journal holds, so a resumed run chooses
the same steps.
"""

import math
from collections.abc import Callable, Mapping

import jax.numpy as jnp

from qmoe_jax.checkpoints import names
from qmoe_jax.config import SwitchConfig
from qmoe_jax.pipeline.run import Run
from qmoe_jax.quantization.settings import CompressionSettings, size_in_bytes
from qmoe_jax.quantization.step_search import moved_step, step_for_bits, typical_bits

# Not less is asked of any kernel: the side information alone may take as much.
_LEAST_BITS = 0.02


class BitBudget:
    """Bits and weights that are left to one process.

    Kernels are named as in `CompressionSettings.kernel_steps`: "encoder/layers_1/wi".
    """

    def __init__(
        self, weights: Mapping[str, int], steps: Mapping[str, float], bits_per_weight: float
    ):
        """Begin with everything left.

        Args:
          weights: of each kernel, of this process's experts.
          steps: of each kernel; only their ratios matter.
          bits_per_weight: over all kernels.
        """
        self._weights = dict(weights)
        self._steps = dict(steps)
        self._target = bits_per_weight * sum(weights.values())
        self._spent = 0  # whole bits: the sum does not depend on their order
        # Of the batch at work: kernels that have their step, and the bits that they will take.
        self._expected: dict[str, int] = {}
        self._found: dict[str, tuple[float, float]] = {}

    def bits_for(self, kernel: str) -> float:
        """Return the bits a weight that the next experts of a kernel should take."""
        left = [
            (self._steps[name], count)
            for name, count in self._weights.items()
            if count and name not in self._expected
        ]
        spent = self._spent + sum(self._expected.values())
        low, high = 1e-4, 1e4
        for _ in range(60):
            middle = (low * high) ** 0.5
            total = sum(count * typical_bits(middle * step) for step, count in left)
            low, high = (middle, high) if total > self._target - spent else (low, middle)
        return max(typical_bits(low * self._steps[kernel]), _LEAST_BITS)

    def step_for(
        self, kernel: str, num_weights: int, measure: Callable[[float, bool], float]
    ) -> float:
        """Choose the step for the next experts of a kernel.

        Args:
          kernel: its name.
          num_weights: of these experts.
          measure: bits a weight that they take at a step, from some of them or (True) from all.
        """
        wanted = self.bits_for(kernel)
        start = moved_step(*self._found[kernel], wanted) if kernel in self._found else None
        is_last = self._is_last(kernel, num_weights)
        if start is not None and not is_last:
            return start
        measured = [wanted]

        def bits_at(step: float) -> float:
            measured.append(measure(step, is_last))
            return measured[-1]

        step = step_for_bits(bits_at, wanted, start=start)
        if is_last:
            self._expected[kernel] = round(num_weights * measured[-1])
        return step

    def _is_last(self, kernel: str, num_weights: int) -> bool:
        """Whether nothing follows but the other kernels of the same experts."""
        layer = kernel.rpartition("/")[0]
        return all(
            name.rpartition("/")[0] == layer and count <= num_weights
            for name, count in self._weights.items()
            if count
        )

    def spend(self, kernel: str, num_weights: int, bits: int, step: float | None) -> None:
        """Note what experts of a kernel have taken.

        Args:
          kernel: its name.
          num_weights: of these experts.
          bits: that they took.
          step: that they had; None where no experts of the kernel follow.
        """
        self._weights[kernel] -= num_weights
        self._spent += bits
        self._expected.pop(kernel, None)
        if step is not None:
            self._found[kernel] = step, max(bits / num_weights, _LEAST_BITS)


def coded_names(config: SwitchConfig, settings: CompressionSettings) -> set[str]:
    """Return the names of the parameters that a run stores as codes."""
    return {
        names.expert_kernel(stack, layer, kernel)
        for stack, layer in config.sparse_layers
        if settings.for_layer(stack, layer).method != "none"
        for kernel in (*config.wi_names, "wo")
    }


def dense_bytes(
    shapes: Mapping[str, tuple[int, ...]],
    dtypes: Mapping[str, str],
    config: SwitchConfig,
    settings: CompressionSettings,
) -> int:
    """Return the bytes of what a run does not compress, before the storage's own compression."""
    coded = coded_names(config, settings)
    return sum(
        math.prod(shape) * jnp.dtype(settings.stored_dtype(name, dtypes[name])).itemsize
        for name, shape in shapes.items()
        if name not in coded
    )


def target_bits(
    shapes: Mapping[str, tuple[int, ...]],
    dtypes: Mapping[str, str],
    config: SwitchConfig,
    settings: CompressionSettings,
) -> float | None:
    """Return the bits a weight that a run's lattice codes shall take; None without a target.

    Args:
      shapes: of every parameter of the native checkpoint.
      dtypes: their names.
      config: its geometry.
      settings: of the run. Of a `target_size` what is not compressed is subtracted, and what other
        grids take cannot be known.

    Raises:
      ValueError: a size that what is not compressed takes already, or with other grids beside.
    """
    if settings.target_size is None:
        return settings.target_bits_per_weight
    layers = {at: settings.for_layer(*at) for at in config.sparse_layers}
    if any(own.method != "none" and not own.has_steps for own in layers.values()):
        raise ValueError(
            f"target_size is {settings.target_size!r}, but layer_overrides gives some layers "
            'another grid than "lattice", whose size no step decides; set target_bits_per_weight, '
            "which is of the lattice's layers alone"
        )
    dense = dense_bytes(shapes, dtypes, config, settings)
    weights = sum(math.prod(shapes[name]) for name in coded_names(config, settings))
    wanted = size_in_bytes(settings.target_size)
    bits = 8 * (wanted - dense) / weights
    if bits < _LEAST_BITS:
        raise ValueError(
            f"target_size is {settings.target_size!r}, {wanted} bytes, and what is not compressed "
            f"takes {dense} alone; the experts need {math.ceil(_LEAST_BITS * weights / 8)} or more "
            "beside it"
        )
    return bits


def bit_budget(run: Run) -> BitBudget | None:
    """Return the budget of this process's experts; None without a target."""
    source = run.source
    target = target_bits(source.shapes, source.dtype_names, run.config, run.settings)
    if target is None:
        return None
    weights, steps = {}, {}
    size = run.config.embed_dim * run.config.expert_mlp_dim * len(run.experts)
    for stack, layer in run.config.sparse_layers:
        settings = run.settings.for_layer(stack, layer)
        if settings.method == "none" or not settings.quantization_grid.has_steps:
            continue
        for name in run.kernel_names:
            kernel = f"{stack}/layers_{layer}/{name}"
            weights[kernel], steps[kernel] = size, settings.step_of(name)
    return BitBudget(weights, steps, target)
