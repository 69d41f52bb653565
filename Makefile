# Two commands: `make demo` and `make test`. Each makes .venv if there is none and installs what it needs.
# On a machine with a CPU only, TORCH_INDEX=https://download.pytorch.org/whl/cpu saves downloading CUDA.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
DEMO ?= demo-bundle
TORCH_INDEX ?=
COMMA := ,
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile --constraint constraints.txt
INSTALLED := $(VENV)/.installed
# The tests' Triton: an old build, which comes with a wheel and wants numpy 1. What else the wheel asks for is left out.
TRITON_VENV ?= .venv-triton
TRITON := $(TRITON_VENV)/.installed
TRITON_PIP := $(TRITON_VENV)/bin/python -m pip install --quiet --disable-pip-version-check --no-compile
# What tests must find here rather than skip (runtime/tests/needs.py). CLIP's vocabulary comes with open_clip_torch, whose
# dependencies are left out: they would replace torch.
REQUIRE := clip-vocabulary,matplotlib,moto,pyarrow,ray,tritonserver$(if $(HIDIFF_REQUIRE),$(COMMA)$(HIDIFF_REQUIRE))
# A file's tests stay together, for they share what they build; files keep the order that tests/conftest.py gives them.
PROCESSES ?= 2
WORKERS := -n $(PROCESSES) --dist loadfile --no-loadscope-reorder

# Bytecode is kept when a module is first imported, whatever the environment says: the tests start hundreds of processes, and
# each would compile PyTorch and diffusers again (16 of 23 s of their import). It lies apart, so that no source folder changes.
unexport PYTHONDONTWRITEBYTECODE
export PYTHONPYCACHEPREFIX := $(abspath $(VENV))/bytecode

.PHONY: demo test coverage lint types imports format install clean

$(INSTALLED): pyproject.toml runtime/pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) torch
	$(PIP) --editable ./runtime --editable '.[dev]'
	$(PIP) --no-deps open_clip_torch
	touch $@

$(TRITON): runtime/pyproject.toml constraints.txt
	test -x $(TRITON_VENV)/bin/python || $(PYTHON) -m venv $(TRITON_VENV)
	grep -v '^numpy==' constraints.txt > $(TRITON_VENV)/constraints.txt
	$(TRITON_PIP) --constraint $(TRITON_VENV)/constraints.txt 'numpy==1.26.*' --editable './runtime[cpu]'
	$(TRITON_PIP) --no-deps nvidia-pytriton==0.7.0
	touch $@

install: $(INSTALLED) $(TRITON)

demo: $(INSTALLED)
	$(BIN)/hidiff-export plan demo
	$(BIN)/hidiff-export build demo --output $(DEMO)
	$(BIN)/hidiff-export verify $(DEMO)
	$(BIN)/hidiff-run check $(DEMO)
	$(BIN)/hidiff-export showcase $(DEMO) --steps 20 --guidance-scale 4 --output $(DEMO).showcase

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(INSTALLED)
	$(BIN)/mypy

imports: $(INSTALLED)
	$(BIN)/lint-imports

test: lint types imports $(TRITON)
	HIDIFF_REQUIRE=$(REQUIRE) $(BIN)/python -m pytest $(WORKERS)

# A third slower than the tests alone, so by hand.
coverage: $(INSTALLED) $(TRITON)
	HIDIFF_REQUIRE=$(REQUIRE) $(BIN)/python -m pytest $(WORKERS) --cov --cov-report=term:skip-covered

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) $(TRITON_VENV) $(DEMO) $(DEMO).partial $(DEMO).showcase .mypy_cache .ruff_cache .pytest_cache
