"""Errors that bad input raises. A message names the value, the requirement and the remedy."""


class CheckpointError(ValueError):
    """A checkpoint is missing, truncated, mis-shaped, holds NaN, or is of an unknown version."""


class CodecError(ValueError):
    """Codes, levels or offsets do not form a valid compressed tensor."""


class TokensError(ValueError):
    """A token file is missing, truncated or does not fit the model."""
