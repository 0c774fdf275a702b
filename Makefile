# make demo   trains the demo model             make test         lint, types, and every test that needs no GPU
# make lint   ruff and mypy only                make test-newest  compiles the kernels with the newest Triton
# make clean  removes what these made           make test-gpu     the tests on this machine's own python and GPU
#
# Everything but test-gpu sets itself up in .venv. PYTHON=... picks the interpreter, PIP_ARGS=... adds options to pip install.

PYTHON ?= python3
PIP_ARGS ?=
WORKERS ?= 2
# One more than processors: in the tests of the Hopper kernels' stand-in, threads wait for each other.
HOST_WORKERS ?= 3
PY := .venv/bin/python

# Without a GPU: PyTorch's small CPU build, and everything pinned. With one: the PyTorch and Triton that belong together.
GPU := $(shell command -v nvidia-smi rocm-smi 2>/dev/null)
CPU_WHEELS := https://download.pytorch.org/whl/cpu/torch/
UNPINNED := $(if $(GPU),^(torch|triton)==,^$$)
INSTALL = -m pip install --disable-pip-version-check $(PIP_ARGS)

.PHONY: demo test test-newest test-gpu lint clean
.DELETE_ON_ERROR:

demo: .venv/.demo
	$(PY) -m triflash demo $(ARGS)

lint: .venv/.dev
	$(PY) -m ruff check .
	$(PY) -m ruff format --check --quiet .
	$(PY) -m mypy

test: lint
	CUDA_VISIBLE_DEVICES= HIP_VISIBLE_DEVICES= TRITON_INTERPRET=1 $(PY) -m pytest -q -n $(HOST_WORKERS) tests --ignore=tests/aot
	$(PY) -m pytest -q -n $(WORKERS) tests/aot

test-newest: .venv/.dev .triton-newest/.installed
	PYTHONPATH=.triton-newest $(PY) -c 'import triton; print("Triton", triton.__version__)'
	PYTHONPATH=.triton-newest $(PY) -m pytest -q -n $(WORKERS) tests/aot $(ARGS)

test-gpu:
	PYTHONPATH=src$(if $(PYTHONPATH),:$(PYTHONPATH)) $(PYTHON) -m pytest -q tests $(ARGS)

clean:
	rm -rf .venv .triton-newest .pytest_cache .mypy_cache .ruff_cache .hypothesis build dist src/*.egg-info demo-out
	find . -name .git -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +

# One stamp per set of extras; a change of pins or of the package's metadata installs again.
.venv/.constraints: constraints.txt Makefile
	test -x $(PY) || $(PYTHON) -m venv .venv
	grep -vE '$(UNPINNED)' constraints.txt > .venv/pins.txt
	$(if $(GPU),,$(PY) $(INSTALL) -qq --retries 1 --no-deps --find-links $(CPU_WHEELS) "$$(grep '^torch==' constraints.txt)")
	touch $@

.venv/.%: .venv/.constraints pyproject.toml
	$(PY) $(INSTALL) --quiet --constraint .venv/pins.txt --editable '.[$*]'
	touch $@

.triton-newest/.installed: Makefile | .venv/.constraints
	rm -rf .triton-newest
	$(PY) $(INSTALL) --quiet --target .triton-newest --no-deps triton
	touch $@
