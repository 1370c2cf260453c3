#!/usr/bin/env bash
# Every row of the accuracy table in docs/ppruning.md for one task: about an hour on one core.
#   bash benchmarks/ppruning_accuracy.sh movies; bash benchmarks/ppruning_accuracy.sh stsb
set -euo pipefail
cd "$(dirname "$0")/.."
export OMP_NUM_THREADS=1
PYTHON="${PYTHON:-.venv/bin/python}"
task="$1"; shift
for seed in 0 1 2; do
  "$PYTHON" benchmarks/ppruning_accuracy.py --task "$task" --criterion dense --seed "$seed" "$@"
  for keep in 0.5 0.3 0.7; do
    for criterion in similarity magnitude random; do
      "$PYTHON" benchmarks/ppruning_accuracy.py --task "$task" --criterion "$criterion" --keep "$keep" --seed "$seed" "$@"
    done
  done
done
