# Everything here needs Python (3.11 or newer) and make, and nothing else.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# Each worker has servers of its own; a file's tests share what they start, and stay together.
PYTEST := $(BIN)/python -m pytest --numprocesses auto --dist loadfile --no-loadscope-reorder

# Where it is set, each of some hundred processes would compile what it imports.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help demo up test test-slow coverage mutation matrix lint check docs bench render deploy clean
help: ## Show the targets.
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(READY): pyproject.toml deployments/constraints.txt
	@echo "Installing into $(VENV) ..."
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade 'pip>=25.1'
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check \
		--constraint deployments/constraints.txt --group dev --editable '.[mysql,embedded]'
	@touch $(READY)

demo: $(READY) ## Set everything up and run the main job.
	@$(BIN)/python -m deployments.demo

up: $(READY) ## The demo, and on until Ctrl-C.
	@$(BIN)/python -m deployments.demo --stay

test: $(READY) ## Set everything up and run the tests.
	@$(PYTEST)

test-slow: $(READY) ## The tests that need a minute each, which `make test` leaves out.
	@$(PYTEST) -m slow

coverage: $(READY) ## What the unit and contract tests leave out of what decides.
	@$(BIN)/python -m coverage run -m pytest tests/unit tests/contract
	@$(BIN)/python -m coverage report

mutation: $(READY) ## Which changes to what decides no unit test notices; ten minutes.
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check \
		--constraint deployments/constraints.txt --group mutation
	@$(BIN)/mutmut run
	@$(BIN)/mutmut results

matrix: $(READY) ## The built package on every Python that is here, and with the oldest Prefect.
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check \
		--constraint deployments/constraints.txt --group matrix
	@rm -rf dist
	@$(BIN)/python -m build --outdir dist .
	@$(BIN)/nox --reuse-venv=no

lint: $(READY) ## Format, lint, strict types, and whether deployments/prefect.yaml is up to date.
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy
	@$(BIN)/taskadapter render --check

check: lint test ## What CI runs.

bench: $(READY) ## Compare with Prefect's process worker, side by side.
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check \
		--constraint deployments/constraints.txt --group bench
	@$(BIN)/python -m tests.benchmarks

docs: $(READY) ## Build the documentation's site into build/docs; a warning is an error.
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check \
		--constraint deployments/constraints.txt --group docs
	@$(BIN)/zensical build --clean --strict
	@echo "The site is in build/docs: open build/docs/index.html."

render: $(READY) ## Write deployments/prefect.yaml from flows/.
	@$(BIN)/taskadapter render

deploy: render ## Deploy to the server that PREFECT_API_URL names.
	@$(BIN)/prefect --no-prompt deploy --prefect-file deployments/prefect.yaml --all

clean: ## Remove what these targets made.
	rm -rf $(VENV) .nox .cache .coverage mutants .pytest_cache .mypy_cache .ruff_cache .hypothesis build dist *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
