# Two commands set everything up: `make demo` translates a brain slice, `make test` runs the tests.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test check coverage lock sbom clean

demo: .venv/ready
	$(BIN)/knife demo

# A worker for each core. Each begins with its part of the tests as they are listed, so that few fixtures are made twice,
# and the first to be done takes tests from the others.
test: .venv/ready-test
	$(BIN)/python -m pytest -n auto --dist worksteal

check: .venv/ready-lint
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

# Which lines and branches no test comes to.
coverage: .venv/ready-lint
	mkdir -p build/coverage
	$(BIN)/coverage erase
	$(BIN)/coverage run -m pytest
	$(BIN)/coverage combine --quiet
	$(BIN)/coverage report

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

# The versions of everything that tests and checks need, with hashes; needs uv.
lock:
	head -2 requirements-dev.txt > requirements-dev.tmp
	uv pip compile pyproject.toml --extra test --extra lint -c constraints.txt --universal --python-version 3.11 \
		--generate-hashes --no-emit-index-url --no-header --no-annotate --quiet >> requirements-dev.tmp
	mv requirements-dev.tmp requirements-dev.txt

# What is installed in .venv, as CycloneDX: sbom.json; needs cyclonedx-bom.
sbom: .venv/ready
	cyclonedx-py environment .venv --pyproject pyproject.toml --output-reproducible -o sbom.json

clean:
	rm -rf .venv build *.egg-info sbom.json demo slice.nii healthy.nii mask.nii
