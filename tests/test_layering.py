"""Imports point one way, nothing heavy is imported by accident, and nothing happens at import."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "qmoe_jax"

# In the order of the data flow; a module imports only from its own layer and those before it.
LAYERS = (
    ("errors", "run_folder", "host_threads"),
    ("codec",),
    ("checkpoints",),
    ("quantization",),
    ("ops",),
    ("models",),
    ("calibration",),
    ("evaluation",),
    ("pipeline",),
    ("gin_flags", "demo_report", "infer_report", "prompt_files"),
    (
        "compress",
        "evaluate",
        "infer",
        "prepare_tokens",
        "demo",
        "inspect",
        "plan",
        "convert_published",
        "dequantize",
        "t5x_plugin",
    ),
)
# What a GPU machine runs: it has no TensorFlow.
FREE_OF_TENSORFLOW = (
    "errors",
    "run_folder",
    "host_threads",
    "codec",
    "checkpoints",
    "quantization",
    "ops",
    "models",
    "evaluation",
)


def module_name(path):
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def layer_of(name):
    for index, prefixes in enumerate(LAYERS):
        if any(name == prefix or name.startswith(prefix + ".") for prefix in prefixes):
            return index
    raise AssertionError(f"{name} belongs to no layer; add it to LAYERS")


def imports(path):
    """Modules imported anywhere in a file, as dotted names."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


MODULES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


@pytest.mark.parametrize("path", MODULES, ids=module_name)
def test_imports_point_one_way(path):
    name = module_name(path)
    own = layer_of(name)
    for imported in imports(path):
        if imported.startswith("qmoe_jax."):
            target = imported.removeprefix("qmoe_jax.")
            assert layer_of(target) <= own, f"{name} imports {imported}, which comes after it"


@pytest.mark.parametrize("path", MODULES, ids=module_name)
def test_forbidden_imports(path):
    name = module_name(path)
    roots = {imported.split(".")[0] for imported in imports(path)}
    if name != "gin_flags":
        assert "gin" not in roots, "only gin_flags imports gin"
    if name.split(".")[0] in FREE_OF_TENSORFLOW:
        assert not roots & {"tensorflow", "seqio", "tensorflow_datasets", "t5x", "torch"}


def test_importing_the_package_is_light():
    heavy = "('jax', 'flax', 'tensorflow', 'seqio', 'gin', 'cupy', 'numba')"
    code = f"import sys, qmoe_jax; print([m for m in {heavy} if m in sys.modules])"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[]"


def test_running_a_model_needs_neither_tensorflow_nor_gin():
    code = (
        "import sys, qmoe_jax; "
        "qmoe_jax.SwitchConfig, qmoe_jax.SwitchTransformer, qmoe_jax.open_t5x_checkpoint, "
        "qmoe_jax.load_switch, qmoe_jax.compress; "
        "print([m for m in ('tensorflow', 'seqio', 'gin', 'cupy', 'torch') if m in sys.modules])"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[]"
