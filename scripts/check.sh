#!/usr/bin/env bash
# Formatting, lint, types and tests: what a change must pass.
#   scripts/check.sh           everything
#   scripts/check.sh --fast    without the tests that take more than ten seconds
set -euo pipefail
cd "$(dirname "$0")/.."
ruff format --check .
ruff check .
mypy
if [ "${1:-}" = --fast ]; then pytest -n auto -m "not slow"; else pytest -n auto; fi
