"""Marks of several files: what only `make test-all` runs, and what needs a compiler."""

import shutil

import pytest

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")


def slow(*values):
    """Each value of one argument, marked; put them behind those of the default run with `*`."""
    return [pytest.param(value, marks=pytest.mark.slow) for value in values]
