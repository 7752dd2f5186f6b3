"""Pages and model cards: what they show, that they need nothing else, and what they replace."""

import dataclasses
import datetime
import html.parser
import re
import shlex
import sys
import xml.etree.ElementTree
from pathlib import Path

import numpy as np
import pytest
from command import command, refusal
from factories import CALIBRATION

import qmoe_jax
from qmoe_jax import page, plots
from qmoe_jax.calibration.tokens import write_tokens
from qmoe_jax.cli.wording import spell_command
from qmoe_jax.evaluation import evaluation_page
from qmoe_jax.evaluation.divergence import DivergenceReport
from qmoe_jax.evaluation.metrics import LossReport
from qmoe_jax.pipeline import run_pages

NOW = datetime.datetime(2026, 5, 4, 3, 2, tzinfo=datetime.UTC)


class Outline(html.parser.HTMLParser):
    """Tables and text of a page, and whatever it would fetch."""

    def __init__(self, content):
        super().__init__()
        self.tables, self.fetched, self._cell = [], [], None
        self.feed(content)

    def handle_starttag(self, tag, attrs):
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self._cell = ""
        self.fetched += [v for k, v in attrs if k in ("src", "href") and not v.startswith("#")]
        if tag in ("script", "link", "img"):
            self.fetched.append(tag)

    def handle_data(self, data):
        if self._cell is not None:
            self._cell += data

    def handle_endtag(self, tag):
        if tag in ("td", "th"):
            self.tables[-1][-1].append(self._cell)
            self._cell = None


def figures(content):
    """The plots of a page, each well-formed."""
    found = re.findall(r"<svg .*?</svg>", content, re.DOTALL)
    for svg in found:
        xml.etree.ElementTree.fromstring(svg)
        assert "aria-label" in svg
    return found


@pytest.fixture(scope="module")
def made(base, tmp_path_factory):
    """A folder with a compressed model and its pages, made by the command; its command line."""
    pytest.importorskip("gin")
    folder = tmp_path_factory.mktemp("pages")
    few = CALIBRATION[:8]
    write_tokens(folder / "tokens.npz", few.tokens, few.metadata)
    arguments = [
        f"--gin.CHECKPOINT='{base}'",
        f"--gin.TOKENS='{folder / 'tokens.npz'}'",
        f"--gin.OUTPUT='{folder / 'small <model>'}'",
        "--gin.CompressionSettings.method='rtn'",
        "--gin.REPORT_EXAMPLES=4",
    ]
    assert command("compress")(arguments) == 0
    return folder, arguments


def test_every_run_leaves_a_page(made):
    folder, arguments = made
    content = (folder / "small <model>.report.html").read_text()
    outline = Outline(content)
    assert outline.fetched == []
    assert len(figures(content)) == (2 if plots.can_plot() else 0)
    facts, kernels, settings = outline.tables
    facts = dict(facts)
    checkpoint = qmoe_jax.load_switch(folder / "small <model>")
    weights = sum(spec.num_weights for _, spec in checkpoint[0].coded)
    assert facts["expert weights"] == f"{weights:,}"
    assert float(facts["KL from the uncompressed model"].split()[0]) > 0
    assert "of calibration text" in facts["KL from the uncompressed model"]
    names = [row[0] for row in kernels[1:]]
    assert sorted(names) == sorted(dict(checkpoint[0].coded))
    for row in kernels[1:]:
        values = dict(zip(kernels[0], row, strict=True))
        parts = sum(float(values[part]) for part in ("codes", "levels", "lengths"))
        assert parts == pytest.approx(float(values["bits"]), abs=0.002)
        assert re.fullmatch(r"\d+ to \d+", values["tokens an expert"])
    assert ["method", "'rtn'"] in settings
    assert f"qmoe-jax {qmoe_jax.__version__}, 20" in content
    # The command, as a shell reads it.
    line = re.search(r"<pre>(.*?)</pre>", content, re.DOTALL)
    assert shlex.split(html.unescape(line[1]))[2:] == arguments


def test_the_model_card(made):
    folder, arguments = made
    card = (folder / "small <model>.model_card.md").read_text()
    block = re.search(r"```sh\n(.*?)\n```", card, re.DOTALL)
    assert shlex.split(block[1])[2:] == arguments
    page_facts = Outline((folder / "small <model>.report.html").read_text()).tables[0]
    for name, value in page_facts[1:]:
        assert f"| {name} | {value} |" in card


def test_errors_are_explained_where_they_stand(made):
    """A weight error above 1 looks like a mistake, and is none."""
    folder, _ = made
    for file in ("small <model>.report.html", "small <model>.model_card.md"):
        content = html.unescape((folder / file).read_text())
        assert "Layer error is |(W - Q) X|² / |W X|²" in content
        assert "Weight error is |W - Q|² / |W|²" in content


