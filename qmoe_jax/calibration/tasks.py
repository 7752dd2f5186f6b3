"""seqio tasks that turn documents into corrupted examples, and their way into a token file.

A task is registered under a name that spells its settings, so asking twice gives the same task and
two settings never share one. Nothing is registered, and neither TensorFlow nor seqio imported,
with this module.
"""

import functools
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from qmoe_jax.calibration import documents, prepared_c4, span_corruption, text_packages, tokens
from qmoe_jax.checkpoints.storage import check_reachable
from qmoe_jax.errors import TokensError
from qmoe_jax.paths import expanded
from qmoe_jax.progress import progress as show_progress

PROTOCOLS = ("t5x", "paper")

# seqio's Task and vocabulary, named for the reader.
Task = Any
Vocabulary = Any
Settings = Mapping[str, str | int | bool | None]


def load_vocabulary(path: str) -> Vocabulary:
    """Return a SentencePiece vocabulary with T5's 100 sentinels.

    The public Switch models use gs://t5-data/vocabs/cc_all.32000.100extra/sentencepiece.model,
    which has the sentinels inside. To a model without any, as cc_all.32000, they are added on top:
    the ids are the same.

    Args:
      path: local or `gs://` path of the sentencepiece model.

    Returns:
      `seqio.SentencePieceVocabulary`.

    Raises:
      TokensError: no such file, or no sentencepiece model.
    """
    check_reachable(path)
    seqio, tf = text_packages.seqio(), text_packages.tensorflow()
    path = expanded(path, "the vocabulary", TokensError)
    try:
        vocabulary = seqio.SentencePieceVocabulary(path)
        vocabulary.load_model()
    except (tf.errors.OpError, OSError) as error:
        raise TokensError(
            f"The vocabulary {path} cannot be read ({error}); a sentencepiece model is needed. "
            "Public Switch models: gs://t5-data/vocabs/cc_all.32000.100extra/sentencepiece.model"
        ) from error
    except Exception as error:  # protobuf's DecodeError differs between its implementations
        raise TokensError(f"{path} is no sentencepiece model: {error}") from error
    if not vocabulary.tokenizer.IdToPiece(vocabulary.vocab_size - 1).endswith("<extra_id_0>"):
        vocabulary = seqio.SentencePieceVocabulary(path, extra_ids=100)
    return vocabulary


def c4_task(
    vocabulary_path: str,
    *,
    data_dir: str | None = None,
    version: str | None = None,
    config: str = "en",
    protocol: str = "t5x",
) -> Task:
    """C4 as TensorFlow Datasets has prepared it.

    Args:
      vocabulary_path: see `load_vocabulary`.
      data_dir: the TFDS folder that has `c4/<config>/<version>`; None is TFDS's default.
      version: version of the dataset; the newest that is prepared where None.
      config: `en` or another configuration of C4.
      protocol: `t5x` or `paper`, see `span_corruption`.

    Raises:
      TokensError: unknown protocol, bad vocabulary, or no such prepared dataset: C4 takes days to
        generate, so that is never begun here.
    """
    if data_dir is not None:
        check_reachable(data_dir)
    seqio, tfds = text_packages.seqio(), text_packages.tensorflow_datasets()
    version = prepared_c4.choose_version(version, data_dir, config)
    name = f"c4/{config}:{version}"
    data_dir = prepared_c4.tfds_folder(data_dir)
    try:
        prepared = bool(tfds.builder(name, data_dir=data_dir).info.splits)
        cause = "no split is there"
    except Exception as error:  # TFDS raises a dozen kinds
        prepared, cause = False, " ".join(str(error).split())[:200]
    if not prepared:
        raise TokensError(
            f"TFDS cannot read the prepared {name} under {data_dir} ({cause}); prepare it again, "
            "or use the released JSON lines."
        )
    source = seqio.TfdsDataSource(tfds_name=name, tfds_data_dir=data_dir, read_only=True)
    settings = {"source": "c4_tfds", "name": name, "data_dir": data_dir}
    return _task(f"c4_{config}_tfds", source, vocabulary_path, protocol, settings)


def c4_jsonl_task(
    vocabulary_path: str,
    files: documents.Files,
    *,
    protocol: str = "t5x",
) -> Task:
    """Documents from JSON lines, such as C4's `c4-train.00000-of-01024.json.gz`.

    Each line is an object with "text"; other keys ("timestamp", "url") are ignored.

    Args:
      vocabulary_path: see `load_vocabulary`.
      files: for each split, a path, glob or folder or several; read in sorted order, `.gz`
        unpacked. Of a folder, the files that end in .json or .jsonl, or these with .gz.
      protocol: `t5x` or `paper`, see `span_corruption`.

    Raises:
      TokensError: unknown protocol, bad vocabulary, or a pattern without a file. A bad line raises
        when it is read.
    """
    found = documents.find_json_files(files)
    settings = {"source": "c4_jsonl", "files": json.dumps(found, sort_keys=True)}
    source = _generator_source(
        {split: functools.partial(documents.json_lines, found[split]) for split in found}
    )
    return _task("c4_jsonl", source, vocabulary_path, protocol, settings)


