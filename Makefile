# `make demo` and `make test` do all their own set-up: a virtual environment, the pinned torch, the
# project's extras, an editable install with the compiled extension. Stamp files in the environment
# make a second call start at once; a changed kernel is rebuilt.

PYTHON ?= python3
# What pip is asked for. More words are allowed: TORCH="torch==2.12.0 --index-url URL"
TORCH ?= torch==2.13.0
OLDEST := torch==2.10.0
# The Triton that this torch is made for.
TRITON ?= triton==3.7.1
VENV ?= .venv
# Test processes. Each has OMP_NUM_THREADS=1.
JOBS ?= 2
# The GPU architecture of gpu-build, and how long gpu-check may take.
ARCH ?= 9.0
MINUTES ?= 8
# More words for pytest, the demo, the study or the benchmark: make test ARGS="-k lambda -x"
ARGS ?=

export TORCH
export PIP_DISABLE_PIP_VERSION_CHECK := 1

BIN := $(VENV)/bin
PY := $(BIN)/python
PIP := $(PY) -m pip install --quiet
# Before a command that is silent for minutes: a line every 10 s until it ends.
TICK := (s=0; while sleep 10 >&- 2>&-; do s=$$((s + 10)); echo "$$s s so far"; done) & trap "kill $$!" EXIT;
SAY := @printf '%s\n'

SOURCES := $(shell find csrc -type f 2>/dev/null)

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo study bench report test test-all floor test-floor lint docs wheel release hub install gpu-build gpu-check clean distclean FORCE

help:
	@echo 'make demo      set up what is missing, then train the comparison networks (3 to 4 minutes)'
	@echo 'make study     accuracy with and without noise and transform on small data sets (QUICK=1: minutes)'
	@echo 'make test      set up what is missing, then lint and run the tests'
	@echo 'make test-all  the exhaustive tests that `make test` leaves out'
	@echo 'make test-floor the tests that tell whether the oldest supported torch still serves'
	@echo 'make lint      ruff and mypy alone'
	@echo 'make docs      the documentation site, build/site/index.html'
	@echo 'make bench     layers and whole networks beside those of torch: half an hour (ARGS=--quick: a minute)'
	@echo 'make report    the README section and runs/plots from the stored benchmark results'
	@echo 'make gpu-build compile what gpu-check needs for another machine (ARCH=9.0)'
	@echo 'make gpu-check build, test and measure on this machine'"'"'s GPU with its own torch (DRY=1: without)'
	@echo 'make wheel     a source archive, and a CPU wheel in dist/cpu (CUDA=1: in dist/cuda one with CUDA kernels)'
	@echo 'make release   all three, each tried with the oldest and the newest torch (10 GB of disk)'
	@echo 'make hub       the folder build/hub, for the package kernels of Hugging Face'
	@echo 'make install   the environment alone, with the extension built in place'
	@echo 'make clean     remove what was built (distclean: the environment too)'
	@echo
	@echo 'Overridable: PYTHON=$(PYTHON) TORCH="$(TORCH)" VENV=$(VENV) JOBS=$(JOBS) ARGS="$(ARGS)"'

demo: $(VENV)/.native $(VENV)/.accuracy
	$(PY) benchmarks/demo.py $(ARGS)

# Goes on with what runs/study.json holds, and writes its page.
study: STUDY := runs/study$(if $(filter-out 0,$(QUICK)),-quick)
study: $(VENV)/.native $(VENV)/.accuracy
	@mkdir -p runs
	$(PY) benchmarks/study.py $(if $(filter-out 0,$(QUICK)),--quick) --results $(STUDY).json \
	    --page $(STUDY).md $(ARGS)

bench: $(VENV)/.native $(VENV)/.dev
	$(PY) benchmarks/bench.py $(ARGS)

