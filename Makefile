# make run    installs what is missing, builds, and generates text with the model in this repository
# make test   installs what is missing, builds, and runs the test suite
# An interpreter that already has torch is used as it is, also without network:
#   make run PYTHON=python3
# else .venv is made, with $(TORCH) in it. ARGS go to the command: make run ARGS=--compare
PYTHON ?= python3
TORCH ?= torch==2.13.0
ARGS ?=
PACKAGES = 'setuptools>=77,<82' wheel 'pybind11>=2.13' 'cmake>=3.26' ninja \
  numpy 'safetensors>=0.5' 'pyyaml>=6' 'rich>=13' 'transformers>=5.7' accelerate \
  'pytest>=8' 'pytest-benchmark>=5' 'hypothesis>=6'
MODULES = setuptools pybind11 numpy safetensors yaml rich transformers
test: MODULES += accelerate pytest pytest_benchmark hypothesis
# what people write checkpoints with, for tests that read such files; without them these are skipped
WRITERS = 'gguf>=0.10' 'compressed-tensors>=0.10'

# $(call lacks,interpreter,modules): succeeds if one of the modules is not there
lacks = ! $(1) -c 'import importlib.util as u, sys; sys.exit(any(u.find_spec(m) is None for m in sys.argv[1:]))' $(2) 2>/dev/null
PY := $(shell $(call lacks,$(PYTHON),torch) && echo .venv/bin/python || echo $(PYTHON))
pip = $(PY) -m pip install -q --disable-pip-version-check

.PHONY: deps writers build run test
.venv/bin/python:
	@$(PYTHON) -m venv .venv || { rm -rf .venv; exit 1; }

deps: $(filter .venv/bin/python,$(PY))
	@if $(call lacks,$(PY),torch); then \
	  echo "Installing $(TORCH) into .venv (a large download, once) ..."; $(pip) '$(TORCH)'; fi
	@if $(call lacks,$(PY),$(MODULES)); then \
	  echo "Installing what is missing for $(PY) ..."; $(pip) $(PACKAGES); fi

# torch is named so that no other one takes its place
writers: deps
	@if $(call lacks,$(PY),gguf compressed_tensors); then \
	  echo "Installing $(WRITERS) for $(PY) ..."; \
	  $(pip) $(WRITERS) "torch==$$($(PY) -c 'import torch; print(torch.__version__)')" \
	  || echo "They cannot be installed; the tests of their files will be skipped."; fi

build: deps
	@ls python/expertyard/_C.*.so >/dev/null 2>&1 \
	  || echo "Building the kernels (2 minutes, once; with nvcc on two cores up to 6) ..."
	@$(PY) setup.py -q build_ext --inplace

run: build
	@PYTHONPATH=python $(PY) -m expertyard run $(ARGS)

test: writers build
	@PYTHONPATH=python $(PY) -m pytest $(ARGS)
