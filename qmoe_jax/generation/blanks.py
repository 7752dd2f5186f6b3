"""When all blanks of a prompt are filled: what is generated after that changes no answer.

A span follows its sentinel and ends at the next. So an answer is complete with the sentinel that
comes after those of all blanks, and T5's models, which were trained to close their targets with one
more sentinel or eos, seldom stop at once.
"""

import dataclasses
from collections.abc import Sequence

import flax.struct
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int


@flax.struct.dataclass
class Blanks:
    """What is still to be filled, row by row. Shapes depend on the vocabulary alone.

    Attributes:
      sentinels: int32 [sentinels], ids of all sentinels of the vocabulary.
      open: bool [rows, sentinels], blanks whose sentinel was not generated yet.
      any: bool [rows], whether the prompt has blanks; without any an answer ends with eos.
    """

    sentinels: Array
    open: Array
    any: Array


def blanks_of(
    prompts: Int[np.ndarray, "rows length"], sentinels: Sequence[int], repeats: int = 1
) -> Blanks:
    """Find the blanks of prompts; each stands for `repeats` rows."""
    ids = np.asarray(sentinels, np.int32)
    found = np.repeat((prompts[:, :, None] == ids).any(axis=1), repeats, axis=0)
    return Blanks(jnp.asarray(ids), jnp.asarray(found), jnp.asarray(found.any(axis=1)))


def fill(blanks: Blanks, token: Int[Array, "rows"]) -> tuple[Blanks, Bool[Array, "rows"]]:
    """Take a generated token of each row; return what is left, and which rows are filled by it."""
    matches = token[:, None] == blanks.sentinels
    filled = blanks.any & ~jnp.any(blanks.open, axis=1) & jnp.any(matches, axis=1)
    return dataclasses.replace(blanks, open=blanks.open & ~matches), filled


def until_filled(
    tokens: Sequence[int], prompt: Sequence[int], sentinels: Sequence[int]
) -> tuple[int, ...]:
    """Return generated tokens up to the sentinel that completes the answer, and with it.

    This is `fill`, plainly, for one row on the host.
    """
    missing = set(sentinels) & set(prompt)
    has_blanks = bool(missing)
    for count, token in enumerate(tokens, 1):
        if has_blanks and not missing and token in sentinels:
            return tuple(tokens[:count])
        missing.discard(token)
    return tuple(tokens)
