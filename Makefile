# make demo        set up and run the whole pipeline on a small generated catalog
# make test        set up and run the tests
# make test-long   the tests that take minutes each
# make lint        set up and check the style
# make docs        write docs/configuration.md from gtc_dist/config.py
# make lock        pin the packages of pyproject.toml in constraints.txt; pins that still fit are kept. Then write
#                  cluster/docker/requirements-*.txt, with hashes

PYTHON ?= python3.11
BIN := .venv/bin

.PHONY: setup demo test test-long lint docs lock clean

setup: .venv/.installed

.venv/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[test]'
	touch $@

demo: setup
	$(BIN)/python tools/demo.py

test: setup
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder --durations 20

test-long: setup
	$(BIN)/python -m pytest -m long --durations 0

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

docs: setup
	$(BIN)/python -m gtc_dist.config_reference > docs/configuration.md

lock: setup
	$(BIN)/pip install --quiet --constraint constraints.txt pip-tools
	$(BIN)/pip-compile --quiet --extra=test --strip-extras --allow-unsafe --no-annotate --no-emit-index-url \
		--no-emit-find-links --output-file=constraints.txt pyproject.toml
	sed -i 's/+cpu$$//' constraints.txt  # torch without the name of its CPU build, which not every index has
	$(BIN)/python cluster/docker/lock.py

clean:
	rm -rf .venv demo .pytest_cache .ruff_cache .hypothesis
