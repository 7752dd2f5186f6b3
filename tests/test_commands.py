"""The commands: gin files, T5X's flags, help, and what a typing mistake gets."""

import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import golden_data
import pytest
from command import refusal
from factories import CALIBRATION

from qmoe_jax.__main__ import COMMANDS, main
from qmoe_jax.calibration.tokens import write_tokens
from qmoe_jax.checkpoints.geometry import infer_config, parameter_shapes
from qmoe_jax.cli import flags
from qmoe_jax.config import SwitchConfig
from qmoe_jax.models.load import load_switch
from qmoe_jax.ops.products import CHOICES, IMPLEMENTATIONS

gin = pytest.importorskip("gin")
REPOSITORY = Path(__file__).parent.parent


def run(*arguments, cwd):
    return subprocess.run(
        [sys.executable, "-m", "qmoe_jax", *arguments],
        capture_output=True,
        text=True,
        cwd=cwd,
        check=False,
    )


@pytest.fixture(scope="module")
def tokens(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokens") / "tokens.npz"
    few = CALIBRATION[:12]
    write_tokens(path, few.tokens, few.metadata)
    return path


@pytest.fixture(scope="module")
def compressed(golden_checkpoint, tokens, tmp_path_factory):
    """Made by the command, from a working folder that is not the checkout."""
    folder = tmp_path_factory.mktemp("run")
    result = run(
        "compress",
        "--gin_file=gin/runs/compress.gin",
        f"--gin.CHECKPOINT='{golden_checkpoint('base', 't5x_bfloat16')}'",
        f"--gin.TOKENS='{tokens}'",
        "--gin.OUTPUT='compressed'",
        "--gin.CompressionSettings.batch_size=4",
        cwd=folder,
    )
    assert result.returncode == 0, result.stderr
    assert re.search(r"compressed: [\d,]+ expert weights at \d\.\d+ bits", result.stdout)
    return folder / "compressed"


def test_evaluate(compressed, tokens, tmp_path):
    # As `python -m`, and then: a machine that evaluates token files needs no TensorFlow.
    code = (
        "import sys; from qmoe_jax.__main__ import main; main(['evaluate', *sys.argv[1:]]); "
        "sys.exit(sorted({'tensorflow', 'seqio', 'torch'} & set(sys.modules)) or 0)"
    )
    arguments = [f"--gin.CHECKPOINT='{compressed}'", f"--gin.TOKENS='{tokens}'"]
    arguments += ["--gin.BATCH_SIZE=4", "--gin.OUTPUT='out'", "--gin.TENSORBOARD=False"]
    result = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    (model,) = json.loads((tmp_path / "out" / "metrics.json").read_text())["models"]
    assert model["num_examples"] == 12
    assert 3 < model["loss"] < 12
    row = next(line for line in result.stdout.splitlines() if line.startswith("compressed "))
    assert f"{model['loss']:.4f}" in row.split()
    assert f"{model['bits_per_weight']:.3f}" in row.split()


def test_the_operative_configuration_is_beside_the_checkpoint(compressed):
    saved = compressed.with_name("compressed.operative_config.gin").read_text()
    assert "CompressionSettings.batch_size = 4" in saved
    assert "CompressionSettings.damping = 0.1" in saved
    assert not list(compressed.glob("*.gin"))


def test_infer_on_the_demo_model(tmp_path):
    pytest.importorskip("sentencepiece")
    result = run(
        "infer",
        f"--gin.CHECKPOINT='{golden_data.DEMO / 'checkpoint_4200'}'",
        f"--gin.VOCABULARY='{golden_data.DEMO / 'sentencepiece.model'}'",
        "--gin.PROMPTS=['Return the <extra_id_0> of the array.', 'Raises an <extra_id_0>.']",
        "--gin.MAX_DECODE_LENGTH=8",
        cwd=tmp_path,
    )
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert lines[0] == "Return the <extra_id_0> of the array."
    assert lines[1].startswith("  -> <extra_id_0>")
    assert lines[2].startswith("  => Return the ")
    assert "<extra_id_0>" not in lines[2]


@pytest.mark.parametrize(
    ("command", "binding", "message"),
    [
        ("compress", "--gin.compress.damp=0.1", "damp"),
        ("compress", "--gin.CompressionSettings.griid='ternary'", "griid"),
        ("compress", "--gin.CHEKPOINT='x'", "is called CHEKPOINT; did you mean CHECKPOINT?"),
        ("evaluate", "--gin.evalute.batch_size=4", "called evalute; did you mean evaluate? known"),
        ("compress", "--gin.CompresionSettings.step=4", "did you mean CompressionSettings? known"),
        ("compress", "--gin.Nothing.step=4", "is called Nothing; known are compress, Compression"),
        ("evaluate", "--gin.evaluate.btach_size=4", "btach_size"),
        ("infer", "--gin.PROMPTS", "write --gin.NAME=VALUE"),
        ("evaluate", "--gin_file=nothing.gin", "there is no gin file nothing.gin in any of "),
        ("compress", "--gin_file=gin/runs/comprss.gin", "did you mean gin/runs/compress.gin?"),
        ("compress", "compressed", "arguments: compressed; settings are given as bindings, --gin."),
    ],
)
def test_mistakes_are_one_line_that_names_them(capsys, command, binding, message):
    required = ["--gin.CHECKPOINT='x'", "--gin.TOKENS='y'", "--gin.OUTPUT='z'"]
    assert message in refusal(capsys, command, *required, binding)


def test_missing_required_values_are_named(capsys):
    line = refusal(capsys, "compress", "--gin.CHECKPOINT='x'")
    assert "OUTPUT is required; pass --gin.OUTPUT=VALUE" in line


def test_a_model_file_provides_the_checkpoint(capsys):
    """T5X's order: the model's file, then the run's."""
    files = ["--gin_file=gin/models/switch_base.gin", "--gin_file=gin/runs/eval.gin"]
    assert "give either TOKENS" in refusal(capsys, "evaluate", *files)
    # The vocabulary is the model file's too: the run file, which comes after it, leaves it alone.
    task = [*files, "--gin.TASK='jsonl_span_corruption'"]
    assert "needs files (FILES)" in refusal(capsys, "evaluate", *task)
    line = refusal(capsys, "evaluate", "--gin.TOKENS='x'")
    assert "CHECKPOINT is required" in line


def test_a_missing_checkpoint_is_one_message(tmp_path, tokens):
    result = run(
        "evaluate",
        "--gin.CHECKPOINT='nowhere'",
        f"--gin.TOKENS='{tokens}'",
        cwd=tmp_path,
    )
    assert result.returncode == 2
    (line,) = result.stderr.splitlines()
    assert "nowhere" in line


@pytest.mark.parametrize("command", COMMANDS)
def test_help(capsys, command):
    with pytest.raises(SystemExit) as exit_info:
        main([command, "--help"])
    assert exit_info.value.code == 0
    text = capsys.readouterr().out
    assert text.startswith(f"usage: qmoe-jax {command} ")
    assert "python -m qmoe_jax." not in text


# What argparse asks for before it looks at anything else.
NEEDED = {
    "prepare-tokens": ["--source", "demo", "--output", "x"],
    "inspect": ["x"],
    "dequantize": ["x", "y"],
    "convert": ["published", "import", "x", "y"],
}


@pytest.mark.parametrize("command", COMMANDS)
def test_an_unknown_option_is_one_line(capsys, command):
    line = refusal(capsys, command, *NEEDED.get(command, []), "--nonsense")
    assert "--nonsense" in line
    assert line.endswith("--help says more")


def test_commands_are_found_or_the_nearest_is_named(capsys):
    for arguments in ([], ["--help"], ["-h"]):
        assert main(arguments) == 0
        listed = capsys.readouterr().out
        assert all(f"  {name} " in listed for name in COMMANDS)
    for given, meant in (("comprss", "compress"), ("prepare_tokens", "prepare-tokens")):
        assert main([given, "--help"]) == 2
        assert f"did you mean {meant}?" in capsys.readouterr().err
    assert main(["xyz"]) == 2
    assert "did you mean" not in capsys.readouterr().err
    folder = REPOSITORY / "qmoe_jax" / "cli"
    modules = {path.stem.replace("_", "-") for path in folder.glob("*.py")}
    helpers = {"--init--", "argument-types", "compilation-cache", "flags"}
    helpers |= {"printed-answers", "wording"}
    assert modules - helpers == set(COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_an_interrupted_command_says_how_to_go_on(monkeypatch, capsys, command):
    module = importlib.import_module(f"qmoe_jax.cli.{command.replace('-', '_')}")

    def interrupted(arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "main", interrupted)
    assert main([command]) == 130
    line = capsys.readouterr().err.strip()
    assert line == f"qmoe-jax {command}: interrupted; {module.IF_INTERRUPTED}"


WITHOUT = """
import importlib.abc, sys
HIDDEN = {"gin", "seqio", "tensorflow", "tensorflow_datasets", "torch"}
class Hide(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"gin", "seqio", "tensorflow", "tensorflow_datasets", "torch"}:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Hide())
from qmoe_jax.__main__ import main
sys.exit(main(sys.argv[1:]))
"""


class TestBareCheckout:
    """A checkout that is not installed, on a machine with JAX but no gin, seqio or TensorFlow."""

    def run(self, *arguments, cwd=REPOSITORY):
        return subprocess.run(
            [sys.executable, "-c", WITHOUT, *map(str, arguments)],
            capture_output=True,
            text=True,
            cwd=cwd,
            env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
            check=False,
        )

    def test_plan(self):
        result = self.run("plan", "switch_base_8", "--host_gb", 4000, "--disk_gb", 9000)
        assert result.returncode == 0, result.stderr
        assert "The run fits" in result.stdout

    def test_inspect_and_dequantize(self, gptq, tmp_path):
        result = self.run("inspect", gptq[0], cwd=tmp_path)
        assert result.returncode == 0, result.stderr
        assert "all experts" in result.stdout
        result = self.run("dequantize", gptq[0], "native", "--no-progress", cwd=tmp_path)
        assert result.returncode == 0, result.stderr
        assert (tmp_path / "native" / "checkpoint_0" / "checkpoint").is_file()

    @pytest.mark.parametrize(
        ("command", "function"), [("compress", "compress"), ("infer", "generate")]
    )
    def test_what_needs_gin_says_so(self, command, function):
        """The folder gin/ of the checkout is not taken for gin-config."""
        result = self.run(command, "--gin.CHECKPOINT='x'")
        assert result.returncode == 2
        (line,) = result.stderr.splitlines()
        assert "pip install 'qmoe-jax[gin]'" in line
        assert f"call qmoe_jax.{function} from Python" in line

    def test_a_namespace_package_is_not_gin(self, monkeypatch):
        import types

        from qmoe_jax.cli import flags

        namespace = types.ModuleType("gin")
        namespace.__path__ = [str(REPOSITORY / "gin")]
        monkeypatch.setitem(sys.modules, "gin", namespace)
        monkeypatch.delitem(sys.modules, "gin.config", raising=False)
        with pytest.raises(ValueError, match="gin-config is not installed"):
            flags._import_gin("compress")


@pytest.mark.parametrize("model", ["base", "large", "xxl", "c"])
def test_model_files_parse_and_agree_with_the_inferred_routing(model):
    registry = json.loads((REPOSITORY / "configs" / "public_checkpoints.json").read_text())
    path = f"gin/models/switch_{model}.gin"
    entries = [entry for entry in registry["checkpoints"] if entry["gin"] == path]
    assert entries
    flags._configurable(load_switch, "load_switch")
    gin.clear_config()
    gin.parse_config_file(str(REPOSITORY / path))
    bound = {
        name: gin.query_parameter(f"load_switch.{name}")
        for name in ("max_group_size", "train_capacity_factor", "min_expert_capacity")
    }
    bound["eval_capacity_factor"] = gin.query_parameter("T5X_EXPERT_CAPACITY_FACTOR/macro.value")
    location = gin.query_parameter("CHECKPOINT/macro.value")
    gin.clear_config()
    assert location in [entry["location"] for entry in entries]
    for entry in entries:
        for name, value in bound.items():
            assert entry["config"][name] == value


def test_the_registry_s_geometries_are_consistent():
    registry = json.loads((REPOSITORY / "configs" / "public_checkpoints.json").read_text())
    assert len(registry["checkpoints"]) == 9
    for entry in registry["checkpoints"]:
        config = SwitchConfig.from_json(entry["config"])
        # Names, shapes and the rule for routing fields lead back to the very same config.
        assert infer_config(parameter_shapes(config)) == config, entry["name"]


# --- The implementations of products with codes ---


@pytest.mark.parametrize(
    "where",
    [
        *(f"gin/runs/{run}.gin" for run in ("compress", "eval", "infer")),
        "docs/compress_public_checkpoint.md",
        "demo",
    ],
)
def test_every_implementation_is_named(where, capsys):
    """In the comment, help or guide that says what may be chosen."""
    if where == "demo":
        with pytest.raises(SystemExit):
            main(["demo", "--help"])
        text = capsys.readouterr().out.partition("--implementation IMPLEMENTATION")[2]
        assert set(re.findall(r"\w+", text)) >= set(CHOICES)
        return
    text = (REPOSITORY / where).read_text()
    chosen = IMPLEMENTATIONS if where.endswith(".md") else CHOICES
    assert set(re.findall(r"\"'?(\w+)'?\"", text.partition("IMPLEMENTATION")[2])) >= set(chosen)


@pytest.mark.parametrize("command", ["demo", "compress"])
def test_an_implementation_that_cannot_be(capsys, tmp_path, monkeypatch, command):
    """Without a GPU, or of no such name: one line, before anything is read."""
    monkeypatch.chdir(tmp_path)

    def line(name):
        if command == "demo":
            return refusal(capsys, command, "--implementation", name)
        given = [f"--gin.{needed}='nowhere'" for needed in ("CHECKPOINT", "TOKENS", "OUTPUT")]
        chosen = f"--gin.IMPLEMENTATION='{name}'"
        return refusal(capsys, command, "--gin_file=gin/runs/compress.gin", chosen, *given)

    assert "requires a CUDA device" in line("cuda_fragments")
    assert f"must be one of {', '.join(CHOICES)}" in line("cuda_pieces")
