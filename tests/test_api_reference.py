"""The API reference: a page for every module, signatures with shapes, and nothing that warns."""

import html
import inspect
import os
import re
import subprocess
import sys
import typing
from pathlib import Path

import jax
import numpy as np
import pytest

import qmoe_jax

pytest.importorskip("pdoc", reason="needs pdoc: pip install qmoe-jax[docs]")

REPOSITORY = Path(__file__).parent.parent
PACKAGE = REPOSITORY / "qmoe_jax"
# Flax adds these to each module, and Python to each class of a dataclass or tuple.
FLAX_FIELDS = {"parent", "name", "scope"}


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """Built as `make docs` builds it: there a warning is an error."""
    folder = tmp_path_factory.mktemp("api")
    result = subprocess.run(
        [sys.executable, "docs/build_api.py", folder],
        capture_output=True,
        text=True,
        cwd=REPOSITORY,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert "Warning" not in result.stderr
    return folder


def page(reference, module):
    """The HTML of a module's page without source code."""
    text = (reference / (module.replace(".", "/") + ".html")).read_text()
    text = text[text.index("<main") : text.index("</main>") + len("</main>")]
    return re.sub(r'<div class="pdoc-code.*?</div>', "", text, flags=re.DOTALL)


def text_of(fragment):
    text = html.unescape(re.sub(r"<[^>]+>", "", fragment))
    return re.sub(r"\s+", " ", text.replace("View Source", ""))


def entry(reference, module, name):
    """The HTML of one function or class on a module's page, without its members."""
    found = re.search(
        rf'<(section|div) id="{re.escape(name)}".*?(?=<section id=|<div id=|</main>)',
        page(reference, module),
        re.DOTALL,
    )
    assert found, f"{module} has no entry for {name}"
    return found[0]


def modules():
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = ("qmoe_jax", *path.relative_to(PACKAGE).with_suffix("").parts)
        name = ".".join(parts).removesuffix(".__init__")
        # One needs T5X, and to import the other is to run a command.
        if not name.startswith("qmoe_jax.t5x_plugin") and name != "qmoe_jax.__main__":
            yield name


def test_every_module_has_a_page(reference):
    pages = {p.relative_to(reference).with_suffix("").as_posix() for p in reference.rglob("*.html")}
    expected = {name.replace(".", "/") for name in modules()}
    assert pages - {"index"} == expected


@pytest.mark.parametrize("name", qmoe_jax.__all__)
def test_a_public_name_is_on_the_front_page(reference, name):
    public = getattr(qmoe_jax, name)
    shown = entry(reference, "qmoe_jax", name)
    (link,) = re.findall(rf'<a class="name" href="([^"#]+)#{name}">{name}</a>', shown)
    assert f'id="{name}"' in (reference / link).read_text()
    summary = inspect.getdoc(public).partition("\n\n")[0]
    assert " ".join(summary.replace("`", "").split()) in text_of(shown)
    if inspect.isclass(public) and issubclass(public, Exception):
        assert "args" not in text_of(shown)
        return
    parameters = set(inspect.signature(public).parameters) - FLAX_FIELDS
    signature = text_of(shown).partition(summary)[0]
    assert [p for p in sorted(parameters) if not re.search(rf"\b{p}: ", signature)] == []


@pytest.mark.parametrize(
    ("module", "name", "shape"),
    [
        ("models.load", "load_switch", "returns float32 logits [batch, length, vocab]"),
        (
            "models.switch",
            "SwitchTransformer.__call__",
            "encoder_input_tokens: Int[Array | np.ndarray, 'batch encoder_length']",
        ),
        ("models.switch", "SwitchTransformer.__call__", "-> Float[Array, 'batch length vocab']"),
        ("models.moe", "MoeLayer.__call__", "Float[Array, 'batch length embed']"),
        ("evaluation.metrics", "evaluate_loss", "each int32 [batch, length]"),
        ("evaluation.metrics", "LossReport", "num_target_tokens: int64 [examples]"),
        ("ops.products", "compressed_product", "x: Float[Array, 'tokens in']"),
        ("ops.products", "compressed_product", "-> Float[Array, 'tokens out']"),
        ("checkpoints.t5x", "T5XCheckpoint.read_experts", "-> Float[np.ndarray, 'experts in out']"),
        (
            "calibration.tokens",
            "TokenBatch",
            "encoder_input_tokens: int32 [examples, inputs_length]",
        ),
        ("generation.step", "Generated", "tokens: int32 [batch, num_decodes, max_decode_length]"),
    ],
)
def test_shapes_are_readable(reference, module, name, shape):
    assert shape in text_of(entry(reference, f"qmoe_jax.{module}", name))


@pytest.mark.parametrize("module", list(modules()))
def test_annotations_and_sections_are_rendered(reference, module):
    shown = page(reference, module)
    text = re.sub(r"\(typing\.\w+\):", "", text_of(shown))  # a base, as of `Launcher`
    for leftover in ("jaxtyping.", "jaxlib.", "jax._src", "typing.", "Union[", "_Sentinel"):
        assert leftover not in text, leftover
    # A section that pdoc did not recognise is a paragraph like any other.
    assert not re.search(r"(Args|Returns|Raises|Attributes|Yields):\s*(</p>|\w)", shown)


def test_sections_of_a_docstring_are_lists(reference):
    shown = entry(reference, "qmoe_jax.models.load", "load_switch")
    headings = re.findall(r"<h6[^>]*>(.*?):</h6>", shown)
    assert headings == ["Arguments", "Returns", "Raises"]
    assert "<li><strong>CheckpointError:</strong>" in shown.replace("\n", "")


# --- What is reachable from the public names says shapes and dtypes ---


def test_what_public_names_lead_to_states_shapes_and_dtypes():
    silent = []
    for owner, name, annotation, documentation in reachable_annotations():
        stated = re.search(
            rf"^\s*{name}: .*\b(int|float|bool|bfloat|uint|key|scalar|number)\w*\b",
            documentation,
            re.M,
        )
        if is_bare_array(annotation) and not stated:
            silent.append(f"{owner}: {name}")
    assert silent == []


def reachable_annotations():
    """Yields owner, name, annotation and docstring of all parameters, results and fields."""
    waiting = [getattr(qmoe_jax, name) for name in qmoe_jax.__all__]
    seen = set()
    while waiting:
        found = waiting.pop()
        if found in seen:
            continue
        seen.add(found)
        for owner, name, annotation, documentation in annotations_of(found):
            waiting += classes_in(annotation)
            yield owner, name, annotation, documentation


def annotations_of(found):
    if not inspect.isclass(found):
        yield from annotations_of_function(found.__qualname__, found)
        return
    for name, annotation in inspect.get_annotations(found).items():
        if not name.startswith("_") and name not in FLAX_FIELDS:
            yield found.__qualname__, name, annotation, found.__doc__ or ""
    for name, member in vars(found).items():
        function = getattr(member, "fget", None) or getattr(member, "__func__", member)
        public = name == "__call__" or not name.startswith("_")
        if public and inspect.isfunction(inspect.unwrap(function)):
            yield from annotations_of_function(f"{found.__qualname__}.{name}", function)


def annotations_of_function(owner, function):
    signature = inspect.signature(function)
    documentation = inspect.getdoc(function) or ""
    for parameter in signature.parameters.values():
        yield owner, parameter.name, parameter.annotation, documentation
    yield owner, "return", signature.return_annotation, documentation


def classes_in(annotation):
    if inspect.isclass(annotation) and annotation.__module__.startswith("qmoe_jax."):
        yield annotation
    for argument in typing.get_args(annotation):
        for inner in argument if isinstance(argument, list) else [argument]:
            yield from classes_in(inner)


def is_bare_array(annotation):
    """Whether this has an array somewhere whose shape the annotation leaves open."""
    if annotation in (jax.Array, np.ndarray):
        return True
    return any(map(is_bare_array, typing.get_args(annotation)))
