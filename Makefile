# Everything a checkout needs, from `make`. Variables to set on the command line:
#   CPU=1 or CUDA=1   which build to install (default: CUDA where nvidia-smi finds a GPU)
#   PYTHON=…          the interpreter for .venv (default: the first suitable one found)
#   PIP_FLAGS=…       more options for pip, such as --extra-index-url with an index of
#                     CPU-only torch builds, which are much smaller
#   PYTEST_ARGS=…     more options for pytest, such as --durations=10

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.ONESHELL:
.DEFAULT_GOAL := help

BIN := .venv/bin
ifdef CUDA
KIND := cuda
else ifdef CPU
KIND := cpu
else
KIND := $(shell nvidia-smi -L 2>/dev/null | grep -q GPU && echo cuda || echo cpu)
endif

# The stamp names what was installed, by content: a new clone or a touched file changes nothing.
# A compiler that was not there before counts as a change.
COMPILER := $(if $(shell command -v $${CXX:-g++}),native,plain)
STAMP := .venv/.installed-$(KIND)-$(COMPILER)-$(firstword $(shell cat Makefile pyproject.toml setup.py kernels/native/* | cksum))
TORCHREC := $(shell sed -n 's/.*"\(torchrec==[0-9.]*\)".*/\1/p' pyproject.toml)
FBGEMM := $(shell sed -n 's/^$(KIND) = \["\(fbgemm[^"]*\)".*/\1/p' pyproject.toml)
OTHER_FBGEMM := $(if $(filter cpu,$(KIND)),fbgemm-gpu,fbgemm-gpu-cpu)
PIP := $(BIN)/python -m pip --disable-pip-version-check
# Conflict warnings are off: without fbgemm-gpu, torchrec counts as broken to pip, on purpose.
INSTALL := $(PIP) install -qq --no-warn-conflicts $(PIP_FLAGS)

# Long fault-injection tests are for a machine with time; gpu tests need a GPU.
DESELECT := not (chaos and slow)$(if $(filter cpu,$(KIND)), and not gpu)
NATIVE_TESTS := $(addprefix tests/kernels/test_,$(addsuffix .py,\
  implementations settle normal uniforms arguments operators tables states))
LINTED := setup.py dist_dp kernels cluster datasets tests examples

.PHONY: help setup demo test chaos test-fast sanitize lint format wheel clean

help:  ## show this list
	@sed -n 's/^\([a-z-]*\):.*##  *\(.*\)/\1|\2/p' Makefile \
	  | while IFS='|' read -r target what; do printf '  make %-10s %s\n' "$$target" "$$what"; done

setup: $(STAMP)  ## create .venv and install everything into it (once)

$(STAMP):
	@if [ ! -x $(BIN)/python ]; then
	  suitable='import ensurepip, sys, venv; sys.exit(not sys.version_info >= (3, 11))'
	  for python in $(or $(PYTHON),python3.11 python3.12 python3.13 python3 python3.14); do
	    if "$$python" -c "$$suitable" 2>/dev/null; then found=$$python; break; fi
	  done
	  if [ -z "$${found:-}" ]; then
	    echo "No Python 3.11 or newer that can make virtual environments was found$(PYTHON:%= at %)." \
	      "Install one with its venv module, or name it: make setup PYTHON=/path/to/python3.11" >&2
	    exit 1
	  fi
	  echo "Creating .venv with $$("$$found" --version)"
	  "$$found" -m venv .venv
	fi
	echo "Installing the $(KIND) build into .venv (a few minutes the first time)"
	rm -f .venv/.installed-*
	# The two fbgemm distributions write the same files, so the other one goes first, and what
	# it overwrote or took along is laid down again.
	if $(PIP) show -q $(OTHER_FBGEMM) 2>/dev/null; then
	  $(PIP) uninstall -q -y $(OTHER_FBGEMM)
	  $(INSTALL) --no-deps --force-reinstall $(FBGEMM)
	fi
	$(INSTALL) 'setuptools>=77'
	$(INSTALL) --no-build-isolation -e '.[$(KIND),dev]'
	$(INSTALL) --no-deps $(TORCHREC)
	$(BIN)/python -c 'from dist_dp._builds import check_builds; check_builds(need_cuda="$(KIND)" == "cuda")'
	$(BIN)/python -c 'import sys; from dist_dp import kernels; sys.exit(kernels.slow_reason())' || true
	touch $@

demo: setup  ## train a private model on two local Ray workers, on generated data
	@$(BIN)/dist-dp demo

# Two processes: one for all tests on Ray, which wait a lot, one for the others (tests/conftest.py).
test: setup  ## run the whole test-suite
	@$(BIN)/pytest -n 2 --dist loadscope -m '$(DESELECT)' $(PYTEST_ARGS)

chaos: setup  ## kill workers at every moment, and at random: half an hour
	@$(BIN)/pytest -s -m 'chaos' $(PYTEST_ARGS)

test-fast: setup  ## run the tests that need neither Ray nor patience
	@$(BIN)/pytest -m 'not slow and not ray and not gpu and not chaos' $(PYTEST_ARGS)

# The compiled kernels, built with both sanitizers, under the tests that run them on every kind of
# argument. Python itself is not instrumented, so the runtime is loaded first; it leaks by design.
sanitize: setup  ## run the native kernels' tests under AddressSanitizer and UBSan
	@$(BIN)/python -c 'import setup; from pathlib import Path; f = Path("build/sanitize");
	setup.compile_library(f / "_native.so", f, ("-g", "-O1", "-fsanitize=address,undefined",
	  "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer"))'
	LD_PRELOAD="$$($${CXX:-g++} -print-file-name=libasan.so):$$($${CXX:-g++} -print-file-name=libstdc++.so.6)" \
	  ASAN_OPTIONS=detect_leaks=0 DIST_DP_NATIVE_LIBRARY=$$PWD/build/sanitize/_native.so \
	  $(BIN)/pytest -s -p no:cacheprovider -m 'not gpu and not slow' $(NATIVE_TESTS) $(PYTEST_ARGS)

lint: setup  ## ruff, its formatter in check mode, and mypy
	@$(BIN)/ruff check $(LINTED)
	$(BIN)/ruff format --check $(LINTED)
	# mypy knows no package-dir: show it the folders under their import names.
	rm -rf build/typecheck
	mkdir -p build/typecheck/dist_dp
	for path in dist_dp/* kernels cluster datasets; do
	  ln -s "../../../$$path" build/typecheck/dist_dp/
	done
	cd build/typecheck
	../../$(BIN)/mypy --config-file ../../pyproject.toml --cache-dir ../../.mypy_cache -p dist_dp \
	  | sed -E 's#^dist_dp/(kernels|cluster|datasets)/#\1/#'

format: setup  ## let ruff sort imports and format
	@$(BIN)/ruff check --fix-only $(LINTED)
	$(BIN)/ruff format $(LINTED)

wheel: setup  ## build dist/*.whl
	@rm -rf build/lib build/bdist.* dist   # a stale build/lib would put deleted modules in
	$(PIP) wheel -q --no-deps --no-build-isolation -w dist .
	ls dist/*.whl

clean:  ## remove what building, testing and linting left (not .venv, not runs)
	@rm -rf build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache
	find $(LINTED) -name __pycache__ -type d -prune -exec rm -rf {} +
