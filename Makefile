# What people type. Everything happens in .venv, with the versions of constraints.txt.
PYTHON ?= python3
TEST_ARGS ?=
BENCH_ARGS ?=

PY := .venv/bin/python
PIP := $(PY) -m pip --disable-pip-version-check
C_SOURCES = $(wildcard csrc/*.[ch] kernels/*.cu kernels/*.cuh)

.PHONY: build test test-transformers bench plots notebook wheel lint format sanitize sanitize-cuda clean

test: build
	$(PY) -m pytest $(TEST_ARGS)

# flatout.hf on the oldest and the newest transformers, each with a version of kernels that runs
# beside it, laid over .venv's packages.
TRANSFORMERS ?= 4.57.6 5.23.0
kernels-4.57.6 = 0.12.3
kernels-5.23.0 = 0.17.2

test-transformers: $(TRANSFORMERS:%=test-transformers-%)

test-transformers-%: build .venv/transformers-%/ready
	PYTHONPATH=.venv/transformers-$* \
	  $(PY) -m pytest tests/test_hf.py tests/test_hf_attention.py $(TEST_ARGS)

.PRECIOUS: .venv/transformers-%/ready
.venv/transformers-%/ready: .venv/ready
	$(PIP) install --quiet --upgrade --target $(@D) transformers==$* $(kernels-$*:%=kernels==%)
	touch $@

bench: build
	$(PY) benchmarks/run_stages.py $(BENCH_ARGS)

# PNG plots over sizes, from every folder of result files of run_ops.py.
RESULTS ?= $(patsubst %/ops.csv,%,$(wildcard benchmarks/results/*/ops.csv))
plots: build
	$(PY) benchmarks/run_ops.py --plots $(RESULTS)

# Runs the example notebook and stores its outputs.
notebook: build
	$(PY) tests/notebook.py

# In place, for the editable install; seconds when little has changed.
build: .venv/ready
	$(PY) setup.py --quiet build_ext --inplace

wheel: .venv/ready
	$(PY) -m pip wheel --no-build-isolation --no-deps --wheel-dir dist .

# torch first: pip takes its CPU build where PIP_EXTRA_INDEX_URL names an index that has one.
.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(PIP) install --quiet --constraint constraints.txt setuptools wheel numpy
	$(PIP) install --quiet --constraint constraints.txt torch
	FLATOUT_CUDA=off $(PIP) install --quiet --constraint constraints.txt --no-build-isolation \
	  --editable '.[torch,bench,peers,test]'
	touch $@

# The CPU ops and the tensor boundary under gcc's address and undefined behaviour sanitizers.
SANITIZE = -fsanitize=address,undefined
SANITIZE_TESTS ?= $(filter-out tests/test_build.py tests/test_run_% tests/test_compat% \
  tests/test_hf% tests/test_drop_in.py tests/test_examples.py, $(wildcard tests/test_*.py))
sanitize: .venv/ready
	FLATOUT_CUDA=off CFLAGS="$(SANITIZE) -fno-sanitize-recover -fno-omit-frame-pointer -g" \
	  LDFLAGS="$(SANITIZE)" $(PY) setup.py --quiet build --build-lib build/sanitize
	LD_PRELOAD="$$(gcc -print-file-name=libasan.so) $$(gcc -print-file-name=libubsan.so)" \
	  ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1 \
	  UBSAN_OPTIONS=print_stacktrace=1 PYTHONMALLOC=malloc \
	  PYTHONPATH=build/sanitize \
	  $(PY) -m pytest --capture=sys -p no:cacheprovider -m "not slow" $(SANITIZE_TESTS)

# Every CUDA kernel on small shapes, between guard bands, under NVIDIA's compute-sanitizer: needs a
# GPU and the module that `make build` left. racecheck and synccheck take the smaller half.
COMPUTE_SANITIZER ?= compute-sanitizer
SANITIZE_CUDA_TOOLS ?= memcheck racecheck synccheck
SANITIZE_CUDA_TESTS-memcheck = not wide_and_many
SANITIZE_CUDA_TESTS-racecheck = every_op and (bfloat16 or float32) or optimizer and True
sanitize-cuda: $(SANITIZE_CUDA_TOOLS:%=sanitize-cuda-%)

sanitize-cuda-%:
	PYTHONPATH=python PYTORCH_NO_CUDA_MEMORY_CACHING=1 \
	  $(COMPUTE_SANITIZER) --tool $* --error-exitcode 9 $(SANITIZE_CUDA_ARGS) \
	  $(PY) -m pytest -p no:cacheprovider -m gpu tests/test_guard_bands.py \
	  -k "$(or $(SANITIZE_CUDA_TESTS-$*),$(SANITIZE_CUDA_TESTS-racecheck))"

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