def test_the_output_does_not_know_of_its_pages(made, base, tmp_path):
    """Its bytes are those of a run without any."""
    folder, _ = made
    few = CALIBRATION[:8]
    qmoe_jax.compress(base, tmp_path / "plain", few, method="rtn", progress=False)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["plain"]
    manifest = (folder / "small <model>" / "manifest.json").read_bytes()
    assert manifest == (tmp_path / "plain" / "manifest.json").read_bytes()


def test_files_of_others_stay(made, tmp_path, capsys, monkeypatch):
    _, arguments = made
    monkeypatch.chdir(tmp_path)
    arguments = [*arguments, "--gin.OUTPUT='out'"]
    for name in ("out.report.html", "out.model_card.md"):
        (tmp_path / name).write_text("mine")
        assert f"{name} is there and is not" in refusal(capsys, "compress", *arguments)
        assert [p.name for p in tmp_path.iterdir()] == [name]
        (tmp_path / name).unlink()
    assert command("compress")([*arguments, "--gin.compress.report=False"]) == 0
    assert not list(tmp_path.glob("out.report*"))
    # Its own are replaced.
    assert command("compress")([*arguments, "--overwrite", "--gin.REPORT_EXAMPLES=0"]) == 0
    assert "not measured" in (tmp_path / "out.report.html").read_text()
    assert command("compress")([*arguments, "--overwrite", "--gin.REPORT_EXAMPLES=0"]) == 0
    capsys.readouterr()
    line = refusal(capsys, "compress", *arguments, "--overwrite", "--gin.REPORT_EXAMPLES=-1")
    assert "report_examples is -1" in line


def report_of(kernels, **changes):
    """A report without a run."""
    from qmoe_jax.pipeline.report import CompressionReport, KernelReport

    made = [
        KernelReport(
            name=f"{'encoder' if i % 2 else 'decoder'}/layers_{i}/mlp/expert/wi",
            num_experts=2,
            num_weights=1000,
            bits={"codes": 500 + i, "levels": 90, "offsets": 10, "total": 600 + i},
            zeros=0.8,
            relative_weight_error=0.5,
            relative_layer_error=0.1 / (1 + i) ** 3,
            experts_without_tokens=1 if i == 0 else 0,
            singular_hessians=0,
            nonfinite_experts=0,
            token_counts=[0.0 if i == 0 else 3.0, 7.0],
        )
        for i in range(kernels)
    ]
    report = CompressionReport("a/out", {"grid": "ternary"}, made, 800, 50)
    return dataclasses.replace(report, **changes)


def test_fallbacks_warnings_and_many_kernels():
    content = run_pages.html_page(report_of(60), [("a", "b")], None)
    if plots.can_plot():
        first, second = figures(content)
        # Of 60 kernels not all can be named below their bars.
        assert 15 < first.count("enc ") + first.count("dec ") < 60
        assert "codes" in second
    rows = Outline(content).tables[1]
    assert rows[1][-1] == "of 2: 1 no tokens"
    assert rows[2][-1] == "none"
    assert "experts saw no calibration token" in content
    assert "Command" not in content


def test_the_figures_of_a_comparison_stand_in_the_page(tmp_path):
    tokens = np.array([10, 30])
    zeros = np.zeros(2, np.int64)
    losses = LossReport(np.array([20.0, 61.0]), tokens, zeros)
    reference = LossReport(np.array([20.0, 60.0]), tokens, zeros)
    divergence = DivergenceReport(np.array([0.4, 1.2]), tokens, losses, reference)
    report = report_of(2, output=str(tmp_path / "out"), divergence=divergence)
    at, _ = run_pages.write_pages(report, checkpoint="from/here")
    facts = dict(Outline(Path(at).read_text()).tables[0])
    assert facts["compressed from"] == "from/here"
    assert facts["KL from the uncompressed model"].startswith("0.04000 ± 0.00000 nats")
    assert facts["loss above the uncompressed model"].startswith("+0.0250 ± ")


def test_without_matplotlib_the_page_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr(plots, "can_plot", lambda: False)
    content = run_pages.html_page(report_of(3), [("a", "b")], None)
    assert "matplotlib is not installed" in content
    assert "<svg" not in content
    assert len(Outline(content).tables) == 3


def test_equal_figures_are_equal_files():
    pytest.importorskip("matplotlib")
    once, again = (run_pages.html_page(report_of(3), [], None) for _ in range(2))
    assert figures(once) == figures(again)


def test_a_page_escapes_what_it_shows():
    content = page.page("kind", "<b>", [page.html_table([("<i>",), ("&",)])], now=NOW)
    assert "<b>" not in content
    assert Outline(content).tables == [[["<i>"], ["&"]]]
    assert "2026-05-04 03:02 UTC" in content


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--gin.OUTPUT='out'"], "qmoe-jax compress --gin.OUTPUT=\"'out'\""),
        (["--gin.X=1", "a b"], "qmoe-jax compress --gin.X=1 'a b'"),
    ],
)
def test_commands_are_quoted_as_in_the_guides(arguments, line):
    assert spell_command("compress", arguments) == line


