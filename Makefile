# Everything a developer or CI runs. A fresh machine needs Python with pip, make and g++; the targets set up the rest.

PYTHON ?= python3
WORKERS ?= 2
# One thread a worker: with more, the workers of a test run fight over the cores.
export OMP_NUM_THREADS ?= 1

PIP_INSTALL = -m pip install --quiet --disable-pip-version-check
WITHOUT_SLOW = -m "not slow" -n $(WORKERS)
# The oldest and the newest of what pyproject.toml promises.
MATRIX ?= 3.10:2.13 3.13:2.14

.DEFAULT_GOAL := help
.PHONY: help venv demo test test-slow test-matrix test-interop fuzz soak tables doctest docs visit pictures lint types format wheel bench ci clean

help: ## list the targets
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/\1\t\2/' | expand -t 14

venv: .venv/.stamp ## make .venv, or bring it up to date with pyproject.toml and constraints.txt

demo: .venv/.stamp ## run the tour of the library
	.venv/bin/python examples/basics.py

test: .venv/.stamp ## run the fast tests on the newest torch
	.venv/bin/pytest tests $(WITHOUT_SLOW)

test-slow: .venv/.stamp ## run the slow tests; with SHARE=1/4 the first quarter of them
	.venv/bin/pytest tests -m slow -n $(WORKERS) || [ $$? -eq 5 ] # 5: there are none

test-matrix: wheel ## run the fast tests of the wheel on other versions of Python and torch: MATRIX="3.10:2.13 3.13:2.14"
	for versions in $(MATRIX); do WORKERS=$(WORKERS) .ci/test-wheel $$versions || exit 1; done

test-interop: .venv-interop/.stamp ## check architectures of other libraries, such as transformers and timm, as layers
	.venv-interop/bin/pytest tests/interop/test_zoo.py tests/interop/test_libraries.py -n $(WORKERS)

fuzz: .venv/.stamp ## check the laws on FUZZ_MODELS random models, 10000 if not set
	FUZZ_MODELS=$${FUZZ_MODELS:-10000} .venv/bin/pytest tests/fuzz -n $(WORKERS)

soak: .venv/.stamp ## run for hours what must not break, and write docs/reliability.md; with ONLY="kills threads" these
	.venv/bin/python -m tests.soak $(ONLY)

tables: .venv/.stamp ## write the tables of docs/ that tests compare: laws.md, torch_nn.md and drop_in.md
	TABLES=write .venv/bin/pytest tests/layers/test_law_table.py tests/interop/test_torch_nn_laws.py \
		tests/interop/test_zoo.py tests/sweeps -k "table or sweeps"

doctest: .venv/.stamp ## run the examples in the docstrings
	.venv/bin/pytest --doctest-modules luxtorch

# The blocks in the guides run in tests, the examples while the site is built.
docs: .venv/.stamp ## build the site in build/docs, running every example; with ONLY=basics that one alone
	.venv/bin/pytest -q tests/docs/test_guides.py tests/interop/test_guide.py tests/benchmarks/test_performance_page.py
	.venv/bin/python -m sphinx -b html -d build/doctrees -W --keep-going \
		$(if $(ONLY),-D sphinx_gallery_conf.filename_pattern='/$(ONLY)\.py$$') docs build/docs
	@echo "The site begins at build/docs/index.html."

visit: .venv/.stamp ## open every page of the built site in headless Chromium
	SHARE=1/1 VISIT=1 .venv/bin/pytest -q tests/docs/test_visit.py # all of it: a share may be empty

pictures: .venv/.stamp ## draw the pictures of the README again, by the examples
	for one in ensemble_digits neural_ode pinn_heat; do .venv/bin/python examples/$$one.py || exit 1; done
	.venv/bin/python docs/_ext/pictures.py

lint: .venv/.stamp ## check format, lint rules, the arrows between folders, and what GitHub reads
	.venv/bin/ruff format --check .
	.venv/bin/ruff check .
	.venv/bin/lint-imports --no-logo
	.venv/bin/zizmor --offline --quiet .github
	.venv/bin/check-jsonschema --builtin-schema vendor.github-workflows .github/workflows/*.yml
	.venv/bin/check-jsonschema --builtin-schema vendor.github-issue-forms .github/ISSUE_TEMPLATE/[!c]*.yml
	.venv/bin/check-jsonschema --builtin-schema vendor.github-issue-config .github/ISSUE_TEMPLATE/config.yml
	.venv/bin/check-jsonschema --builtin-schema vendor.dependabot .github/dependabot.yml
	.venv/bin/check-jsonschema --builtin-schema vendor.citation-file-format CITATION.cff

types: .venv/.stamp ## check the types, by mypy and as users of pyright see them
	.venv/bin/mypy
	.venv/bin/basedpyright

format: .venv/.stamp ## format, and mend what ruff can mend
	.venv/bin/ruff check --fix --quiet . || true
	.venv/bin/ruff format .

wheel: .venv/.stamp ## build the sdist in dist/, and the wheel from it
	rm -rf dist
	.venv/bin/python -m build --outdir dist . > /dev/null

# Torch's candidates run also where JAX cannot be installed; the report says so then.
bench: .venv/.stamp ## time luxtorch and its rivals, on some problems with ONLY="W1 W3"
	$(MAKE) --no-print-directory .venv-jax/.stamp || echo "JAX could not be installed; its rows are left out."
	.venv/bin/python -m benchmarks $(ONLY)

ci: ## run all that CI runs
	.ci/run

clean: ## remove the environments and all that the tools left
	rm -rf .venv .venv-* build dist .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis
	rm -rf docs/tutorials
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

.venv/.stamp: pyproject.toml constraints.txt
	test -x .venv/bin/python || $(PYTHON) -m venv .venv
	.venv/bin/python $(PIP_INSTALL) -c constraints.txt --editable '.[dev]'
	touch $@

.venv-interop/.stamp: pyproject.toml constraints.txt constraints-interop.txt
	test -x .venv-interop/bin/python || $(PYTHON) -m venv .venv-interop
	.venv-interop/bin/python $(PIP_INSTALL) -c constraints.txt --editable '.[test]'
	.venv-interop/bin/python $(PIP_INSTALL) --no-deps -r constraints-interop.txt
	touch $@

.venv-jax/.stamp: benchmarks/constraints-jax.txt
	test -x .venv-jax/bin/python || $(PYTHON) -m venv .venv-jax
	.venv-jax/bin/python $(PIP_INSTALL) -r benchmarks/constraints-jax.txt
	touch $@
