"""`qmoe-jax COMMAND` in this process: a new one takes seconds to start."""

import functools

from qmoe_jax.__main__ import main


def command(name):
    """`main` of a command line that begins with a command: arguments to exit status."""
    return functools.partial(_main, name)


def _main(name, arguments):
    return main([name, *arguments])


def refusal(capsys, name, *arguments):
    """The one line on stderr that a command ends with, whose exit status is 2."""
    assert main([name, *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    assert line.startswith(f"qmoe-jax {name}: ")
    return line
