"""Values from gin files and flags against the annotations of what they are bound to.

Python is lenient: a number of examples given as text would be found hours later, or never.
"""

import collections.abc
import dataclasses
import inspect
import os
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any


def check_arguments(
    function: Callable[..., Any], arguments: Mapping[str, Any], spell: Callable[[str], str]
) -> dict[str, Any]:
    """Refuse an argument whose type is not the annotated one; return them, integers as floats.

    Args:
      function: a function, or a dataclass.
      arguments: by name.
      spell: gives an argument's name as a user knows it.

    Raises:
      ValueError: names the argument, its value and type, and the types that it may have.
    """
    holder = function if dataclasses.is_dataclass(function) else inspect.unwrap(function)
    hints = typing.get_type_hints(holder)
    checked = dict(arguments)
    for name, value in arguments.items():
        if name in hints and not fits(value, hints[name]):
            raise ValueError(
                f"{spell(name)} is {value!r:.80}, a value of type {type(value).__name__}; it must "
                f"be {describe(hints[name])}"
            )
        if type(value) is int and not fits(value, _without_float(hints.get(name, Any))):
            checked[name] = float(value)
    return checked


def _without_float(hint: Any) -> Any:
    """Return what is left of a union without float: where an integer is none of it, a float is."""
    if hint is float:
        return types.NoneType
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        left = [one for one in typing.get_args(hint) if one is not float]
        return typing.Union[tuple(left)] if left else types.NoneType  # noqa: UP007
    return hint


def fits(value: Any, hint: Any) -> bool:
    """Whether a value is of an annotated type; of types that are not known here, every value is.

    A bool is no number, an integer is a float too.
    """
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(fits(value, one) for one in arguments)
    if origin is typing.Literal:
        return value in arguments
    if origin is collections.abc.Callable:
        return callable(value)
    if origin is os.PathLike:
        return isinstance(value, os.PathLike)
    if origin in (tuple, list, collections.abc.Sequence):
        is_sequence = isinstance(value, list | tuple)
        return is_sequence and all(fits(v, arguments[0]) for v in value if arguments)
    if origin in (dict, collections.abc.Mapping):
        key, entry = arguments
        return isinstance(value, Mapping) and all(
            fits(k, key) and fits(v, entry) for k, v in value.items()
        )
    if hint in (int, float):
        kinds = int if hint is int else (int, float)
        return isinstance(value, kinds) and not isinstance(value, bool)
    if hint is None or hint is types.NoneType:
        return value is None
    if hint is not Any and isinstance(hint, type) and origin is None:
        return isinstance(value, hint)
    return True


_NAMES = {
    bool: "True or False",
    float: "a number",
    int: "an integer",
    str: "a text in quotes",
    types.NoneType: "None",
}


def describe(hint: Any) -> str:
    """Say what an annotated type is, in words."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        words = dict.fromkeys(describe(one) for one in arguments)
        return " or ".join(words)
    if origin is typing.Literal:
        return " or ".join(map(repr, arguments))
    if origin is os.PathLike:
        return "a text in quotes"
    if origin in (tuple, list, collections.abc.Sequence):
        return f"a list, each {describe(arguments[0])}" if arguments else "a list"
    if origin in (dict, collections.abc.Mapping):
        return "a dict"
    if origin is collections.abc.Callable:
        return "a configurable, @name"
    return _NAMES.get(hint, getattr(hint, "__name__", str(hint)))
