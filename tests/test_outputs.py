"""Nothing that a writer did not make is deleted, and no input is ever an output.

A canary tree is compared before and after: whatever is refused must have lost no file.
"""

import shutil

import pytest
from canary import tree
from factories import CALIBRATION, QUICK

import qmoe_jax
from qmoe_jax.calibration.tokens import write_tokens
from qmoe_jax.checkpoints.t5x_writer import T5XCheckpointWriter
from qmoe_jax.errors import CheckpointError
from qmoe_jax.outputs import FolderKind, OutputFolder, check_no_input

KIND = FolderKind(
    "a test folder",
    lambda name: name in ("manifest", "data"),
    lambda folder: (folder / "manifest").exists(),
)


def whole(folder, text="old"):
    (folder / "data").mkdir(parents=True)
    (folder / "data" / "0").write_text(text)
    (folder / "manifest").write_text(text)
    return folder


def write(folder, **options):
    output = OutputFolder(folder, KIND, **options)
    output.begin(anew=True)
    (output.partial / "data").mkdir()
    (output.partial / "manifest").write_text("new")
    return output.finish()


class TestReplacing:
    def test_a_new_output(self, tmp_path):
        assert write(tmp_path / "a" / "out") == tmp_path / "a" / "out"
        assert tree(tmp_path / "a") == {"out": None, "out/data": None, "out/manifest": b"new"}

    def test_a_finished_one_only_when_asked(self, tmp_path):
        whole(tmp_path / "out")
        before = tree(tmp_path)
        with pytest.raises(CheckpointError, match="exists already.*overwrite=True"):
            write(tmp_path / "out")
        assert tree(tmp_path) == before
        write(tmp_path / "out", overwrite=True)
        assert tree(tmp_path) == {"out": None, "out/data": None, "out/manifest": b"new"}

    def test_an_empty_folder_may_be_used(self, tmp_path):
        (tmp_path / "out").mkdir()
        write(tmp_path / "out", overwrite=True)
        assert (tmp_path / "out" / "manifest").read_text() == "new"

    @pytest.mark.parametrize(
        "make",
        [
            lambda out: (out.mkdir(), (out / "notes.txt").write_text("mine")),
            lambda out: (whole(out), (out / "notes.txt").write_text("mine")),
            lambda out: (out / "data").mkdir(parents=True),  # no manifest: not a finished one
            lambda out: out.write_text("a file"),
        ],
        ids=["foreign", "mixed", "unfinished", "file"],
    )
    def test_anything_else_is_refused_and_stays(self, tmp_path, make):
        make(tmp_path / "out")
        before = tree(tmp_path)
        with pytest.raises(CheckpointError, match="stays as it is; choose another output"):
            write(tmp_path / "out", overwrite=True)
        assert tree(tmp_path) == before

    @pytest.mark.parametrize("ending", [".partial", ".previous"])
    def test_so_is_what_stands_beside_it(self, tmp_path, ending):
        whole(tmp_path / "out")
        (tmp_path / f"out{ending}").mkdir()
        (tmp_path / f"out{ending}" / "thesis.tex").write_text("mine")
        before = tree(tmp_path)
        with pytest.raises(CheckpointError, match=r"holds thesis\.tex"):
            write(tmp_path / "out", overwrite=True)
        assert tree(tmp_path) == before

    def test_a_file_that_came_while_the_run_worked_is_kept(self, tmp_path):
        whole(tmp_path / "out")
        output = OutputFolder(tmp_path / "out", KIND, overwrite=True)
        output.begin(anew=True)
        (output.partial / "manifest").write_text("new")
        (tmp_path / "out" / "notes.txt").write_text("mine")
        with pytest.raises(CheckpointError, match=r"holds notes\.txt"):
            output.finish()
        assert (tmp_path / "out" / "notes.txt").read_text() == "mine"
        assert (output.partial / "manifest").read_text() == "new"

    def test_a_link_is_followed_and_stays_a_link(self, tmp_path):
        whole(tmp_path / "real")
        (tmp_path / "out").symlink_to("real")
        assert write(tmp_path / "out", overwrite=True) == tmp_path / "real"
        assert (tmp_path / "out").is_symlink()
        assert (tmp_path / "real" / "manifest").read_text() == "new"