def text_files_task(
    vocabulary_path: str,
    files: documents.Files,
    *,
    protocol: str = "t5x",
) -> Task:
    """Documents from UTF-8 text files, each file one document.

    Args:
      vocabulary_path: see `load_vocabulary`.
      files: for each split, a path, glob or folder or several; read in sorted order, `.gz`
        unpacked. Of a folder, the files that end in .txt or .txt.gz, in folders below it too.
      protocol: `t5x` or `paper`, see `span_corruption`.

    Raises:
      TokensError: unknown protocol, bad vocabulary, or a pattern without a file. A file that is
        not UTF-8 raises when it is read.
    """
    found = documents.find_text_files(files)
    settings = {"source": "text_files", "files": json.dumps(found, sort_keys=True)}
    source = _generator_source(
        {split: functools.partial(documents.text_files, found[split]) for split in found}
    )
    return _task("text_files", source, vocabulary_path, protocol, settings)


def pairs_task(vocabulary_path: str, files: documents.Files) -> Task:
    """Take inputs and targets as they are, such as a model was or is to be fine-tuned on.

    Each line of the files is a JSON object with the texts "inputs" and "targets". They get an
    end-of-sequence id each, and are cut to the lengths that are asked for.

    Args:
      vocabulary_path: see `load_vocabulary`.
      files: see `c4_jsonl_task`.

    Raises:
      TokensError: bad vocabulary, or a pattern without a file. A bad line raises when it is read.
    """
    seqio, tf = text_packages.seqio(), text_packages.tensorflow()
    found = documents.find_json_files(files)
    full = {"files": found, "vocabulary": vocabulary_path}
    digest = hashlib.sha256(json.dumps(full, sort_keys=True).encode()).hexdigest()[:12]
    name = f"qmoe_jax_pairs_{digest}"
    if name in seqio.TaskRegistry.names():
        return seqio.TaskRegistry.get(name)
    vocabulary = load_vocabulary(vocabulary_path)
    keys = ("inputs", "targets")

    def dataset_fn(split, shuffle_files, seed=None):
        del shuffle_files, seed
        return tf.data.Dataset.from_generator(
            functools.partial(documents.json_records, found[split], keys),
            output_signature={key: tf.TensorSpec([], tf.string) for key in keys},
        )

    return seqio.TaskRegistry.add(
        name,
        source=seqio.FunctionDataSource(dataset_fn, splits=tuple(found)),
        preprocessors=[seqio.preprocessors.tokenize, seqio.preprocessors.append_eos_after_trim],
        output_features={key: seqio.Feature(vocabulary=vocabulary, add_eos=True) for key in keys},
        metric_fns=[],
    )


def text_task(
    name: str,
    vocabulary_path: str,
    texts: Mapping[str, Sequence[str]],
    *,
    protocol: str = "t5x",
    drop_short: bool = False,
) -> Task:
    """Documents held in memory, in the order given.

    Args:
      name: beginning of the task's name.
      vocabulary_path: see `load_vocabulary`.
      texts: the documents of each split.
      protocol: `t5x` or `paper`, see `span_corruption`.
      drop_short: with `t5x`, leave out examples that need padding.
    """
    digest = hashlib.sha256(json.dumps({k: list(v) for k, v in texts.items()}).encode())
    settings = {"source": name, "texts": digest.hexdigest()}
    source = _generator_source({split: functools.partial(iter, texts[split]) for split in texts})
    return _task(name, source, vocabulary_path, protocol, settings, drop_short=drop_short)


def check_count(num_examples: int | None) -> None:
    """Refuse a number of examples that is none.

    Raises:
      TokensError: it is below 1.
    """
    if num_examples is not None and num_examples < 1:
        raise TokensError(f"num_examples is {num_examples}; at least 1 is needed.")


