# Two commands need nothing else on a fresh machine: `make quickstart` and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# fla-core's naive functions serve as an oracle; without its dependencies, so that no second torch is fetched.
DEV := build einops hypothesis 'lm-eval>=0.4.13,<0.5' mypy 'numpy<2.4' peft pytest pytest-xdist ruff 'triton>=3.6' types-PyYAML

.PHONY: quickstart test lint clean

$(BIN)/statex: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --editable .
	@touch $@

$(VENV)/.dev: $(BIN)/statex
	$(BIN)/pip install --quiet --disable-pip-version-check $(DEV)
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps fla-core==0.6.0
	@touch $@

quickstart: $(BIN)/statex
	$(BIN)/statex quickstart --out runs/quickstart --force

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: $(VENV)/.dev lint
	$(BIN)/pytest -n 2

clean:
	rm -rf $(VENV) build dist runs
