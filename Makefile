# Two commands do all the set-up: `make demo` and `make test`.
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/installed
# A mirror that pip is configured for serves uv as well.
export UV_DEFAULT_INDEX ?= $(shell $(PYTHON) -m pip config get global.index-url 2>/dev/null)
ifeq ($(UV_DEFAULT_INDEX),)
unexport UV_DEFAULT_INDEX
endif

.PHONY: help demo study bench test lint types lock clean
help:
	@echo "make demo   train a small IDDPM on real handwritten digits, here, and show what it learnt (minutes)"
	@echo "make study  a small scaling study of the digits, with its report (under 45 minutes on two cores)"
	@echo "make bench  speed, as ratios against peers and limits (under 15 minutes on two cores)"
	@echo "make test   run the tests"
	@echo "make lint   ruff;  make types   mypy;  make lock   resolve the dependencies anew"

demo: $(INSTALLED)
	$(BIN)/python -m jobs.demo

# STUDY=studies/tiny.yaml shows the whole way in minutes.
STUDY ?= studies/digits.yaml
study: $(INSTALLED)
	$(BIN)/python -m jobs.study plan $(STUDY) --hardware here
	OMP_NUM_THREADS=1 $(BIN)/python -m jobs.study run $(STUDY) --jobs $$(nproc)
	$(BIN)/python -m jobs.study report $(STUDY)

# Those for a GPU, where there is one, by themselves: the others hide it, since they start more ranks than there are GPUs.
test: $(INSTALLED)
	! command -v nvidia-smi >/dev/null || $(BIN)/python -m pytest -m cuda tests/test_cuda.py
	$(BIN)/python -m pytest

# A peer to measure against, which nothing else needs.
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
	$(BIN)/uv pip install --python $(BIN)/python --compile-bytecode -r requirements.lock
	$(BIN)/uv pip install --python $(BIN)/python --no-deps --editable .
	touch $@

lock: $(INSTALLED)
	$(BIN)/uv pip compile --quiet --no-header --no-annotate --python-version 3.11 --group dev pyproject.toml -o requirements.lock

clean:
	rm -rf .venv
