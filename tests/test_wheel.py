"""An installed package works without a checkout: a wheel, a fresh environment, the commands."""

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
from pathlib import Path

import golden_data
import pytest
from factories import CALIBRATION

from qmoe_jax.calibration.tokens import write_tokens

REPOSITORY = Path(__file__).parent.parent


def test_the_list_of_packages_is_the_tree():
    settings = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["tool"]["setuptools"]
    code = [path.parent for path in (REPOSITORY / "qmoe_jax").rglob("__init__.py")]
    expected = {".".join(path.relative_to(REPOSITORY).parts) for path in code}
    for folder in ("configs", "gin", "kernels_cuda"):
        below = [REPOSITORY / folder, *(p for p in (REPOSITORY / folder).iterdir() if p.is_dir())]
        expected |= {
            "qmoe_jax._" + ".".join(path.relative_to(REPOSITORY).parts)
            for path in below
            if path.name != "__pycache__"
        }
        assert settings["package-dir"][f"qmoe_jax._{folder}"] == folder
    assert set(settings["packages"]) == expected
    assert settings["packages"] == sorted(settings["packages"])


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """An environment with the wheel in it, and the dependencies of this one."""
    pytest.importorskip("wheel")
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    names = ("qmoe_jax", "configs", "gin", "kernels_cuda", "pyproject.toml", "README.md", "LICENSE")
    source.mkdir()
    for name in names:
        path = REPOSITORY / name
        if path.is_dir():
            ignored = shutil.ignore_patterns("__pycache__")
            shutil.copytree(path, source / name, ignore=ignored)
        else:
            shutil.copy(path, source / name)
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    build = [*pip, "wheel", ".", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder)]
    subprocess.run(build, cwd=source, check=True)
    shutil.rmtree(source)
    (wheel,) = folder.glob("*.whl")
    environment = folder / "environment"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(environment)], check=True)
    python = environment / "bin" / "python"
    install = [*pip, "--python", str(python), "install", "--no-deps", "--no-index", str(wheel)]
    subprocess.run(install, check=True)
    # A path in a .pth file is a path and no more: what stands in that folder's own .pth files, as
    # the editable install of a checkout, is not looked at.
    site = next((environment / "lib").glob("python*")) / "site-packages"
    (site / "dependencies.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    return environment


@pytest.fixture(scope="module")
def run(installed, tmp_path_factory):
    """Runs a program of the environment in a folder of its own, which is no checkout."""
    folder = tmp_path_factory.mktemp("user")
    kept = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}

    def run(program, *arguments, expected=0):
        result = subprocess.run(
            [installed / "bin" / program, *map(str, arguments)],
            capture_output=True,
            text=True,
            cwd=folder,
            env=kept,
            check=False,
        )
        assert result.returncode == expected, result.stderr
        return result

    run.folder = folder
    return run


def test_the_package_is_the_wheel_s(run, installed):
    code = "import qmoe_jax; from qmoe_jax import resources; print(qmoe_jax.__file__)"
    assert Path(run("python", "-c", code).stdout.strip()).is_relative_to(installed)
    code = (
        "from qmoe_jax import resources as r;"
        "print(r.configs(), r.kernels_cuda(), r.gin_file('gin/runs/compress.gin'), sep='\\n')"
    )
    for line in run("python", "-c", code).stdout.splitlines():
        assert Path(line).is_relative_to(installed)
        assert Path(line).exists()


def test_every_resource_is_in_it(run):
    code = (
        "from qmoe_jax import resources as r; import pathlib, qmoe_jax\n"
        "for f in (r.configs(), r.kernels_cuda(), r.gin_file('gin')):\n"
        "    print(*sorted(str(p.relative_to(f)) for p in f.rglob('*.*') if '__pyc' not in str(p)))"
    )
    lines = run("python", "-c", code).stdout.splitlines()
    for folder, line in zip(("configs", "kernels_cuda", "gin"), lines, strict=True):
        root = REPOSITORY / folder
        expected = [
            str(p.relative_to(root)) for p in root.rglob("*.*") if "__pycache__" not in str(p)
        ]
        assert line.split() == sorted(expected)


def test_help_and_version(run):
    text = run("qmoe-jax", "--help").stdout
    assert re.search(r"^  prepare-tokens +text to tokens", text, re.MULTILINE)
    assert re.fullmatch(r"qmoe-jax \d+\.\d+\.\d+\n", run("qmoe-jax", "--version").stdout)


def test_plan(run):
    text = run(
        *("qmoe-jax", "plan", "switch_base_128", "--device", "h100"),
        *("--host_gb", 4000, "--disk_gb", 9000),
    ).stdout
    assert "7,247,757,312 in experts" in text
    assert "The run fits" in text
    run("qmoe-jax", "plan", "switch_c_2048", "--host_gb", 1, expected=1)


