PYTHON ?= python3
BASE ?= checkpoints/sam-tiny

NEWEST := .venv/newest/bin
FLOOR := .venv/floor/bin

.PHONY: demo test quality test-newest test-floor bench clean

# Fine-tunes BASE (a folder or a Hub id) on half of the coins of a photograph and shows the other half.
demo: .venv/newest/installed
	$(NEWEST)/python demo.py --base "$(BASE)"

# Quality gates, then the tests with the newest and the oldest supported versions, side by side.
test: quality .venv/floor/installed
	$(MAKE) --jobs=2 test-newest test-floor

quality: .venv/newest/installed
	$(NEWEST)/ruff check
	$(NEWEST)/ruff format --check
	$(NEWEST)/mypy

test-newest: .venv/newest/installed
	$(NEWEST)/pytest

test-floor: .venv/floor/installed
	$(FLOOR)/pytest

# Time and memory against stock SAM; BENCH="--help" says what can be varied.
BENCH ?=
bench: .venv/newest/installed
	$(NEWEST)/python -m benchmarks.bench $(BENCH)

clean:
	rm -rf .venv build

.venv/%/installed: pyproject.toml requirements/no-deps.txt requirements/%.txt
	$(PYTHON) -m venv --clear $(@D)
	$(@D)/bin/pip install --quiet --disable-pip-version-check '.[dev]' --constraint requirements/$*.txt
	$(@D)/bin/pip install --quiet --disable-pip-version-check --no-deps --requirement requirements/no-deps.txt
	touch $@
