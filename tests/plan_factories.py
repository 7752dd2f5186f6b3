"""What plans are made of, and the published numbers they are compared with."""

from qmoe_jax.planning.inputs import ModelFacts, TokenFacts
from qmoe_jax.planning.memory import Resources
from qmoe_jax.planning.public_checkpoints import devices, public_checkpoint

# The QMoE paper (arXiv 2310.16795), "Compression rates and sizes for ternary models": experts'
# compression, GB in bfloat16, GB compressed.
PAPER_SIZES = {
    "switch_base_128": (17.06, 14.9, 1.27),
    "switch_large_128": (18.34, 52.7, 3.96),
    "switch_c_2048": (20.07, 3142.0, 158.6),
}
# T5X docs/models.md, "Converted Mesh Tensorflow checkpoints": gin file of flaxformer, location
# under gs://t5-data/pretrained_models/t5x/moe/switch_classic/.
T5X_DOCUMENTATION = {
    "switch_base_8": ("switch_base.gin", "base/e8/checkpoint_500100"),
    "switch_base_16": ("switch_base.gin", "base/e16/checkpoint_550000"),
    "switch_base_32": ("switch_base.gin", "base/e32/checkpoint_550000"),
    "switch_base_64": ("switch_base.gin", "base/e64/checkpoint_550000"),
    "switch_base_128": ("switch_base.gin", "base/e128/checkpoint_550000"),
    "switch_base_256": ("switch_base.gin", "base/e256/checkpoint_550000"),
    "switch_large_128": ("switch_large.gin", "large/e128/checkpoint_483100"),
    "switch_xxl_128": ("switch_xxl.gin", "xxl/e128/checkpoint_634600"),
    "switch_c_2048": ("switch_c.gin", "c/e2048/checkpoint_611800"),
}


def facts(name="switch_base_128"):
    return ModelFacts.from_registry(public_checkpoint(name), "float32")


def some_tokens(count=1000, validation=0):
    lengths = {"encoder": 512, "decoder": 114}
    return TokenFacts.from_means(
        count, validation, {s: float(n) for s, n in lengths.items()}, lengths
    )


def resources(device="h100", **changes):
    found = devices()[device]
    return Resources(device=found, device_bytes=found.memory_bytes, **changes)
