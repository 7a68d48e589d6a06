# `make` lists the targets. PYTHON names the interpreter that makes .venv (3.11 or newer).
PYTHON ?= python3
VENV ?= .venv
PIP = $(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
RUN_DIR ?= runs/dpo_smollm2

.PHONY: help demo test test-fast lint format clean

help:
	@echo "make demo       align SmolLM2-135M-Instruct by DPO on two CPU cores, in minutes"
	@echo "make test       every test, on 8 fake devices"
	@echo "make test-fast  the tests that need neither torch, nor libtpu, nor minutes"
	@echo "make lint       ruff, as CI runs it"
	@echo "make format     let ruff rewrite"
	@echo "make clean      remove .venv, runs and caches of the tools"

# One stamp for each set of extras: an install is repeated only when its inputs change.
$(VENV)/.made:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; say make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.demo: $(VENV)/.made pyproject.toml constraints.txt
	@echo "installing alignjax into $(VENV)"
	$(PIP) -e .
	@touch $@

$(VENV)/.test-fast: $(VENV)/.made pyproject.toml constraints.txt
	@echo "installing alignjax and its tests into $(VENV)"
	$(PIP) -e ".[test]"
	@touch $@

$(VENV)/.test: $(VENV)/.made pyproject.toml constraints.txt
	@echo "installing alignjax, its tests, torch and the TPU compiler into $(VENV)"
	$(PIP) -e ".[test,parity,plan-tpu]"
	@touch $@

$(VENV)/.dev: $(VENV)/.made pyproject.toml constraints.txt
	$(PIP) ruff
	@touch $@

demo: $(VENV)/.demo
	$(VENV)/bin/python -m alignjax.train --config=dpo_smollm2 --run_dir=$(RUN_DIR) $(ARGS)

test: $(VENV)/.test
	$(VENV)/bin/python -m pytest -n 2 --dist loadscope $(ARGS)

test-fast: $(VENV)/.test-fast
	$(VENV)/bin/python -m pytest -n 2 --dist loadscope -m "not slow" $(ARGS)

lint: $(VENV)/.dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

format: $(VENV)/.dev
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

clean:
	rm -rf $(VENV) runs .pytest_cache .ruff_cache *.egg-info
