"""Builds the API reference from the docstrings; a warning is an error.

    python docs/build_api.py build/api

Left out is `qmoe_jax.t5x_plugin`, which can be imported only where T5X is installed.
"""

import argparse
import collections.abc
import inspect
import re
import sys
import types
import typing
import warnings
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import pdoc
from markupsafe import Markup
from pdoc import render, render_helpers

TEMPLATES = Path(__file__).parent / "api"


def build(output: Path) -> int:
    """Write the pages; return their number.

    Raises:
      Warning: a module that cannot be imported, or a docstring that cannot be read.
    """
    import qmoe_jax

    # Where each public name is defined. There it is described; the front page leads to it.
    homes = [(name, getattr(qmoe_jax, name).__module__) for name in qmoe_jax.__all__]
    homes.sort(key=lambda home: home[1] == "qmoe_jax.errors")  # these come last
    del qmoe_jax.__all__  # pdoc would look for no other modules than those named there
    render.configure(
        docformat="google",
        footer_text=f"qmoe-jax {qmoe_jax.__version__}",
        template_directory=TEMPLATES,
    )
    render.env.globals |= {
        "annotation_text": annotation_text,
        "public_names": homes,
        "value_text": _value_text,
        "is_flax_field": _is_flax_field,
    }
    render.env.filters["format_signature"] = _format_signature
    render.env.filters["linkify"] = jinja2.pass_context(_linkify)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        # Modules import others; what those warn of is theirs.
        warnings.simplefilter("ignore", DeprecationWarning)
        pdoc.pdoc("qmoe_jax", "!qmoe_jax.t5x_plugin", output_directory=output)
    return len(list(output.rglob("*.html")))


def annotation_text(annotation: Any) -> str:
    """Write an annotation as its source has it: `Float[Array, 'batch length']`, `DTypeLike`.

    Classes of the package keep their full name, by which they are linked.
    """
    import jax
    from jax.typing import DTypeLike

    if isinstance(annotation, list):  # the arguments of a Callable
        return f"[{', '.join(map(annotation_text, annotation))}]"
    if isinstance(annotation, str):
        return annotation
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (typing.Union, types.UnionType):
        return _union_text(arguments, typing.get_args(DTypeLike))
    if origin is collections.abc.Callable:
        return f"Callable[{', '.join(map(annotation_text, arguments))}]"
    if origin is typing.Literal:
        return f"Literal[{', '.join(map(repr, arguments))}]"
    if origin is not None:
        return f"{annotation_text(origin)}[{', '.join(map(annotation_text, arguments))}]"
    if getattr(annotation, "__module__", None) == "jaxtyping":
        dtype = annotation.__name__.partition("[")[0]
        return f"{dtype}[{annotation_text(annotation.array_type)}, '{annotation.dim_str}']"
    written = {jax.Array: "Array", np.ndarray: "np.ndarray", type(None): "None", ...: "..."}
    if annotation in written:
        return written[annotation]
    if isinstance(annotation, type) and annotation.__module__.startswith("qmoe_jax."):
        return f"{annotation.__module__}.{annotation.__qualname__}"
    return getattr(annotation, "__name__", None) or str(annotation)


def _union_text(members: tuple[Any, ...], dtype_like: tuple[Any, ...]) -> str:
    """Join types by `|`, those of JAX's `DTypeLike` under that name, arrays of one shape as one."""
    names = [annotation_text(m) for m in members]
    if set(dtype_like) <= set(members):
        rest = [annotation_text(m) for m in members if m not in dtype_like]
        names = ["DTypeLike", *rest]
    text = " | ".join(names)
    return re.sub(
        r"(\w+)\[Array, ('[^']*')\] \| \1\[np.ndarray, \2\]", r"\1[Array | np.ndarray, \2]", text
    )


class _Text:
    """Text that stands in a signature as it is, without quotes."""

    def __init__(self, text: str):
        self._text = text

    def __repr__(self) -> str:
        return self._text


def _format_signature(signature: inspect.Signature, colon: bool) -> str:
    """Highlight a signature as pdoc does, with annotations and defaults as the source has them."""
    parameters = [
        parameter.replace(
            annotation=_annotation(parameter.annotation), default=_default(parameter.default)
        )
        for parameter in signature.parameters.values()
        # Flax adds `parent` and `name` to each module; nobody gives them.
        if "flax.linen.module._Sentinel" not in str(parameter.annotation)
        and not (parameter.name == "name" and "parent" in signature.parameters)
    ]
    shown = signature.replace(
        parameters=parameters, return_annotation=_annotation(signature.return_annotation)
    )
    return render_helpers.format_signature(shown, colon)


def _annotation(annotation: Any) -> Any:
    return (
        annotation if annotation is inspect.Signature.empty else _Text(annotation_text(annotation))
    )


def _default(default: Any) -> Any:
    """`jnp.float32` and `load_switch` rather than what Python prints of them."""
    if repr(default) == "<factory>":  # of a dataclass's field
        return _Text("...")
    if default is inspect.Signature.empty or not hasattr(default, "__name__"):
        return default
    prefix = "jnp." if default.__module__ == "jax.numpy" else ""
    return _Text(prefix + default.__name__)


def _value_text(variable: pdoc.doc.Variable) -> str:
    """Write the value of a variable: a name where it has one, a type as in a signature."""
    value = variable.default_value
    if typing.get_origin(value) or getattr(value, "__module__", None) == "jaxtyping":
        return annotation_text(value)
    shown = _default(value)
    text = repr(shown) if isinstance(shown, _Text) else variable.default_value_str
    return "..." if re.search(r"<function | object>", text) else text  # Python's own words


def _is_flax_field(doc: pdoc.doc.Doc[Any]) -> bool:
    """Whether this is an attribute that Flax adds to each of its modules."""
    from flax import linen

    owner = getattr(sys.modules[doc.modulename], doc.qualname.partition(".")[0], None)
    return (
        doc.name in ("name", "parent", "scope")
        and isinstance(owner, type)
        and issubclass(owner, linen.Module)
    )


def _linkify(context: Any, code: str, namespace: str = "", shorten: bool = True) -> str:
    """Link names as pdoc does; in signatures a class is shown without its module."""
    linked = str(render_helpers.linkify(context, code, namespace, shorten))
    if not shorten:
        return Markup(linked)
    return Markup(re.sub(r'(<a href="[^"]*">)qmoe_jax(?:\.[a-z0-9_]+)*\.(?=[A-Z])', r"\1", linked))


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("output", type=Path, help="folder for the pages")
    output = parser.parse_args().output
    print(f"{build(output)} pages; begin at {output / 'qmoe_jax.html'}")


if __name__ == "__main__":
    main()
