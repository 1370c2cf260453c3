#!/usr/bin/env bash
# Builds sdist and wheel in dist/, checks them, and tries the wheel in empty environments: with the newest versions that we
# pin, and with the lowest that pyproject.toml allows. Called by `make dist`, which names the Python to use as $1.
set -euo pipefail
python=$(realpath -s "$1")
cd "$(dirname "$0")/.."
root=$PWD
rm -rf dist
"$python" -m build --outdir dist .
"$python" -m twine check --strict dist/*

scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
for constraints in constraints.txt constraints-lowest.txt; do
    SECONDS=0
    environment=$scratch/${constraints%.txt}
    "$python" -m venv "$environment"
    "$environment/bin/python" -m pip --disable-pip-version-check install -q --only-binary :all: -c "$constraints" dist/*.whl
    mkdir "$environment/empty"
    (cd "$environment/empty" && "$environment/bin/python" "$root/.ci/smoke.py")
    rm -rf "$environment"
    echo "$constraints: works, $SECONDS seconds"
done
