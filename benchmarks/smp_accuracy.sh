#!/usr/bin/env bash
# The accuracy table of docs/smp.md: three seeds of each configuration, one thread each. About two hours of one core.
# RESULTS=file changes where lines are appended; a second copy may run beside the first with other SEEDS.
set -euo pipefail
cd "$(dirname "$0")/.."
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
PYTHON=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python)}
RESULTS=${RESULTS:-benchmarks/results/smp_accuracy.jsonl}
run() { "$PYTHON" benchmarks/smp_accuracy.py --results "$RESULTS" "$@"; }

for seed in ${SEEDS:-0 1 2}; do
    run --run dense --seed "$seed" --steps 565
    run --run smp-s --sparsity 0.9 --seed "$seed" --steps 678 --teacher
    run --run smp-l --sparsity 0.5 --seed "$seed" --steps 678 --teacher
    run --run frozen --seed "$seed" --steps 565
done
"$PYTHON" benchmarks/smp_accuracy.py --results "$RESULTS" --table
