"""Array annotations of the package are checked at run time; fixtures of several files."""

import gc
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from jaxtyping import install_import_hook

# Compiled programs are shared by the workers, by the processes that tests start, and by later runs:
# compilation is most of what the tests do. Before anything imports JAX.
_CACHE = Path(__file__).parent.parent / ".cache" / "jax"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(_CACHE))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")

# Tracing makes objects by the million, few of them in cycles: collecting took a tenth of the time.
gc.set_threshold(100_000, 20, 100)

# Before anything imports the package.
install_import_hook("qmoe_jax", "beartype.beartype")

import golden_data  # noqa: E402
import hypothesis  # noqa: E402

# No test depends on how fast the machine is at the moment.
hypothesis.settings.register_profile("untimed", deadline=None)
hypothesis.settings.load_profile("untimed")


# Of the 65,530 that Linux lets a process have unless it is told otherwise.
_MOST_MEMORY_MAPS = 16_000


@pytest.fixture(scope="module", autouse=True)
def _drop_programs():
    """Let go of compiled programs between files, once there are many.

    Each takes several memory maps of the process. Without this a whole run has used up the limit
    by its last files, and the next compilation ends the process.
    """
    yield
    maps = Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > _MOST_MEMORY_MAPS:
        import jax

        jax.clear_caches()
        gc.collect()


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


@pytest.fixture(scope="session")
def base(golden_checkpoint) -> Path:
    return golden_checkpoint("base", "t5x_float32_inference")


@pytest.fixture(scope="session")
def gptq(base, tmp_path_factory):
    """A compressed checkpoint and its report; do not write to it."""
    from factories import CALIBRATION, TERNARY

    import qmoe_jax

    path = tmp_path_factory.mktemp("gptq") / "compressed"
    return path, qmoe_jax.compress(base, path, CALIBRATION, **TERNARY)


@pytest.fixture(scope="session")
def emulated():
    from cuda_emulation.launcher import EmulatedLauncher

    return EmulatedLauncher()


@pytest.fixture
def launcher(emulated):
    """The emulator, in CuPy's place for the length of a test."""
    from qmoe_jax.ops.cuda.launcher import use_launcher

    emulated.calls.clear()
    with use_launcher(emulated):
        yield emulated
