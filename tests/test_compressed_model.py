"""Compressed models: "cuda" beside "xla", with the kernels run by `cuda_emulation`."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from factories import shortened
from golden_data import load_golden
from markers import needs_compiler
from plan_factories import resources, some_tokens

import qmoe_jax
from qmoe_jax.checkpoints import names
from qmoe_jax.codec.tensor import TensorSpec
from qmoe_jax.errors import CudaError
from qmoe_jax.generation.sampling import greedy_generate
from qmoe_jax.models import load
from qmoe_jax.models.moe import DERIVED
from qmoe_jax.ops.cuda.fragments import Fragments, fragment_bytes
from qmoe_jax.ops.cuda.launcher import use_launcher
from qmoe_jax.planning.inputs import ModelFacts
from qmoe_jax.planning.plan import make_plan
from qmoe_jax.quantization.settings import CompressionSettings


@pytest.fixture(scope="module")
def compressed(golden_checkpoint, tmp_path_factory):
    """The smallest golden model, rounded to nearest."""
    output = tmp_path_factory.mktemp("compressed") / "base"
    native = golden_checkpoint("base", "t5x_bfloat16")
    qmoe_jax.compress(native, output, grid="ternary", method="rtn", progress=False)
    return output


def load_layers(*arguments, **options):
    """A dense and a sparse layer of both stacks."""
    return shortened(*qmoe_jax.load_switch(*arguments, **options), 2)


@pytest.fixture(scope="module")
def inputs():
    """Tokens of the encoder, of the decoder, and targets."""
    golden = load_golden("base")
    names = ("encoder_input", "decoder_input", "decoder_target")
    return [jnp.asarray(golden[f"batch/{name}_tokens"][:2, :6]) for name in names]


@pytest.fixture(scope="module")
def logits_of(emulated, compressed, inputs):
    """`logits_of(implementation, dtype, in_jit)`: the model's, run once for all tests."""

    @functools.cache
    def run(implementation, dtype, in_jit=True):
        with use_launcher(emulated):
            module, variables = load_layers(compressed, dtype, implementation=implementation)
            apply = functools.partial(module.apply, enable_dropout=False)
            emulated.calls.clear()
            logits = np.asarray((jax.jit(apply) if in_jit else apply)(variables, *inputs))
        config = module.config
        layers = len(config.encoder_sparse_layers + config.decoder_sparse_layers)
        if implementation == "cuda":  # wi and wo of every sparse layer, in the fused kernel
            assert [name.split("_")[0] for name, _ in emulated.calls] == ["fused"] * 2 * layers
            assert {inside for _, inside in emulated.calls} == {in_jit}
        else:
            assert not emulated.calls
        return logits

    return run


