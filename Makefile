# What people type. Everything happens in .venv, with the versions of constraints.txt.
PYTHON ?= python3
TEST_ARGS ?=
BENCH_ARGS ?=

PY := .venv/bin/python
PIP := $(PY) -m pip --disable-pip-version-check
C_SOURCES = $(wildcard csrc/*.[ch] kernels/*.cu kernels/*.cuh)

.PHONY: build test bench wheel lint format sanitize clean

test: build
	$(PY) -m pytest $(TEST_ARGS)

bench: build
	$(PY) benchmarks/run_stages.py $(BENCH_ARGS)

# In place, for the editable install; seconds when little has changed.
build: .venv/ready
	$(PY) setup.py --quiet build_ext --inplace

wheel: .venv/ready
	$(PY) -m pip wheel --no-build-isolation --no-deps --wheel-dir dist .

# Without a GPU, torch's CPU build: a tenth of the download, where its index can be reached.
.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(PIP) install --quiet --constraint constraints.txt setuptools wheel numpy
	index=$$(command -v nvidia-smi >/dev/null || $(PY) -c "import urllib.request as u; \
	  i = 'https://download.pytorch.org/whl/cpu'; u.urlopen(i + '/torch/', timeout=5); \
	  print('--extra-index-url', i)" 2>/dev/null); \
	$(PIP) install --quiet --constraint constraints.txt $$index torch
	FLATOUT_CUDA=off $(PIP) install --quiet --constraint constraints.txt --no-build-isolation \
	  --editable '.[torch,bench,peers,test]'
	touch $@

lint: .venv/ready
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	.venv/bin/clang-format --dry-run --Werror $(C_SOURCES)

format: .venv/ready
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .
	.venv/bin/clang-format -i $(C_SOURCES)

clean:
	rm -rf build dist .venv python/*.egg-info python/flatout/*.so
