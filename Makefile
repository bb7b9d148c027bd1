# `make sweep` and `make test` do everything on a fresh machine with a package index.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
RESULTS ?= results

.PHONY: sweep verdict compare forecasters report docs test slow lint format clean

sweep: $(READY)
	$(BIN)/python runners/sweep.py method=informed sparsity=0.3,0.5,0.7 speed=sweep \
	  results_dir=$(RESULTS) -m
	$(BIN)/python analysis/verdict.py results_dir=$(RESULTS)
	$(BIN)/python analysis/tradeoff.py results_dir=$(RESULTS)
	$(BIN)/python analysis/training_time.py results_dir=$(RESULTS)

verdict: $(READY)
	$(BIN)/python runners/sweep.py experiment=verdict results_dir=$(RESULTS) -m
	$(BIN)/python analysis/verdict.py results_dir=$(RESULTS)

forecasters: $(READY)
	$(BIN)/python runners/sweep.py experiment=forecasters results_dir=$(RESULTS)/forecasters -m
	$(BIN)/python runners/sweep.py experiment=forecasters method.forecaster.fit=closed_form \
	  budget=standard results_dir=$(RESULTS)/forecasters -m
	$(BIN)/python analysis/training_time.py results_dir=$(RESULTS)/forecasters

compare: $(READY)
	$(BIN)/python runners/sweep.py experiment=tradeoff results_dir=$(RESULTS) -m
	$(BIN)/python analysis/tradeoff.py results_dir=$(RESULTS)
	$(BIN)/python analysis/training_time.py results_dir=$(RESULTS)

report: $(READY)
	$(BIN)/python analysis/report.py results_dir=$(RESULTS)

docs: $(VENV)/.docs
	$(BIN)/mkdocs build --strict

$(VENV)/.docs: $(READY)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[docs]'
	touch $@

# two processes of one thread: most tests are too small to share their work among threads
test: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

slow: $(READY)
	$(BIN)/python -m pytest -m slow --timeout 3600

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# torch first: resolved with the rest, pip may fetch gigabytes of CUDA libraries.
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt torch numpy
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $(READY)

clean:
	rm -rf $(VENV) build *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis outputs
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