@needs_compiler
class TestModel:
    def test_same_parameters(self, launcher, compressed):
        xla_module, xla = qmoe_jax.load_switch(compressed, implementation="xla")
        module, variables = qmoe_jax.load_switch(compressed, implementation="cuda")
        assert module == dataclasses.replace(xla_module, implementation="cuda")
        assert set(variables) == {"params", DERIVED}
        jax.tree.map(np.testing.assert_array_equal, variables["params"], xla["params"])
        automatic, _ = qmoe_jax.load_switch(compressed, implementation="auto")
        assert automatic == module

    def test_native_checkpoints_have_no_codes(self, launcher, golden_checkpoint):
        path = golden_checkpoint("base", "t5x_bfloat16")
        with pytest.raises(CudaError, match="is a native checkpoint.*Compress it"):
            qmoe_jax.load_switch(path, implementation="cuda")
        module, _ = qmoe_jax.load_switch(path, implementation="auto")
        assert module.implementation == "xla"

    def test_without_a_gpu(self, compressed):
        if jax.default_backend() == "gpu":
            pytest.skip("there is a GPU")
        assert qmoe_jax.load_switch(compressed, implementation="auto")[0].implementation == "cpu"
        with pytest.raises(CudaError, match="requires a CUDA device"):
            qmoe_jax.load_switch("nowhere", implementation="cuda")
        with pytest.raises(ValueError, match="must be one of auto, xla, cpu, cuda"):
            qmoe_jax.load_switch(compressed, implementation="gpu")

    @pytest.mark.parametrize("in_jit", [True, False])
    def test_float32_logits(self, logits_of, in_jit):
        """Ternary codes: three bfloat16 products are a float32 one, so the bound is tight."""
        logits = logits_of("cuda", "float32", in_jit)
        np.testing.assert_allclose(logits, logits_of("xla", "float32"), atol=2e-5)

    def test_bfloat16_logits(self, logits_of):
        """Rounding to bfloat16 differs in a last place here and there, as between XLA programs."""
        logits, expected = logits_of("cuda", "bfloat16"), logits_of("xla", "bfloat16")
        exact = logits_of("xla", "float32")
        rounding = np.abs(expected - exact).mean()
        assert np.abs(logits - expected).mean() <= rounding
        assert np.abs(logits - exact).mean() <= 1.5 * rounding

    def test_without_derived_variables(self, launcher, compressed, inputs, logits_of):
        module, variables = load_layers(compressed, implementation="cuda")
        apply = jax.jit(functools.partial(module.apply, enable_dropout=False))
        logits = apply({"params": variables["params"]}, *inputs)
        np.testing.assert_array_equal(logits, logits_of("cuda", "float32"))

    def test_greedy_tokens(self, launcher, compressed, inputs):
        generated = {}
        for implementation in ("xla", "cuda"):
            module, variables = load_layers(compressed, implementation=implementation)
            launcher.calls.clear()  # loading derives arrays, outside
            generate = jax.jit(
                functools.partial(greedy_generate, module, max_decode_length=4, eos_id=-1)
            )
            generated[implementation] = np.asarray(generate(variables, inputs[0]))
        np.testing.assert_array_equal(generated["cuda"], generated["xla"])
        assert generated["xla"].shape == (2, 4)
        assert {inside for _, inside in launcher.calls} == {True}

    def test_groups_of_columns_stay_with_xla(self, launcher, compressed):
        config = qmoe_jax.load_switch(compressed)[0].config
        half = TensorSpec("tunstall", config.num_experts, 256, config.embed_dim // 2)
        coded = (("encoder/layers_1/mlp/expert/wi", half),)
        assert load._choose_implementation("auto", config, coded) == "xla"
        with pytest.raises(CudaError, match="group_size"):
            load._choose_implementation("cuda", config, coded)


@pytest.fixture(scope="module")
def lattice(golden_checkpoint, tmp_path_factory):
    """The same model on the lattice."""
    output = tmp_path_factory.mktemp("lattice") / "base"
    native = golden_checkpoint("base", "t5x_bfloat16")
    qmoe_jax.compress(native, output, grid="lattice", method="rtn", progress=False)
    return output


@needs_compiler
class TestFragments:
    """Codes of the lattice that are laid out for tensor cores when they are loaded."""

    @pytest.mark.parametrize("grid", ["lattice", "ternary"])
    def test_logits(self, launcher, lattice, compressed, inputs, grid):
        found, path = {}, lattice if grid == "lattice" else compressed
        for implementation, dtype in (
            ("cuda_fragments", "float32"),
            ("cuda_fragments", "bfloat16"),
            ("xla", "bfloat16"),
            ("xla", "float32"),
        ):
            module, variables = load_layers(path, dtype, implementation=implementation)
            launcher.calls.clear()
            apply = jax.jit(functools.partial(module.apply, enable_dropout=False))
            found[implementation, dtype] = np.asarray(apply(variables, *inputs))
            config = module.config
            layers = len(config.encoder_sparse_layers + config.decoder_sparse_layers)
            name = f"matmul_fragments_{grid}"
            names = [name] * 2 * layers if implementation != "xla" else []
            assert [name.rpartition("_")[0] for name, _ in launcher.calls] == names
        full, logits, expected, exact = found.values()
        np.testing.assert_allclose(full, exact, atol=2e-5)
        rounding = np.abs(expected - exact).mean()
        assert np.abs(logits - exact).mean() <= 1.5 * rounding

    def test_are_derived_at_loading(self, launcher, lattice, monkeypatch):
        """With "auto", where they take half of the free memory at most."""

        def implementation_of(dtype="bfloat16", implementation="auto", free=None):
            monkeypatch.setattr(load, "_free_bytes", lambda: free)
            module, variables = qmoe_jax.load_switch(lattice, dtype, implementation=implementation)
            kernel = variables[DERIVED]["encoder"]["layers_1"]["mlp"]["expert"]["wi"]
            assert ("fragments" in kernel) == (module.implementation == "cuda_fragments")
            return module.implementation

        specs = qmoe_jax.load_switch(lattice, implementation="xla")[0].coded
        needed = sum(fragment_bytes(spec) for _, spec in specs)
        assert implementation_of() == "cuda"
        assert implementation_of(free=2 * needed - 1) == "cuda"
        assert implementation_of(free=2 * needed) == "cuda_fragments"
        assert implementation_of("float32", free=2 * needed) == "cuda_fragments"
        assert implementation_of("float32", "cuda_fragments", free=0) == "cuda_fragments"

    @pytest.mark.parametrize("grid", ["lattice", "ternary"])
    def test_memory_is_what_a_plan_says(
        self, launcher, golden_checkpoint, lattice, compressed, grid
    ):
        """To the byte, but for extra chunks of the lattice: a plan has one for each 32 rows."""
        native = str(golden_checkpoint("base", "t5x_bfloat16"))
        model, settings = ModelFacts.from_checkpoint(native), CompressionSettings(grid=grid)
        planned = make_plan(model, some_tokens(), settings, resources()).memory_at_work
        path = lattice if grid == "lattice" else compressed
        module, variables = qmoe_jax.load_switch(path, implementation="cuda_fragments")
        derived = names.flatten(variables[DERIVED])
        laid_out = [a for name, a in derived.items() if name.split("/")[-1] in Fragments._fields]
        made = sum(array.nbytes for array in laid_out)
        assert planned.derived == sum(array.nbytes for array in derived.values()) - made
        dense = [a for n, a in names.flatten(variables["params"]).items() if "/expert/" not in n]
        assert planned.dense == sum(array.nbytes for array in dense)
        strips = sum(spec.num_experts * -(-spec.rows // 32) for _, spec in module.coded)
        extra = 640 * strips if grid == "lattice" else 0
        assert planned.fragments - extra <= made <= planned.fragments

    def test_ternary_codes_have_them_where_they_are_asked_for(
        self, launcher, compressed, monkeypatch
    ):
        monkeypatch.setattr(load, "_free_bytes", lambda: 10**12)
        assert qmoe_jax.load_switch(compressed, "bfloat16")[0].implementation == "cuda"
        module, variables = qmoe_jax.load_switch(
            compressed, "bfloat16", implementation="cuda_fragments"
        )
        assert module.implementation == "cuda_fragments"
        assert "fragments" in variables[DERIVED]["encoder"]["layers_1"]["mlp"]["expert"]["wi"]

    def test_other_codes_are_refused(self, launcher, compressed, monkeypatch):
        config = qmoe_jax.load_switch(compressed, implementation="xla")[0].config
        spec = TensorSpec("packed2", config.num_experts, 256, config.embed_dim)
        coded = (("encoder/layers_1/mlp/expert/wi", spec),)
        assert load._choose_implementation("auto", config, coded) == "cuda"
        with pytest.raises(CudaError, match="codes of 'packed2'.*requires those of the lattice"):
            load._choose_implementation("cuda_fragments", config, coded)

    def test_older_devices_have_none_of_ternary_codes(
        self, launcher, compressed, lattice, monkeypatch
    ):
        older = dataclasses.replace(launcher.device, compute_capability="7.5")
        monkeypatch.setattr(launcher, "device", older)
        monkeypatch.setattr(load, "_free_bytes", lambda: 10**12)
        assert qmoe_jax.load_switch(lattice, "bfloat16")[0].implementation == "cuda_fragments"
        with pytest.raises(CudaError, match=r"capability 7\.5.*requires 8\.0 for ternary codes"):
            qmoe_jax.load_switch(compressed, implementation="cuda_fragments")
