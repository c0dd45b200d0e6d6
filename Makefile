# Four commands for people: make demo, make test, make lint, make docs. Each installs what it needs into .venv first. `make test-install`
# runs what the documentation says where nothing is installed yet, with the oldest and the newest versions: minutes, gigabytes.
PYTHON ?= python3
CORES ?= 2
BIN := .venv/bin

.PHONY: demo test test-install lint docs readme format clean

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "winnow needs Python 3.11 or newer; set PYTHON=...")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[workflow,dev,docs]'
	touch $@

demo: .venv/installed  ## the main job, offline: six methods, five byte budgets, tables, figures, report
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/snakemake --cores $(CORES)
	$(BIN)/winnow show results
	@echo 'Next, your own model: . $(BIN)/activate; winnow init path/to/model --text your.txt'

test: .venv/installed  ## all tests but those marked slow
	$(BIN)/python -m pytest -m "not slow" -n $(CORES) --dist loadscope --no-loadscope-reorder

test-install: .venv/installed  ## the commands of README.md and docs/, in environments of their own
	$(BIN)/python -m pytest tests/workflow/test_install.py

lint: .venv/installed  ## style, types, workflow, and generated files in step with their source
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/snakefmt --check Snakefile workflow
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache
	$(BIN)/codespell
	$(BIN)/python -m winnow config --check
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python tests/lint_workflow.py

docs: .venv/installed  ## the site, in site/; needs no network
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

readme: .venv/installed  ## the results of a finished `make demo` in README.md and docs/
	$(BIN)/python docs/update.py results

format: .venv/installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/snakefmt Snakefile workflow
	$(BIN)/python -m winnow config

clean:
	rm -rf results .snakemake site
