#!/usr/bin/env bash
# Everything that a machine with an NVIDIA GPU can tell: builds for its card, runs the CUDA tests,
# measures the card's ceilings and every kernel beside its peers, and writes one JSON file under
# bench/results/. Parts that are done are not done again: call it until it says that all are.
#
#   bench/gpu_check.sh                     all parts, for at most 9 minutes
#   bench/gpu_check.sh --part ceilings     one part (--list names them)
#   bench/gpu_check.sh --minutes 5 --again tests
#
# PYTHON (default python3) has a CUDA build of torch, pytest, and what `make run` installs; nvcc is
# found as in docs/cuda.md. Without a GPU it ends with a sentence and status 3.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHONPATH="python:bench${PYTHONPATH:+:$PYTHONPATH}" exec "${PYTHON:-python3}" -m gpu_check "$@"
