"""Nothing that a writer did not make is deleted, and no input is ever an output.

A canary tree is compared before and after: whatever is refused must have lost no file.
"""

import os
import shutil

import pytest
from canary import tree
from factories import CALIBRATION, TERNARY

import qmoe_jax
from qmoe_jax.calibration.tokens import write_tokens
from qmoe_jax.checkpoints.t5x_writer import T5XCheckpointWriter
from qmoe_jax.errors import CheckpointError, TokensError
from qmoe_jax.outputs import FolderKind, OutputFolder, check_no_input, is_json_object, output_file

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
                "model/checkpoint_500100", output, "tokens.npz", overwrite=True, **TERNARY
            )
        assert "\n" not in str(refusal.value)
        assert tree(canary) == before

    def test_the_parent_given_as_the_checkpoint(self, canary, monkeypatch):
        """What is read is the latest step in it: neither may go."""
        monkeypatch.chdir(canary)
        before = tree(canary)
        for output in ("model", "model/checkpoint_500100"):
            with pytest.raises(CheckpointError):
                qmoe_jax.compress("model", output, overwrite=True, method="rtn", **TERNARY)
        assert tree(canary) == before


def test_dequantize_leaves_a_foreign_partial_folder_alone(tmp_path):
    (tmp_path / "checkpoint_7.partial").mkdir()
    (tmp_path / "checkpoint_7.partial" / "notes.txt").write_text("mine")
    before = tree(tmp_path)
    with pytest.raises(CheckpointError, match=r"holds notes\.txt"):
        T5XCheckpointWriter(tmp_path, 7)
    assert tree(tmp_path) == before


class TestFiles:
    """An output that is a file replaces only files of its kind."""

    @pytest.fixture
    def place(self, tmp_path):
        (tmp_path / "mine.txt").write_text("mine")
        (tmp_path / "ours.json").write_text('{"kind": 1, "more": 2}')
        (tmp_path / "empty").write_text("")
        (tmp_path / "folder").mkdir()
        (tmp_path / "link").symlink_to("ours.json")
        (tmp_path / "loop").symlink_to("loop")
        return tmp_path

    def where(self, path, **options):
        return output_file(path, "the plan", lambda file: is_json_object(file, ["kind"]), **options)

    @pytest.mark.parametrize("name", ["new", "a/b/new", "ours.json", "empty", "link"])
    def test_right(self, place, name):
        before = tree(place)
        assert self.where(place / name) == place / name
        assert tree(place) == before

    @pytest.mark.parametrize(
        ("name", "message"),
        [
            ("mine.txt", "mine.txt is there and is not such a file as the plan; it stays"),
            ("folder", "the plan .*folder is a folder"),
            ("mine.txt/below", r"cannot write the plan .*below \(Not a directory\)"),
            ("loop", r"cannot write the plan .*loop \(Too many levels"),
            ("n" * 300, r"cannot write the plan .*\(File name too long\)"),
        ],
    )
    def test_wrong(self, place, name, message):
        before = tree(place)
        with pytest.raises(TokensError, match=message):
            self.where(place / name, error=TokensError)
        assert tree(place) == before

    def test_an_input(self, place):
        for output in ("ours.json", "link"):
            with pytest.raises(CheckpointError, match="is, or holds, the input"):
                self.where(place / output, inputs=[place / "ours.json"])

    @pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
    def test_a_folder_without_the_right(self, place):
        (place / "folder").chmod(0o500)
        with pytest.raises(CheckpointError, match="Permission denied"):
            self.where(place / "folder" / "new")


class TestEvaluate:
    """Results stand beside a user's files, and never in their place."""

    def evaluate(self, base, output, **options):
        options = {"batch_size": 8, "progress": False, "tensorboard": True} | options
        return qmoe_jax.evaluate({"model": base}, CALIBRATION[:8], output=output, **options)

    @pytest.mark.parametrize("name", ["metrics.json", "model/shard_00000.npz", "model/notes.txt"])
    @pytest.mark.parametrize("overwrite", [False, True])
    def test_foreign_files_stay(self, base, tmp_path, name, overwrite):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("mine")
        before = tree(tmp_path)
        with pytest.raises(CheckpointError, match="stays as it is"):
            self.evaluate(base, tmp_path, overwrite=overwrite)
        assert tree(tmp_path) == before

    def test_so_do_foreign_events(self, base, tmp_path):
        pytest.importorskip("tensorboardX")
        self.evaluate(base, tmp_path)
        (tmp_path / "model" / "events.out.tfevents.1.host").write_text("mine")
        for _ in range(2):
            self.evaluate(base, tmp_path, overwrite=True)
            events = sorted(path.name for path in (tmp_path / "model").glob("events.*"))
            assert len(events) == 2
            assert events[0] == "events.out.tfevents.1.host"
            assert events[1].endswith(".qmoe_jax")

    def test_nothing_is_written_into_a_checkpoint(self, golden_copy, tmp_path):
        model = golden_copy("base", "t5x_float32_inference")
        before = tree(tmp_path)
        for named, output in (({"a": model}, model), ({model.name: model}, model.parent)):
            with pytest.raises(CheckpointError, match="an input; choose|is, or holds, the in"):
                qmoe_jax.evaluate(named, CALIBRATION[:8], output=output, tensorboard=False)
        assert tree(tmp_path) == before


def test_work_of_a_run_is_not_put_among_other_files(base, tmp_path):
    """A journal deletes all its batches in the end: they must not be anybody else's."""
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "calibration.npz").write_text("mine")
    before = tree(tmp_path)
    for overwrite in (False, True):
        options = {"work_dir": tmp_path / "work", "overwrite": overwrite} | TERNARY
        with pytest.raises(CheckpointError, match=r"holds calibration\.npz, which is of no run"):
            qmoe_jax.compress(base, tmp_path / "out", CALIBRATION, **options)
    assert tree(tmp_path) == before


class TestDemo:
    def test_token_files_are_of_their_vocabulary_and_corpus(self, tmp_path, monkeypatch):
        pytest.importorskip("matplotlib")
        from qmoe_jax.demo import run

        made = []

        def tokens(vocabulary, split, count, **_):
            made.append(vocabulary)
            return CALIBRATION[: min(count, len(made))]

        monkeypatch.setattr(run, "demo_tokens", tokens)
        for name in ("a", "b"):
            (tmp_path / name).write_text(name)
        (tmp_path / "c").write_text("a")
        (tmp_path / "out").mkdir()

        def count(name, **_):
            return len(run._tokens(tmp_path / name, tmp_path / "out", "train", 40, 0))

        assert [count("a"), count("b"), count("c"), count("a")] == [1, 2, 1, 1]
        (tmp_path / "a").write_text("changed")
        assert count("a") == 3
        monkeypatch.setattr(run, "corpus_versions", lambda: ["other"])
        assert count("b") == 4
        assert len(made) == 4

    @pytest.mark.parametrize("name", ["report.json", "report.html"])
    def test_reports_replace_no_other_file(self, tmp_path, name):
        pytest.importorskip("matplotlib")
        from qmoe_jax.demo import run

        (tmp_path / name).write_text("mine")
        before = tree(tmp_path)
        with pytest.raises(CheckpointError, match="not such a file as a report of the demo"):
            run.run_demo("nowhere", "nothing", tmp_path)
        assert tree(tmp_path) == before
