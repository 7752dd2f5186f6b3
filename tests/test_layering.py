"""Imports point one way, nothing heavy is imported by accident, and nothing happens at import."""

import ast
import builtins
import subprocess
import symtable
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "qmoe_jax"

# In the order of the data flow; a module imports only from its own layer and those before it.
LAYERS = (
    (
        "errors",
        "atomic_file",
        "captured_stderr",
        "config",
        "formatting",
        "host_threads",
        "outputs",
        "page",
        "paths",
        "plots",
        "progress",
        "resources",
        "run_folder",
        "varying",
    ),
    ("codec",),
    ("checkpoints",),
    ("quantization",),
    ("ops",),
    ("models",),
    ("generation",),
    ("calibration",),
    ("evaluation",),
    ("training",),
    ("pipeline",),
    ("planning",),
    ("demo", "t5x_plugin"),
    ("cli", "__main__"),
)
# What a GPU machine runs: it has no TensorFlow.
FREE_OF_TENSORFLOW = (
    "errors",
    "atomic_file",
    "captured_stderr",
    "config",
    "formatting",
    "host_threads",
    "progress",
    "resources",
    "run_folder",
    "varying",
    "codec",
    "checkpoints",
    "quantization",
    "ops",
    "models",
    "generation",
    "evaluation",
    "training",
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
    if name != "cli.flags":
        assert "gin" not in roots, "only cli.flags imports gin"
    if name != "calibration.text_packages" and not name.startswith("t5x_plugin"):
        packages = {"tensorflow", "seqio", "tensorflow_datasets"}
        assert not roots & packages, "only calibration.text_packages imports them, without noise"
    if name.split(".")[0] in FREE_OF_TENSORFLOW:
        assert not roots & {"tensorflow", "seqio", "tensorflow_datasets", "t5x", "torch"}


@pytest.mark.parametrize("path", MODULES, ids=module_name)
def test_little_of_the_pipeline_knows_codecs(path):
    name = module_name(path)
    if name.startswith("pipeline.") and name not in (
        "pipeline.layer_store",
        "pipeline.stored_codes",
    ):
        assert not [i for i in imports(path) if i.startswith("qmoe_jax.codec")]


@pytest.mark.parametrize("path", [*MODULES, PACKAGE / "__init__.py"], ids=module_name)
def test_only_resources_looks_at_its_own_path(path):
    if module_name(path) != "resources":
        names = {n.id for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Name)}
        assert "__file__" not in names


def undefined_names(table, module):
    """Names that nothing defines, in a scope and those in it."""
    defined = {
        symbol.get_name()
        for symbol in module.get_symbols()
        if symbol.is_assigned() or symbol.is_imported() or symbol.is_namespace()
    }
    for symbol in table.get_symbols():
        known = symbol.get_name() in defined or hasattr(builtins, symbol.get_name())
        if symbol.is_referenced() and symbol.is_global() and not known:
            yield symbol.get_name()
    for child in table.get_children():
        yield from undefined_names(child, module)


# Linters cannot be asked: to them the shape strings of jaxtyping are undefined names.
@pytest.mark.parametrize("path", [*MODULES, PACKAGE / "__init__.py"], ids=module_name)
def test_every_name_is_defined(path):
    table = symtable.symtable(path.read_text(), str(path), "exec")
    assert not set(undefined_names(table, table)) - {"__file__"}


def test_the_search_for_undefined_names_finds_them():
    code = "import a\ndef f(x: 'n'):\n  b = [a(c) for c in x]\n  return lambda: b + missing"
    table = symtable.symtable(code, "code", "exec")
    assert list(undefined_names(table, table)) == ["missing"]


def test_no_circle_of_imports():
    graph = {module_name(path): set() for path in MODULES}
    for path in MODULES:
        for node in ast.parse(path.read_text()).body:  # at the top only: these run on import
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("qmoe_jax"):
                base = node.module.removeprefix("qmoe_jax").lstrip(".")
                for alias in node.names:
                    full = f"{base}.{alias.name}" if base else alias.name
                    target = full if full in graph else base
                    if target in graph:
                        graph[module_name(path)].add(target)
    state: dict[str, str] = {}

    def visit(name, trail):
        assert state.get(name) != "open", f"circle: {' -> '.join([*trail, name])}"
        if name in state:
            return
        state[name] = "open"
        for target in sorted(graph[name]):
            visit(target, [*trail, name])
        state[name] = "done"

    for name in sorted(graph):
        visit(name, [])


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
