# make demo   trains four small models on made images and prints one table (no download of data)
# make test   the whole offline test suite; ARGS="..." goes to pytest
#
# Both set up .venv first: the ordinary PyPI builds of torch and torchvision, in the versions of constraints.txt.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check

.PHONY: demo test lint clean

demo: $(VENV)/demo.stamp
	$(BIN)/vitreous demo

test: $(VENV)/test.stamp
	$(BIN)/python -m pytest -n 2 $(ARGS)

lint: $(VENV)/test.stamp
	$(BIN)/ruff check src tests benchmarks

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Found Python %d.%d. Expected 3.11 or newer: make PYTHON=python3.12 ..." % sys.version_info[:2])'
	$(PYTHON) -m venv $(VENV)

$(VENV)/demo.stamp: $(BIN)/python pyproject.toml constraints.txt
	@echo "Installing into $(VENV): 1 to 3 minutes and 6 GB, most of it torch."
	$(PIP) install --quiet -c constraints.txt -e .
	@touch $@

$(VENV)/test.stamp: $(VENV)/demo.stamp
	$(PIP) install --quiet -c constraints.txt -e ".[dev]"
	@touch $@

clean:
	rm -rf $(VENV) runs build dist
