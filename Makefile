# make train, make test: each first makes .venv ready (see .ci/setup) if anything it is built from changed.
# ARGS are passed on: make train ARGS="seed=1 run=mine", make test ARGS="tests/ops -x"

.DEFAULT_GOAL := help
SHELL := /bin/bash
export PYTHON QIRL_CUDA

BIN := .venv/bin
READY := .venv/.ready
# The folder and the choices the environment was made with; another value means set-up again.
KEY := $(CURDIR) PYTHON=$(PYTHON) QIRL_CUDA=$(QIRL_CUDA)
# Tests run on all cores, four at most; those of a file on one, as they share what they set up.
WORKERS := -n logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder
LOCKS := $(patsubst %,.ci/locks/%.txt,build dev cpu cuda)
CXX_FILES = $(shell find csrc -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')

.PHONY: help setup train train-edit pipeline evaluate test chaos fuzz soak lint format docs wheel \
  clean cuda-check asan FORCE

help:
	@echo 'make train       train the packaged tiny model on the CPU   ARGS="key=value ..."'
	@echo 'make train-edit  the same for editing: recolour, add, remove, move  ARGS="key=value ..."'
	@echo 'make pipeline    curate, two teachers, one student, compared      ARGS="key=value ..."'
	@echo 'make evaluate    the tiny model against the last make train       ARGS="key=value ..."'
	@echo 'make test        run the fast tests                         ARGS="pytest arguments"'
	@echo 'make chaos       kill, starve and mislead runs; a table at the end'
	@echo 'make fuzz        300,000 strange inputs: prompts, recipes, images, checkpoints, HTTP, tensors'
	@echo 'make soak        2,000 small steps: do memory, open files, step time stay flat?'
	@echo 'make lint        ruff, mypy, clang-format; changes nothing'
	@echo 'make format      let ruff and clang-format rewrite the files'
	@echo 'make docs        the site of these pages, in build/site'
	@echo 'make wheel       the package in dist/, installed and used in a new environment'
	@echo 'make cuda-check  compile the CUDA code, where nvcc is found; needs no GPU'
	@echo 'make asan        test the kernels under AddressSanitizer and UBSan   ARGS="pytest arguments"'
	@echo 'make setup       only what the others do first: .venv, dependencies, C++ kernels'
	@echo 'make clean       remove build products; keeps .venv and outputs/'

setup: $(READY)

$(READY): pyproject.toml $(LOCKS) CMakeLists.txt .ci/setup .ci/install $(shell find csrc -type f)
	@.ci/setup
	@echo '$(KEY)' > $@

ifneq ($(shell cat $(READY) 2>/dev/null),$(KEY))
$(READY): FORCE
endif

train: $(READY)
	$(BIN)/python -m qirl_fast.train $(ARGS)

train-edit: $(READY)
	$(BIN)/python -m qirl_fast.train configs/tiny_edit.yaml $(ARGS)

pipeline: $(READY)
	$(BIN)/python -m qirl_fast.pipeline $(ARGS)

evaluate: $(READY)
	$(BIN)/python -m qirl_fast.evaluate $(ARGS)

test: $(READY)
	$(BIN)/python -m pytest $(WORKERS) -m 'not slow' $(ARGS)

chaos: $(READY)
	$(BIN)/python -m pytest $(WORKERS) -m chaos $(ARGS)

fuzz: $(READY)
	@$(BIN)/python -c 'import atheris' 2>/dev/null || .ci/install fuzz
	QIRL_FUZZ=$${QIRL_FUZZ:-2000} $(BIN)/python -m pytest --timeout 7200 -n logical --dist load tests/test_fuzz.py tests/ops/test_fuzz_ops.py
	$(BIN)/python tests/fuzz/guided.py $(if $(ARGS),$(ARGS),20000)

soak: $(READY)
	rm -rf outputs/soak
	$(BIN)/python -m bench soak $(ARGS)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(CXX_FILES)

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_FILES)

docs: $(READY)
	@$(BIN)/python -c 'import material' 2>/dev/null || .ci/install docs
	$(BIN)/python .ci/site_pages.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet --strict -f .ci/mkdocs.yml

wheel: $(READY)
	@.ci/wheel $(ARGS)

cuda-check: $(READY)
	@.ci/cuda-check

asan: $(READY)
	@.ci/asan $(ARGS)

clean:
	rm -rf build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis $(READY)
	find . -path ./.venv -prune -o -path ./.git -prune -o -name __pycache__ -print0 | xargs -0 rm -rf
