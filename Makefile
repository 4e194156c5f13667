# make run    installs what is missing, builds, and generates text with the model in this repository
# make test   the whole test suite
# An interpreter that already has torch is used as it is, also without network:
#   make run PYTHON=python3
# else .venv is made, with $(TORCH) in it.
PYTHON ?= python3
TORCH ?= torch==2.13.0
NEEDS = torch transformers numpy safetensors yaml rich pybind11 pytest hypothesis pytest_benchmark

has = $(shell $(1) -c 'import importlib.util as u, sys; sys.exit(any(u.find_spec(m) is None for m in sys.argv[1:]))' $(2) 2>/dev/null && echo yes)
PY := $(if $(call has,$(PYTHON),torch),$(PYTHON),.venv/bin/python)

.PHONY: deps build run test
.venv/bin/python:
	$(PYTHON) -m venv .venv

deps: $(filter .venv/bin/python,$(PY))
	@$(PY) -c 'import importlib.util as u, sys; sys.exit(any(u.find_spec(m) is None for m in sys.argv[1:]))' $(NEEDS) \
	  || { echo "installing what is missing into $(PY) (PyTorch takes a while) ..."; \
	       $(PY) -m pip install -q --disable-pip-version-check '$(TORCH)' && \
	       $(PY) -m pip install -q --disable-pip-version-check 'setuptools>=77,<82' wheel 'pybind11>=2.13' 'cmake>=3.26' ninja \
	         numpy safetensors pyyaml rich 'transformers>=5.7' 'pytest>=8' 'pytest-benchmark>=5' 'hypothesis>=6'; }

build: deps
	@$(PY) setup.py -q build_ext --inplace

run: build
	@PYTHONPATH=python $(PY) -m expertyard run

test: build
	@PYTHONPATH=python $(PY) -m pytest tests
