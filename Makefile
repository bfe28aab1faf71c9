PYTHON ?= python3
BASE ?= checkpoints/sam-tiny
ADAPTER ?=
PYTEST ?=

BIN := .venv/newest/bin
ROWS := newest floor pypi
# Most modules are never imported, so compiling all of them takes longer than compiling those that are.
PIP_OPTIONS := --quiet --disable-pip-version-check --no-compile

.PHONY: app demo test test-all quality style bench notebook clean

# Fine-tunes BASE (a folder or a Hub id) on half of the coins of a photograph and shows the other half.
demo: .venv/newest/installed
	$(BIN)/python demo.py --base "$(BASE)"

# Opens a page on this machine to click on, with BASE, or with ADAPTER (a folder or a Hub id) before and after.
app: .venv/newest/installed
	$(BIN)/python app.py $(if $(ADAPTER),--adapter "$(ADAPTER)",--base "$(BASE)")

# Quality gates, then all tests with the newest versions that have a build for CPUs.
test: quality test-newest

# The same, and the tests with the oldest supported versions and, less the slow ones, with the newest of all, as PyPI
# has them.
test-all: quality
	$(MAKE) --jobs=3 $(ROWS:%=.venv/%/installed)
	$(MAKE) $(ROWS:%=test-%)

# The page, the notebook, and what reads images and labels have the same packages of their own in every row.
SAME_IN_FLOOR := app_page notebook spaces check coco data errors folders images labels layouts pairs refusals \
	result_pictures same_data samples
test-floor: PYTEST += $(SAME_IN_FLOOR:%=--ignore=tests/test_%.py)
test-pypi: PYTEST += -m "not slow"

test-%: .venv/%/installed
	.venv/$*/bin/pytest --numprocesses=auto --dist=worksteal $(PYTEST)

quality: .venv/newest/installed
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

# Mends what ruff can mend by itself.
style: .venv/newest/installed
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

# Time and memory against stock SAM; BENCH="--help" says what can be varied.
BENCH ?=
bench: .venv/newest/installed
	$(BIN)/python -m benchmarks.bench $(BENCH)

# Runs the notebook's script, and keeps what it prints and draws in the notebook.
notebook: .venv/newest/installed
	$(BIN)/jupytext --quiet --to ipynb examples/finetune_sam.py
	$(BIN)/jupyter-execute --inplace examples/finetune_sam.ipynb

clean:
	rm -rf .venv build

.PRECIOUS: .venv/%/installed
.venv/%/installed: pyproject.toml requirements/no-deps.txt requirements/%.txt
	$(PYTHON) -m venv --clear $(@D)
	$(@D)/bin/pip install $(PIP_OPTIONS) '.[dev]' --requirement requirements/$*.txt
	$(@D)/bin/pip install $(PIP_OPTIONS) --no-deps --requirement requirements/no-deps.txt
	touch $@
