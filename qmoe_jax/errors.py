"""Errors that bad input raises. A message names the value, the requirement and the remedy."""


class CheckpointError(ValueError):
    """A checkpoint is missing, truncated, mis-shaped, holds NaN, or is of an unknown version."""


class CodecError(ValueError):
    """Codes, levels or offsets do not form a valid compressed tensor."""


class TokensError(ValueError):
    """A token file is missing, truncated or does not fit the model."""


class CudaError(ValueError):
    """The CUDA kernels cannot do what is asked: no GPU, no CuPy, or a case they do not have."""


def one_line(error: BaseException) -> str:
    """Return an error's message without line breaks, as commands print it."""
    return " ".join(str(error).split()) or repr(error)
