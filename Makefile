# Two commands set everything up: `make demo` translates a brain slice, `make test` runs the tests.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test check clean

demo: .venv/ready
	$(BIN)/knife demo

test: .venv/ready-test
	$(BIN)/python -m pytest

check: .venv/ready-lint
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

# One environment, three stages; torch first and by its pin, so that nothing pulls another build of it.
.venv/ready: pyproject.toml setup.py constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch setuptools
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --no-build-isolation -e .
	touch $@

.venv/ready-test: .venv/ready
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --no-build-isolation -e ".[test]"
	touch $@

.venv/ready-lint: .venv/ready-test
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --no-build-isolation -e ".[test,lint]"
	touch $@

clean:
	rm -rf .venv build *.egg-info demo slice.nii healthy.nii mask.nii
