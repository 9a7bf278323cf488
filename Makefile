# make demo | test [ARGS=tests/diffusion] | test-all | mutate [ARGS=training] | lint | clean
# make notebooks [NOTEBOOKS=pods] | docs | gpu [ARGS=--data_dir=DIR]
# All of them work on a fresh machine with Python 3.11 to 3.14 and nothing else; gpu wants CIFAR-10 in
# data/ as well (ddpm prepare-data --dataset=cifar10 --data_dir=data).

PYTHON ?= python3
VENV := .venv
RUN_DIR := runs/digits
NOTEBOOKS ?= walkthrough your_images pods
GRID := $(RUN_DIR)/samples/grid.png
READY := $(VENV)/.requirements.lock

.PHONY: demo test test-all mutate lint notebooks docs gpu clean

# Train on scikit-learn's 8x8 digits and draw 64 new ones. An interrupted training goes on where it
# was.
demo: $(READY)
	$(VENV)/bin/python -m ddpm_jax.cli train --config=digits --workdir=$(RUN_DIR)
	$(VENV)/bin/python -m ddpm_jax.cli sample --workdir=$(RUN_DIR) --num_images=64 --scale=8 --output=$(GRID)
	@echo "64 samples of the trained model: $(CURDIR)/$(GRID)"

# Over all cores. Programs are compiled cheaply (tests/conftest.py says how), since most run once.
test: $(READY)
	$(VENV)/bin/python -m pytest --numprocesses=auto --dist=worksteal $(ARGS)

# All suites, the oracles compiled in full: what continuous integration runs (.ci/run), and the slow tests.
test-all:
	.ci/run --slow

# Plant the faults of tests/support/mutations.toml one at a time, and count those that the tests catch.
mutate: $(READY)
	$(VENV)/bin/python -m tests.support.mutations $(ARGS)

lint: $(READY)
	@test -x $(VENV)/bin/ruff || $(VENV)/bin/python -m pip install --quiet "ruff>=0.17,<0.18"
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

# Execute the notebooks anew, pictures and all: minutes each. Their sources are the .py beside them;
# DDPM_DATA=FOLDER names prepared data, PICTURES and INCEPTION what your_images asks for.
notebooks: $(READY)
	@test -x $(VENV)/bin/jupytext || $(VENV)/bin/python -m pip install --quiet --constraint requirements.lock --no-build-isolation --editable ".[notebooks]"
	for name in $(NOTEBOOKS); do \
		$(VENV)/bin/jupytext --quiet --to ipynb notebooks/$$name.py && \
		$(VENV)/bin/jupyter execute --inplace --timeout=-1 notebooks/$$name.ipynb || exit 1; \
	done

# README, docs/, the notebooks and the docstrings as a site; a warning or a broken link is an error.
docs: $(READY)
	@test -x $(VENV)/bin/mkdocs || $(VENV)/bin/python -m pip install --quiet --constraint requirements.lock --no-build-isolation --editable ".[docs]"
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --quiet --strict
	@echo "the site: $(CURDIR)/.cache/site/index.html"

# The first hour on a GPU, ten minutes a call: checked, timed, trained, drawn, evaluated. CUDA comes as wheels,
# which the plugin alone, as docs/ahead.md installs it, does not bring.
gpu: $(READY)
	@$(VENV)/bin/python -c "import jax_cuda12_plugin, nvidia.cudnn, nvidia.cuda_nvcc" 2>/dev/null || $(VENV)/bin/python -m pip install --quiet --constraint requirements.lock --no-build-isolation --editable ".[cuda,torch]"
	$(VENV)/bin/python -m ddpm_jax.cli first-hour --minutes=10 $(ARGS)

clean:
	rm -rf $(VENV) .cache .pytest_cache .ruff_cache build dist *.egg-info

# Built anew whenever the pinned set differs from the one that was installed, and only then. The copy
# of the lock comes last, so that an installation cut short starts over.
$(READY): requirements.lock
	@$(PYTHON) -c "import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 14))" || \
		{ echo "error: $(PYTHON) is not Python 3.11 to 3.14; name one that is: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	@echo "installing requirements.lock into $(VENV): about 100 packages, once"
	rm -rf $(VENV)
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --requirement requirements.lock
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	cp requirements.lock $(READY)
