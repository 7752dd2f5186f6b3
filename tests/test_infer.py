"""The command `infer`: prompts in, answers out, and what bad input gets."""

import dataclasses
import io
import json
import os
import shutil

import golden_data
import pytest
from canary import tree
from command import refusal
from factories import CALIBRATION

import qmoe_jax
from qmoe_jax.__main__ import main
from qmoe_jax.calibration.tokens import write_tokens
from qmoe_jax.cli import infer
from qmoe_jax.errors import TokensError
from qmoe_jax.generation import prompt_files
from qmoe_jax.generation.settings import GenerationSettings
from qmoe_jax.generation.text import Vocabulary, encode_prompts, fill_blanks
from qmoe_jax.models.load import load_switch

pytest.importorskip("gin")
pytest.importorskip("sentencepiece")

CHECKPOINT = golden_data.DEMO / "checkpoint_4200"
VOCABULARY = golden_data.DEMO / "sentencepiece.model"
PROMPTS = ("Return the <extra_id_0> of the array.", "Raises an <extra_id_0>.")


@pytest.fixture
def command(capsys, monkeypatch, tmp_path):
    """Runs the command in an empty folder; returns exit code, stdout and stderr."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments, checkpoint=CHECKPOINT, vocabulary=VOCABULARY, stdin=None):
        if stdin is not None:
            monkeypatch.setattr("sys.stdin", io.StringIO(stdin))
        code = main(
            [
                "infer",
                f"--gin.CHECKPOINT='{checkpoint}'",
                f"--gin.VOCABULARY='{vocabulary}'",
                "--gin.MAX_DECODE_LENGTH=6",
                *arguments,
            ]
        )
        return code, *capsys.readouterr()

    return run


@pytest.fixture(scope="module")
def compressed(tmp_path_factory):
    path = tmp_path_factory.mktemp("infer") / "compressed"
    qmoe_jax.compress(CHECKPOINT, path, method="rtn", progress=False)
    return path


class TestAnswers:
    def test_prompts_as_arguments_list_or_file(self, command, tmp_path):
        code, printed, progress = command(*PROMPTS)
        assert code == 0, progress
        lines = printed.splitlines()
        assert lines[0::3] == list(PROMPTS)
        for filled, generated in zip(lines[2::3], lines[1::3], strict=True):
            assert generated.startswith("  -> <extra_id_0> ")
            assert filled.startswith("  => R")
            assert "<extra_id_0>" not in filled
            assert "\x1b" not in filled
        assert "tokens/s" in progress
        assert "MiB on the host" in progress
        assert command(f"--gin.PROMPTS={list(PROMPTS)!r}")[1] == printed
        (tmp_path / "prompts.txt").write_text("\n\n".join(PROMPTS))
        assert command("--gin.PROMPTS_FILE='prompts.txt'")[1] == printed
        # One at a time, as tokens come: the same text.
        assert command("--gin.STREAM=True", *PROMPTS)[1] == printed

    def test_output(self, command, tmp_path):
        arguments = ("--gin.METHOD='beam'", "--gin.NUM_DECODES=2", "--gin.OUTPUT='out.jsonl'")
        code, printed, progress = command(*arguments, *PROMPTS)
        assert code == 0, progress
        lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
        assert [line["inputs"] for line in lines] == list(PROMPTS)
        for line in lines:
            # Beams that have not ended by then are no answers.
            best, *others = line["decodes"]
            assert all(best["score"] >= other["score"] for other in others)
            assert (
                f"  -> [{best['score']:.3f}] {best['prediction']}\n  => {best['text']}" in printed
            )
            assert len(best["tokens"]) <= 6
        assert sorted(len(line["decodes"]) for line in lines) == [1, 2]
        assert {path.name for path in tmp_path.iterdir()} == {
            "out.jsonl",
            "out.jsonl.operative_config.gin",
        }

    def test_samples_are_reproduced_by_their_seed(self, command):
        arguments = ("--gin.METHOD='sample'", "--gin.TOP_P=0.95", PROMPTS[0])
        first = command(*arguments, "--gin.SEED=1")
        assert first[0] == 0
        assert command(*arguments, "--gin.SEED=1")[1] == first[1]
        assert command(*arguments, "--gin.SEED=2")[1] != first[1]
        # Streaming is another way to print, not another sample.
        streamed = command(*arguments, "--gin.SEED=1", "--gin.STREAM=True")
        assert streamed[1] == first[1]

    def test_codes_and_their_expansion_answer_alike(self, command, compressed):
        code, printed, progress = command(*PROMPTS, checkpoint=compressed)
        assert code == 0, progress
        expanded = command(*PROMPTS, "--gin.DEQUANTIZE=True", checkpoint=compressed)
        assert expanded[1] == printed

    def test_a_stopped_run_goes_on(self, command, tmp_path, monkeypatch):
        prompts = (*PROMPTS, "Compute the <extra_id_0>.")
        arguments = ("--gin.BATCH_SIZE=1", "--gin.OUTPUT='out.jsonl'", *prompts)
        assert command(*arguments)[0] == 0
        undisturbed = (tmp_path / "out.jsonl").read_bytes()
        (tmp_path / "out.jsonl").unlink()

        generate, calls = qmoe_jax.generation.prompts._generate, []

        def counting(stop_at):
            def stopped(*args):
                if len(calls) == stop_at:
                    raise KeyboardInterrupt
                calls.append(args)
                return generate(*args)

            return stopped

        monkeypatch.setattr("qmoe_jax.generation.prompts._generate", counting(2))
        assert command(*arguments)[0] == 130
        assert not (tmp_path / "out.jsonl").exists()
        with open(tmp_path / "out.jsonl.partial", "a") as file:
            file.write('{"batch": 2, "li')  # killed while it wrote
        calls.clear()
        monkeypatch.setattr("qmoe_jax.generation.prompts._generate", counting(99))
        code, printed, _ = command(*arguments)
        assert code == 0
        assert len(calls) == 1
        assert (tmp_path / "out.jsonl").read_bytes() == undisturbed
        assert printed.splitlines()[0::3] == list(prompts)
        assert not (tmp_path / "out.jsonl.partial").exists()

    def test_other_settings_begin_anew(self, tmp_path):
        def begun(run):
            file = prompt_files.AnswerFile(tmp_path / "out")
            file.begin(run)
            return file

        begun({"seed": 1}).add(0, {0: {"inputs": "a"}})
        assert begun({"seed": 1}).finished == {0: {0: {"inputs": "a"}}}
        assert begun({"seed": 2}).finished == {}

    def test_answers_of_another_model_are_not_kept(self, tmp_path):
        """The checkpoint that was put in the place of another, in files of the same names."""
        path = shutil.copytree(CHECKPOINT, tmp_path / "model")
        module = load_switch(CHECKPOINT)[0]

        def identity(module=module):
            return prompt_files.run_identity(path, module, GenerationSettings(), [[5, 1]])

        before = identity()
        assert identity() == before
        routed = dataclasses.replace(module.config, eval_capacity_factor=2.0)
        assert identity(dataclasses.replace(module, config=routed)) != before
        array = max((p for p in path.rglob("*") if p.is_file()), key=os.path.getsize)
        array.write_bytes(array.read_bytes()[::-1])  # in a folder of its own, below the top
        assert identity() != before


class TestImplementation:
    def test_auto_is_cuda_where_there_is_a_gpu(self, command, compressed, launcher, monkeypatch):
        loaded = []
        monkeypatch.setattr(infer, "_fill", lambda module, *_: loaded.append(module) or [])
        for given in ((), ("--gin.IMPLEMENTATION='xla'",), ("--gin.IMPLEMENTATION='cuda'",)):
            assert command(PROMPTS[0], *given, checkpoint=compressed)[0] == 0
        assert [module.implementation for module in loaded] == ["cuda", "xla", "cuda"]

    @pytest.mark.parametrize(("value", "part"), [("gpu", "one of auto, xla"), ("cuda", "'cpu'")])
    @pytest.mark.parametrize("name", ["infer", "evaluate", "demo"])
    def test_every_command_that_runs_a_model_has_it(self, name, value, part, capsys, tmp_path):
        tokens = tmp_path / "tokens.npz"
        write_tokens(tokens, CALIBRATION.tokens, CALIBRATION.metadata)
        arguments = {
            "infer": ["a", f"--gin.VOCABULARY='{VOCABULARY}'"],
            "evaluate": [f"--gin.TOKENS='{tokens}'"],
            "demo": [f"--output={tmp_path}", f"--implementation={value}"],
        }[name]
        if name != "demo":
            arguments += [f"--gin.CHECKPOINT='{CHECKPOINT}'", f"--gin.IMPLEMENTATION='{value}'"]
        assert part in refusal(capsys, name, *arguments)


class TestBadInput:
    """Each is one line on stderr that names the value, and exit code 2."""

    def refused(self, result, *parts):
        code, printed, errors = result
        assert code == 2
        assert printed == ""
        (line,) = errors.strip().splitlines()
        assert line.startswith("qmoe-jax infer: ")
        for part in parts:
            assert part in line

    def test_files(self, command, tmp_path):
        self.refused(command("a", checkpoint="nothing"), "nothing")
        self.refused(command("a", vocabulary="nothing.model"), "nothing.model")
        self.refused(command("--gin.PROMPTS_FILE='none.txt'"), "none.txt", "No such file")
        (tmp_path / "empty.txt").write_text("\n \n")
        self.refused(command("--gin.PROMPTS_FILE='empty.txt'"), "holds no prompt")
        self.refused(command("--gin.OUTPUT='no/folder.jsonl'", "a"), "no/folder.jsonl")
        assert {path.name for path in tmp_path.iterdir()} == {"empty.txt"}

    @pytest.mark.parametrize(
        ("name", "content"),
        [
            ("out.jsonl", "a poem\n"),
            ("out.jsonl", '{"inputs": "a <extra_id_0>"}\n'),  # prompts
            ("out.jsonl", '{"inputs": "a", "decodes": []}\nadded by hand'),
            ("out.jsonl", '{"a": 1}'),
            ("out.jsonl.partial", "a poem\n"),
            ("out.jsonl.partial", '{"run": "x"}\n{"bottle'),
        ],
    )
    def test_what_is_no_output_of_ours_is_kept(self, command, tmp_path, name, content):
        (tmp_path / name).write_text(content)
        refused = command("--gin.OUTPUT='out.jsonl'", "a <extra_id_0>")
        self.refused(refused, f"{tmp_path / name}".rpartition("/")[2], "stays as it is")
        assert tree(tmp_path) == {name: content.encode()}

    @pytest.mark.parametrize("output", ["prompts.jsonl", "./prompts.jsonl", "link"])
    def test_the_prompts_are_no_output(self, command, tmp_path, output):
        content = '{"inputs": "a <extra_id_0>", "decodes": []}\n'  # as answers are, and yet
        (tmp_path / "prompts.jsonl").write_text(content)
        (tmp_path / "link").symlink_to("prompts.jsonl")
        before = tree(tmp_path)
        prompts = "--gin.PROMPTS_FILE='prompts.jsonl'"
        self.refused(command(prompts, f"--gin.OUTPUT='{output}'"), "the input prompts.jsonl")
        assert tree(tmp_path) == before

    def test_prompts(self, command):
        self.refused(command(stdin=""), "there is no prompt", "PROMPTS")
        self.refused(command("a", "--gin.PROMPTS_FILE='x'"), "in one way")
        self.refused(command("--gin.PROMPTS='a'"), "must be a list, each a text")
        self.refused(command("a", ""), "prompt 2 is empty")
        self.refused(command("A <extra_id_100>."), "<extra_id_100>")
        long = "word " * 40
        self.refused(
            command("short", long, "--gin.MAX_INPUT_LENGTH=32"),
            "prompt 2 has",
            "max_input_length is 32",
        )

    def test_settings(self, command):
        self.refused(command("a", "--gin.METHOD='beem'"), "'beem'", "greedy, beam, sample")
        self.refused(command("a", "--gin.TOP_P=2"), "top_p is 2")
        self.refused(command("a", "--gin.STREAM=True", "--gin.METHOD='beam'"), "streamed")
        self.refused(command("a", "--gin.GenerationSettings.temperatur=1"), "temperatur")
        self.refused(command("a", "--gin.TEMPERATUR=1"), "TEMPERATUR")
        self.refused(command("a", "--gin.DEQUANTIZE=True"), "no codes to expand")

    def test_another_model_s_vocabulary(self, command, golden_checkpoint):
        other = golden_checkpoint("base", "t5x_bfloat16")
        self.refused(command("a", checkpoint=other), "4068 pieces", "512 embeddings")

    def test_a_truncated_compressed_checkpoint(self, command, compressed, tmp_path):
        copy = shutil.copytree(compressed, tmp_path / "copy")
        largest = max((p for p in copy.rglob("*") if p.is_file()), key=os.path.getsize)
        os.truncate(largest, os.path.getsize(largest) // 2)
        self.refused(command("a", checkpoint=copy), largest.name)


class TestPromptFiles:
    def test_json_lines(self, tmp_path):
        path = tmp_path / "prompts.jsonl"
        path.write_text('{"inputs": "a", "text": "b"}\n\n{"text": "c\\u2028d", "inputs": 3}\n')
        assert prompt_files.read_prompts(path) == ["a", "c\u2028d"]
        path.write_text('{"text": "a"}\nplain\n')
        with pytest.raises(TokensError, match="line 2 of .*'plain'"):
            prompt_files.read_prompts(path)

    def test_stdin(self, monkeypatch):
        monkeypatch.setattr("sys.stdin", io.StringIO('one\n{two}\n{"text": "three"}\n'))
        assert prompt_files.read_prompts("-") == ["one", "{two}", "three"]

    def test_not_text(self, tmp_path):
        (tmp_path / "x").write_bytes(b"\xff\xfe\x00")
        with pytest.raises(TokensError, match="UTF-8"):
            prompt_files.read_prompts(tmp_path / "x")

    def test_flags_and_prompts(self):
        assert infer.split_prompts(["a", "--gin.X=1", "--gin_file", "f.gin", "b"]) == (
            ["--gin.X=1", "--gin_file", "f.gin"],
            ["a", "b"],
        )
        assert infer.split_prompts(["--", "-x", "--y"]) == ([], ["-x", "--y"])


class TestText:
    def test_fill_blanks(self):
        generated = "<extra_id_0> red <extra_id_1> <extra_id_2> c <extra_id_0> blue"
        prompt = "A <extra_id_0> <extra_id_1>, <extra_id_2>, <extra_id_7>."
        assert fill_blanks(prompt, generated) == "A red <extra_id_1>, c, <extra_id_7>."
        marked = fill_blanks(prompt, generated, before="[", after="]")
        assert marked == "A [red] <extra_id_1>, [c], <extra_id_7>."
        assert fill_blanks("no blank", "") == "no blank"

    def test_spans_stand_out_on_a_terminal(self, monkeypatch):
        answer = qmoe_jax.generation.text.Filled("A <extra_id_0>.", "<extra_id_0> cat", "A cat.")
        assert infer.marked(answer) == "A cat."
        monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
        monkeypatch.delenv("NO_COLOR", raising=False)
        assert infer.marked(answer) == "A \x1b[1;32mcat\x1b[0m."
        monkeypatch.setenv("NO_COLOR", "1")
        assert infer.marked(answer) == "A [cat]."

    def test_sentinels_survive_a_round_trip(self):
        vocabulary = Vocabulary(VOCABULARY)
        (ids,) = encode_prompts(vocabulary, ["Return <extra_id_0> and <extra_id_99>."])
        assert ids[-1] == vocabulary.eos_id
        assert {4067, 3968} <= set(ids)
        assert vocabulary.decode(ids).startswith("Return <extra_id_0> and <extra_id_99>")

    def test_sentinels_above_a_vocabulary_that_has_none(self, tmp_path):
        """The ids are seqio's for `extra_ids=100`, as `prepare-tokens` makes them."""
        seqio = pytest.importorskip("seqio")
        spm = pytest.importorskip("sentencepiece")
        words = [f"word{i} of some{i % 7} text{i % 11}" for i in range(200)]
        (tmp_path / "corpus.txt").write_text("\n".join(words))
        spm.SentencePieceTrainer.train(
            input=str(tmp_path / "corpus.txt"),
            model_prefix=str(tmp_path / "plain"),
            vocab_size=80,
            pad_id=0,
            eos_id=1,
            unk_id=2,
            bos_id=-1,
            hard_vocab_limit=False,
            minloglevel=2,
        )
        ours = Vocabulary(tmp_path / "plain.model")
        theirs = seqio.SentencePieceVocabulary(str(tmp_path / "plain.model"), extra_ids=100)
        assert len(ours) == theirs.vocab_size
        first, last = ours.encode("<extra_id_0><extra_id_99>")
        assert [first, last] == [theirs.vocab_size - 1, theirs.vocab_size - 100]
        text = "word3 <extra_id_0> text5 <extra_id_1>"
        assert ours.decode([*ours.encode(text), ours.eos_id]) == text


