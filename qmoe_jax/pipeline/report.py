"""What a compression run did, per expert kernel and in total."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from qmoe_jax.evaluation.divergence import DivergenceReport
from qmoe_jax.evaluation.metrics import LossReport
from qmoe_jax.formatting import format_memory
from qmoe_jax.quantization.expert_batch import ExpertStatus


@dataclasses.dataclass
class KernelReport:
    """One expert kernel of one layer, all experts.

    Attributes:
      name: module path, `encoder/layers_1/mlp/expert/wi`.
      num_experts: experts in the layer.
      num_weights: weights in all experts' kernels.
      bits: stored bits: `codes`, `levels`, `offsets`, `total`, and what `codec.stats.bits` derives.
      zeros: share of weights that are exactly zero.
      relative_weight_error: |W - Q|^2 / |W|^2 over all experts.
      relative_layer_error: |(W - Q) X|^2 / |W X|^2 over the calibration tokens of all experts; None
        where there were none.
      experts_without_tokens: experts that no calibration token reached; rounded to nearest.
      singular_hessians: experts whose Hessian could not be factorised; rounded to nearest.
      nonfinite_experts: experts whose Hessian was not finite; rounded to nearest.
      overload_share: share of lattice codes at the ends of their range: clipped, or just fitting.
      step: of the lattice, mean over experts; None of other grids.
      token_counts: calibration tokens of each expert; zeros where there was no calibration.
    """

    name: str
    num_experts: int
    num_weights: int
    bits: dict[str, Any]
    zeros: float
    relative_weight_error: float
    relative_layer_error: float | None
    experts_without_tokens: int
    singular_hessians: int
    nonfinite_experts: int
    overload_share: float = 0.0
    step: float | None = None
    token_counts: list[float] = dataclasses.field(default_factory=list)


@dataclasses.dataclass
class CompressionReport:
    """Sizes, errors and losses of a whole compression run.

    Attributes:
      output: the compressed checkpoint.
      settings: the run's settings.
      kernels: a report per expert kernel, in the order of the model.
      dense_bits: stored bits of the parameters that are not compressed.
      dense_parameters: their number.
      seconds: wall time of the run.
      num_replayed: expert batches that a resumed run found finished.
      bytes_read: bytes of the checkpoint that this process read, as they are stored.
      peak_host_bytes: the most memory that this process held (resident set).
      validation: loss on the validation tokens that flowed along, through compressed experts; None
        where none were given.
      validation_warning: what is wrong with that loss; None where nothing is.
      separate_validation: loss on them of the finished output, loaded again; None where not asked.
      divergence: of the finished output from the uncompressed model; None where not measured.
      divergence_text: whose examples these are, "calibration" or "validation".
      has_pages: whether a page and a model card stand beside the output, see `run_pages`.
    """

    output: str
    settings: dict[str, Any]
    kernels: list[KernelReport]
    dense_bits: int
    dense_parameters: int
    seconds: float = 0.0
    num_replayed: int = 0
    bytes_read: int = 0
    peak_host_bytes: int = 0
    validation: LossReport | None = None
    validation_warning: str | None = None
    separate_validation: LossReport | None = None
    divergence: DivergenceReport | None = None
    divergence_text: str = "calibration"
    has_pages: bool = False

    @property
    def expert_weights(self) -> int:
        """Number of compressed weights."""
        return sum(kernel.num_weights for kernel in self.kernels)

    @property
    def expert_bits(self) -> int:
        """Bits stored for them, everything counted."""
        return sum(kernel.bits["total"] for kernel in self.kernels)

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per expert weight, everything counted."""
        return self.expert_bits / self.expert_weights

    @property
    def lattice_bits_per_weight(self) -> float | None:
        """Stored bits per weight of the kernels that a target is of; None without any."""
        coded = [kernel for kernel in self.kernels if kernel.step is not None]
        if not coded:
            return None
        bits = sum(int(kernel.bits["total"]) for kernel in coded)
        return bits / sum(kernel.num_weights for kernel in coded)

    @property
    def expert_compression(self) -> float:
        """Size of the experts in bfloat16 over their stored size."""
        return 16 / self.bits_per_weight

    @property
    def model_compression(self) -> float:
        """Size of the whole model in bfloat16 over its stored size."""
        parameters = self.expert_weights + self.dense_parameters
        return 16 * parameters / (self.expert_bits + self.dense_bits)

    @property
    def zeros(self) -> float:
        """Share of expert weights that are exactly zero."""
        zeros = sum(kernel.zeros * kernel.num_weights for kernel in self.kernels)
        return zeros / self.expert_weights

    def warnings(self) -> list[str]:
        """Return what a user should know before trusting the result, in sentences."""
        found = []
        for kernel in self.kernels:
            if kernel.experts_without_tokens:
                found.append(
                    f"{kernel.name}: {kernel.experts_without_tokens} of {kernel.num_experts} "
                    "experts saw no calibration token and were rounded to nearest; "
                    "calibrate on more examples"
                )
            if kernel.singular_hessians:
                found.append(
                    f"{kernel.name}: {kernel.singular_hessians} of {kernel.num_experts} Hessians "
                    "could not be factorised and their experts were rounded to nearest; "
                    "raise damping or calibrate on more examples"
                )
            if kernel.nonfinite_experts:
                found.append(
                    f"{kernel.name}: {kernel.nonfinite_experts} of {kernel.num_experts} experts "
                    "had non-finite activations and were rounded to nearest; "
                    'try activation_dtype="float32"'
                )
            if kernel.overload_share > 0:
                found.append(
                    f"{kernel.name}: {kernel.overload_share:.2%} of the codes are at the ends of "
                    "their range, 127 steps, and may have been clipped; choose a larger step"
                )
        target, bits = self.settings.get("target_bits_per_weight"), self.lattice_bits_per_weight
        if target is not None and bits is not None and abs(bits - target) > 0.01 * target:
            found.append(
                f"lattice codes take {bits:.3f} bits a weight instead of {target:g}: "
                "steps and column classes alone may take more, or the last kernels were too few to "
                "make up for the others"
            )
        if self.validation_warning is not None:
            found.append(f"validation: {self.validation_warning}")
        return found

    def to_json(self) -> dict[str, Any]:
        """Everything, with the totals."""
        return {
            "output": self.output,
            "settings": self.settings,
            "kernels": [dataclasses.asdict(kernel) for kernel in self.kernels],
            "bits_per_weight": self.bits_per_weight,
            "expert_compression": self.expert_compression,
            "model_compression": self.model_compression,
            "zeros": self.zeros,
            "dense_bits": self.dense_bits,
            "dense_parameters": self.dense_parameters,
            "seconds": self.seconds,
            "num_replayed": self.num_replayed,
            "bytes_read": self.bytes_read,
            "peak_host_bytes": self.peak_host_bytes,
            "separate_validation_loss": None
            if self.separate_validation is None
            else self.separate_validation.loss,
            "divergence": None if self.divergence is None else self.divergence.to_json(),
            "validation_loss": None if self.validation is None else self.validation.loss,
            "warnings": self.warnings(),
        }

    def summary(self) -> str:
        """Return the totals in a few lines."""
        lines = [
            f"{self.output}: {self.expert_weights:,} expert weights at "
            f"{self.bits_per_weight:.3f} bits (experts {self.expert_compression:.2f}x, whole model "
            f"{self.model_compression:.2f}x smaller than bfloat16), {self.zeros:.1%} zeros, "
            f"{self.seconds:.1f} seconds",
            f"read {self.bytes_read / 1e9:.3f} GB of the checkpoint, at most "
            f"{format_memory(self.peak_host_bytes, 'GiB')} of host memory",
        ]
        if self.validation is not None:
            lines.append(f"validation loss {self.validation.loss:.4f}")
        if self.separate_validation is not None:
            lines.append(f"of the output, loaded again: {self.separate_validation.loss:.4f}")
        if self.divergence is not None:
            (kl, kl_error), (gap, gap_error) = self.divergence.divergence, self.divergence.gap
            lines.append(
                f"against the uncompressed model on {len(self.divergence.kl):,} "
                f"{self.divergence_text} examples: KL {kl:.5f} ± {kl_error:.5f}, loss "
                f"{gap:+.4f} ± {gap_error:.4f} nats a target token, "
                f"{self.divergence.agreement:.2%} of the most probable tokens agree"
            )
        return "\n".join(lines)


