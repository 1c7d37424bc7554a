# make help says what there is. PYTHON is the interpreter that .venv is made from (3.11 or newer).
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PEER := .parity-venv
INSTALL := $(BIN)/python -m pip install --disable-pip-version-check --no-input -c constraints.txt
RUN := runs/demo
ANNOUNCEMENT := "Installing PyTorch and what else danet needs into $(VENV): several GB, a few minutes."

.DEFAULT_GOAL := help
.PHONY: help demo test setup check test-slow parity docs test-all bench serve ablation audit sbom \
	fuzz faults

help: ## list the commands
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' Makefile

demo: $(VENV)/runtime ## train on generated street scenes, evaluate, write runs/demo/report.html (minutes)
	$(BIN)/danet train demo --out $(RUN) --resume
	$(BIN)/danet evaluate $(RUN) --split test --branches --json $(RUN)/scores.json --report $(RUN)/report.html
	@echo "Done. Open $(RUN)/report.html; the model is in $(RUN)/model. Delete $(RUN) to start anew."

test: $(VENV)/development ## run the tests (minutes)
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "not slow"

setup: $(VENV)/development ## make .venv with everything for development

check: $(VENV)/development ## lint, types, who may import whom, and whether docs tables are up to date
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python docs/tables.py --check

test-slow: $(VENV)/development $(PEER)/ready ## run the slow tests, parity with mmsegmentation among them
	$(BIN)/python -m pytest -n 2 --dist worksteal -m slow

parity: $(VENV)/development $(PEER)/ready ## compare with mmsegmentation, printing the differences
	$(BIN)/python -m pytest tests/parity -s

docs: $(VENV)/development ## write docs' tables and curves from benchmarks/results, and the site into site/
	$(BIN)/python docs/tables.py
	$(BIN)/python docs/loss_curves.py
	$(BIN)/python docs/ablation_curves.py
	$(BIN)/python docs/street.py
	$(BIN)/mkdocs build --strict --quiet

serve: $(VENV)/development ## serve the shipped model on http://127.0.0.1:7860
	$(BIN)/danet serve street-small

ablation: $(VENV)/runtime ## rerun the paper's ablation, going on where it stopped; CAMVID=DIR RESULTS=DIR (hours)
	$(BIN)/python benchmarks/ablation.py $(if $(CAMVID),--camvid $(CAMVID)) --results $(or $(RESULTS),runs/ablation)

audit: $(VENV)/development ## look the pinned packages up in the database of known vulnerabilities
	$(INSTALL) --quiet --editable ".[audit]"
	$(BIN)/pip-audit --requirement constraints.txt --no-deps --disable-pip

sbom: $(VENV)/runtime ## write sbom.json, the packages that danet is installed with (CycloneDX)
	$(INSTALL) --quiet --editable ".[audit]"
	$(BIN)/cyclonedx-py environment --pyproject pyproject.toml --output-reproducible \
		--output-file sbom.json $(BIN)/python

fuzz: $(VENV)/development ## try 100,000 damaged inputs on every reader (an hour)
	$(INSTALL) --quiet --editable ".[fuzz]"
	$(BIN)/python benchmarks/fuzz.py

faults: $(VENV)/development ## kill training, prediction, evaluation and export again and again (half an hour)
	$(BIN)/python benchmarks/faults.py

test-all: test test-slow ## run every test

bench: $(VENV)/development $(PEER)/ready ## measure against the public implementations and renew docs/performance.md (half an hour)
	for dtype in float32 bfloat16; do \
		$(BIN)/python benchmarks/position_attention.py --dtype $$dtype --positions 4096 9409; \
		$(BIN)/python benchmarks/position_attention.py --dtype $$dtype --positions 32768 \
			--direction forward --rounds 1 --repeats 1; \
	done
	$(BIN)/python benchmarks/mmsegmentation.py prediction --size 512 512 --compiled --int8
	$(BIN)/python benchmarks/mmsegmentation.py prediction --size 2048 1024 --rounds 1 --repeats 1
	$(BIN)/python benchmarks/mmsegmentation.py training --size 512 512 --batch 2 --rounds 1 --compiled
	$(BIN)/python benchmarks/mmsegmentation.py evaluation --size 512 256 --rounds 1
	$(BIN)/python benchmarks/mmsegmentation.py augmentation --size 2048 1024 --threads 1 --repeats 50
	$(BIN)/python benchmarks/logits_to_labels.py
	$(BIN)/python benchmarks/export.py street-small
	$(BIN)/python benchmarks/export.py "random R50" --sizes 512x512 2048x1024 --repeats 1
	$(BIN)/python benchmarks/video.py street-small
	$(BIN)/python benchmarks/page.py street-small
	$(BIN)/python docs/tables.py

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "danet needs Python 3.11 or newer; say which with make PYTHON=python3.12"; exit 2; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/runtime: pyproject.toml constraints.txt | $(VENV)/bin/python
	@echo $(ANNOUNCEMENT)
	$(INSTALL) --quiet --no-compile --editable .
	@touch $@

# Tests start many processes, which may not be allowed to keep the bytecode that they compile.
# Some packages hold files that are not this Python's, on which compileall fails.
$(VENV)/development: pyproject.toml constraints.txt | $(VENV)/bin/python
	@echo $(ANNOUNCEMENT)
	$(INSTALL) --quiet --no-compile --editable ".[dev]"
	@$(BIN)/python -m compileall -qq -j 0 $(VENV)/lib || true
	@touch $(VENV)/runtime $@

# The peer has its own packages and reads the project's torch, torchvision and numpy.
$(PEER)/ready: tests/parity/requirements.txt $(VENV)/runtime
	$(PYTHON) -m venv --clear $(PEER)
	$(PEER)/bin/python -m pip install --quiet --disable-pip-version-check --no-input --no-deps -r $<
	$(BIN)/python -c 'import site; print(site.getsitepackages()[0])' \
		> "$$($(PEER)/bin/python -c 'import site; print(site.getsitepackages()[0])')/project.pth"
	@$(BIN)/python -m compileall -qq -j 0 $(PEER)/lib || true
	@touch $@
