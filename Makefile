# make demo   create .venv, install, plan the example
# make test   create .venv, check, run all tests
# make check  linter and type checker
# make bench  speed figures        make docs  regenerate the generated pages
# make spread  fit the error bars to published runs, write them and the tables of docs/uncertainty.md
# make accuracy  compare with published runs, write docs/accuracy.md, fail below a threshold
# make quality  plans beside published layouts, write docs/quality.md, fail where one is not reached
# make exhaustive  search beside pricing everything, write docs/exhaustive.md, fail where the optimum differs
# make schedules  schedules of an MoE layer beside their papers, write docs/schedules.md
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: demo test check bench spread accuracy quality exhaustive schedules docs clean

$(STAMP): pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or later is needed: make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(RUN)/python -m pip install --quiet --upgrade pip
	$(RUN)/python -m pip install --quiet --editable '.[dev]'
	$(RUN)/python -m compileall -q moeplan
	touch $(STAMP)

$(VENV)/.demo: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or later is needed: make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(RUN)/python -m pip install --quiet --editable .
	$(RUN)/python -m compileall -q moeplan
	touch $(VENV)/.demo

demo: $(VENV)/.demo
	rm -rf demo && mkdir demo
	$(RUN)/moeplan solve --model deepseek-v3 --cluster h100x256 --global-batch 2048 --seq-len 4096 --precision fp8-cs -o demo/plan.yaml
	$(RUN)/moeplan explain demo/plan.yaml
	$(RUN)/moeplan export demo/plan.yaml --to megatron -d demo/launch

test: check
	$(RUN)/python -m pytest --numprocesses 2 --dist loadfile

check: $(STAMP)
	$(RUN)/ruff check .
	$(RUN)/ruff format --check .
	$(RUN)/mypy

bench: $(STAMP)
	$(RUN)/python -m benchmarks.speed.pricing
	$(RUN)/python -m benchmarks.speed.solving
	$(RUN)/python -m benchmarks.speed.schedules
	$(RUN)/python -m benchmarks.speed.simulation
	$(RUN)/python -m benchmarks.speed.commands
	$(RUN)/python -m benchmarks.speed.gradients
	$(RUN)/python -m benchmarks.speed.elastic_moves

spread: $(STAMP)
	$(RUN)/python -m benchmarks.fit_spread

accuracy: $(STAMP)
	$(RUN)/python -m benchmarks.accuracy

quality: $(STAMP)
	$(RUN)/python -m benchmarks.quality

exhaustive: $(STAMP)
	$(RUN)/python -m benchmarks.exhaustive

schedules: $(STAMP)
	$(RUN)/python -m benchmarks.schedules

docs: $(STAMP)
	$(RUN)/python docs/generate.py

clean:
	rm -rf $(VENV) .cache demo build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
