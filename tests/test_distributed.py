"""Two processes (DDP, gloo): the same masks on both at every step, and those of one process up to rounding."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import make_bert
from distributed_run import CONFIGS
from peft import PeftModel
from test_movement import sparse_base
from torch import nn

from peft_prune.tuners.layer import pruning_layers


HERE = Path(__file__).parent


def launch(folder, batch_size, processes):
    script = [str(HERE / "distributed_run.py"), str(folder), str(batch_size)]
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    command = [sys.executable, *(torchrun if processes > 1 else []), *script]
    env = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "ACCELERATE_USE_CPU": "true"}
    run = subprocess.run(command, env=env, capture_output=True, text=True, cwd=HERE)
    assert run.returncode == 0, run.stderr[-3000:]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """2 × 16 in two processes, and 1 × 32 in one."""
    folder = tmp_path_factory.mktemp("runs")
    launch(folder, 16, processes=2)
    launch(folder, 32, processes=1)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", list(CONFIGS))
def test_masks_agree_on_both_ranks_and_with_one_process(runs, name):
    ranks = [torch.load(runs / f"{name}-{rank}-of-2.pt") for rank in (0, 1)]
    assert all(r["world"] == 2 and len(r["masks"]) == 6 for r in ranks)
    for one, two in zip(ranks[0]["masks"], ranks[1]["masks"], strict=True):
        assert torch.equal(one, two)
    alone = torch.load(runs / f"{name}-0-of-1.pt")
    assert alone["world"] == 1
    for together, single in zip(ranks[0]["masks"], alone["masks"], strict=True):
        assert (together == single).float().mean() > 0.99

    base = sparse_base() if name == "zeros" else make_bert()
    loaded = PeftModel.from_pretrained(base, runs / f"{name}-adapter-of-2")
    masks = torch.cat([layer.get_mask("default").reshape(-1) for layer in pruning_layers(loaded)])
    assert torch.equal(masks, ranks[0]["masks"][-1])
    merged = loaded.merge_and_unload()
    if name == "zeros":  # the base's zeros are there, and are all there are
        weights = [(m.weight == 0).flatten() for m in merged.bert.encoder.layer.modules() if isinstance(m, nn.Linear)]
        assert torch.equal(torch.cat(weights), ~masks)
