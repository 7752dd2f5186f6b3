"""T5X's command-line flags for the entry points: `--gin_file`, `--gin.NAME=VALUE`.

Only entry points import this module, and only it imports gin: the library takes arguments.
"""

import argparse
import inspect
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

_CHECKOUT = Path(__file__).resolve().parent.parent

_FLAGS = """\
flags, as T5X's:
  --gin_file=FILE          a gin file; may be given several times, later files win
  --gin.NAME=VALUE         a binding; VALUE is Python, so strings need quotes inside the shell's:
                           --gin.CHECKPOINT="'/data/checkpoint_500100'"
  --gin_search_paths=A,B   folders in which gin files are looked for, besides the working folder
"""


def run(
    name: str,
    function: Callable[..., Any],
    configurables: Sequence[Callable[..., Any]],
    *,
    description: str,
    default_gin_file: str,
    argv: Sequence[str] | None = None,
) -> Any:
    """Parses T5X's flags, lets gin bind `function`, and calls it.

    Args:
      name: of the command, `compress`.
      function: what the command runs; a configurable of that name in gin files.
      configurables: other functions and classes that gin files may bind, by their own names.
      description: for --help.
      default_gin_file: read when no --gin_file is given, relative to the search paths.
      argv: arguments; those of the process where None.
    """
    arguments = _parser(name, description, default_gin_file).parse_args(
        _split_bindings(sys.argv[1:] if argv is None else argv)
    )
    try:
        import gin
    except ImportError as error:
        raise SystemExit(
            f"python -m qmoe_jax.{name} needs gin-config: pip install 'qmoe-jax[gin]'. "
            f"Without it, call qmoe_jax.{name} from Python."
        ) from error
    # gin would bind any name to a function that takes **keywords, misspelt ones too.
    named = [key for key, kind in _parameter_kinds(function) if kind is not kind.VAR_KEYWORD]
    configured = gin.external_configurable(function, name, module="qmoe_jax", allowlist=named)
    for other in configurables:
        gin.external_configurable(other, other.__name__, module="qmoe_jax")
    for folder in (*arguments.gin_search_paths.split(","), ".", str(_CHECKOUT)):
        if folder:
            gin.add_config_file_search_path(folder)
    try:
        gin.parse_config_files_and_bindings(
            arguments.gin_file or [default_gin_file], arguments.gin_bindings
        )
        return configured()
    except (ValueError, OSError, RuntimeError) as error:
        # What a user can mend (a misspelt binding, a missing file, a bad checkpoint) is one
        # message, not a traceback.
        raise SystemExit(f"qmoe_jax.{name}: {_message(error)}") from error


def _message(error: Exception) -> str:
    """An error in the user's terms, without gin's account of its own call stack."""
    text = str(error).split("\n  In call to configurable")[0]
    if macro := re.search(r"(\w+)/(?:gin\.)?macro", text):
        return f"{macro[1]} is required; pass --gin.{macro[1]}=VALUE or a gin file that sets it"
    return text


def _parameter_kinds(function: Callable[..., Any]) -> list[tuple[str, Any]]:
    parameters = inspect.signature(function).parameters
    return [(name, parameter.kind) for name, parameter in parameters.items()]


def _split_bindings(argv: Sequence[str]) -> list[str]:
    """`--gin.NAME=VALUE` as `--gin_bindings=NAME = VALUE`, T5X's own rewriting."""
    rewritten = []
    for argument in argv:
        if argument.startswith("--gin."):
            key, separator, value = argument.removeprefix("--gin.").partition("=")
            if not separator:
                raise SystemExit(f"{argument}: write --gin.NAME=VALUE")
            argument = f"--gin_bindings={key} = {value}"
        rewritten.append(argument)
    return rewritten


def _parser(name: str, description: str, default_gin_file: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=f"python -m qmoe_jax.{name}",
        description=description,
        epilog=_FLAGS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="%(prog)s [--gin_file=FILE ...] [--gin.NAME=VALUE ...] [--gin_search_paths=DIRS]",
    )
    parser.add_argument("--gin_file", action="append", default=[], help=argparse.SUPPRESS)
    parser.add_argument("--gin_bindings", action="append", default=[], help=argparse.SUPPRESS)
    parser.add_argument("--gin_search_paths", default="", help=argparse.SUPPRESS)
    parser.description = f"{description}\n\nWithout --gin_file: {default_gin_file}."
    return parser
