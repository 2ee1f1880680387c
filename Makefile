# Everything starts from a bare clone: the virtual environment is a target like any other.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.DEFAULT_GOAL := env
.PHONY: env demo test lint format clean

env: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[demo,test,lint]'
	touch $@

demo: env ## catch a backdoored network, see its trigger, repair it
	$(BIN)/backdoorscan demo demo --force

test: env ## run the tests, on all cores, one computing thread each
	OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --dist worksteal $(ARGS)

lint: env ## style and types
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

format: env
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

clean:
	rm -rf $(VENV) demo dist .mypy_cache .pytest_cache .ruff_cache
