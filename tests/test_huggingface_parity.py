"""Parity with transformers itself, where it is installed: models made anew, and folders of ours.

Skipped without PyTorch and transformers; test_huggingface.py holds files that transformers wrote.
"""

import golden_huggingface
import jax
import numpy as np
import pytest

import qmoe_jax
from qmoe_jax.checkpoints.huggingface import export_huggingface, import_huggingface

torch = pytest.importorskip("torch")
# transformers warns of TensorFlow, of itself and of others.
pytestmark = pytest.mark.filterwarnings("ignore")
KINDS = tuple(golden_huggingface.KINDS)


@pytest.fixture(scope="module", autouse=True)
def transformers():
    return pytest.importorskip("transformers")


def ours(checkpoint, encoder, decoder):
    module, variables = qmoe_jax.load_switch(checkpoint)
    targets = np.concatenate([decoder[:, 1:], np.ones_like(decoder[:, :1])], axis=1)
    return np.asarray(jax.jit(module.apply)(variables, encoder, decoder, targets))


@pytest.mark.parametrize("safe", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_logits(kind, safe, tmp_path, transformers):
    model = golden_huggingface.make_model(kind)
    tokens = golden_huggingface.make_tokens(3)
    expected = golden_huggingface.logits_of(model, *tokens)
    if safe:
        model.save_pretrained(tmp_path / "hf", max_shard_size="30KB")
    elif int(transformers.__version__.split(".")[0]) >= 5:
        pytest.skip("transformers 5 writes no PyTorch files")
    else:
        model.save_pretrained(tmp_path / "hf", max_shard_size="30KB", safe_serialization=False)
    native = import_huggingface(tmp_path / "hf", tmp_path / "native", progress=False)
    np.testing.assert_allclose(ours(native, *tokens), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["base", "c"])  # no gated class to load with from_pretrained
def test_transformers_loads_what_we_write(kind, tmp_path, transformers):
    """A compressed model, dequantized to a Hugging Face folder: every parameter is taken."""
    model = golden_huggingface.make_model(kind)
    model.save_pretrained(tmp_path / "hf")
    native = import_huggingface(tmp_path / "hf", tmp_path / "native", progress=False)
    compressed = tmp_path / "compressed"
    qmoe_jax.compress(native, compressed, method="rtn", grid="ternary", progress=False)
    folder = export_huggingface(
        compressed, tmp_path / "exported", shard_bytes=40_000, progress=False
    )
    loaded, info = transformers.SwitchTransformersForConditionalGeneration.from_pretrained(
        folder, output_loading_info=True, torch_dtype=torch.float32
    )
    assert not any(info.get(kind) for kind in ("missing_keys", "unexpected_keys", "error_msgs"))
    tokens = golden_huggingface.make_tokens(4)
    found = golden_huggingface.logits_of(loaded.eval(), *tokens)
    np.testing.assert_allclose(found, ours(compressed, *tokens), rtol=0, atol=1e-5)
    uncompressed = golden_huggingface.logits_of(model, *tokens)
    assert np.abs(found - uncompressed).max() > 0.01
