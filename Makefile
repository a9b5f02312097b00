PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed

.PHONY: demo bench-embed test test-quantised pages fuzz torture lint types format install clean
.DEFAULT_GOAL := test

demo: $(STAMP)
	@mkdir -p demo
	@$(BIN)/nopad align untrained:apple/aimv2-large-patch14-native --images examples/images --report demo/align.html
	@$(BIN)/nopad embed examples/images --model untrained:apple/aimv2-large-patch14-native --out demo/features

# The whole embedding job beside transformers one image at a time, about ten minutes; quicker: ARGS="--images 200"
bench-embed: $(STAMP)
	@mkdir -p demo
	@$(BIN)/python benchmarks/embed.py $(ARGS)

# In up to four processes; one test, in one: make test ARGS="tests/test_packing.py -k patchify"
test: $(STAMP)
	@$(BIN)/python -m pytest $(or $(ARGS),-n logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder)

# Quantised checkpoints. Not in .venv itself, where transformers imports torchao with every model, and its warnings.
QUANTISE := .venv/quantise
test-quantised: $(QUANTISE)/.installed
	@PYTHONPATH=$(QUANTISE) $(BIN)/python -m pytest tests/quantised $(ARGS)

$(QUANTISE)/.installed: $(STAMP)
	@$(BIN)/python -m pip install --disable-pip-version-check --quiet --no-deps --upgrade --target $(QUANTISE) torchao==0.18.0 bitsandbytes==0.50.2
	@touch $@

# The pages in Chromium, which has to be there (Debian: apt-get install chromium); look at the screenshots. Playwright is
# not in .venv itself: it is 170 MB, and the continuous integration has no browser.
PAGES := .venv/pages
pages: $(PAGES)/.installed
	@PYTHONPATH=$(PAGES) NOPAD_SCREENSHOTS=demo/screenshots $(BIN)/python -m pytest -rs tests/view/test_in_a_browser.py $(ARGS)

$(PAGES)/.installed: $(STAMP)
	@$(BIN)/python -m pip install --disable-pip-version-check --quiet --upgrade --target $(PAGES) playwright==1.65.2
	@touch $@

# Hostile files without end; seeds are printed, and make fuzz CASE=tars:1234 runs one case again.
MINUTES := 60
fuzz: $(STAMP)
	@$(BIN)/python -m fuzz --minutes $(MINUTES) $(if $(TARGET),--target $(TARGET)) $(if $(SEED),--seed $(SEED)) $(if $(CASE),--case $(CASE))

# Jobs that are killed, stopped and robbed of their disk or folder, then gone on with; about ten seconds a run.
RUNS := 90
torture: $(STAMP)
	@$(BIN)/python -m torture --runs $(RUNS) $(if $(SEED),--seed $(SEED))

lint: $(STAMP)
	@$(BIN)/python -m ruff check .
	@$(BIN)/python -m ruff format --check .
	@$(BIN)/lint-imports --no-cache >.venv/imports.log || { cat .venv/imports.log >&2; exit 1; }

types: $(STAMP)
	@PYRIGHT_PYTHON_IGNORE_WARNINGS=1 $(BIN)/python -m pyright

format: $(STAMP)
	@$(BIN)/python -m ruff check --fix .
	@$(BIN)/python -m ruff format .

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || { echo "nopad needs Python 3.11 or newer, and there is no '$(PYTHON)' here. Name one: make PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "nopad needs Python 3.11 or newer, and '$(PYTHON)' is $$($(PYTHON) -V 2>&1). Name another: make PYTHON=python3.12" >&2; exit 1; }
	@echo "Installing into .venv (the first time takes some minutes) ..."
	@$(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e '.[dev]' >.venv/install.log 2>&1 \
		|| { tail -n 40 .venv/install.log >&2; echo "The installation failed; all of its output is in .venv/install.log" >&2; exit 1; }
	@touch $@

clean:
	@rm -rf .venv .pytest_cache .ruff_cache .hypothesis demo build dist