class TestInputs:
    @pytest.fixture
    def folders(self, tmp_path):
        (tmp_path / "a" / "input" / "deep").mkdir(parents=True)
        (tmp_path / "link").symlink_to(tmp_path / "a" / "input")
        (tmp_path / "up").symlink_to(tmp_path / "a")
        (tmp_path / "elsewhere").mkdir()
        return tmp_path

    @pytest.mark.parametrize(
        ("output", "given"),
        [
            ("a/input", "a/input"),
            ("a/input/", "a/input"),
            ("a/../a/./input", "a/input/"),
            ("a", "a/input"),
            (".", "a/input/deep"),
            ("link", "a/input"),
            ("a/input", "link"),
            ("up", "a/input"),
            ("a", "link/deep"),
            ("a/input", "up/input"),
        ],
    )
    def test_is_or_holds_an_input(self, folders, monkeypatch, output, given):
        monkeypatch.chdir(folders)
        for one in (output, str(folders / output)):
            for other in (given, str(folders / given)):
                with pytest.raises(CheckpointError, match="is, or holds, the input"):
                    check_no_input(one, ["elsewhere/not/there", other])

    @pytest.mark.parametrize(
        ("output", "given"),
        [("a/input/deep/out", "a/input"), ("elsewhere", "a/input"), ("a/inp", "a/input")],
    )
    def test_others_are_fine(self, folders, monkeypatch, output, given):
        monkeypatch.chdir(folders)
        check_no_input(output, [given, "not/there", "gs://bucket/a"])

    def test_urls(self):
        for output in ("gs://bucket/a", "gs://bucket/a/", "gs://bucket/a/b"):
            with pytest.raises(CheckpointError, match="is, or holds, the input"):
                check_no_input(output, ["gs://bucket/a/b/"])
        check_no_input("gs://bucket/a", ["gs://bucket/ab", "a"])

    def test_the_home_folder(self, folders, monkeypatch):
        monkeypatch.setenv("HOME", str(folders / "a"))
        with pytest.raises(CheckpointError, match="is, or holds, the input"):
            check_no_input("~", [folders / "a" / "input"])
        with pytest.raises(CheckpointError, match="is, or holds, the input"):
            check_no_input(folders / "a", ["~/input"])


class TestCompress:
    """The product's writers, on a native checkpoint that must survive."""

    @pytest.fixture
    def canary(self, base, tmp_path):
        shutil.copytree(base, tmp_path / "model" / "checkpoint_500100")
        write_tokens(tmp_path / "tokens.npz", CALIBRATION.tokens, CALIBRATION.metadata)
        (tmp_path / "work").mkdir()
        (tmp_path / "work" / "notes.txt").write_text("mine")
        (tmp_path / "link").symlink_to("model")
        return tmp_path

    @pytest.mark.parametrize(
        "output",
        [
            "model/checkpoint_500100",
            "model/checkpoint_500100/",
            "model",
            "link",
            "link/checkpoint_500100",
            "work/../model",
            ".",
            "work",
            "tokens.npz",
        ],
    )
    def test_what_must_not_be_replaced_is_refused_before_work(self, canary, monkeypatch, output):
        monkeypatch.chdir(canary)
        before = tree(canary)
        with pytest.raises(CheckpointError) as refusal:
            qmoe_jax.compress(
                "model/checkpoint_500100", output, "tokens.npz", overwrite=True, **QUICK
            )
        assert "\n" not in str(refusal.value)
        assert tree(canary) == before

    def test_the_parent_given_as_the_checkpoint(self, canary, monkeypatch):
        """What is read is the latest step in it: neither may go."""
        monkeypatch.chdir(canary)
        before = tree(canary)
        for output in ("model", "model/checkpoint_500100"):
            with pytest.raises(CheckpointError):
                qmoe_jax.compress("model", output, overwrite=True, method="rtn", **QUICK)
        assert tree(canary) == before


def test_dequantize_leaves_a_foreign_partial_folder_alone(tmp_path):
    (tmp_path / "checkpoint_7.partial").mkdir()
    (tmp_path / "checkpoint_7.partial" / "notes.txt").write_text("mine")
    before = tree(tmp_path)
    with pytest.raises(CheckpointError, match=r"holds notes\.txt"):
        T5XCheckpointWriter(tmp_path, 7)
    assert tree(tmp_path) == before
