"""Two processes (DDP, gloo): the same masks on both at every step, and those of one process up to rounding."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import make_bert
from peft import PeftModel

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
@pytest.mark.parametrize("allocation", ["local", "score", "global"])
def test_masks_agree_on_both_ranks_and_with_one_process(runs, allocation):
    ranks = [torch.load(runs / f"{allocation}-{rank}-of-2.pt") for rank in (0, 1)]
    assert all(r["world"] == 2 and len(r["masks"]) == 6 for r in ranks)
    for one, two in zip(ranks[0]["masks"], ranks[1]["masks"], strict=True):
        assert torch.equal(one, two)
    alone = torch.load(runs / f"{allocation}-0-of-1.pt")
    assert alone["world"] == 1
    for together, single in zip(ranks[0]["masks"], alone["masks"], strict=True):
        assert (together == single).float().mean() > 0.99

    loaded = PeftModel.from_pretrained(make_bert(), runs / f"{allocation}-adapter-of-2")
    masks = torch.cat([layer.get_mask("default").reshape(-1) for layer in pruning_layers(loaded)])
    assert torch.equal(masks, ranks[0]["masks"][-1])
