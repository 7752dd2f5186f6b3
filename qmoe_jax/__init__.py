"""Sub-1-bit compression and exact inference of Mixture-of-Experts models in JAX."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qmoe_jax.checkpoints.t5x import open_t5x_checkpoint
    from qmoe_jax.config import SwitchConfig
    from qmoe_jax.models.load import load_switch
    from qmoe_jax.models.switch import SwitchTransformer
    from qmoe_jax.pipeline.compress import compress

__version__ = "0.1.0"
__all__ = ["SwitchConfig", "SwitchTransformer", "compress", "load_switch", "open_t5x_checkpoint"]

_HOMES = {
    "SwitchConfig": "qmoe_jax.config",
    "SwitchTransformer": "qmoe_jax.models.switch",
    "compress": "qmoe_jax.pipeline.compress",
    "load_switch": "qmoe_jax.models.load",
    "open_t5x_checkpoint": "qmoe_jax.checkpoints.t5x",
}


def __getattr__(name: str) -> Any:
    """Import a public name on first use: `import qmoe_jax` alone imports neither JAX nor Flax."""
    if name not in _HOMES:
        raise AttributeError(f"module 'qmoe_jax' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
