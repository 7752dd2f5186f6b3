"""The flags of the commands: argparse for some, T5X's `--gin_file`, `--gin.NAME=VALUE` for others.

This is the only module that imports gin: the library takes arguments.
"""

import argparse
import contextlib
import difflib
import functools
import inspect
import itertools
import logging
import os
import re
import textwrap
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import IO, Any, NoReturn

from qmoe_jax import resources
from qmoe_jax.cli.argument_types import check_arguments
from qmoe_jax.cli.wording import spell_flags

_CONFIG_SUFFIX = ".operative_config.gin"

# Stands among the search paths for the package's own folder gin/, which has another name when the
# package is installed.
_OWN_FILES = "<qmoe_jax>"

_FLAGS = """\
flags, as T5X's:
  --gin_file=FILE          a gin file; may be given several times, later files win
  --gin.NAME=VALUE         a binding; VALUE is Python, so strings need quotes inside the shell's:
                           --gin.CHECKPOINT="'/data/checkpoint_500100'"
  --gin_search_paths=A,B   folders in which gin files are looked for, besides the working folder

The settings that a run used are saved beside its output, as OUTPUT.operative_config.gin.
"""

_DISTRIBUTED_FLAGS = """
several processes, started alike but for the index, on storage that all of them see:
  --coordinator_address=HOST:PORT  of process 0
  --process_count=N
  --process_index=I                0 to N - 1
"""


class CommandParser(argparse.ArgumentParser):
    """Parses the arguments of a command; a mistake is one line, without a usage of many options."""

    def __init__(self, name: str, **options: Any):
        """Begin a parser.

        Args:
          name: of the command.
          **options: of argparse.
        """
        options.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(prog=f"qmoe-jax {name}", **options)

    def error(self, message: str) -> NoReturn:
        """Refuse a command line.

        Raises:
          ValueError: always.
        """
        raise ValueError(f"{message}; --help says more")


def run(
    name: str,
    function: Callable[..., Any],
    configurables: Sequence[Callable[..., Any]],
    *,
    description: str,
    default_gin_file: str,
    argv: Sequence[str],
    optional_macros: Sequence[str] = (),
    distributed: bool = False,
) -> Any:
    """Parse T5X's flags, let gin bind `function`, and call it.

    Where `function` has an argument `output` and it is not None, the operative configuration (every
    value that was used, defaults too) is written to `<output>.operative_config.gin` afterwards.

    Args:
      name: of the command, `compress`.
      function: what the command runs; a configurable of that name in gin files.
      configurables: other functions and classes that gin files may bind, by their own names.
      description: for --help.
      argv: arguments.
      default_gin_file: read when no --gin_file is given, relative to the search paths.
      optional_macros: macros that are None unless a gin file or binding sets them. A run file
        cannot say that itself: it is read after the model's file, and would undo what that sets.
      distributed: take the flags that make the command one of several processes.

    Raises:
      ValueError: flags that cannot be understood, bindings of what does not exist, no gin-config,
        or what the function refuses.
      ModuleNotFoundError: the function needs a package that is not installed.
    """
    parser = _parser(name, description, default_gin_file, distributed)
    arguments, unknown = parser.parse_known_args(_split_bindings(argv))
    if unknown:
        parser.error(
            f"unrecognized arguments: {' '.join(unknown)}; settings are given as bindings, "
            "--gin.CHECKPOINT=\"'PATH'\" and the like"
        )
    gin = _import_gin(name)
    try:
        gin.clear_config()  # of an earlier run in this process
        configured, calls = _configurable(function, name)
        calls.clear()
        for other in configurables:
            _configurable(other, other.__name__)
        folders = [f for f in (*arguments.gin_search_paths.split(","), ".") if f]
        for folder in folders:
            gin.add_config_file_search_path(folder)  # for the files' own includes
        # The package's own files last, so that a user's gin/runs/compress.gin is the one included.
        gin.add_config_file_search_path(_OWN_FILES)
        gin.config.register_file_reader(_open_own_file, _is_own_file)
        gin.parse_config([f"{macro} = None" for macro in optional_macros])
        files = [_find_file(file, folders) for file in arguments.gin_file or [default_gin_file]]
        with _quiet():
            gin.parse_config_files_and_bindings(files, [], finalize_config=False)
        _check_macros(gin.config_str(), arguments.gin_bindings)
        for binding in arguments.gin_bindings:
            _parse_binding(binding, [name, *(other.__name__ for other in configurables)])
        gin.finalize()
        if distributed and arguments.coordinator_address:
            _join_processes(arguments)
        result = configured()
    except BrokenPipeError:
        raise
    except ModuleNotFoundError as error:
        # gin raises a copy, which has lost the name of what is missing.
        raise error.__context__ or error from None
    except SyntaxError as error:
        file = "" if error.filename is None else f"{error.filename} line {error.lineno}: "
        raise ValueError(f"{file}{error.msg} In: {(error.text or '').strip()}") from error
    except (ValueError, OSError, RuntimeError) as error:
        binding = functools.partial(_binding, _known_names(gin.config_str()), configurables)
        raise ValueError(spell_flags(_message(error), binding)) from error
    output = calls[0].get("output")
    if output is not None:
        _save_beside(os.fspath(output), gin.operative_config_str())
    return result


