"""The notebook runs from top to bottom on the demo, and its rendered page was made from it."""

import importlib.util
import json
import re
import sys
import types
from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat")
pytest.importorskip("nbclient")
pytest.importorskip("nbconvert")
pytest.importorskip("ipykernel")
pytest.importorskip("seqio")
pytest.importorskip("matplotlib")

FOLDER = Path(__file__).parent.parent / "notebooks"
# What flaxformer computed: tests/golden/switch_demo/info.json, and of the first 128 examples its
# first four batches.
INFO = json.loads((Path(__file__).parent / "golden" / "switch_demo" / "info.json").read_text())


def load_render():
    spec = importlib.util.spec_from_file_location("render", FOLDER / "render.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


render = load_render()


@pytest.fixture(scope="module")
def notebook():
    return nbformat.read(render.NOTEBOOK, as_version=4)


@pytest.fixture(scope="module")
def run(notebook, tmp_path_factory):
    """All cells with little text: the executed notebook, and the results that it wrote."""
    output = tmp_path_factory.mktemp("notebook") / "out"
    parameters = {"OUTPUT": str(output), "NUM_CALIBRATION": 64, "NUM_VALIDATION": 128}
    parameters["FINETUNE_STEPS"] = 4
    executed = render.execute(notebook, parameters, timeout=600)
    return executed, json.loads((output / "results.json").read_text())


def outputs_of(executed, cell_id):
    (cell,) = (cell for cell in executed.cells if cell.id == cell_id)
    return cell.outputs


def text_of(executed, cell_id):
    return "".join(o.text for o in outputs_of(executed, cell_id) if o.get("name") == "stdout")


def test_losses(run):
    _, results = run
    uncompressed, rtn, gptq, lattice = results["evaluation"]["models"]
    expected = INFO["results"]["dropless_f32"]["ce_sum_per_batch"][:4]
    # Every example of the demo has 29 targets.
    assert uncompressed["loss"] == pytest.approx(sum(expected) / (128 * 29), abs=1e-5)
    assert [m["name"] for m in (rtn, gptq, lattice)] == ["RTN", "GPTQ", "lattice"]
    for model in (rtn, gptq, lattice):
        assert model["num_target_tokens"] == 128 * 29
        assert model["gap"] == pytest.approx(model["loss"] - uncompressed["loss"], abs=1e-6)
    assert 0 < gptq["gap"] < 0.5 * rtn["gap"]
    assert 0 < lattice["gap"] < 0.5 * rtn["gap"]
    assert rtn["gap"] < 0.05


def test_compression(run):
    executed, results = run
    rtn, gptq, lattice = (results["compression"][name] for name in ("RTN", "GPTQ", "lattice"))
    assert lattice["bits_per_weight"] < 0.65 * gptq["bits_per_weight"]
    assert 0.8 < rtn["bits_per_weight"] < gptq["bits_per_weight"] < 1.2
    for of_rtn, of_gptq in zip(rtn["kernels"], gptq["kernels"], strict=True):
        assert of_gptq["relative_layer_error"] < 0.5 * of_rtn["relative_layer_error"]
        assert of_rtn["zeros"] > of_gptq["zeros"]
    for name, report in (("RTN", rtn), ("GPTQ", gptq), ("lattice", lattice)):
        line = next(x for x in text_of(executed, "compress").splitlines() if x.startswith(name))
        assert f"at {report['bits_per_weight']:.3f} bits" in line


def test_blanks_are_filled(run):
    executed, results = run
    shown = text_of(executed, "greedy")
    for texts in results["filled"].values():
        assert len(texts) == 3
        for text in texts:
            assert f"  => {text}\n" in shown
            assert "<extra_id_0>" not in text
    assert len(re.findall(r"-> \[-\d+\.\d+\] <extra_id_0>", text_of(executed, "beam"))) == 2
    assert "Reads the <extra_id_0>" in text_of(executed, "interactive")


def test_plan_and_choice(run):
    executed, results = run
    choice = text_of(executed, "choice")
    for count in (8, 16, 32, 64, 128, 256):
        assert re.search(rf"^switch_base_{count} +\d+\.\d GB +\d\.\d\d GB", choice, re.MULTILINE)
    assert results["plan"]["fits"]
    assert "The run fits" in text_of(executed, "plan")
    # At the default step, against what was stored.
    planned = results["plan"]["sizes"][0]["bits_per_weight"]
    assert results["compression"]["lattice"]["bits_per_weight"] == pytest.approx(planned, rel=0.05)


def test_fine_tuning(run):
    executed, results = run
    figures = results["finetuning"]
    assert figures["after"]["loss"] < figures["before"]["loss"]
    # Corrections are rounded as the checkpoint's kernels are.
    assert figures["written"]["loss"] == pytest.approx(figures["after"]["loss"], rel=0.01)
    assert f"written  loss {figures['written']['loss']:.4f}" in text_of(executed, "finetune")


def test_model_card(run):
    (card,) = (o for o in outputs_of(run[0], "card") if o.output_type == "display_data")
    assert "compressed by qmoe-jax" in card.data["text/markdown"]


@pytest.mark.parametrize("cell_id", ["plots", "zeros", "error", "gap", "finetuned"])
def test_plots(run, cell_id):
    (plot,) = (o for o in outputs_of(run[0], cell_id) if o.output_type == "display_data")
    assert len(plot.data["image/png"]) > 10_000


def test_the_notebook_is_kept_without_outputs(notebook):
    for cell in notebook.cells:
        if cell.cell_type == "code":
            assert cell.outputs == []
            assert cell.execution_count is None


def test_the_page_was_made_from_this_notebook(notebook):
    page = render.NOTEBOOK.with_suffix(".html").read_text()
    digest = render.source_digest(notebook)
    assert f'content="{digest}"' in page, "the notebook has changed since: run `make notebook`"
    assert page.count("data:image/png;base64,") == 5
    assert "<script" not in page
    assert not re.search(r"[\"'> ](/home/|/root/|/tmp/|/Users/)", page)


def test_a_page_does_not_name_this_machine(run):
    executed, _ = run
    assert "data:image/png" in render.render(executed, "0")
    leaking = nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell("# Title")])
    leaking.cells.append(nbformat.v4.new_markdown_cell(f"It is in {render.CHECKOUT}/qmoe_jax."))
    with pytest.raises(ValueError, match="name a folder of this machine"):
        render.render(leaking, "0")


