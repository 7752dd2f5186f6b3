"""Compiled programs are kept for the next command, in the user's cache folder."""

import os
import subprocess
import sys
from pathlib import Path

import golden_data
import pytest

from qmoe_jax.cli import compilation_cache

DEMO = golden_data.DEMO


def environment(**more):
    """That of a user: without what tests set."""
    jax_s = ("JAX_COMPILATION", "JAX_PERSISTENT", "JAX_ENABLE_COMPILATION", "XDG_CACHE")
    return {k: v for k, v in os.environ.items() if not k.startswith(jax_s)} | more


def infer(tmp_path, **more):
    """Fill a blank in a process of its own; returns stderr's lines and the files of the cache."""
    result = subprocess.run(
        [
            *(sys.executable, "-m", "qmoe_jax", "infer", "--gin.MAX_DECODE_LENGTH=2"),
            f"--gin.CHECKPOINT='{DEMO}/checkpoint_4200'",
            *(f"--gin.VOCABULARY='{DEMO}/sentencepiece.model'", "A <extra_id_0>."),
        ],
        env=environment(**more),
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    programs = {p for p in tmp_path.rglob("*-cache") if p.is_file()}
    return result.stderr.splitlines(), programs


def test_the_second_start_compiles_nothing(tmp_path):
    pytest.importorskip("gin")
    first_lines, first = infer(tmp_path, XDG_CACHE_HOME=str(tmp_path))
    assert any("jit_sample_generate" in path.name for path in first)
    assert {path.relative_to(tmp_path).parts[0] for path in first} == {"qmoe_jax"}
    second_lines, second = infer(tmp_path, XDG_CACHE_HOME=str(tmp_path))
    assert second == first
    assert len(first_lines) == len(second_lines) == 1  # the speed


def test_where_nothing_can_be_written_it_is_no_error(tmp_path):
    pytest.importorskip("gin")
    (tmp_path / "file").write_text("")
    lines, programs = infer(tmp_path, XDG_CACHE_HOME=str(tmp_path / "file"))
    assert len(lines) == 1
    assert not programs


@pytest.fixture
def enabled(monkeypatch, tmp_path):
    """`enabled(imported, **variables)`: what `enable` sets, JAX being imported or not."""

    def enabled(imported=(), **variables):
        given = {"HOME": str(tmp_path)} | variables
        monkeypatch.setattr(os, "environ", dict(given))
        monkeypatch.setattr(sys, "modules", {name: None for name in imported})
        monkeypatch.setattr("warnings.filters", [])
        compilation_cache.enable()
        return {key: os.environ[key] for key in os.environ.keys() - given.keys()}

    return enabled


def test_what_is_set(enabled, tmp_path):
    made = enabled(XDG_CACHE_HOME=str(tmp_path / "cache"))
    folder = Path(made.pop("JAX_COMPILATION_CACHE_DIR"))
    assert folder.parent == tmp_path / "cache" / "qmoe_jax"
    assert folder.is_dir()
    assert made == {
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_COMPILATION_CACHE_MAX_SIZE": "1073741824",
    }


@pytest.mark.parametrize(
    "variables",
    [
        {"JAX_COMPILATION_CACHE_DIR": "/mine"},
        {"JAX_COMPILATION_CACHE_DIR": ""},  # how JAX is told to have none
        *({"JAX_ENABLE_COMPILATION_CACHE": off} for off in ("false", "0", "OFF")),
    ],
)
def test_jax_s_own_variables_rule(enabled, variables, tmp_path):
    assert enabled(XDG_CACHE_HOME=str(tmp_path / "x"), **variables) == {}
    assert not (tmp_path / "x").exists()


def test_the_user_s_own_limits_stay(enabled, tmp_path):
    made = enabled(XDG_CACHE_HOME=str(tmp_path), JAX_COMPILATION_CACHE_MAX_SIZE="5")
    assert "JAX_COMPILATION_CACHE_MAX_SIZE" not in made


def test_a_process_that_has_jax_decides_for_itself(enabled):
    assert enabled(imported=("jax",)) == {}


def test_the_folder_of_each_platform(monkeypatch):
    monkeypatch.setenv("HOME", "/home/x")
    for platform, variables, folder in (
        ("linux", {"XDG_CACHE_HOME": "/c"}, "/c"),
        ("linux", {"XDG_CACHE_HOME": ""}, "/home/x/.cache"),
        ("darwin", {}, "/home/x/Library/Caches"),
        ("win32", {"LOCALAPPDATA": "/local"}, "/local"),
        ("win32", {}, "/home/x/.cache"),
    ):
        monkeypatch.setattr(sys, "platform", platform)
        assert compilation_cache.user_cache(variables) == Path(folder)


def test_the_library_keeps_nothing():
    program = (
        "import qmoe_jax; qmoe_jax.load_switch; import jax; "
        "print(jax.config.jax_compilation_cache_dir)"
    )
    result = subprocess.run(
        [sys.executable, "-c", program],
        env=environment(),
        capture_output=True,
        text=True,
        check=True,
    )
    assert result.stdout == "None\n"
