"""Time of P-pruning's mask search for BERT-base's shape, beside a loop over pairs of the same definition.

    python benchmarks/ppruning_search.py

Twelve layers of random activations (200 tokens, 12 heads of 64, 3,072 neurons; correlated, so that clusters exist). The
loop takes a pair of columns at a time, as the paper's code does; it is run on a part of the neurons and scaled by the
number of pairs. Both use one thread, and CPU time is what counts.
"""

from __future__ import annotations

import json
import time

import numpy as np
import torch
from scaffold import FOLDER, machine, make_parser, write
from scipy.cluster.hierarchy import linkage

from peft_prune.structure.clustering import column_similarity, head_similarity, removal_order


TOKENS, HEADS, WIDTH, NEURONS, LAYERS = 200, 12, 64, 3072, 12
PART = 384  # neurons of the loop
REFERENCE_SECONDS = 66.0  # of the paper's code, one layer, measured on a machine of the same class
RESULTS = FOLDER / "ppruning_search.json"


def activations(columns: int, seed: int) -> torch.Tensor:
    """Columns that share 100 hidden factors."""
    generator = torch.Generator().manual_seed(seed)
    factors = torch.randn(TOKENS, 100, generator=generator)
    return factors @ torch.randn(100, columns, generator=generator) + torch.randn(TOKENS, columns, generator=generator)


def pair(a: np.ndarray, b: np.ndarray) -> float:
    return abs(float(np.dot(a, b) / (np.linalg.norm(a) * np.linalg.norm(b))))


def loop_neurons(matrix: np.ndarray) -> np.ndarray:
    count = matrix.shape[1]
    result = np.eye(count)
    for i in range(count):
        for j in range(i + 1, count):
            result[i, j] = result[j, i] = pair(matrix[:, i], matrix[:, j])
    return result


def loop_heads(matrix: np.ndarray) -> np.ndarray:
    result = np.eye(HEADS)
    for a in range(HEADS):
        for b in range(a + 1, HEADS):
            values = np.array(
                [[pair(matrix[:, a * WIDTH + i], matrix[:, b * WIDTH + j]) for j in range(WIDTH)] for i in range(WIDTH)]
            )
            total = 0.0
            for _ in range(WIDTH):
                i, j = np.unravel_index(values.argmax(), values.shape)
                total += values[i, j]
                values[i, :] = values[:, j] = -1
            result[a, b] = result[b, a] = total / WIDTH
    return result


def search(heads: torch.Tensor, neurons: torch.Tensor, matching: str) -> None:
    removal_order(head_similarity(heads, WIDTH, matching), heads.abs().mean(0).view(HEADS, WIDTH).mean(1))
    removal_order(column_similarity(neurons), neurons.abs().mean(0))


def timed(function, *args) -> float:
    start = time.process_time()
    function(*args)
    return time.process_time() - start


def main() -> None:
    args = make_parser(__doc__, RESULTS).parse_args()
    torch.set_num_threads(1)
    layers = [(activations(HEADS * WIDTH, i), activations(NEURONS, 100 + i)) for i in range(LAYERS)]
    search(*layers[0], "greedy")  # warm up
    ours = {m: timed(lambda m=m: [search(h, n, m) for h, n in layers]) for m in ("greedy", "assignment")}
    heads, neurons = (part.double().numpy() for part in layers[0])
    part = neurons[:, :PART]
    start = time.process_time()
    of_neurons = loop_neurons(part)
    neuron_seconds = (time.process_time() - start) * (NEURONS * (NEURONS - 1)) / (PART * (PART - 1))
    start = time.process_time()
    of_heads = loop_heads(heads)
    head_seconds = time.process_time() - start
    tree_seconds = timed(lambda: linkage(np.asarray(column_similarity(layers[0][1])), "complete"))
    loop = neuron_seconds + head_seconds + tree_seconds
    neuron_difference = np.abs(column_similarity(torch.from_numpy(part)).numpy() - of_neurons).max()
    head_difference = np.abs(head_similarity(layers[0][0], WIDTH, "greedy").numpy() - of_heads).max()
    result = {
        "cpu_seconds_12_layers": ours,
        "cpu_seconds_a_layer": {m: s / LAYERS for m, s in ours.items()},
        "loop_cpu_seconds_a_layer": {"neurons": neuron_seconds, "heads": head_seconds, "clustering": tree_seconds},
        "loop_over_ours": {m: loop * LAYERS / s for m, s in ours.items()},
        "reference_over_ours": {m: REFERENCE_SECONDS * LAYERS / s for m, s in ours.items()},
        "largest_difference": {"neurons": float(neuron_difference), "heads": float(head_difference)},
        "torch": torch.__version__, "machine": machine(),
    }  # fmt: skip
    print(json.dumps(result, indent=2))
    write(args.results, result)


if __name__ == "__main__":
    main()
