"""Access to tests/golden: what T5X wrote and what flaxformer computed. See golden/README.md."""

import functools
import io
import json
import lzma
import tarfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np

GOLDEN = Path(__file__).parent / "golden"
DEMO = GOLDEN / "switch_demo"
MODELS = ("base", "xxl", "c")

# Archives of a model, and the layouts in each.
ARCHIVES = {
    ("base", "t5x"): (
        "t5x_float32",
        "t5x_float32_inference",
        "t5x_float32_gcsspec",
        "t5x_float32_gfilespec",
        "t5x_float32_oldspec",
        "t5x_bfloat16",
    ),
    ("base", "t5x_multichunk"): ("t5x_float32_multichunk",),
    ("base", "orbax"): (
        "orbax_float32",
        "orbax_ocdbt_float32",
        "orbax_head_float32",
        "orbax_head_float32_inference",
        "orbax_head_bfloat16_inference",
    ),
    ("xxl", "t5x"): ("t5x_float32", "t5x_float32_inference", "t5x_bfloat16"),
    ("xxl", "orbax"): ("orbax_ocdbt_float32", "orbax_head_float32_inference"),
    ("c", "t5x"): ("t5x_float32", "t5x_float32_inference", "t5x_bfloat16"),
    ("c", "orbax"): ("orbax_ocdbt_float32", "orbax_head_float32_inference"),
}
LAYOUTS = tuple((model, layout) for (model, _), layouts in ARCHIVES.items() for layout in layouts)


def checkpoint_folder(model: str, layout: str, root: Path) -> Path:
    """Path of a `checkpoint_500100` folder under `root`, unpacked there on first use."""
    for (archive_model, archive), layouts in ARCHIVES.items():
        if archive_model == model and layout in layouts:
            folder = root / model / archive
            if not folder.exists():
                with tarfile.open(GOLDEN / f"switch_{model}" / f"{archive}.tar.xz") as tar:
                    tar.extractall(folder, filter="data")
            return folder / layout / "checkpoint_500100"
    raise KeyError(f"no golden checkpoint {(model, layout)}: LAYOUTS lists them")


@functools.cache
def load_golden(model: str) -> Mapping[str, np.ndarray]:
    """flaxformer's inputs and outputs: a mapping that decodes an array when it is asked for."""
    packed = (GOLDEN / f"switch_{model}" / "golden.npz.xz").read_bytes()
    return np.load(io.BytesIO(lzma.decompress(packed)))


@functools.cache
def load_gradients(model: str) -> Mapping[str, np.ndarray]:
    """T5X's training loss and its gradients, with names as in golden/README.md."""
    packed = (GOLDEN / f"switch_{model}" / "gradients.npz.xz").read_bytes()
    return np.load(io.BytesIO(lzma.decompress(packed)))


def thinned(name: str, gradient: np.ndarray) -> np.ndarray:
    """The elements of a gradient that `load_gradients` has, flat; of experts the first two."""
    if "/expert/" in name:
        gradient = gradient[:2]
    for most, kept in ((3000, 2000), (1000, 500)):
        flat = gradient.reshape(-1)
        gradient = flat[:: flat.size // kept] if flat.size > most else flat
    return gradient


def load_json(model: str, name: str) -> dict:
    """`name` is one of config, info and params_axes."""
    return json.loads((GOLDEN / f"switch_{model}" / f"{name}.json").read_text())


def demo_info() -> dict:
    return json.loads((DEMO / "info.json").read_text())