def test_a_checkpoint_all_the_way(run, golden_checkpoint):
    """compress, inspect, evaluate, dequantize, evaluate: one native checkpoint and back."""
    few = CALIBRATION[:12]
    write_tokens(run.folder / "tokens.npz", few.tokens, few.metadata)
    native = golden_checkpoint("base", "t5x_bfloat16")
    text = run(
        *("qmoe-jax", "compress", f"--gin.CHECKPOINT='{native}'", "--gin.TOKENS='tokens.npz'"),
        *("--gin.OUTPUT='compressed'", "--gin.CompressionSettings.batch_size=4"),
    ).stdout
    assert re.search(r"compressed: [\d,]+ expert weights at \d\.\d+ bits", text)
    assert (run.folder / "compressed.operative_config.gin").exists()

    report = json.loads(run("qmoe-jax", "inspect", "compressed", "--json").stdout)
    assert report["kind"] == "compressed"
    assert len(report["kernels"]) == 8

    arguments = ["--gin.TOKENS='tokens.npz'", "--gin.BATCH_SIZE=4", "--gin.OUTPUT='evaluated'"]
    run("qmoe-jax", "evaluate", "--gin.CHECKPOINT='compressed'", *arguments)
    (model,) = json.loads((run.folder / "evaluated" / "metrics.json").read_text())["models"]

    text = run("qmoe-jax", "dequantize", "compressed", "native", "--step", 7).stdout
    assert text.strip().endswith("native/checkpoint_7 written")
    arguments[-1] = "--gin.OUTPUT='again'"
    run("qmoe-jax", "evaluate", "--gin.CHECKPOINT='native'", *arguments)
    (again,) = json.loads((run.folder / "again" / "metrics.json").read_text())["models"]
    assert again["loss"] == pytest.approx(model["loss"], abs=1e-4)


def test_infer(run):
    pytest.importorskip("sentencepiece")
    result = run(
        *("qmoe-jax", "infer", f"--gin.CHECKPOINT='{golden_data.DEMO / 'checkpoint_4200'}'"),
        f"--gin.VOCABULARY='{golden_data.DEMO / 'sentencepiece.model'}'",
        *("--gin.MAX_DECODE_LENGTH=8", "Return the <extra_id_0> of the array."),
    )
    assert result.stdout.splitlines()[2].startswith("  => Return the ")


def test_included_gin_files(run):
    """A user's file includes one of the package's by the name that a checkout has."""
    (run.folder / "mine.gin").write_text("include 'gin/models/switch_base.gin'\nTOKENS = 'x.npz'\n")
    run_file = "--gin_file=gin/runs/eval.gin"
    result = run(
        *("qmoe-jax", "evaluate", run_file, "--gin_file=mine.gin", "--gin.CHECKPOINT='absent'"),
        expected=2,
    )
    assert "x.npz" in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_a_user_s_gin_files_come_before_the_package_s(run):
    """In the folders of --gin_search_paths, for --gin_file and for what a file includes."""
    (run.folder / "theirs" / "gin" / "models").mkdir(parents=True)
    own = run.folder / "theirs" / "gin" / "models" / "switch_base.gin"
    own.write_text("CHECKPOINT = 'their_checkpoint'\n")
    (run.folder / "theirs" / "including.gin").write_text("include 'gin/models/switch_base.gin'\n")
    for file in ("including.gin", "gin/models/switch_base.gin"):
        result = run(
            *("qmoe-jax", "compress", "--gin_search_paths=theirs", f"--gin_file={file}"),
            *("--gin_file=gin/runs/compress.gin", "--gin.TOKENS=None", "--gin.OUTPUT='x'"),
            "--gin.CompressionSettings.method='rtn'",
            expected=2,
        )
        assert "their_checkpoint" in result.stderr
        assert len(result.stderr.splitlines()) == 1


def test_the_demo_says_what_it_needs(run):
    result = run("qmoe-jax", "demo", expected=2)
    assert "run from a checkout of the project, or pass --model" in result.stderr


def test_the_demo_s_model_is_found_in_the_checkout_that_was_installed(run):
    """`pip install .` and then `qmoe-jax demo`, as README says: the package lies elsewhere."""
    model = run.folder / "tests" / "golden" / "switch_demo"
    model.mkdir(parents=True)
    result = run("qmoe-jax", "demo", expected=2)
    model.rmdir()  # which other tests do without
    sought = model.relative_to(run.folder) / "checkpoint_4200"
    assert result.stderr.startswith(f"qmoe-jax demo: {sought} does not exist")


@pytest.mark.slow
def test_installed_by_pip_with_its_dependencies(installed, tmp_path):
    """From a package index, into an environment that has nothing yet."""
    (wheel,) = installed.parent.glob("*.whl")
    subprocess.run([sys.executable, "-m", "venv", str(tmp_path / "venv")], check=True)
    python = tmp_path / "venv" / "bin" / "python"
    pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "-c", REPOSITORY / "constraints.txt", f"{wheel}[gin]"], check=True)
    command = tmp_path / "venv" / "bin" / "qmoe-jax"
    options = ["--device", "h100", "--host_gb", "4000", "--disk_gb", "9000"]
    kept = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    plan = [command, "plan", "switch_base_128", *options]
    subprocess.run(plan, cwd=tmp_path, env=kept, check=True)
    result = subprocess.run(
        [command, "compress", "--gin.CHECKPOINT='absent'", "--gin.OUTPUT='x'", "--gin.TOKENS='y'"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=kept,
        check=False,
    )
    assert result.returncode == 2
    assert result.stderr.startswith("qmoe-jax compress: ")
