# Set-up, demo, tests. What is set up once is used again; a change in csrc/ or python/ is rebuilt.
#
#   make demo ARGS="--data my.csv"       ARGS goes to the demo, to pytest or to the benchmark
#   make test TORCH=torch==2.12.0        another torch, as pip names it; installed before all else
#   make test VENV=none                  in the current environment, as it is: nothing is downloaded
#   make test PYTHON=python3.12          another interpreter

VENV ?= .venv
TORCH ?= torch==2.13.0
PYTHON ?= python3
ARGS ?=

# Folders are listed too: theirs is the date that tells of a deleted file.
SOURCES := $(shell find csrc python -name __pycache__ -prune -o -print) CMakeLists.txt pyproject.toml
export PIP_DISABLE_PIP_VERSION_CHECK = 1

ifeq ($(VENV),none)
PY := $(PYTHON)
PARALLEL :=
INSTALLED := build/installed-$(shell $(PY) -c 'import sys, importlib.metadata as m; \
	print((sys.prefix + "-torch-" + m.version("torch")).strip("/").replace("/", "-").replace(" ", "-"))' 2>/dev/null)
else
PY := $(VENV)/bin/python
# A process a core; ARGS="-n 0" for one process, as debuggers want it.
PARALLEL := -n auto --maxprocesses 8 --dist loadfile
INSTALLED := $(VENV)/.installed
endif

.PHONY: help demo test bench clean
.DELETE_ON_ERROR:

help:  ## list these targets
	@sed -n 's/^\([a-z]*\):.*## /  make \1	/p' $(MAKEFILE_LIST)

demo: $(INSTALLED)  ## fit a spiral with neural ODEs; writes out/spiral.png
	$(PY) examples/spiral.py $(ARGS)

test: $(INSTALLED)  ## run the tests against the installed package
	$(PY) -m pytest $(PARALLEL) $(ARGS)

bench: $(INSTALLED)  ## time flashode against torchdiffeq
	$(PY) bench/run.py $(ARGS)

clean:  ## remove .venv and all that was built
	rm -rf .venv build dist out .pytest_cache .hypothesis

ifeq ($(VENV),none)

$(INSTALLED): $(SOURCES)
	$(PY) -m pip install --no-build-isolation --no-deps --no-index .
	@mkdir -p $(@D) && touch $@

else

$(VENV)/.created:
	$(PYTHON) -m venv $(VENV)
	@touch $@

# Rewritten only when TORCH changes, so that only then torch is installed again.
ifneq ($(shell cat $(VENV)/torch.txt 2>/dev/null),$(TORCH))
.PHONY: $(VENV)/torch.txt
endif
$(VENV)/torch.txt: | $(VENV)/.created
	@echo '$(TORCH)' > $@

# Torch comes first, and the constraint keeps it: nothing installed later may bring another.
$(VENV)/constraints.txt: $(VENV)/torch.txt
	$(PY) -m pip install -r $<
	@$(PY) -m pip list --format=freeze | grep '^torch==' > $@

# The build tools; CMake only where the system has none of 3.24 or later.
CMAKE = $(shell cmake --version 2>/dev/null \
	| awk '{split($$3, v, "."); exit v[1] * 100 + v[2] >= 324}' && echo cmake)
$(VENV)/.tools: $(VENV)/constraints.txt
	$(PY) -m pip install -c $< numpy scikit-build-core pybind11 ninja $(CMAKE)
	@touch $@

$(INSTALLED): $(VENV)/.tools $(SOURCES)
	$(PY) -m pip install -c $(VENV)/constraints.txt --no-build-isolation '.[test]'
	@touch $@

endif
