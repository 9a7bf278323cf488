# make demo | test | lint | clean. All of them work on a fresh machine with Python 3.11 or newer and nothing else.

PYTHON ?= python3
VENV := .venv
RUN_DIR := runs/digits
GRID := $(RUN_DIR)/samples/grid.png
READY := $(VENV)/.requirements.lock

.PHONY: demo test lint clean

# Trains on scikit-learn's 8x8 digits and draws 64 new ones. An interrupted training goes on where it was.
demo: $(READY)
	$(VENV)/bin/python scripts/train.py --config=configs/digits.py --workdir=$(RUN_DIR)
	$(VENV)/bin/python scripts/sample.py --workdir=$(RUN_DIR) --mode=grid --num_images=64 --scale=8 --output=$(GRID)
	@echo "64 samples of the trained model: $(CURDIR)/$(GRID)"

test: $(READY)
	$(VENV)/bin/python -m pytest

lint: $(READY)
	@test -x $(VENV)/bin/ruff || $(VENV)/bin/python -m pip install --quiet "ruff>=0.17,<0.18"
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

clean:
	rm -rf $(VENV) .cache .pytest_cache .ruff_cache

# Built anew whenever the pinned set differs from the one that was installed, and only then; the copy of the lock comes last,
# so that an installation cut short starts over.
$(READY): requirements.lock
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11))" || \
		{ echo "error: $(PYTHON) is not Python 3.11 or newer; name one that is: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	@echo "installing requirements.lock into $(VENV): about 100 packages, once"
	rm -rf $(VENV)
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --requirement requirements.lock
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	cp requirements.lock $(READY)