def _import_gin(name: str) -> Any:
    try:
        # Not `import gin`: without gin-config that would be the folder gin/ of a checkout.
        import gin.config
    except ImportError as error:
        function = name.replace("infer", "generate")
        raise ValueError(
            "gin-config is not installed: pip install 'qmoe-jax[gin]'. Without it, call "
            f"qmoe_jax.{function} from Python"
        ) from error
    return gin


def _binding(
    macros: Collection[str], configurables: Sequence[Callable[..., Any]], name: str
) -> str | None:
    """Return the binding that sets what the library calls `name`; None where there is none."""
    if name.upper() in macros:
        return f"--gin.{name.upper()}"
    for other in configurables:
        if name in inspect.signature(other).parameters:
            return f"--gin.{other.__name__}.{name}"
    return None


def _join_processes(arguments: argparse.Namespace) -> None:
    import jax

    count, index = arguments.process_count, arguments.process_index
    if count is None or index is None or not 0 <= index < count:
        raise ValueError(
            f"--coordinator_address needs --process_count and --process_index, from 0 to the count "
            f"less 1; got {count} and {index}"
        )
    jax.distributed.initialize(arguments.coordinator_address, count, index)


def operative_config_path(output: str) -> str:
    """Where the settings of the run that made `output` are saved."""
    return output.rstrip("/") + _CONFIG_SUFFIX


def _spelled(configurable: str, argument: str) -> str:
    """Name an argument as it is bound: by the macro that a gin file gives it, else as it is."""
    import gin.config

    binding = f"{configurable}.{argument}"
    found = re.search(rf"^{re.escape(binding)} = %(\w+)$", gin.config.config_str(), re.MULTILINE)
    return f"--gin.{found[1] if found else binding}"


