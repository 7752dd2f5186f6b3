"""Files that come with the package but are no modules: gin files, facts, CUDA sources.

They stand at the root of a checkout, and inside an installed package under names that begin with
an underscore. This is the only module that looks at its own path.
"""

from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent
_CHECKOUT = _PACKAGE.parent


def gin_file(name: str) -> Path:
    """Path of one of the package's gin files, whether it exists or not.

    Args:
      name: as a checkout has it, `gin/runs/compress.gin`.
    """
    return _folder("gin").joinpath(*Path(name).parts[1:])


def configs() -> Path:
    """Folder of facts: public checkpoints, devices, kernel launch settings."""
    return _folder("configs")


def kernels_cuda() -> Path:
    """Folder of the CUDA sources."""
    return _folder("kernels_cuda")


def demo_model() -> Path:
    """Folder of the demo's model, which only a checkout has; it may not exist.

    The package's own checkout, else the working folder, where an installed package was installed
    from it.
    """
    path = Path("tests", "golden", "switch_demo")
    own = _CHECKOUT / path
    return own if own.is_dir() or not path.is_dir() else path


def _folder(name: str) -> Path:
    installed = _PACKAGE / f"_{name}"
    return installed if installed.is_dir() else _CHECKOUT / name
