# Everything runs in .venv, which `make venv` fills as constraints.txt says. Variables of setup.py (AUXKERNELS_BUILD, CXX,
# ...) and of pytest (PYTEST_ADDOPTS) can be set on the command line or in the environment.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: help venv build test test-wheel lint format bench demo clean

help:  ## list these targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-11s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

venv: $(VENV)/.complete  ## create the development environment in .venv

# the package goes in uncompiled: `build` compiles it in place, and incrementally, which pip does not.
$(VENV)/.complete: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -c constraints.txt setuptools pybind11 ninja
	AUXKERNELS_BUILD=none $(BIN)/python -m pip install -c constraints.txt --no-build-isolation -e '.[dev]'
	touch $@

build: venv  ## compile the native modules in place; ninja knows what has changed
	$(BIN)/python setup.py --quiet build_ext --inplace

test: build  ## run the tests
	$(BIN)/python -m pytest -n 2

# PYTHONPATH puts the wheel before the checkout; `python -m pytest` would put the checkout first.
test-wheel: venv  ## run the tests on an installed wheel instead of the checkout
	rm -rf build/wheel
	$(BIN)/python -m pip wheel --no-build-isolation --no-deps -w build/wheel .
	$(BIN)/python -m pip install --no-deps --target build/wheel/installed build/wheel/*.whl
	PYTHONPATH=build/wheel/installed:. $(BIN)/pytest -n 2

lint: venv  ## check style and format of Python and C++
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	find csrc -type f -exec $(BIN)/clang-format --dry-run -Werror {} +

format: venv  ## reformat Python and C++
	$(BIN)/ruff check --fix
	$(BIN)/ruff format
	find csrc -type f -exec $(BIN)/clang-format -i {} +

bench: build  ## run the benchmarks
	$(BIN)/python -m benchmarks

demo: build  ## train a small auxiliary model on real text, beside eager PyTorch
	$(BIN)/python -m benchmarks.demo

clean:  ## remove what was built, not .venv
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .hypothesis .benchmarks
	rm -f auxkernels/native/*.so auxkernels/native/_build.json
	find auxkernels benchmarks tests -name __pycache__ -prune -exec rm -rf {} +
