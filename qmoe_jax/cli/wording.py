"""Errors of the library, and calls, in the words of a command line: `overwrite=True` is a flag.

The library's messages advise what to pass to its functions. A command has options or gin bindings
of the same names.
"""

import argparse
import re
import shlex
from collections.abc import Callable, Sequence

# name=VALUE as messages have it; VALUE is missing in "pass tokens=, made by ...".
_ADVICE = re.compile(
    r"""(?<![\w.])([a-z_]+)=(True|False|None|-?[\d.]*\d|"[^"]*"|'[^']*'|(?=[,.;: ]|$))"""
)


def spell_flags(message: str, flag: Callable[[str], str | None]) -> str:
    """Spell each `name=VALUE` of a message as a gin binding.

    Args:
      message: of an error.
      flag: gives the binding of a name, `--gin.OVERWRITE`; None where there is none.
    """

    def spelled(match: re.Match[str]) -> str:
        binding = flag(match[1])
        if binding is None:
            return match[0]
        value = match[2]
        if value[:1] in ("'", '"'):
            value = f"\"'{value[1:-1]}'\""  # Python's quotes inside the shell's
        return f"{binding}={value or '...'}"

    return _ADVICE.sub(spelled, message)


def spell_options(message: str, parser: argparse.ArgumentParser) -> str:
    """Spell each `name=VALUE` of a message as an option of a parser that has it."""
    options = {action.dest: action for action in parser._actions if action.option_strings}

    def spelled(match: re.Match[str]) -> str:
        action = options.get(match[1])
        if action is None:
            return match[0]
        option = action.option_strings[0]
        if action.nargs == 0:  # a switch
            return option
        return f"{option} {match[2].strip(chr(34) + chr(39)) or '...'}"

    return _ADVICE.sub(spelled, message)


def spell_command(name: str, arguments: Sequence[str]) -> str:
    """Return a command line that a shell reads as these arguments."""
    return " ".join(["qmoe-jax", name, *map(_quoted, arguments)])


def _quoted(argument: str) -> str:
    """Quote as a person would: Python's single quotes inside the shell's double ones."""
    if "'" in argument and not re.search(r'["$`\\!\n]', argument):
        name, separator, value = argument.partition("=")
        if separator and shlex.quote(name) == name:
            return f'{name}="{value}"'
        return f'"{argument}"'
    return shlex.quote(argument)
