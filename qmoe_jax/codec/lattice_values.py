"""What codes of the lattice stand for: multiples of a step (FORMAT.md, "Coding `lattice`")."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32, Int, UInt8

from qmoe_jax.codec.lattice_choices import NUM_STEPS

MAX_ORIGIN = 2.0**119
"""Origins are at most this, so that 127 steps stay finite."""
STEPS_AN_OCTAVE = 16
STEP_TABLE: Float32[np.ndarray, "256"] = np.exp2(-np.arange(NUM_STEPS) / STEPS_AN_OCTAVE).astype(
    np.float32
)
"""Steps by index, in units of the origin."""


def multiples(codes: UInt8[Array, "*shape"]) -> Int[jax.Array, "*shape"]:
    """Return the signed multiples that codes stand for, int32."""
    half = (codes.astype(jnp.int32) + 1) >> 1
    return jnp.where(codes & 1, -half, half)
