# `make demo` and `make test` need Python 3.11 to 3.13 and make, nothing else: they create .venv on first use.
SHELL := /bin/sh
VENV := .venv
PY := $(VENV)/bin/python
# The newest supported Python on this machine, or the one given: make test PYTHON=/path/to/python3.12
PYTHON ?= $(shell for p in python3.13 python3.12 python3.11 python3 python; do \
	$$p -c 'import sys, venv; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null && echo $$p && break; done)
INSTALLED := $(VENV)/.installed
PROCESSES := -n 2 --dist worksteal
TRITON_TESTS := $(wildcard tests/kernels/test_*_triton.py)

.PHONY: help install demo test test-all timm-suite lint bench clean

help:
	@echo "make demo        train on images, genomes and sound, end with runs/demo/report.html (under 10 minutes on 2 cores)"
	@echo "make test        the tests that CI runs (under 20 minutes on 2 cores)"
	@echo "make test-all    these, the slow ones and timm's own test-suite on our models"
	@echo "make lint        ruff and pyright"
	@echo "make bench       time the ops; PEERS=1 also times the published kernels where they are installed"

$(INSTALLED): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "error: no Python 3.11 to 3.13 with the venv module found; install one, or name it: make $(MAKECMDGOALS) PYTHON=/path/to/python" >&2; exit 2; }
	$(PY) -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	$(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test,dev]'
	@touch $@

install: $(INSTALLED)

demo: $(INSTALLED)
	$(PY) -m vision.train digits --run_dir runs/demo/vision --overwrite true
	$(PY) -m genomics.classify great_apes --run_dir runs/demo/genomics --overwrite true
	$(PY) -m audio.train digits --run_dir runs/demo/audio --overwrite true
	$(PY) -m core.report runs/demo --title "Triscan: images, genomes and sound"

test: $(INSTALLED)
	$(PY) -m pytest -q $(PROCESSES) -m "not slow and not gpu" $(addprefix --ignore=,$(TRITON_TESTS))
	TRITON_INTERPRET=1 $(PY) -m pytest -q $(PROCESSES) -m "not slow and not gpu" $(TRITON_TESTS)

test-all: $(INSTALLED) lint
	$(PY) -m pytest -q $(PROCESSES) $(addprefix --ignore=,$(TRITON_TESTS))
	TRITON_INTERPRET=1 $(PY) -m pytest -q $(PROCESSES) $(TRITON_TESTS)
	$(MAKE) timm-suite

timm-suite: $(INSTALLED)
	$(PY) tests/vision/timm_suite.py

lint: $(INSTALLED)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m pyright

bench: $(INSTALLED)
	$(PY) -m benchmarks.selective_scan_cpu
	$(PY) -m benchmarks.cpu_ops
	@if $(PY) -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then \
		$(PY) -m benchmarks.selective_scan $(if $(PEERS),--peers) && \
		$(PY) -m benchmarks.causal_conv1d $(if $(PEERS),--peers) && $(PY) -m benchmarks.norm && \
		$(PY) -m benchmarks.host $(if $(PEERS),--peers) && $(PY) -m benchmarks.train_lm $(if $(PEERS),--peers) --case target/mamba_130m; \
	else echo "no GPU here: its benchmarks are left out"; fi

clean:
	rm -rf $(VENV) build .pytest_cache .ruff_cache .hypothesis
