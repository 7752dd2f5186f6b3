# Each target sets up what it needs in .venv: `make demo` and `make test` need nothing before them.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: help demo test test-all lint format bench bench-codec bench-gptq bench-engine bench-generation bench-cpu bench-cpu-generation bench-quality bench-layers bench-settings fuzz gpu-check gpu-bundle test-newest notebook docs clean
help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed-demo: $(VENV)/bin/python pyproject.toml constraints.txt
	@echo "Installing the demo's packages into $(VENV) (about two minutes) ..."
	$(PIP) --editable ".[data,gin,plots]"
	@touch $@

$(VENV)/.installed-dev: $(VENV)/bin/python pyproject.toml constraints.txt
	@echo "Installing the development packages into $(VENV) (about two minutes) ..."
	$(PIP) --editable ".[dev]"
	@touch $@ $(VENV)/.installed-demo

demo: $(VENV)/.installed-demo ## compress a small trained model and compare; results in demo_out/
	$(BIN)/python -m qmoe_jax demo --output demo_out

test: $(VENV)/.installed-dev ## the default tests, some 20 minutes on 2 cores
	$(BIN)/python -m pytest -n 2 --dist loadfile --max-worker-restart 0 -m "not slow"

test-all: $(VENV)/.installed-dev ## all tests, the slow ones too
	$(BIN)/python -m pytest -n 2 --dist loadfile --max-worker-restart 0

# No constraints: what pip finds newest.
NEWEST_PYTHON ?= python3.13
$(VENV)-newest/.installed: pyproject.toml
	$(NEWEST_PYTHON) -m venv $(VENV)-newest
	$(VENV)-newest/bin/python -m pip install --quiet --disable-pip-version-check --upgrade \
	  --editable ".[data,gin,huggingface,plots,tensorboard]" pytest pytest-xdist hypothesis \
	  beartype flatbuffers cupy-cuda13x
	@touch $@

test-newest: $(VENV)-newest/.installed ## the tests with the newest jax, flax and numpy
	$(VENV)-newest/bin/python -m pip list | grep -iE "^(jax|jaxlib|flax|numpy|numba|cupy[^ ]*) "
	$(VENV)-newest/bin/python -m pytest -n 2 --dist loadfile --max-worker-restart 0 -m "not slow"

lint: $(VENV)/.installed-dev ## ruff and pyright
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m pyright --pythonpath $(BIN)/python

format: $(VENV)/.installed-dev ## format the code
	$(BIN)/python -m ruff check --fix .
	$(BIN)/python -m ruff format .

bench: bench-codec bench-gptq bench-engine bench-generation bench-cpu bench-cpu-generation ## all benchmarks; results in benchmarks/results/

bench-codec: $(VENV)/.installed-dev ## size and speed of the codec, on real codes and made ones
	$(BIN)/python benchmarks/bench_codec.py --json benchmarks/results/codec.json

$(VENV)/.installed-fuzz: $(VENV)/.installed-dev
	$(PIP) --editable ".[dev,fuzz]"
	@touch $@

# Where there is no atheris for the platform, the second part says so.
FUZZ_SECONDS ?= 600
fuzz: $(VENV)/.installed-fuzz ## a million mutated tensors, then inputs guided by coverage
	$(BIN)/python tests/fuzz_codec.py --count 1000000 --seed 0 --json benchmarks/results/fuzz_codec.json
	$(BIN)/python tests/fuzz_coverage.py --target tensors --seconds $(FUZZ_SECONDS)
	$(BIN)/python tests/fuzz_coverage.py --target checkpoints --seconds $(FUZZ_SECONDS)

bench-gptq: $(VENV)/.installed-dev ## GPTQ over batches of experts
	$(BIN)/python benchmarks/bench_gptq.py --json benchmarks/results/gptq.json

bench-engine: $(VENV)/.installed-dev ## memory and speed of whole runs; 5 GB of disk
	$(BIN)/python benchmarks/bench_engine.py --json benchmarks/results/engine.json

bench-generation: $(VENV)/.installed-dev ## tokens per second with and without the KV cache
	$(BIN)/python benchmarks/bench_generation.py --json benchmarks/results/generation.json

bench-cpu: $(VENV)/.installed-dev ## products with codes beside dense ones; 6 GB of memory
	$(BIN)/python benchmarks/bench_cpu.py --json benchmarks/results/cpu.json

bench-cpu-generation: $(VENV)/.installed-dev ## generation from codes on a CPU beside float32; 5 GB of memory
	$(BIN)/python benchmarks/bench_cpu_generation.py --json benchmarks/results/cpu_generation.json

# An hour or two. What is in the result already is not measured again.
bench-layers: $(VENV)/.installed-dev ## bits of ternary and lattice at equal error, on made layers
	$(BIN)/python benchmarks/bench_layers.py --json benchmarks/results/layers.json

bench-quality: $(VENV)/.installed-dev ## KL and loss against bits on the demo model, and a plot
	$(BIN)/python benchmarks/bench_quality.py --output benchmarks/results/quality.json

bench-settings: $(VENV)/.installed-dev ## KL with other settings of GPTQ, at equal bits
	$(BIN)/python benchmarks/bench_settings.py --json benchmarks/results/settings.json

# With the Python that has the GPU packages; nothing is installed. PEER=FILE: the paper's kernel too.
gpu-check: ## on a GPU: correctness, sanitizers, and benchmarks of kernels and generation
	$(PYTHON) benchmarks/gpu_check.py $(if $(PEER),--peer $(PEER))

# The commit's files but for golden data that no GPU test reads. Unpack it there, and `make gpu-check`.
gpu-bundle: ## dist/qmoe_jax_gpu.tar.gz, what a GPU machine needs
	@mkdir -p dist
	git archive --format=tar.gz --prefix=qmoe_jax/ --output=dist/qmoe_jax_gpu.tar.gz HEAD -- . \
	  $(foreach path,switch_xxl switch_c huggingface switch_base/orbax.tar.xz \
	  switch_base/t5x_multichunk.tar.xz,":(exclude)tests/golden/$(path)")
	@du -h dist/qmoe_jax_gpu.tar.gz

notebook: $(VENV)/.installed-dev ## run the notebook on the demo and render notebooks/*.html
	$(BIN)/python notebooks/render.py

docs: $(VENV)/.installed-dev ## the API reference from the docstrings, in build/api
	$(BIN)/python docs/build_api.py build/api

clean: ## remove the virtual environment and the output of demo and notebook
	rm -rf $(VENV) demo_out notebook_out build/api
