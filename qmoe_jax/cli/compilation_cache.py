"""Compiled programs, kept for the next command in the user's cache folder.

Compilation is most of what a short command does. Only commands keep programs: a program that
imports the package decides for itself. JAX's own variables rule: JAX_COMPILATION_CACHE_DIR is taken
as it is, and JAX_ENABLE_COMPILATION_CACHE=false keeps nothing.
"""

import hashlib
import os
import platform
import sys
import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path

_FOLDER = "JAX_COMPILATION_CACHE_DIR"
_ENABLE = "JAX_ENABLE_COMPILATION_CACHE"
_OFF = ("0", "false", "f", "no", "n", "off")
_SETTINGS = {
    # A command has dozens of small programs; together they take as long as the large one.
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    # Programs that were not used for longest make room.
    "JAX_COMPILATION_CACHE_MAX_SIZE": str(2**30),
}


def enable() -> None:
    """Let JAX, which is not imported yet, keep what it compiles; nothing where that cannot be."""
    environment = os.environ
    if "jax" in sys.modules or _FOLDER in environment:
        return
    if environment.get(_ENABLE, "").lower() in _OFF:
        return
    folder = user_cache(environment) / "qmoe_jax" / f"jax_{_machine()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError:
        return
    environment[_FOLDER] = os.fspath(folder)
    for name, value in _SETTINGS.items():
        environment.setdefault(name, value)
    # A disk that is full later is no reason to say something for each program.
    warnings.filterwarnings("ignore", "Error (reading|writing) persistent compilation cache")


def user_cache(environment: Mapping[str, str]) -> Path:
    """Return the folder for what a user's programs can make again."""
    if environment.get("XDG_CACHE_HOME"):
        return Path(environment["XDG_CACHE_HOME"])
    if sys.platform == "darwin":
        return Path("~/Library/Caches").expanduser()
    if sys.platform == "win32" and environment.get("LOCALAPPDATA"):
        return Path(environment["LOCALAPPDATA"])
    return Path("~/.cache").expanduser()


def _machine() -> str:
    """Tell kinds of CPUs apart: machines of several may share a home, programs they may not."""
    kind = f"{platform.machine()} {platform.processor()}"
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            # x86 calls them flags, ARM Features.
            kind += next((line for line in file if line.startswith(("flags", "Features"))), "")
    except OSError:
        pass  # not Linux
    return hashlib.sha256(kind.encode()).hexdigest()[:12]