def tokenize_task(
    task: Task,
    *,
    split: str,
    num_examples: int | None,
    inputs_length: int,
    targets_length: int | None = None,
    seed: int = 0,
    source: str = "",
    progress: bool = False,
) -> tokens.TokenFile:
    """Return the first examples of a task, unshuffled; equal arguments give equal tokens.

    Args:
      task: of this module, or any of seqio, or a mixture, with `inputs` and `targets`.
      split: split of the task.
      num_examples: how many examples; all of the split where None, and of a mixture until the first
        of its tasks ends. Asked for more, a mixture begins its tasks again.
      inputs_length: encoder tokens of an example.
      targets_length: decoder tokens; None is what the corruption of `inputs_length` gives.
      seed: seed of the corruption.
      source: description for the metadata.
      progress: show a progress bar.

    Raises:
      TokensError: no such split, unreadable documents, or fewer examples than asked for.
      ValueError: lengths that the corruption cannot keep.
    """
    tf, seqio = text_packages.tensorflow(), text_packages.seqio()
    text_packages.hide_gpus()
    check_count(num_examples)
    if split not in task.splits:
        raise TokensError(f"{task.name} has no split {split!r}; it has {sorted(task.splits)}.")
    if targets_length is None:
        targets_length = span_corruption.corruption_lengths(inputs_length)[1]
    is_endless = isinstance(task, seqio.Mixture) and num_examples is not None
    dataset = task.get_dataset(
        sequence_length={"inputs": inputs_length, "targets": targets_length},
        split=split,
        shuffle=False,
        seed=seed,
        num_epochs=None if is_endless else 1,
    ).take(-1 if num_examples is None else num_examples)
    inputs: list[np.ndarray] = []
    targets: list[np.ndarray] = []
    try:
        examples = dataset.as_numpy_iterator()
        shown = show_progress(
            examples, title="tokenising", unit="examples", total=num_examples, shown=progress
        )
        for example in shown:
            inputs.append(example["inputs"])
            targets.append(example["targets"])
    except tf.errors.OpError as error:
        raise TokensError(f"{task.name} cannot be read: {_cause(error.message)}") from error
    if not inputs or len(inputs) < (num_examples or 1):
        raise TokensError(
            f"{task.name} has {len(inputs)} examples in split {split!r}; {num_examples or 'some'} "
            "were asked for. Ask for fewer, or give more documents (the protocol paper skips those "
            f"that are too long for {inputs_length} input tokens; t5x cuts them)."
        )
    batch = tokens.from_sequences(
        inputs, targets, inputs_length=inputs_length, targets_length=targets_length
    )
    vocabulary = task.output_features["targets"].vocabulary
    first, count = span_corruption.sentinel_range(vocabulary)
    metadata = tokens.TokenMetadata(
        task=task.name,
        split=split,
        vocabulary_size=vocabulary.vocab_size,
        sentinel_first=first,
        sentinel_count=count,
        eos_id=vocabulary.eos_id,
        seed=seed,
        source=source,
    )
    return tokens.TokenFile(batch, metadata)


def _task(
    prefix: str,
    source: Any,
    vocabulary_path: str,
    protocol: str,
    settings: Settings,
    *,
    drop_short: bool = False,
) -> Task:
    """Return the task of these settings, registered at the first call."""
    seqio = text_packages.seqio()
    if protocol not in PROTOCOLS:
        raise TokensError(f"protocol is {protocol!r}; it must be one of {PROTOCOLS}.")
    if drop_short and protocol != "t5x":
        raise TokensError("drop_short is set; only the t5x protocol cuts text to full length.")
    full = {**settings, "vocabulary": vocabulary_path, "protocol": protocol, "short": drop_short}
    digest = hashlib.sha256(json.dumps(full, sort_keys=True).encode()).hexdigest()[:12]
    name = f"qmoe_jax_{prefix}_{protocol}_{digest}"
    if name in seqio.TaskRegistry.names():
        return seqio.TaskRegistry.get(name)
    vocabulary = load_vocabulary(vocabulary_path)
    corruption: list[Callable[..., Any]]
    if protocol == "t5x":
        corruption = [
            functools.partial(span_corruption.t5x_span_corruption, drop_short=drop_short),
            seqio.preprocessors.append_eos_after_trim,
        ]
    else:
        corruption = [span_corruption.paper_span_corruption]
    return seqio.TaskRegistry.add(
        name,
        source=source,
        # The order of T5's c4 tasks, the placeholder included: seeds count from its position.
        preprocessors=[
            functools.partial(
                seqio.preprocessors.rekey, key_map={"inputs": None, "targets": "text"}
            ),
            seqio.preprocessors.tokenize,
            seqio.CacheDatasetPlaceholder(),
            *corruption,
        ],
        output_features={
            key: seqio.Feature(vocabulary=vocabulary, add_eos=True) for key in ("inputs", "targets")
        },
        metric_fns=[],
    )


def _generator_source(splits: Mapping[str, Callable[[], Iterator[str]]]) -> Any:
    """Return a seqio source of {"text"} from one Python generator function per split."""
    seqio, tf = text_packages.seqio(), text_packages.tensorflow()

    def dataset_fn(split, shuffle_files, seed=None):
        del shuffle_files, seed
        texts = tf.data.Dataset.from_generator(
            splits[split], output_signature=tf.TensorSpec([], tf.string)
        )
        return texts.map(lambda text: {"text": text})

    return seqio.FunctionDataSource(dataset_fn, splits=tuple(splits))


def _cause(message: str) -> str:
    """Return the line of TensorFlow's message, a printed traceback, that says what went wrong."""
    lines = [line.strip() for line in message.splitlines() if "Error: " in line]
    return lines[-1].split("Error: ", 1)[1] if lines else message.strip()
