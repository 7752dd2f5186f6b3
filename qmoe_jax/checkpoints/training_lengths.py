"""The lengths that a checkpoint was trained with, from the gin file that T5X left beside it.

A model reads text of other lengths badly. No weight tells them: T5X writes its configuration to
`config.gin` in the folder that has the `checkpoint_<step>` folders.
"""

import ast
import dataclasses
import os
import re

from qmoe_jax.checkpoints.storage import Folder, kvstore_spec, make_context

_FILES = ("config.gin", "operative_config.gin")
# As gin writes a value: on the same line, or behind a backslash on the next.
_VALUE = r"\s*=\s*(?:\\\s*\n\s*)?(\{[^{}]*\})"
_BINDINGS = (
    re.compile(r"^TASK_FEATURE_LENGTHS" + _VALUE, re.MULTILINE),
    re.compile(r"^(?:train/)?[\w./]*DatasetConfig\.task_feature_lengths" + _VALUE, re.MULTILINE),
)


@dataclasses.dataclass(frozen=True)
class TrainingLengths:
    """Tokens of a training example.

    Attributes:
      inputs: of the encoder.
      targets: of the decoder.
      source: the file that says so.
    """

    inputs: int
    targets: int
    source: str


def training_lengths(path: str | os.PathLike[str]) -> TrainingLengths | None:
    """Find the lengths that a checkpoint was trained with; None where no gin file tells them.

    Args:
      path: a checkpoint, or the folder that has its steps; local or gs://.

    Raises:
      CheckpointError: a file is there and cannot be read.
    """
    folder = Folder(kvstore_spec(path), make_context(cache_bytes=0))
    for _ in range(3):  # an Orbax checkpoint is `state` in its folder, which is in the model's
        for name in _FILES:
            content = folder.read(name)
            lengths = None if content is None else lengths_of(content.decode(errors="replace"))
            if lengths is not None:
                return TrainingLengths(*lengths, f"{folder.url}/{name}")
        if not re.fullmatch(r"checkpoint_\d+|state", folder.name):
            break
        folder = folder.parent()
    return None


def lengths_of(text: str) -> tuple[int, int] | None:
    """Return the lengths of inputs and targets that a gin file binds; None where it does not."""
    for binding in _BINDINGS:
        for match in binding.finditer(text):
            try:
                value = ast.literal_eval(match[1])
                found = value["inputs"], value["targets"]
            except (ValueError, SyntaxError, KeyError, TypeError):
                continue
            if all(type(length) is int and length > 0 for length in found):
                return found
    return None
