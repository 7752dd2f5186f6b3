"""Sub-1-bit compression and exact inference of Mixture-of-Experts models in JAX."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qmoe_jax.calibration.tokens import read_tokens as read_tokens
    from qmoe_jax.checkpoints.t5x import open_t5x_checkpoint as open_t5x_checkpoint
    from qmoe_jax.config import SwitchConfig as SwitchConfig
    from qmoe_jax.errors import CheckpointError as CheckpointError
    from qmoe_jax.errors import CodecError as CodecError
    from qmoe_jax.errors import CudaError as CudaError
    from qmoe_jax.errors import TokensError as TokensError
    from qmoe_jax.evaluation.evaluate import evaluate as evaluate
    from qmoe_jax.evaluation.metrics import LossReport as LossReport
    from qmoe_jax.generation.text import Vocabulary as Vocabulary
    from qmoe_jax.generation.text import generate as generate
    from qmoe_jax.models.load import load_switch as load_switch
    from qmoe_jax.models.switch import SwitchTransformer as SwitchTransformer
    from qmoe_jax.pipeline.compress import compress as compress
    from qmoe_jax.pipeline.report import CompressionReport as CompressionReport
    from qmoe_jax.quantization.settings import CompressionSettings as CompressionSettings
    from qmoe_jax.training.finetune import finetune as finetune
    from qmoe_jax.training.finetune import recover as recover
    from qmoe_jax.training.settings import FinetuneSettings as FinetuneSettings

__version__ = "0.1.0"
__all__ = [
    "CheckpointError",
    "CodecError",
    "CompressionReport",
    "CompressionSettings",
    "CudaError",
    "FinetuneSettings",
    "LossReport",
    "SwitchConfig",
    "SwitchTransformer",
    "TokensError",
    "Vocabulary",
    "compress",
    "evaluate",
    "finetune",
    "generate",
    "load_switch",
    "open_t5x_checkpoint",
    "read_tokens",
    "recover",
]

# Where each public name is defined: imported on first use, so that `import qmoe_jax` alone imports
# neither JAX nor Flax.
_HOMES = {
    "CheckpointError": "errors",
    "CodecError": "errors",
    "CompressionReport": "pipeline.report",
    "CompressionSettings": "quantization.settings",
    "CudaError": "errors",
    "FinetuneSettings": "training.settings",
    "LossReport": "evaluation.metrics",
    "SwitchConfig": "config",
    "SwitchTransformer": "models.switch",
    "TokensError": "errors",
    "Vocabulary": "generation.text",
    "compress": "pipeline.compress",
    "evaluate": "evaluation.evaluate",
    "finetune": "training.finetune",
    "generate": "generation.text",
    "load_switch": "models.load",
    "open_t5x_checkpoint": "checkpoints.t5x",
    "read_tokens": "calibration.tokens",
    "recover": "training.finetune",
}

if not TYPE_CHECKING:  # which would take it as leave to accept any name, misspelt ones too

    def __getattr__(name: str) -> Any:
        """Import a public name on first use."""
        if name not in _HOMES:
            raise AttributeError(f"module 'qmoe_jax' has no attribute {name!r}")
        return getattr(importlib.import_module(f"qmoe_jax.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    """List the public names, for completion."""
    return sorted([*globals(), *_HOMES])