def kernel_report(
    name: str,
    *,
    num_experts: int,
    num_weights: int,
    bits: dict[str, Any],
    batches: Sequence[Mapping[str, Any]],
) -> KernelReport:
    """Sum up the batches of experts of one kernel.

    Args:
      name: module path of the kernel.
      num_experts: experts in the layer.
      num_weights: weights of all of them.
      bits: stored bits, as `KernelReport` has them.
      batches: the statistics of `expert_pass.QuantizedKernel` of all experts.
    """
    joined = {key: np.concatenate([np.asarray(b[key]) for b in batches]) for key in batches[0]}
    counts, status = joined["token_counts"], joined["status"]
    layer_energy = (counts * joined["layer_energy"]).sum()
    layer_error = (counts * joined["layer_error"]).sum()
    return KernelReport(
        name=name,
        num_experts=num_experts,
        num_weights=num_weights,
        bits=bits,
        zeros=float(joined["zero_share"].mean()),
        relative_weight_error=float(
            joined["weight_error"].sum() / max(joined["weight_energy"].sum(), 1e-30)
        ),
        relative_layer_error=float(layer_error / layer_energy) if layer_energy > 0 else None,
        experts_without_tokens=int((status == ExpertStatus.NO_TOKENS).sum()),
        singular_hessians=int((status == ExpertStatus.SINGULAR).sum()),
        nonfinite_experts=int((status == ExpertStatus.NONFINITE_INPUT).sum()),
        overload_share=float(joined["overload_share"].mean())
        if "overload_share" in joined
        else 0.0,
        step=float(joined["step"].mean()) if "step" in joined else None,
        token_counts=[float(count) for count in counts],
    )