@pytest.mark.parametrize("text", ["--a='$x'", "--a='`b`'", "'\"!\\", "--a b='c'", "", "\n'"])
def test_commands_are_read_as_they_were(text):
    assert shlex.split(spell_command("compress", [text]))[2:] == [text]


# --- Evaluations ---


def model(name, size, gap, kl):
    router = dict.fromkeys(
        ("num_tokens", "dropped_fraction", "max_load", "unused_experts", "confidence"), 1.0
    ) | {"auxiliary_loss": 1.0, "router_z_loss": 1.0, "num_tokens": 3}
    reference = {"kl": kl, "kl_standard_error": kl / 9, "agreement": 0.9}
    return {
        "name": name,
        "num_examples": 2,
        "num_target_tokens": 30,
        "loss": 3 + gap,
        "gap": gap,
        "gap_standard_error": 0.01,
        "accuracy": 0.5,
        "bits_per_weight": None if not gap else 0.8,
        "num_bytes": size,
        "target_tokens_per_second": None,
        "warnings": ["is odd"] if gap else [],
        "router": {"layers": {"encoder/layers_1/mlp": router}, "total": router},
        "reference": reference | {"gap": gap, "gap_standard_error": 0.01},
    }


def test_an_evaluation_shows_size_and_kl():
    from qmoe_jax.evaluation.tables import summary

    models = [model("whole", 2_000_000, 0.0, 0.0), model("small", 100_000, 0.02, 0.003)]
    settings = {"expert_capacity_factor": None, "activation_dtype": "float32"}
    settings["reference"] = {"path": "somewhere"}
    document = {"models": models, "settings": settings}
    table = summary(document, routers=False)
    heads, _, whole, small = table.split("\n\n")[1].splitlines()
    assert heads.split()[:4] == ["checkpoint", "loss", "gap", "+-"]
    assert "KL" in heads
    assert "size" in heads
    assert "2 MB" in whole
    assert "0.00300" in small
    assert "100 kB" in small
    assert "routers of" not in table
    assert "routers of small" in summary(document)
    content = evaluation_page.html_page(document)
    outline = Outline(content)
    assert outline.fetched == []
    assert outline.tables[0][2][0] == "small"
    assert len(figures(content)) == (1 if plots.can_plot() else 0)
    assert "Warning: small: is odd" in content


def test_the_page_of_an_evaluation(made, base, tmp_path, capsys):
    folder, _ = made
    output = tmp_path / "out"
    few = CALIBRATION[8:12]
    document = qmoe_jax.evaluate(
        {"whole": base, "small": folder / "small <model>"},
        few,
        output=output,
        tensorboard=False,
        progress=False,
    )
    content = (output / "report.html").read_text()
    assert [row[0] for row in Outline(content).tables[0]] == ["checkpoint", "whole", "small"]
    sizes = [found["num_bytes"] for found in document["models"]]
    native = qmoe_jax.open_t5x_checkpoint(base)
    assert sizes[0] == sum(4 * int(np.prod(shape)) for shape in native.shapes.values())
    assert 0 < sizes[1] < sizes[0] / 2
    (output / "report.html").write_text("mine")
    with pytest.raises(qmoe_jax.CheckpointError, match="is not such a file as the report"):
        qmoe_jax.evaluate(base, few, output=output, progress=False)


# --- The demo ---


def demo_row(name, bits, gap, **changes):
    compression = report_of(4).to_json()
    row = {
        "name": name,
        "loss": 2.7 + gap,
        "num_target_tokens": 100,
        "gap": gap,
        "gap_standard_error": 0.0003,
        "kl": gap / 2,
        "kl_standard_error": gap / 30,
        "bits_per_weight": bits,
        "expert_compression": 16 / bits,
        "model_compression": 3.0,
        "zeros": 0.8,
        "seconds": 20.0,
        "compression": compression,
        "samples": [{"text": "Returns the <mean> of x."}],
    }
    return {key: value for key, value in (row | changes).items() if value is not None}


def test_the_demo_s_page(tmp_path):
    pytest.importorskip("matplotlib")
    from qmoe_jax.demo import report as demo_report

    rows = [
        demo_row("uncompressed", 16.0, 0.0, compression=None),
        demo_row("RTN ternary", 0.9, 0.03),
        demo_row("lattice, 1 bit", 1.0, 0.001),
    ]
    facts = {"checkpoint": "here", "num_calibration_examples": 5, "seconds": 1.0}
    document = demo_report.document(rows, **facts)
    demo_report.write_html(document, tmp_path / "report.html")
    content = (tmp_path / "report.html").read_text()
    outline = Outline(content)
    assert outline.fetched == []
    assert [row[0] for row in outline.tables[0]] == ["model", *(row["name"] for row in rows)]
    assert len(figures(content)) == 2
    assert "Returns the &lt;mean&gt; of x." in content
    assert demo_report.is_html_report(tmp_path / "report.html")
    (tmp_path / "other.html").write_text("<!doctype html>")
    assert not demo_report.is_html_report(tmp_path / "other.html")
