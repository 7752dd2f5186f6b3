"""`qmoe-jax COMMAND ...`, also as `python -m qmoe_jax COMMAND ...`.

Every command ends alike: bad input is one line `qmoe-jax COMMAND: ...` and exit status 2, and an
interrupted command says in one line how to go on, with exit status 130.
"""

import contextlib
import difflib
import importlib
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import qmoe_jax
from qmoe_jax.cli import compilation_cache
from qmoe_jax.errors import one_line

COMMANDS = {
    "plan": "what a compression run will read, need and write",
    "prepare-tokens": "text to tokens, for calibration and evaluation",
    "compress": "a native T5X checkpoint to a compressed one",
    "inspect": "what a checkpoint holds, and what each kernel costs",
    "evaluate": "losses, gaps and router statistics of checkpoints",
    "infer": "fill the blanks of texts",
    "finetune": "train parts of a checkpoint over its codes",
    "recover": "win back what compression took, by the uncompressed model's predictions",
    "dequantize": "a compressed checkpoint back to a native T5X one",
    "convert": "from Hugging Face's checkpoints and back; published QMoE models; other codings",
    "demo": "all of it on a small trained model",
}
"""Name and meaning of each command; `cli/` has a module of that name."""

BAD_INPUT = 2
INTERRUPTED = 130
NOBODY_READS = 141
"""As a shell reports a program that SIGPIPE ended."""

# The extra of pyproject.toml that brings a package.
_EXTRAS = {
    "gin": "gin",
    "matplotlib": "plots",
    "safetensors": "huggingface",
    "sentencepiece": "data",
    "seqio": "data",
    "tensorflow": "data",
    "tensorflow_datasets": "data",
    "torch": "torch",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line; return the exit status.

    Args:
      argv: arguments; those of the process where None.
    """
    for stream in (sys.stdout, sys.stderr):
        _never_refuse(stream)
    try:
        try:
            with _no_interruption_lost():
                return _dispatch(list(sys.argv[1:] if argv is None else argv))
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        # The reader of the output, as `head`, has had enough. Python flushes again at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return NOBODY_READS


@contextlib.contextmanager
def _no_interruption_lost() -> Iterator[None]:
    """Interrupt again where a Ctrl-C fell into what Python drops exceptions of.

    Those are callbacks that no code called: JAX's at each garbage collection, finalizers.
    """
    previous = sys.unraisablehook

    def hook(dropped: Any) -> None:
        if not issubclass(dropped.exc_type, KeyboardInterrupt):
            previous(dropped)
            return
        # A moment later, since it would be dropped again inside this hook.
        main_thread = threading.main_thread().ident
        again = threading.Timer(0.05, signal.pthread_kill, (main_thread, signal.SIGINT))
        again.daemon = True
        again.start()

    sys.unraisablehook = hook
    try:
        yield
    finally:
        sys.unraisablehook = previous


def _never_refuse(stream: Any) -> None:
    """Let a stream escape the characters that its encoding lacks: an answer is not lost by one."""
    if not hasattr(stream, "reconfigure"):
        return
    # In the C locale "surrogateescape" gives the bytes of a path back, but refuses all else.
    holds_all = stream.encoding.lower().replace("-", "") == "utf8"
    if stream.errors == "strict" or (stream.errors == "surrogateescape" and not holds_all):
        stream.reconfigure(errors="backslashreplace")


def _dispatch(arguments: list[str]) -> int:
    command = arguments[0] if arguments else "--help"
    if command in ("-h", "--help"):
        print(_help())
        return 0
    if command == "--version":
        print(f"qmoe-jax {qmoe_jax.__version__}")
        return 0
    if command not in COMMANDS:
        near = difflib.get_close_matches(command.replace("_", "-"), COMMANDS, n=1)
        meant = f"did you mean {near[0]}? " if near else ""
        print(
            f"qmoe-jax: there is no command {command!r}; {meant}commands are {', '.join(COMMANDS)}",
            file=sys.stderr,
        )
        return BAD_INPUT
    return _run(command, arguments[1:])


def _run(command: str, arguments: list[str]) -> int:
    module = None
    compilation_cache.enable()
    try:
        module = importlib.import_module(f"qmoe_jax.cli.{command.replace('-', '_')}")
        return module.main(arguments)
    except BrokenPipeError:
        raise
    except (ValueError, OSError, RuntimeError) as error:
        # What a user can mend (a misspelt option, a missing file, a bad checkpoint) is one
        # message, not a traceback.
        message = one_line(error)
        if module is not None and hasattr(module, "make_parser"):
            from qmoe_jax.cli.wording import spell_options

            message = spell_options(message, module.make_parser())
        print(f"qmoe-jax {command}: {message}", file=sys.stderr)
        return BAD_INPUT
    except ModuleNotFoundError as error:
        package = error.name or ""
        if "." in package or package in ("", "qmoe_jax"):
            raise
        needed = f"'qmoe-jax[{_EXTRAS[package]}]'" if package in _EXTRAS else package
        print(
            f"qmoe-jax {command}: {package} is not installed: pip install {needed}", file=sys.stderr
        )
        return BAD_INPUT
    except KeyboardInterrupt:
        advice = "run it again" if module is None else module.IF_INTERRUPTED
        print(f"\nqmoe-jax {command}: interrupted; {advice}", file=sys.stderr)
        return INTERRUPTED


def _help() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {meaning}" for name, meaning in COMMANDS.items()]
    return "\n".join(
        [
            "usage: qmoe-jax COMMAND ...",
            "",
            "Sub-1-bit compression and exact inference of Mixture-of-Experts models in JAX.",
            "",
            "commands:",
            *lines,
            "",
            "qmoe-jax COMMAND --help says more; qmoe-jax --version which version this is.",
            "",
            "Compiled programs are kept for the next command, up to 1 GiB in ~/.cache/qmoe_jax or",
            "$XDG_CACHE_HOME/qmoe_jax. JAX's own variables rule: JAX_COMPILATION_CACHE_DIR=FOLDER",
            "chooses another folder, JAX_ENABLE_COMPILATION_CACHE=false keeps nothing.",
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
