"""TensorFlow, and the packages that import it, without the lines that TensorFlow starts with.

It tells of its optimisations, and of CUDA that it did not find, before it heeds any setting. All of
the package's own imports of these go through here.
"""

import contextlib
import os
import sys
from typing import Any

from qmoe_jax.captured_stderr import captured_stderr


def tensorflow() -> Any:
    """Import TensorFlow."""
    _import_tensorflow()
    import tensorflow

    return tensorflow


def seqio() -> Any:
    """Import seqio."""
    _import_tensorflow()
    import seqio

    return seqio


def tensorflow_datasets() -> Any:
    """Import TensorFlow Datasets."""
    _import_tensorflow()
    import tensorflow_datasets

    return tensorflow_datasets


def hide_gpus() -> None:
    """Keep TensorFlow, which only reads text here, from reserving a whole GPU when it looks at it.

    It stays as it is where the caller has used TensorFlow before.
    """
    tf = tensorflow()
    with captured_stderr(), contextlib.suppress(RuntimeError):
        tf.config.set_visible_devices([], "GPU")


def _import_tensorflow() -> None:
    if "tensorflow" not in sys.modules:
        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # of what it logs later; errors raise
        with captured_stderr():
            import tensorflow  # noqa: F401
