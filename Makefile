# Needs make and Python 3.11 or newer. The first target sets up .venv with the versions of
# requirements.lock and installs this folder into it; `make PYTHON=python3.12 ...` takes another Python.

PYTHON ?= python3
UV ?= uv
BIN := .venv/bin
# pip's progress is for people; a CI log needs none. ARGS go to `fmfl study`, NAME to the course.
PIP_FLAGS ?= $(if $(CI),--quiet)
ARGS ?=
NAME ?= me
# In a container one is root, which JupyterLab wants to be told.
LAB_FLAGS := $(if $(filter 0,$(shell id -u)),--allow-root)

.PHONY: study paper lab class test notebooks site lock clean
.NOTPARALLEL:
.DELETE_ON_ERROR:

study: .venv/installed  ## the whole story on built-in data, without a GPU: runs/study
	$(BIN)/fmfl study $(ARGS)

paper: .venv/installed  ## the paper's sizes and rounds (hours on a GPU); data and teacher: make paper ARGS='--data ...'
	$(BIN)/fmfl study --profile paper --out runs/paper $(ARGS)

lab: .venv/installed  ## the notebooks in JupyterLab
	$(BIN)/jupyter-lab --ServerApp.root_dir=. $(LAB_FLAGS) notebooks/01_data.ipynb

class: .venv/installed  ## a participant's copy of the exercises in runs/class, and every solution run once: make class NAME="ada bob"
	$(BIN)/python -m fmfl.course copy $(NAME)

test: .venv/installed  ## every check: style, tests (slow ones too; the page needs Chromium), notebooks
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/python -m pytest -rs -m "slow or not slow"
	$(BIN)/python -m pytest --nbval-lax notebooks/0*.ipynb

notebooks: .venv/installed  ## the committed notebooks' outputs, anew, without times that would change each diff
	TQDM_DISABLE=1 $(BIN)/jupyter-nbconvert --to notebook --execute --inplace \
	    --ExecutePreprocessor.record_timing=False notebooks/0*.ipynb notebooks/bring_your_own.ipynb

site: .venv/installed  ## the pages of docs/, the docstrings and the notebooks as one site: site/index.html
	$(BIN)/python docs/build_site.py

lock:  ## requirements.lock from pyproject.toml; keeps what still fits, or takes the newest: make lock UPGRADE=--upgrade
	$(UV) pip compile --quiet $(UPGRADE) --universal --python-version 3.11 --extra dicom --extra flower --extra test \
	    --no-emit-index-url --no-emit-find-links --custom-compile-command "make lock" \
	    --output-file requirements.lock pyproject.toml

clean:  ## what make can make again; results (runs) and downloads (data/cache) stay
	rm -rf .venv .pytest_cache .ruff_cache site
	find fmfl tests notebooks -name __pycache__ -prune -exec rm -rf {} + -o -name .ipynb_checkpoints -prune -exec rm -rf {} +

.venv/installed: pyproject.toml requirements.lock
	@command -v $(PYTHON) >/dev/null || \
	    { echo "make: $(PYTHON) is not there: install Python 3.11 or newer, or name one with make PYTHON=..." >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	    { echo "make: $$($(PYTHON) --version) is too old: name Python 3.11 or newer with make PYTHON=..." >&2; exit 1; }
	@echo "Setting up .venv; the first time this downloads some packages of several hundred megabytes."
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install $(PIP_FLAGS) --constraint requirements.lock --editable '.[test]'
	@# JupyterLab would ask about its news, and look for newer versions in the network.
	$(BIN)/jupyter-labextension disable --level sys_prefix "@jupyterlab/apputils-extension:announcements"
	@touch $@
