# make setup | demo | test. Needs only Python 3.11 or newer: everything else is installed into .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.complete

.PHONY: setup demo test lint bench clean help

help:
	@echo "make setup   install everything into .venv (with uv where it can be had, else pip)"
	@echo "make demo    compress the embedded model on embedded images, show the verdict and the report"
	@echo "make test    linters, type checker, tests"

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt scripts/bootstrap.sh
	@PYTHON="$(PYTHON)" sh scripts/bootstrap.sh $(VENV)
	@touch $(STAMP)

demo: $(STAMP)
	@$(BIN)/lighten compress demo --device this-machine --max-drop 1 --min-shrink 70 --name demo

lint: $(STAMP)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

test: lint
	$(BIN)/pytest -n 2 --dist loadfile

clean:
	rm -rf $(VENV) runs .pytest_cache .mypy_cache .ruff_cache
