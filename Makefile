# make demo        train the demo model
# make test        lint, types, and the tests that every change should pass, in minutes
# make test-full   every test that needs no GPU, also on the oldest versions, and an eighth of the compilations on the newest Triton
# make test-newest every compilation on the newest Triton
# make test-gpu    the tests on this machine's own python and GPU (ARGS="-k dbias")
# make test-torch  the interpreted tests with the lowest PyTorch (TORCH=2.10.0), whose CUDA build is gigabytes: not part of test-full
# make package     build sdist and wheel, check them, and run the wheel in a fresh environment (ARGS=--release: RELEASING.md)
# make docs        the site, in build/site: pages of docs/, the README, the API from docstrings; a broken link fails
# make lint        ruff and mypy only
# make durations   measure what each test costs, which decides what make test runs
# make clean       remove what these made
# make help        this list
#
# Everything but test-gpu sets itself up in .venv. PYTHON=... picks the interpreter, PIP_ARGS=... adds options to pip install.

PYTHON ?= python3
PIP_ARGS ?=
WORKERS ?= 2
TORCH ?= 2.10.0
PY := .venv/bin/python

# Interpreted or run by stand-ins, without a GPU even where there is one; and compiled. What is compiled is kept, by the hash of its source.
INTERPRETED = CUDA_VISIBLE_DEVICES= HIP_VISIBLE_DEVICES= TRITON_INTERPRET=1 $(PY) -m pytest -q -n $(WORKERS) tests --ignore=tests/aot --ignore=tests/stub
COMPILED = TRITON_CACHE_DIR=$(CURDIR)/.triton-cache $(PY) -m pytest -q -n $(WORKERS) tests/aot
# Launched by Triton's own launchers on a driver that runs nothing.
STUBBED = $(subst tests/aot,tests/stub,$(COMPILED))
# Of what not every run can hold, the commit picks a fiftieth (tests/tiers.py); PART=0 to 49 picks another.
CHOICE = $(if $(PART),--part $(PART))
# What test-rest runs besides: all that test leaves out (rest), or two fifths (some), as .ci/run does.
TIER ?= rest

# Without a GPU: PyTorch's small CPU build, and everything pinned. With one: the PyTorch and Triton that belong together.
GPU := $(shell command -v nvidia-smi rocm-smi 2>/dev/null)
CPU_WHEELS := https://download.pytorch.org/whl/cpu/torch/
UNPINNED := $(if $(GPU),^(torch|triton)==,^$$)
INSTALL = -m pip install --disable-pip-version-check $(PIP_ARGS)

.PHONY: demo docs help package test test-full test-rest test-others test-newest test-oldest test-torch test-gpu durations lint clean
.DELETE_ON_ERROR:

demo: .venv/.demo
	$(PY) -m triflash demo $(ARGS)

help:
	@sed -n 's/^# make /make /p' Makefile

lint: .venv/.dev
	$(PY) -m ruff check .
	$(PY) -m ruff format --check --quiet .
	$(PY) -m mypy

test: lint
	$(INTERPRETED) --tier first $(CHOICE)
	$(COMPILED) --tier first $(CHOICE)
	$(STUBBED) --tier first $(CHOICE)

# What test leaves out; the oldest versions; and of the compilations with the newest Triton the eighth that the commit picks.
test-rest: .venv/.dev
	$(INTERPRETED) --tier $(TIER) $(CHOICE)
	$(COMPILED) --tier $(TIER) $(CHOICE)
	$(STUBBED) --tier $(TIER) $(CHOICE)
	$(MAKE) test-others

test-others:
	$(MAKE) test-oldest
	$(MAKE) test-newest ARGS="--shard commit/8"

# As test and test-rest, in one go.
test-full: lint
	$(INTERPRETED)
	$(COMPILED)
	$(STUBBED)
	$(MAKE) test-others

# What each test costs and which kernels it runs, which decides what is tested first: tests/durations.json.
durations: .venv/.dev
	$(INTERPRETED) --record
	$(COMPILED) --record
	$(STUBBED) --record

test-newest: .venv/.dev .triton-newest/.installed
	PYTHONPATH=.triton-newest $(PY) -c 'import triton; print("Triton", triton.__version__)'
	PYTHONPATH=.triton-newest $(COMPILED) $(ARGS)
	PYTHONPATH=.triton-newest $(STUBBED) $(ARGS)

# The lowest versions that pyproject.toml allows. Those of Triton and PyTorch: the README says which are tested.
test-oldest: .venv/.dev .oldest/.installed
	PYTHONPATH=.oldest $(PY) -m pytest -q -n $(WORKERS) tests/test_demo.py tests/test_bench_compare.py tests/test_bench_gate.py tests/test_bench_workloads.py

test-torch: .torch-$(TORCH)/.installed
	$(subst $(PY),.torch-$(TORCH)/bin/python,$(INTERPRETED)) $(ARGS)

test-gpu:
	PYTHONPATH=src$(if $(PYTHONPATH),:$(PYTHONPATH)) $(PYTHON) -m pytest -q tests $(ARGS)

package: .venv/.package
	$(PY) scripts/package.py $(ARGS)

docs: .venv/.docs
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict --site-dir build/site $(ARGS)

clean:
	rm -rf .venv .triton-newest .oldest .torch-* .triton-cache .pytest_cache .mypy_cache .ruff_cache .hypothesis build dist src/*.egg-info demo-out
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

.oldest/.installed: pyproject.toml | .venv/.constraints
	rm -rf .oldest
	$(PY) $(INSTALL) --quiet --target .oldest --no-deps $$(sed -nE '/^demo = /{s/^demo = \[([^]]*)\].*/\1/; s/[",]//g; s/>=/==/g; p}' pyproject.toml)
	touch $@

.torch-$(TORCH)/.installed: constraints.txt pyproject.toml
	$(PYTHON) -m venv .torch-$(TORCH)
	grep -vE '^(torch|triton)==' constraints.txt > .torch-$(TORCH)/pins.txt
	.torch-$(TORCH)/bin/python $(INSTALL) --quiet --constraint .torch-$(TORCH)/pins.txt torch==$(TORCH) --editable '.[dev]'
	touch $@

.triton-newest/.installed: Makefile | .venv/.constraints
	rm -rf .triton-newest
	$(PY) $(INSTALL) --quiet --target .triton-newest --no-deps triton
	touch $@