# RESULTS="a.json b.json" names others; what another program stored beside them is left out.
report: $(VENV)/.native $(VENV)/.dev
	@mkdir -p runs
	$(PY) benchmarks/report.py $(or $(RESULTS),$(shell grep -lE '"format": *"normnorm-bench"' \
	    benchmarks/results/*.json)) --png runs/plots $(if $(RESULTS),,--readme README.md)

test: lint
	$(call pytest,not slow)

test-all: install
	$(call pytest,slow)

# The oldest supported torch, in a copy of the tree with an environment of its own: an in-place build would
# replace this tree's extension. Of the CUDA kernels their binding alone is compiled.
FLOOR := .venv-floor
floor:
	@mkdir -p $(FLOOR)
	@find $(FLOOR) -mindepth 1 -maxdepth 1 ! -name .venv ! -name build -exec rm -rf {} +
	@git ls-files -z --cached --others --exclude-standard | tar --null --files-from=- --create | \
	    tar --extract --directory=$(FLOOR)
	@rm -f $(FLOOR)/.venv/.native
	NORMNORM_CUDA=0 $(MAKE) --directory=$(FLOOR) VENV=.venv TORCH=$(OLDEST) .venv/.native .venv/.test

test-floor: floor
	cd $(FLOOR) && OMP_NUM_THREADS=1 .venv/bin/python -m pytest $(WORKERS) -m 'not slow and not serial' $(ARGS) \
	    tests/core/test_ops.py tests/core/test_modules.py tests/core/test_compile.py tests/core/test_export.py \
	    tests/tools/test_packaging.py::test_the_cuda_binding_compiles_against_this_torch

lint: install
	$(BIN)/ruff check .
	$(SAY) 'checking types'
	@$(TICK) $(BIN)/mypy

docs: $(VENV)/.dev
	@$(TICK) $(PY) -m sphinx -b html -q -W --keep-going -c docs -d build/doctrees . build/site
	$(SAY) build/site/index.html

install: $(VENV)/.native $(VENV)/.dev $(VENV)/.integrations

# A worker that has finished takes over some of another's tests, a few of which last minutes.
WORKERS = -n $(JOBS) --dist worksteal

# The parallel part, then the tests that need the machine to themselves. pytest's exit status 5
# means that no test was selected: right for an empty part, wrong for both.
define pytest
@parallel=0; serial=0; \
OMP_NUM_THREADS=1 $(PY) -m pytest $(WORKERS) -m '($(1)) and not serial' $(ARGS) || parallel=$$?; \
case $$parallel in 0|5) ;; *) exit $$parallel;; esac; \
OMP_NUM_THREADS=1 $(PY) -m pytest -m '($(1)) and serial' $(ARGS) || serial=$$?; \
case $$serial in 0|5) ;; *) exit $$serial;; esac; \
if [ $$parallel = 5 ] && [ $$serial = 5 ]; then echo 'no test was selected'; exit 5; fi
endef

# What a machine with a GPU needs, compiled here for one architecture into build/gpu.
gpu-build: $(VENV)/.torch
	$(PY) tests/cuda/gpu/build.py --arch $(ARCH)

# With the machine's own Python and torch, and no network; only a dry run uses the environment.
# DRY=1 runs without a GPU; RESULTS=DIR is where results go; no more than so many MINUTES.
gpu-check: DRY_RUN := $(filter-out 0,$(DRY))
gpu-check: $(if $(filter-out 0,$(DRY)),install)
	$(if $(DRY_RUN),$(PY),$(PYTHON)) benchmarks/gpu_check.py $(if $(DRY_RUN),--dry) \
	    --minutes $(MINUTES) \
	    --results '$(or $(RESULTS),$(if $(DRY_RUN),runs/gpu-check,benchmarks/results))' $(ARGS)

# The CPU wheel, dist/cpu, and the source archive, or with CUDA=1 the wheel with CUDA kernels, dist/cuda.
wheel: $(VENV)/.dev
	$(PY) tests/tools/wheels.py build $(if $(filter-out 0,$(CUDA)),cuda,cpu)

# What can be uploaded, tried in empty environments with the oldest torch, the one used here and the newest.
release: SHELL := bash
release: $(VENV)/.dev
	@mkdir -p dist build
	@set -o pipefail; { uname -srm && nproc && $(MAKE) wheel && TORCH_CUDA_ARCH_LIST= $(MAKE) wheel CUDA=1 && \
	    $(PY) tests/tools/wheels.py try $(OLDEST) $(firstword $(TORCH)) torch && ls -lR dist; } 2>&1 | tee dist/release.log

# The variants of a kernel without compiled code: a copy of the package for each of the devices.
hub:
	rm -rf build/hub
	@for device in cpu cuda; do \
	    folder=build/hub/build/torch-$$device; \
	    mkdir -p $$folder && cp -RL normnorm/. LICENSE $$folder || exit 1; \
	    rm -f $$folder/_C.*; \
	    find $$folder -name __pycache__ -type d -prune -exec rm -rf {} +; \
	    sum=$$(find $$folder -name '*.py' | LC_ALL=C sort | xargs cat | cksum | cut -d ' ' -f 1); \
	    printf '{"id": "normnorm_%s_%s", "name": "normnorm", "version": 1, "license": "MIT",\n "python-depends": [], "backend": {"type": "%s"}}\n' \
	        $$device $$sum $$device >$$folder/metadata.json; \
	done
	@ls -d build/hub/build/*

clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	rm -f normnorm/_C.* $(VENV)/.native
	find normnorm tests benchmarks triton_kernels -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean
	rm -rf $(VENV) $(FLOOR)

# --- the environment, one stamp a step ------------------------------------------------------------

$(VENV)/.python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	    echo "normnorm needs Python 3.10 or newer; '$(PYTHON)' is" \
	         "$$($(PYTHON) --version 2>&1 || true). Name another: make PYTHON=python3.11 ..."; exit 1; }
	$(SAY) 'creating $(VENV)'
	@rm -rf $(VENV)
	@$(PYTHON) -m venv $(VENV) && $(PY) -m pip --version >/dev/null || { rm -rf $(VENV); \
	    echo "'$(PYTHON) -m venv' could not make an environment with pip in it;" \
	         "on Debian and Ubuntu the package python3-venv is missing."; exit 1; }
	@touch $@

# Holds the word TORCH, and is touched only when that changes.
$(VENV)/.torch-wanted: $(VENV)/.python FORCE
	@[ -f $@ ] && [ "$$(cat $@)" = "$$TORCH" ] || printf '%s\n' "$$TORCH" >$@

# First of all packages: anything else that depends on torch would fetch one of its own choosing.
$(VENV)/.torch: $(VENV)/.torch-wanted
	$(SAY) "installing $$TORCH (the largest download)"
	@$(TICK) $(PIP) $$TORCH
	@$(TICK) $(PIP) torch 'setuptools>=77' ninja  # torch as it is: it may bound setuptools
	@rm -rf build normnorm/_C.*  # compiled against another torch
	@touch $@

# In place and without the extension, which the next step builds: pip would forget its objects.
$(VENV)/.installed: $(VENV)/.torch pyproject.toml setup.py
	$(SAY) 'installing normnorm in place'
	@NORMNORM_NATIVE=0 $(PIP) --no-build-isolation --no-deps --editable .
	@touch $@

$(VENV)/.native: $(VENV)/.installed $(SOURCES)
	$(SAY) 'building the extension (NORMNORM_CUDA=1: with CUDA kernels)'
	@$(PY) setup.py --quiet build_ext --inplace
	@touch $@

# normnorm is installed by now, so that only the extras' packages are fetched.
$(VENV)/.accuracy: pyproject.toml | $(VENV)/.installed
	$(SAY) 'installing the packages for training networks'
	@$(TICK) $(PIP) 'normnorm[accuracy]'
	@touch $@

# What test-floor needs of it.
$(VENV)/.test: pyproject.toml | $(VENV)/.installed
	$(SAY) 'installing the packages for tests'
	@$(TICK) $(PIP) 'normnorm[export,test]'
	@touch $@

# A torch built for GPUs brings its own Triton. Any other does without, but the tests interpret and
# compile the Triton kernels; --no-deps, for nothing may exchange torch. There is none but for Linux.
triton = $(PY) -c 'import triton' 2>/dev/null || [ "$$(uname -s)" != Linux ] || $(PIP) --no-deps $(TRITON)

$(VENV)/.dev: pyproject.toml | $(VENV)/.installed
	$(SAY) 'installing the packages for tests and linting'
	@$(TICK) $(PIP) 'normnorm[dev]'
	@$(TICK) $(triton)
	@touch $@

# Beside the torch that is here, never in its place: torchvision 0.(n + 15) belongs to torch 2.n. Its
# compiled part belongs to the build of torch too: where TORCH names an index, it comes from there.
$(VENV)/.integrations: pyproject.toml | $(VENV)/.dev
	$(SAY) 'installing the libraries that normnorm is tested with'
	@$(PY) -c 'from importlib.metadata import version; v = version("torch"); n = int(v.split(".")[1]) + 15; \
	    print(f"torch=={v}\ntorchvision==0.{n}.*")' >$(VENV)/constraints.txt
	@$(TICK) set -- $$TORCH; shift; [ $$# = 0 ] || $(PIP) --constraint $(VENV)/constraints.txt "$$@" torchvision
	@$(TICK) $(PIP) --constraint $(VENV)/constraints.txt 'normnorm[integrations]'
	@$(PY) -c 'import torchvision' >/dev/null 2>&1 || printf '%s\n' \
	    'torchvision, and timm and the models of transformers with it, can be imported here by the' \
	    'tests alone, which stand in for its compiled part: that is made for' \
	    "another build of torch than $$($(PY) -c 'import torch; print(torch.__version__)')." \
	    'README.md, "Existing models", names the right one.'
	@touch $@

FORCE:
