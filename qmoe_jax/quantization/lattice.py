"""The lattice grid: all multiples of a step that differs by input feature, for entropy coding.

Where codes are stored at their entropy, a grid need not have few values. What a weight may cost is
then decided by the step alone, and the steps can follow what a feature matters. With the damped
Hessian H = V V^T of `gptq.py` (V upper triangular) the errors of a sweep are e = V^T d: an error
d_j of column j, taken after the columns before it, is worth (V_jj d_j)^2, where V_jj^2 is the
energy of input feature j that the features after it do not explain. Rounding to multiples of s_j
gives an error of about s_j^2 / 12, so the layer error is sum_j (V_jj s_j)^2 / 12, while a code
costs log2(1 / s_j) bits but for a constant. Least error at a given number of bits: V_jj s_j is the
same for all j (reverse water-filling over a triangular factor), hence

    s_j = c * rms(W) * geometric_mean_j(V_jj) / V_jj

with one number c, the step in units of the kernel's weights: comparable between kernels and
experts, and 0.5 bit a weight at about c = 5. Rounding with feedback is Babai's nearest plane
algorithm on the lattice whose basis is V^T diag(s) (arXiv 2507.18553), which is why steps chosen
from its diagonal fit it. The idea is WaterSIC's (arXiv 2603.04956); scaling and stored form are our
own. Features of little energy get steps so large that all their codes are zero.

**Range.** Codes are not clipped but for the range of a byte, -127 to 127: overload is what hurts
most. What lies at the ends is counted and reported.

**Stored form.** A step is `origin * 2^(-index / 16)`: a byte a feature, 16 octaves, steps at most
2.2 % from what they should be; codes are chosen for the step as stored. V_jj^2 lies between the
damping and the trace of H, so that a Hessian of 3,072 features damped by 0.1 of its mean diagonal
spans 8 octaves.

**Unbiased outputs.** Weights near zero are rounded to it more often than feedback makes good, and
outputs shrink by a percent or so. After the sweep `origin` is multiplied by the gain of the expert
at which <W q, W>_H = <W, W>_H. A gain a row instead: on the demo model KL 0.00206 against 0.00207
at c = 4, 0.00371 against 0.00376 at c = 5, for 8 to 16 bits a row, which steps use better. A fixed
offset of 0.1 step on every value that is not zero doubled the KL.
"""

import dataclasses
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

from qmoe_jax.codec.lattice_values import MAX_ORIGIN, STEP_TABLE, STEPS_AN_OCTAVE, multiples

MAX_CODE = 127
"""The largest multiple that a code stands for."""
_MIN_NORMAL = 1.1754943508222875e-38
_MAX_ORIGIN = MAX_ORIGIN / 2
"""A gain of two leaves it at what the stored form allows (FORMAT.md)."""
MAX_INDEX = 254
"""The largest index of a step: 255 stands for a column of zeros (FORMAT.md)."""

OVERLOAD_CODE = 2 * MAX_CODE - 1
"""Codes from here on are -127 and 127: weights that were clipped, or just fit."""


class Steps(NamedTuple):
    """What is stored beside the codes of a kernel; of several with a leading axis.

    Attributes:
      index: uint8 `[in]`, of the step of each input feature in `STEP_TABLE`.
      origin: float32, the step of index 0.
    """

    index: UInt8[Array | np.ndarray, "*experts in"]
    origin: Float[Array | np.ndarray, "*experts"]

    @property
    def values(self) -> Float[Array, "*experts in"]:
        """Steps, float32."""
        return jnp.asarray(self.origin)[..., None] * jnp.asarray(STEP_TABLE)[self.index]


@dataclasses.dataclass(frozen=True)
class Lattice:
    """Multiples of a step by input feature.

    levels: `Steps`.
    codes: 0 is the multiple 0, 2 k - 1 is -k and 2 k is k, for k up to 127.
    """

    name: str = dataclasses.field(default="lattice", init=False)
    num_codes: int = dataclasses.field(default=2 * MAX_CODE + 1, init=False)
    has_steps: bool = dataclasses.field(default=True, init=False)

    def fit_kernel(
        self,
        kernel: Float[Array, "in out"],
        factor_diagonal: Float[Array, " in"],
        step: float | Float[Array, ""],
        group_size: int | None,
    ) -> Steps:
        """Return steps c rms(W) geometric_mean(V_jj) / V_jj, rounded to their stored form."""
        refuse_groups(group_size)
        return self.steps(root_mean_square(kernel), factor_diagonal, step)

    def steps(
        self,
        weight: Float[Array, ""],
        factor_diagonal: Float[Array, " in"],
        step: float | Float[Array, ""],
    ) -> Steps:
        """Return the steps of a kernel whose root mean square is `weight`."""
        log_inverse = -jnp.log2(factor_diagonal)
        least = jnp.max(log_inverse)
        index = jnp.clip(jnp.round(STEPS_AN_OCTAVE * (least - log_inverse)), 0, MAX_INDEX)
        origin = step * weight * jnp.exp2(least - jnp.mean(log_inverse))
        # A kernel of zeros: any step will do.
        origin = jnp.where(origin >= _MIN_NORMAL, jnp.minimum(origin, _MAX_ORIGIN), 1.0)
        return Steps(index.astype(jnp.uint8), origin.astype(jnp.float32))

    def of_groups(self, levels: Steps, num_out: int) -> Float[Array, "in 1 1"]:
        """Return the step of each input feature: a group of its own, the same for all rows."""
        return levels.values[:, None, None]

    def quantize(
        self, weights: Float[Array, "*columns out"], numbers: Float[Array, "1 1"]
    ) -> UInt8[Array, "*columns out"]:
        """Return the nearest multiple, ties to the even one, as its code."""
        multiple = jnp.clip(jnp.round(weights * (1 / numbers[:, 0])), -MAX_CODE, MAX_CODE)
        return jnp.where(multiple < 0, -2 * multiple - 1, 2 * multiple).astype(jnp.uint8)

    def dequantize(
        self, codes: UInt8[Array, "*columns out"], numbers: Float[Array, "1 1"]
    ) -> Float[Array, "*columns out"]:
        """Return multiple times step."""
        return multiples(codes).astype(jnp.float32) * numbers[:, 0]

    def scaled(self, levels: Steps, gain: Float[Array, ""]) -> Steps:
        """Return the steps times the gain."""
        return Steps(levels.index, levels.origin * gain)


def refuse_groups(group_size: int | None) -> None:
    """Raise ValueError where a group size is given."""
    if group_size is not None:
        raise ValueError(
            f"group_size is {group_size}, but the lattice has a step for each input feature and "
            'nothing that a group could share; leave it None, or choose grid="ternary" or "2bit"'
        )


def root_mean_square(kernel: Float[Array, "in out"]) -> Float[Array, ""]:
    """Return the root mean square of a kernel; its squares may overflow."""
    largest = jnp.max(jnp.abs(kernel), initial=0.0)
    unit = jnp.where(largest > 0, largest, 1.0)
    return unit * jnp.sqrt(jnp.mean(jnp.square(kernel / unit)))


class Overlap(NamedTuple):
    """Products of a kernel W and of its error d = W - Q, of weights or, under H, of outputs.

    Attributes:
      own: <W, W>.
      cross: <W, d>.
      error: <d, d>.
    """

    own: Float[Array | np.ndarray, "*experts"]
    cross: Float[Array | np.ndarray, "*experts"]
    error: Float[Array | np.ndarray, "*experts"]

    @property
    def unbiased_gain(self) -> Float[Array, "*experts"]:
        """<W, W> / <W, Q>, but at most 2: a kernel of which hardly a code is left stays so."""
        shared = self.own - self.cross
        gain = self.own / jnp.where(shared > 0, shared, 1.0)
        usable = (shared > 0) & jnp.isfinite(gain)
        return jnp.where(usable, jnp.clip(gain, 0.5, 2.0), 1.0)

    def error_at(self, gain: Float[Array, "*experts"]) -> Float[Array, "*experts"]:
        """Return the error <W - gain Q, W - gain Q>."""
        more = gain - 1
        codes = self.own - 2 * self.cross + self.error
        return jnp.asarray(self.error - 2 * more * (self.cross - self.error) + more**2 * codes)
