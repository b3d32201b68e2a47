# Everything a fresh machine needs: `make demo` runs the main job, `make test` the tests.
# Both build .venv from pyproject.toml by themselves (Python 3.11+ and make are all they ask for).
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
NEWEST := .venv-newest
TARGETS := .venv-targets
DOCS := .venv-docs
WORKERS ?= 2
# Further arguments of pytest: `make test ARGS="tests/test_cli.py -x"`.
ARGS ?=
PYTEST := -m pytest -n $(WORKERS) --dist worksteal

.PHONY: demo test test-slow test-newest test-targets targets docs lint format types check clean

# A failed or interrupted install must not leave a stamp, or the next make would trust a broken environment.
$(VENV)/.installed: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "mwplan needs Python 3.11 or newer; set PYTHON=/path/to/python3.11"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade "pip>=24"
	$(BIN)/python -m pip install --quiet -e ".[dev]"
	touch $@

# Where `make demo` writes: the repository's own figures are those of `make demo OUT=results/demo`.
OUT ?= build/demo

demo: $(VENV)/.demo
	$(BIN)/mwplan train --out $(OUT)

# What the demo needs, which is installed in half the time of all that development takes.
$(VENV)/.demo: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "mwplan needs Python 3.11 or newer; set PYTHON=/path/to/python3.11"; exit 1; }
	test -e $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade "pip>=24"
	$(BIN)/python -m pip install --quiet -e ".[example,report]"
	touch $@

test: $(VENV)/.installed
	$(BIN)/python $(PYTEST) -m "not slow" $(ARGS)

test-slow: $(VENV)/.installed
	$(BIN)/python $(PYTEST) $(ARGS)

# The same tests under a newer Python with the newest JAX: make test-newest PYTHON=/path/to/python3.13
test-newest: $(NEWEST)/.installed
	$(NEWEST)/bin/python -m pip install --quiet --upgrade jax jaxlib
	@$(NEWEST)/bin/python -c 'import sys, jax; print("Python", sys.version.split()[0], "and JAX", jax.__version__)'
	$(NEWEST)/bin/python $(PYTEST) -m "not slow" $(ARGS)

$(NEWEST)/.installed: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 12))' || \
	  { echo "the newest JAX needs Python 3.12 or newer; set PYTHON=/path/to/python3.13"; exit 1; }
	$(PYTHON) -m venv --clear $(NEWEST)
	$(NEWEST)/bin/python -m pip install --quiet --upgrade "pip>=24"
	$(NEWEST)/bin/python -m pip install --quiet -e ".[dev]"
	touch $@

# What needs a compiler for GPUs, without one: in an environment of its own, where JAX keeps to the CPU.
test-targets: $(TARGETS)/.installed
	JAX_PLATFORMS=cpu $(TARGETS)/bin/python $(PYTEST) tests/test_targets.py tests/test_targets_pricing.py \
	  tests/test_peak.py tests/test_remote.py tests/test_experiments_targets.py tests/test_field_targets.py \
	  tests/test_barriers.py $(ARGS)

# Their environment alone.
targets: $(TARGETS)/.installed

$(TARGETS)/.installed: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "mwplan needs Python 3.11 or newer; set PYTHON=/path/to/python3.11"; exit 1; }
	$(PYTHON) -m venv $(TARGETS)
	$(TARGETS)/bin/python -m pip install --quiet --upgrade "pip>=24"
	$(TARGETS)/bin/python -m pip install --quiet -e ".[dev]"
	$(TARGETS)/bin/python -m pip install --quiet $$($(TARGETS)/bin/python -c \
	  'import jaxlib; v = jaxlib.__version__; print(f"jax-cuda12-plugin=={v} jax-cuda12-pjrt=={v} nvidia-cuda-nvcc-cu12")')
	touch $@

# The site, in build/site; fails at a broken link or any other warning. The tutorials are run for it.
docs: $(DOCS)/.installed
	JAX_PLATFORMS=cpu NO_MKDOCS_2_WARNING=1 $(DOCS)/bin/mkdocs build --strict

$(DOCS)/.installed: pyproject.toml
	$(PYTHON) -m venv $(DOCS)
	$(DOCS)/bin/python -m pip install --quiet --upgrade "pip>=24"
	$(DOCS)/bin/python -m pip install --quiet -e ".[docs]"
	touch $@

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(VENV)/.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: $(VENV)/.installed
	$(BIN)/mypy

check: lint types test

clean:
	rm -rf $(VENV) $(NEWEST) $(TARGETS) $(DOCS) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