class TestLines:
    """Prompts that come one by one."""

    def test_each_line_is_answered_as_it_comes(self, command, monkeypatch):
        """The second is read when the first was answered; nothing is loaded or compiled twice."""
        loads, compiled, order = [], [], []
        monkeypatch.setattr(
            "qmoe_jax.models.load.open_t5x_checkpoint",
            lambda *a, **k: loads.append(a) or qmoe_jax.open_t5x_checkpoint(*a, **k),
        )
        print_answers = infer.print_answers
        generate = infer.generate_batches

        def timed(*arguments, **options):
            for batch in generate(*arguments, **options):
                compiled.append(batch.compile_seconds)
                yield batch

        def printing(answers, **options):
            order.append(f"answered {answers[0].prompt}")
            print_answers(answers, **options)

        def lines():
            for prompt in (*PROMPTS, PROMPTS[0]):
                order.append(f"read {prompt}")
                yield prompt

        monkeypatch.setattr(infer, "generate_batches", timed)
        monkeypatch.setattr(infer, "print_answers", printing)
        monkeypatch.setattr(infer, "stdin_prompts", lines)
        code, printed, errors = command(stdin="")
        assert (code, errors.count("remark")) == (0, 0)
        expected = [f"{what} {p}" for p in (*PROMPTS, PROMPTS[0]) for what in ("read", "answered")]
        assert order == expected
        assert len(loads) == 1
        assert compiled[1:] == [0.0, 0.0]
        answers = [printed.split(prompt + "\n")[1].split("\n")[0] for prompt in PROMPTS]
        assert all(answer.startswith("  -> <extra_id_0>") for answer in answers)
        # As all at once.
        _, together, _ = command(*PROMPTS, PROMPTS[0])
        assert together == printed

    def test_a_pipe(self, command):
        lines = '{"text": "Raises an <extra_id_0>."}\n\nOne <extra_id_100>.\nNothing.\n'
        code, printed, errors = command("--gin.PROMPTS_FILE='-'", "--gin.STREAM=True", stdin=lines)
        assert code == 2
        assert printed.startswith("Raises an <extra_id_0>.\n  -> <extra_id_0>")
        assert "Nothing.\n  -> " in printed
        assert "not answered: <extra_id_100> is no sentinel" in errors
        assert "remark: prompt 3 has no blank" in errors
        assert "1 of 3 lines could not be answered" in errors

    def test_a_line_of_no_encoding(self, command, monkeypatch):
        stdin = io.TextIOWrapper(io.BytesIO(b"Caf\xff <extra_id_0>\n"))
        monkeypatch.setattr("sys.stdin", stdin)
        code, printed, errors = command()
        assert (code, printed) == (2, "")
        assert "line 1 of stdin is no UTF-8" in errors

    def test_samples_differ_from_line_to_line(self, command):
        line = "Return the <extra_id_0> of the <extra_id_1>.\n"
        flags = ("--gin.METHOD='sample'", "--gin.SEED=3", "--gin.TEMPERATURE=3.0")
        _, printed, _ = command(*flags, stdin=3 * line)
        answers = [text for text in printed.splitlines() if text.startswith("  -> ")]
        assert len(answers) == 3
        assert len(set(answers)) > 1
        assert command(*flags, stdin=3 * line)[1] == printed

    def test_remarks(self, command):
        prompts = ("All there.", "A <extra_id_0> of <extra_id_0>.", "A <extra_id_0>.")
        code, _, errors = command(*prompts)
        assert code == 0
        assert "remark: prompt 1 has no blank" in errors
        assert "remark: prompt 2 has <extra_id_0> 2 times" in errors
        assert errors.count("remark") == 2
        assert command(*7 * ["All there."])[2].count("remark") == 6  # five, and that there are more
