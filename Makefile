# Everything a fresh machine needs: Python 3.11, make and the package index.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
export OMP_NUM_THREADS ?= 1
SEEDS := --seed 11 --seed 12 --seed 13
PAPERS ?= --all --stale

.PHONY: demo test test-all evidence lint docs bench clean

demo: $(VENV)/.demo  ## choose text from a real corpus, and open the report it names
	$(BIN)/python examples/make_corpus.py demo
	$(BIN)/salience select text demo/raw --target demo/target.jsonl --count 2000 --min-tokens 40 \
		-o demo/chosen.jsonl --overwrite
	@echo "open it in a browser: file://$(CURDIR)/demo/chosen.jsonl.report.html"

test: $(VENV)/.test  ## what every change must pass (slow tests left out)
	$(BIN)/python -m pytest -n 2 -m "not slow"

test-all: $(VENV)/.test  ## the slow ones, too
	$(BIN)/python -m pytest -n 2

evidence: $(VENV)/.test  ## refresh the committed outcomes of what changed (or PAPERS="slug …")
	$(BIN)/salience reproduce $(PAPERS) $(SEEDS) --out src/salience/evidence/outcomes; test $$? -le 1 -o $$? -eq 4
	$(BIN)/python docs/generate.py --readme

lint: $(VENV)/.test
	$(BIN)/ruff check src tests benchmarks examples docs
	$(BIN)/ruff format --check src tests benchmarks examples docs
	$(BIN)/mypy
	$(BIN)/lint-imports

docs: $(VENV)/.docs
	$(BIN)/python -m sphinx -W -b html docs docs/_build/html

bench: $(VENV)/.test  ## side by side with the official packages, in environments of their own
	$(BIN)/python benchmarks/dsir.py

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.demo: $(BIN)/python pyproject.toml constraints.txt
	$(BIN)/python -m pip install -q -c constraints.txt -e ".[demo]"
	touch $@

$(VENV)/.test: $(BIN)/python pyproject.toml constraints.txt
	$(BIN)/python -m pip install -q -c constraints.txt -e ".[test]"
	touch $@ $(VENV)/.demo

$(VENV)/.docs: $(VENV)/.test
	$(BIN)/python -m pip install -q -c constraints.txt -e ".[docs]"
	touch $@

clean:
	rm -rf $(VENV) demo docs/_build docs/_generated