@functools.cache
def _configurable(
    function: Callable[..., Any], name: str
) -> tuple[Callable[..., Any], list[dict[str, Any]]]:
    """Make `function` gin's `name`, once a process; return it and the arguments of its calls."""
    gin = _import_gin(name)
    signature = inspect.signature(function)
    calls: list[dict[str, Any]] = []

    @functools.wraps(function)
    def recorded(*args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(*args, **kwargs)
        spelled = functools.partial(_spelled, name)
        bound.arguments.update(check_arguments(function, bound.arguments, spelled))
        calls.append(bound.arguments)
        return function(*bound.args, **bound.kwargs)

    # gin looks at this, and not through the wrapper.
    recorded.__signature__ = signature  # pyright: ignore[reportAttributeAccessIssue]
    # gin would bind any name to a function that takes **keywords, misspelt ones too.
    named = [
        key
        for key, parameter in signature.parameters.items()
        if parameter.kind is not parameter.VAR_KEYWORD
    ]
    configured = gin.external_configurable(recorded, name, module="qmoe_jax", allowlist=named)
    return configured, calls


def _find_file(file: str, folders: Sequence[str]) -> str:
    """Path of a gin file; gin's own search would log an error for each place where it is not."""
    if not file:
        raise ValueError("--gin_file is an empty path; give a gin file")
    for folder in folders:
        path = os.path.join(folder, file)
        if os.path.isfile(path):
            return os.path.abspath(path)
    if _is_own_file(own := f"{_OWN_FILES}/{file}"):
        return own
    ours = resources.gin_file("gin")
    known = [f"gin/{path.relative_to(ours).as_posix()}" for path in ours.rglob("*.gin")]
    raise ValueError(
        f"there is no gin file {file} in any of {', '.join(folders)}, nor among the package's own"
        + _nearest(file, known, "; did you mean {}?")
    )


def _nearest(name: str, known: Collection[str], question: str) -> str:
    """Ask whether the nearest of the known names was meant; "" where none is near."""
    near = difflib.get_close_matches(name, sorted(known), n=1, cutoff=0.6)
    return question.format(near[0]) if near else ""


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Leave out what gin logs of each place where an included file is not."""
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)


def _is_own_file(path: str) -> bool:
    """Whether a path is `gin/...` below `_OWN_FILES`, and the package has it."""
    file = path.removeprefix(f"{_OWN_FILES}/")
    return file != path and file.startswith("gin/") and resources.gin_file(file).is_file()


def _open_own_file(path: str) -> IO[str]:
    return open(resources.gin_file(path.removeprefix(f"{_OWN_FILES}/")), encoding="utf-8")


def _known_names(config: str) -> set[str]:
    """Return the macros that a configuration sets or refers to."""
    set_there = re.findall(r"^(\w+) = ", config, re.MULTILINE)
    return {*re.findall(r"%(\w+)", config), *set_there}


def _parse_binding(binding: str, configurables: Collection[str]) -> None:
    """Let gin take a binding of the command line, or say how to spell it."""
    import gin.config

    name, _, value = (part.strip() for part in binding.partition("="))
    try:
        gin.config.parse_config([binding])
    except (ValueError, SyntaxError) as error:
        unquoted = re.fullmatch(r"[\w./:*~ -]+", value) and not re.fullmatch(r"[\d.]+", value)
        if unquoted and "No parameter" not in str(error) and "No configurable" not in str(error):
            raise ValueError(
                f"--gin.{name}={value}: a text needs quotes, inside the shell's: "
                f"--gin.{name}=\"'{value}'\""
            ) from error
        if isinstance(error, SyntaxError):
            raise ValueError(f"--gin.{name}={value} is no Python value") from error
        raise ValueError(_with_suggestion(str(error), name, configurables)) from error


def _with_suggestion(message: str, name: str, configurables: Collection[str]) -> str:
    """Name the nearest where gin says that there is no such configurable or parameter."""
    import gin.config

    configurable, _, parameter = name.rpartition(".")
    if message.startswith("No configurable matching") and configurable:
        return (
            f"--gin.{name}: nothing is called {configurable}; "
            f"{_nearest(configurable, configurables, 'did you mean {}? ')}"
            f"known are {', '.join(configurables)}"
        )
    if not re.search("doesn't (have a parameter|include kwarg)", message) or not configurable:
        return message
    function = gin.config.get_configurable(configurable)
    known = list(inspect.signature(function).parameters)
    meant = _nearest(parameter, known, "did you mean {}? ")
    return f"--gin.{name}: there is no {parameter}; {meant}known are {', '.join(known)}"


def _check_macros(config: str, bindings: Sequence[str]) -> None:
    """Refuse `--gin.NAME=` of a macro that nothing uses: gin would set it and say nothing.

    Raises:
      ValueError: a name that no gin file sets and neither files nor bindings refer to.
    """
    known = _known_names(config) | set(re.findall(r"%(\w+)", "\n".join(bindings)))
    for binding in bindings:
        name = binding.partition("=")[0].strip()
        if name.isidentifier() and name not in known:
            meant = _nearest(name, known, "did you mean {}? ")
            raise ValueError(
                f"--gin.{name}: nothing is called {name}; {meant}known are "
                f"{', '.join(sorted(known))}"
            )


def _save_beside(output: str, text: str) -> None:
    """Write the configuration beside a local or gs:// output, whole or not at all."""
    from qmoe_jax.checkpoints.storage import write_file

    write_file(operative_config_path(output), text.encode())


def _message(error: Exception) -> str:
    """Put an error in the user's terms and in one line, without gin's own call stack."""
    text = str(error).split("\n  In call to configurable")[0]
    if macro := re.search(r"(\w+)/(?:gin\.)?macro", text):
        return f"{macro[1]} is required; pass --gin.{macro[1]}=VALUE or a gin file that sets it"
    return text or repr(error)


def _split_bindings(argv: Sequence[str]) -> list[str]:
    """`--gin.NAME=VALUE` as `--gin_bindings=NAME = VALUE`, T5X's own rewriting."""
    rewritten = []
    for argument in argv:
        if argument.startswith("--gin."):
            key, separator, value = argument.removeprefix("--gin.").partition("=")
            if not separator:
                raise ValueError(f"{argument}: write --gin.NAME=VALUE")
            argument = f"--gin_bindings={key} = {value}"
        rewritten.append(argument)
    return rewritten


def _about(gin_file: str) -> str:
    """Return what a gin file says of itself: the comment that it begins with."""
    path = resources.gin_file(gin_file)
    if not path.is_file():
        return ""
    lines = itertools.takewhile(
        lambda line: line.startswith("#"), path.read_text("utf-8").splitlines()
    )
    text = "\n".join(line.removeprefix("#").removeprefix(" ") for line in lines)
    return f"\n{gin_file}:\n" + textwrap.indent(text, "  ") + "\n"


def _parser(
    name: str, description: str, default_gin_file: str, distributed: bool
) -> argparse.ArgumentParser:
    parser = CommandParser(
        name,
        description=description,
        epilog=_FLAGS + _about(default_gin_file) + (_DISTRIBUTED_FLAGS if distributed else ""),
        usage="%(prog)s [--gin_file=FILE ...] [--gin.NAME=VALUE ...] [--gin_search_paths=DIRS]",
    )
    parser.add_argument("--gin_file", action="append", default=[], help=argparse.SUPPRESS)
    parser.add_argument("--gin_bindings", action="append", default=[], help=argparse.SUPPRESS)
    parser.add_argument("--gin_search_paths", default="", help=argparse.SUPPRESS)
    if distributed:
        parser.add_argument("--coordinator_address", help=argparse.SUPPRESS)
        parser.add_argument("--process_count", type=int, help=argparse.SUPPRESS)
        parser.add_argument("--process_index", type=int, help=argparse.SUPPRESS)
    parser.description = f"{description}\n\nWithout --gin_file: {default_gin_file}."
    return parser
