"""`qmoe-jax COMMAND` in this process: a new one takes seconds to start."""

import functools
import subprocess
import sys

from qmoe_jax.__main__ import main


def command(name):
    """`main` of a command line that begins with a command: arguments to exit status."""
    return functools.partial(_main, name)


def _main(name, arguments):
    return main([name, *arguments])


# Before its signals: a shell's background jobs, and so their children, begin with SIGINT ignored.
_WAITING = """
import importlib, runpy, signal, sys, time
name, function, calls = sys.argv[1:4]
del sys.argv[1:4]
module, called = importlib.import_module(name), []
original = getattr(module, function)

def waiting(*arguments):
    if len(called) == int(calls):
        print("waiting", flush=True)
        time.sleep(600)
    called.append(arguments)
    return original(*arguments)

setattr(module, function, waiting)
signal.signal(signal.SIGINT, signal.default_int_handler)
runpy.run_module("qmoe_jax", run_name="__main__", alter_sys=True)
"""


def start_and_wait(module, function, calls, *arguments, **options):
    """A new process of `qmoe-jax`, which waits to be signalled, in the middle of its work.

    Args:
      module: of the package, whose `function` the command calls again and again.
      function: that name as it stands there.
      calls: so many are let through; the process waits in the next one.
      *arguments: of the command line.
      **options: of `subprocess.Popen`.
    """
    program = (sys.executable, "-c", _WAITING, module, function, str(calls))
    process = subprocess.Popen([*program, *arguments], stdout=subprocess.PIPE, text=True, **options)
    assert process.stdout is not None
    if "waiting\n" not in iter(process.stdout.readline, ""):
        _, errors = process.communicate()
        raise AssertionError(f"it ended, with {process.returncode}: {errors}")
    return process


def refusal(capsys, name, *arguments):
    """The one line on stderr that a command ends with, whose exit status is 2."""
    assert main([name, *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    assert line.startswith(f"qmoe-jax {name}: ")
    return line
