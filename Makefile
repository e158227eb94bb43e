# Everything from a bare clone, with Python 3.11 or later, make and a C++ compiler:
#
#   make train                                  the built-in digits, in float, 8 and 4 bits
#   make train ARGS="mnist --data-dir DIR"      whatever `swalp train` takes
#   make test                                   the test suite
#   make check                                  what CI runs: tests, style, types, examples
#
# The first call makes .venv with the exact versions of constraints.txt.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/installed
ARGS ?=
WORKERS ?= 2

# Both: pip 25.3 and later takes the versions of build tools from the second.
export PIP_CONSTRAINT := $(CURDIR)/constraints.txt
export PIP_BUILD_CONSTRAINT := $(CURDIR)/constraints.txt
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: install train test check clean

install: $(INSTALLED)

# The packages too: an editable install knows them by name.
$(INSTALLED): pyproject.toml constraints.txt CMakeLists.txt $(wildcard src/swalp/csrc/* src/swalp/*/__init__.py)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	touch $@

train: $(INSTALLED)
	$(BIN)/swalp train $(ARGS)

# Two processes; their threads sleep while they wait, as there are more of them than cores.
test: $(INSTALLED)
	OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal $(ARGS)

check: $(INSTALLED)
	.ci/run

clean:
	rm -rf $(VENV) build
