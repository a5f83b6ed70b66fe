# Every target makes .venv itself when it is missing or older than what it is made from.
VENV := .venv
PYTHON ?= python3
BIN := $(VENV)/bin
CONSTRAINTS := requirements/constraints.txt
# Processes of the test run; 0 runs the tests in pytest itself, as a debugger needs.
WORKERS ?= 2
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c $(CONSTRAINTS)
TEST := $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder -m "not slow and not gpu"
export TOKENIZERS_PARALLELISM := false

.PHONY: demo test test-all errors fuzz lint format bench bench-gpu gpu-wheels tables docs results hashes pocket pocket-large clean

$(VENV)/installed: pyproject.toml $(CONSTRAINTS)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(INSTALL) torch
	$(INSTALL) -e ".[dev]"
	touch $@

demo: $(VENV)/installed  ## zero-shot, local and federated on easy-VQA, side by side; one to two minutes
	$(BIN)/python examples/demo.py

test: $(VENV)/installed
	$(TEST)

test-all: $(VENV)/installed  ## with the slow tests: the demo's margins on three seeds, kills at random instants, a long run
	$(BIN)/python -m pytest -m "not gpu"

errors: $(VENV)/installed  ## docs/errors.md again, from a run of the test suite
	$(TEST) --errors-page=docs/errors.md

SEED ?= $(shell date +%s)
fuzz: $(VENV)/installed  ## thirty times as many cases for the readers of files, with a new seed, or with SEED=… again; about half an hour
	$(BIN)/python -m pytest tests/test_fuzz_files.py tests/test_fuzz_commands.py --hypothesis-profile=fuzz --hypothesis-seed=$(SEED) --timeout=0

lint: $(VENV)/installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(VENV)/installed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

$(VENV)/installed-bench: $(VENV)/installed
	$(INSTALL) -e ".[bench]"
	touch $@

bench: $(VENV)/installed-bench  ## ratios: to the peers, of each speed-up, to the floor, the cost of many clients and of other fleets; about twenty minutes
	$(BIN)/python benchmarks/peers.py
	$(BIN)/python benchmarks/local_training.py
	$(BIN)/python benchmarks/floor.py
	$(BIN)/python benchmarks/overhead.py --rounds 4 --repeats 2
	$(BIN)/python benchmarks/scale.py
	$(BIN)/python benchmarks/fleets.py
	$(BIN)/python benchmarks/secure.py

bench-gpu: $(VENV)/installed  ## on a GPU: speed and memory at the shapes of SmolVLM-500M, SmolVLM-2.2B and Qwen2.5-VL-3B; under ten minutes
	PYTHONPATH=. $(BIN)/python benchmarks/gpu.py --out build/gpu

# For a machine with PyTorch, NumPy and Pillow but no network: what benchmarks/gpu.py imports beside them, of the tested versions.
GPU_PYTHON ?= 3.12
PLATFORMS := _2_28 _2_17 2014
GPU_WHEELS := transformers peft accelerate tokenizers safetensors huggingface_hub httpx2 httpcore2 h11 anyio idna truststore \
	regex PyYAML tqdm packaging psutil typer click rich shellingham pydantic pydantic_core annotated-types typing-inspection \
	typing_extensions tomli_w
gpu-wheels: $(VENV)/installed  ## wheels for benchmarks/gpu.py on a machine without a network, in build/gpu-wheels: 25 MB
	$(BIN)/python -m pip download --quiet --no-deps --only-binary=:all: --python-version $(GPU_PYTHON) --implementation cp \
		$(PLATFORMS:%=--platform manylinux%_x86_64) -c $(CONSTRAINTS) --dest build/gpu-wheels $(GPU_WHEELS)
	du -ch build/gpu-wheels/*.whl | tail -n 1

$(VENV)/installed-docs: $(VENV)/installed
	$(INSTALL) -e ".[docs]"
	touch $@

tables: $(VENV)/installed  ## the tables of parts and the pictures of scenarios and weights in docs/ again, from the registries
	$(BIN)/python docs/tables.py
	$(BIN)/python docs/scenarios.py
	$(BIN)/python docs/fairness.py

docs: $(VENV)/installed-docs tables
	$(BIN)/mkdocs build --strict --quiet

GRIDS := $(foreach task,openmoji pocket-memes pocket-qwen pocket-large qa,$(wildcard $(foreach part,main others ablation,results/$(task).$(part).tar.xz)))
CLAIMED := $(wildcard $(foreach study,attacks modality-aware rank skew,results/study-$(study).tar.xz))
OTHER_STUDIES := $(filter-out $(CLAIMED),$(wildcard results/study-*.tar.xz))
REPORT := $(BIN)/fedmllm report
CLAIMS := --hypotheses experiments/offline/hypotheses.toml
results: $(VENV)/installed  ## docs/results.md, docs/studies.md and docs/results-full.html again, from the runs in results/ alone
	$(REPORT) $(CLAIMS) --brief $(GRIDS) $(CLAIMED) --out docs/results.md
	$(REPORT) --title Studies --brief $(OTHER_STUDIES) --out docs/studies.md
	$(REPORT) $(CLAIMS) $(GRIDS) $(CLAIMED) $(OTHER_STUDIES) --out docs/results-full.html
	$(REPORT) results/study-noise.tar.xz results/study-stragglers.tar.xz --out build/studies.md
	cp build/figures/study-noise-corruption.svg build/figures/study-stragglers-time.svg docs/figures

EXTRAS := flower ray secure privacy gpu hub openmoji track pandas
hashes: $(VENV)/installed  ## requirements/hashes.txt again: the tested versions with the digests of all their files
	$(BIN)/uv pip compile pyproject.toml $(EXTRAS:%=--extra %) -c $(CONSTRAINTS) --universal --python-version 3.11 --generate-hashes \
		--quiet --no-annotate --output-file requirements/hashes.txt \
		--custom-compile-command "make hashes   (PyTorch is the build of the package index; others have other digests: SECURITY.md)"

pocket: $(VENV)/installed  ## train the shipped model from scratch again; 60 to 90 minutes on two cores
	$(BIN)/python -m recipes.pocket.pretrain --out build/pocket

pocket-large: $(VENV)/installed  ## unpack the larger model that experiments/offline/pocket-large.*.toml name, into build/pocket-large
	mkdir -p build
	$(BIN)/python -m tarfile -e experiments/offline/pocket-large.tar.xz build

clean:
	rm -rf $(VENV) build site .pytest_cache .mypy_cache .ruff_cache .hypothesis
