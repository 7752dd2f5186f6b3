"""Parameters that only `make test-all` runs."""

import pytest


def slow(*values):
    """Each value of one argument, marked; put them behind those of the default run with `*`."""
    return [pytest.param(value, marks=pytest.mark.slow) for value in values]