def test_unknown_parameters_are_refused(notebook):
    with pytest.raises(ValueError, match="no parameter NUM_CALIBRATIONS; it has REPOSITORY, "):
        render.execute(notebook, {"NUM_CALIBRATIONS": 64})


def test_final_screen():
    """Nested bars as tqdm draws them: the inner one ends and is wiped out."""
    text = "outer:  0%\n\rinner:  0%\x1b[A\n\rinner: 99%\x1b[A\n\r          \r\x1b[A\router: 100%\n"
    assert render.final_screen(text) == "outer: 100%\n"
    assert render.final_screen("one\n\ntwo\rt") == "one\ntwo\n"
    assert (
        render.final_screen("W0000 00:00:1 x.cc:3] chatter\nwarning: kept\n") == "warning: kept\n"
    )
    assert render.final_screen("") == ""


def test_colab_installs_from_the_checkout(notebook, monkeypatch):
    """The set-up cell as it is, as if on Colab."""
    (cell,) = (cell for cell in notebook.cells if cell.id == "setup")
    commands = []
    monkeypatch.setitem(sys.modules, "google.colab", types.ModuleType("google.colab"))
    monkeypatch.setattr("subprocess.run", lambda command, check: commands.append(command))
    monkeypatch.setattr(sys, "path", [*sys.path])
    exec(cell.source, {"REPOSITORY": ""})  # installed already: nothing to do
    assert commands == []
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="set REPOSITORY above"):
        exec(cell.source, {"REPOSITORY": ""})
    exec(cell.source, {"REPOSITORY": "https://example.org/x.git"})
    clone, install = commands
    assert clone[:2] == ["git", "clone"]
    assert clone[-2:] == ["https://example.org/x.git", "checkout"]
    assert install[-2:] == ["--editable", "checkout[data,gin,plots]"]
    assert Path(sys.path[0]).name == "checkout"
