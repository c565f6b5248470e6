# `make demo` and `make test` do all the set-up themselves.
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/installed
# Let uv use the package mirror that pip is configured with.
export UV_DEFAULT_INDEX ?= $(shell $(PYTHON) -m pip config get global.index-url 2>/dev/null)
ifeq ($(UV_DEFAULT_INDEX),)
unexport UV_DEFAULT_INDEX
endif

.PHONY: help demo study bench test lint types lock clean
help:
	@echo "make demo   train a small IDDPM on real handwritten digits and sample from it (minutes)"
	@echo "make study  run a small scaling study on the digits and write its report (under 45 minutes on two cores)"
	@echo "make bench  measure speed relative to peers and limits (under 15 minutes on two cores)"
	@echo "make test   run the tests"
	@echo "make lint   run ruff;  make types   run mypy;  make lock   update requirements.lock"

demo: $(INSTALLED)
	$(BIN)/python -m jobs.demo

# STUDY=studies/tiny.yaml runs every step in minutes.
STUDY ?= studies/digits.yaml
study: $(INSTALLED)
	$(BIN)/python -m jobs.study plan $(STUDY) --hardware here
	OMP_NUM_THREADS=1 $(BIN)/python -m jobs.study run $(STUDY) --jobs $$(nproc)
	$(BIN)/python -m jobs.study report $(STUDY)

# GPU tests run separately: the other tests hide the GPU, because they start more ranks than there are GPUs.
# More workers than the two cores that they need at least: many tests wait for a cluster, a server or a time-out.
WORKERS ?= 3
test: $(INSTALLED)
	! command -v nvidia-smi >/dev/null || $(BIN)/python -m pytest -m cuda tests/test_cuda.py
	$(BIN)/python -m pytest -n $(WORKERS)

# diffusers is only needed as a peer to compare with.
bench: $(INSTALLED)
	$(BIN)/uv pip install --quiet --python $(BIN)/python -c requirements.lock diffusers==0.42.1
	$(BIN)/python -m benchmarks

lint: $(INSTALLED)
	$(BIN)/ruff check
	$(BIN)/ruff format --check

types: $(INSTALLED)
	$(BIN)/mypy

$(INSTALLED): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(None if v >= (3, 11) else f"error: {sys.executable} is Python {v[0]}.{v[1]}, this needs 3.11 or newer: make PYTHON=/path/to/python3.11")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet uv==0.13.9
	$(BIN)/uv pip install --python $(BIN)/python --compile-bytecode --require-hashes -r requirements.lock
	$(BIN)/uv pip install --python $(BIN)/python --no-deps --editable .
	touch $@

lock: $(INSTALLED)
	$(BIN)/uv pip compile --quiet --no-header --no-annotate --generate-hashes --python-version 3.11 --all-extras --group dev pyproject.toml -o requirements.lock

clean:
	rm -rf .venv
