"""Bits between kernels: a step of the lattice for each, at one slope of KL against bits.

Kernels differ in what an error in them does to the predictions, and one step for all is not best.
It is measured: a kernel is quantized at a few steps while all else stays uncompressed, and the KL
to the uncompressed model is taken on a few calibration examples. With log KL and log bits as
parabolas of log step, the least total KL at a number of bits has all kernels at one slope
dKL / dbits; errors of different kernels are taken to add up. Only calibration text is looked at.

What it costs: a compression at every step, and for each kernel and step the model over the
examples. The uncompressed model is in memory meanwhile. The result is a run's `kernel_steps`.
"""

import dataclasses
import os
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from qmoe_jax.calibration.tokens import TokenFile, read_tokens
from qmoe_jax.checkpoints import names
from qmoe_jax.evaluation.divergence import measure_divergence
from qmoe_jax.models.load import dequantized, load_switch
from qmoe_jax.pipeline.compress import compress

PROBE_STEPS = (3.0, 5.0, 9.0)

# Steps that may be chosen: beyond the probed ones the parabolas are trusted for half an octave.
_CANDIDATES = np.exp2(np.arange(np.log2(2.0), np.log2(13.0), 1 / 64))


@dataclasses.dataclass(frozen=True)
class Probe:
    """What quantizing one kernel costs and saves, all else uncompressed.

    Attributes:
      kernel: as `CompressionSettings.kernel_steps` names it, "encoder/layers_1/wi".
      num_weights: of all experts.
      steps: probed, rising.
      bits: a weight, at each step.
      kl: nats per target token, at each step.
    """

    kernel: str
    num_weights: int
    steps: tuple[float, ...]
    bits: tuple[float, ...]
    kl: tuple[float, ...]

    def curves(self) -> tuple[Float[np.ndarray, " steps"], Float[np.ndarray, " steps"]]:
        """Return bits a weight and KL at every candidate step."""
        degree = min(2, len(self.steps) - 1)
        at, wanted = np.log(self.steps), np.log(_CANDIDATES)
        bits, kl = (
            np.exp(np.polyval(np.polyfit(at, np.log(np.maximum(values, 1e-12)), degree), wanted))
            for values in (self.bits, self.kl)
        )
        return bits, kl


def measure_probes(
    checkpoint: str | os.PathLike[str],
    tokens: str | os.PathLike[str] | TokenFile,
    *,
    steps: Sequence[float] = PROBE_STEPS,
    num_kl_examples: int = 128,
    batch_size: int = 32,
    **settings: Any,
) -> list[Probe]:
    """Quantize the kernels one at a time and measure the KL of each.

    Args:
      checkpoint: native.
      tokens: calibration examples.
      steps: to probe.
      num_kl_examples: calibration examples on which the KL is measured.
      batch_size: examples at a time.
      **settings: other fields of `CompressionSettings`.

    Raises:
      CheckpointError: the checkpoint cannot be read.
      TokensError: too few examples.
    """
    calibration = tokens if isinstance(tokens, TokenFile) else read_tokens(tokens)
    examples = calibration.first(min(num_kl_examples, len(calibration)))
    batches = [batch.arrays() for batch in examples.batches(batch_size)]
    reference, variables = load_switch(checkpoint)
    dense = names.flatten(variables["params"])
    found: dict[str, list[tuple[float, float]]] = {}
    sizes: dict[str, int] = {}
    for step in sorted(steps):
        with tempfile.TemporaryDirectory() as folder:
            report = compress(
                *(checkpoint, f"{folder}/probe", calibration),
                progress=False,
                grid="lattice",
                step=step,
                **settings,
            )
            _, quantized = dequantized(*load_switch(f"{folder}/probe"))
        values = names.flatten(quantized["params"])
        for kernel in report.kernels:
            path = f"{kernel.name}/kernel"
            mixed = {"params": names.unflatten(dense | {path: jnp.asarray(values[path])})}
            divergence = measure_divergence(reference, mixed, reference, variables, batches)
            bits = float(kernel.bits["bits_per_weight"])
            found.setdefault(kernel.name, []).append((bits, divergence.divergence[0]))
            sizes[kernel.name] = kernel.num_weights
    return [
        Probe(
            name.replace("/mlp/expert/", "/"),
            sizes[name],
            tuple(sorted(steps)),
            *(tuple(column) for column in zip(*points, strict=True)),
        )
        for name, points in found.items()
    ]


def allocate(probes: Sequence[Probe], bits_per_weight: float) -> Mapping[str, float]:
    """Return the step of each kernel at which the total KL is least for so many bits.

    Args:
      probes: of all kernels.
      bits_per_weight: over all kernels, as `Probe.bits` counts them.

    Returns:
      `kernel_steps`: the kernel's name to its step.

    Raises:
      ValueError: no steps within an octave of the probed ones have so many bits.
    """
    weights = np.array([probe.num_weights for probe in probes], np.float64)
    curves = [probe.curves() for probe in probes]
    bits = weights[:, None] * np.stack([own for own, _ in curves])
    kl = np.stack([own for _, own in curves])
    total = bits_per_weight * weights.sum()

    def chosen(log_slope: float) -> np.ndarray:
        return np.argmin(kl + np.exp(log_slope) * bits / weights.sum(), axis=1)

    def bits_of(choice: np.ndarray) -> float:
        return float(np.take_along_axis(bits, choice[:, None], axis=1).sum())

    low, high = -30.0, 15.0  # at a low price bits are many
    if not bits_of(chosen(high)) <= total <= bits_of(chosen(low)):
        least, most = (bits_of(chosen(price)) / weights.sum() for price in (high, low))
        raise ValueError(
            f"bits_per_weight is {bits_per_weight}; what was probed allows {least:.3f} to "
            f"{most:.3f}"
        )
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if bits_of(chosen(middle)) > total else (low, middle)
    # Both ends differ in one candidate of one kernel at the most, or in a few at a kink.
    return {
        probe.kernel: float(_CANDIDATES[at]) for probe, at in zip(probes, chosen(high), strict=True)
    }
