"""A forward pass of an adapted model in eval mode beside one of the dense model: the cache of masked weights.

BERT-base's shape, random weights, CPU time of one thread; passes alternate in one process, after one call of each.

    python benchmarks/eval_forward.py
"""

from __future__ import annotations

import copy
import json
import statistics
import time
from typing import Any

import torch
from peft import get_peft_model
from scaffold import FOLDER, make_parser, write
from transformers import BertConfig, BertForSequenceClassification

from peft_prune import SMPConfig, cache_masked_weights, finalize, update_schedule


RESULTS = FOLDER / "eval_forward.json"
LENGTH, PAIRS = 128, {1: 15, 32: 3}


def seconds(model: Any, inputs: torch.Tensor) -> float:
    start = time.process_time()
    model(input_ids=inputs)
    return time.process_time() - start


@torch.no_grad()
def main() -> None:
    args = make_parser(__doc__, RESULTS).parse_args()
    torch.manual_seed(0)
    dense: Any = BertForSequenceClassification(BertConfig()).eval()
    adapted: Any = get_peft_model(copy.deepcopy(dense), SMPConfig(task_type="SEQ_CLS", sparsity=0.9))
    update_schedule(adapted, 1, 1)
    finalize(adapted)
    adapted.eval()
    rows = []
    for batch, pairs in PAIRS.items():
        inputs = torch.randint(5, 30000, (batch, LENGTH))
        for cached in (True, False):
            cache_masked_weights(adapted, cached)
            seconds(adapted, inputs), seconds(dense, inputs)
            ratios = [seconds(adapted, inputs) / seconds(dense, inputs) for _ in range(pairs)]
            row = {"batch": batch, "length": LENGTH, "cached": cached, "ratio": statistics.median(ratios)}
            rows.append(row | {"ratios": sorted(ratios), "torch": torch.__version__})
            print(json.dumps(rows[-1]), flush=True)
    write(args.results, rows, indent=1)


if __name__ == "__main__":
    main()
