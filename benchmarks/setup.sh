#!/bin/sh
# Makes .venv-bench beside pyproject.toml: sartor with all solvers that it is measured against.
# Honours UV_FIND_LINKS, or takes PIP_FIND_LINKS for it. The order matters: see peers/__init__.py.
set -eu
cd "$(dirname "$0")/.."
if [ -z "${UV_FIND_LINKS:-}" ] && [ -n "${PIP_FIND_LINKS:-}" ]; then
    export UV_FIND_LINKS="$PIP_FIND_LINKS"
fi
uv venv --allow-existing --python ">=3.11,<3.13" .venv-bench
export VIRTUAL_ENV="$PWD/.venv-bench"
uv pip install --editable .
uv pip install torch==2.13.0 setuptools scipy || echo "torch is missing: mpc.pytorch will be skipped"
uv pip install comma-deps-acados || echo "comma-deps-acados is missing: acados will be skipped"
uv pip install --no-deps mpc==0.0.6 || echo "mpc is missing: mpc.pytorch will be skipped"
uv pip install --reinstall-package casadi casadi
echo "now: .venv-bench/bin/python benchmarks/run.py --quick"
