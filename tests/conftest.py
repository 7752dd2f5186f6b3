"""Array annotations of the package are checked at run time; fixtures for golden checkpoints."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from jaxtyping import install_import_hook

# Before anything imports the package.
install_import_hook("qmoe_jax", "beartype.beartype")

import golden_data  # noqa: E402


@pytest.fixture(scope="session")
def golden_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Path]:
    """`golden_checkpoint(model, layout)`: path of a `checkpoint_500100` folder; do not write to it.

    The pairs are those of `golden_data.LAYOUTS`.
    """
    root = tmp_path_factory.mktemp("golden")
    return lambda model, layout: golden_data.checkpoint_folder(model, layout, root)


@pytest.fixture
def golden_copy(golden_checkpoint, tmp_path: Path) -> Callable[[str, str], Path]:
    """The same in a copy of its own, which a test may damage."""

    def copy(model: str, layout: str) -> Path:
        return shutil.copytree(
            golden_checkpoint(model, layout), tmp_path / layout / "checkpoint_500100"
        )

    return copy
