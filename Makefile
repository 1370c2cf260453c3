# Two commands do everything on a fresh machine: `make demo` and `make test`. Each sets itself up.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
SETUP := pyproject.toml constraints.txt
WORKERS ?= 2

.PHONY: demo demo-llm test test-quantized lint docs dist format bench peft-matrix clean

demo: $(VENV)/demo.stamp  ## prune a real encoder on real data; prints accuracy, sparsity and adapter size
	$(BIN)/python examples/quickstart.py

demo-llm: $(VENV)/demo.stamp  ## prune a language model without training; prints perplexity, size, speed and text, before and after
	$(BIN)/python examples/demo_llm.py

test: $(VENV)/dev.stamp  ## run every test, in two processes; WORKERS=8 for more, WORKERS=0 for one
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile

test-quantized: $(VENV)/dev.stamp  ## tests of bases quantised by bitsandbytes and torchao, which it installs
	$(PIP) install -q -c constraints.txt -e '.[quantized]'
	$(BIN)/python -m pytest tests/test_quantized.py

lint: $(VENV)/dev.stamp  ## style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(VENV)/docs.stamp  ## the documentation as a site, in site/; broken links and names fail
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

dist: $(VENV)/dist.stamp  ## wheel and sdist in dist/, checked, and tried in empty environments: newest and lowest versions
	.ci/dist.sh $(BIN)/python

format: $(VENV)/dev.stamp
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/demo.stamp  ## the accuracy table of docs/smp.md; an hour on two cores
	bash benchmarks/smp_accuracy.sh

peft-matrix: $(VENV)/dev.stamp  ## PEFT's own tests with our methods; writes docs/peft_matrix.md; takes long
	$(BIN)/python tests/peft_matrix/run.py --output docs/peft_matrix.md

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/demo.stamp: $(VENV)/bin/python $(SETUP)
	$(PIP) install -q -c constraints.txt -e '.[examples]'
	touch $@

$(VENV)/dev.stamp: $(VENV)/bin/python $(SETUP)
	$(PIP) install -q -c constraints.txt -e '.[dev]'
	touch $@

$(VENV)/docs.stamp: $(VENV)/bin/python $(SETUP)
	$(PIP) install -q -c constraints.txt -e '.[docs]'
	touch $@

$(VENV)/dist.stamp: $(VENV)/bin/python $(SETUP)
	$(PIP) install -q -c constraints.txt build twine
	touch $@

clean:
	rm -rf $(VENV) runs site dist .pytest_cache .mypy_cache .ruff_cache
