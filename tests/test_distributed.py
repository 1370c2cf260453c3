"""Two processes (gloo): the same masks on both at every step, and those of one process up to rounding."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from distributed_run import BLOCKS, KILLED, REFUSED, SAVED, SHORT, STEPS, STRATEGIES, WHOLE
from helpers.methods import CALIBRATED
from helpers.models import make_bert, sparse_base
from peft import PeftModel

from peft_prune.layers.layer import pruning_layers
from peft_prune.layers.sharding import refuse_sharded, unsplit


HERE = Path(__file__).parent
RUNS = [(strategy, name) for strategy in STRATEGIES for name in SHORT if strategy == "ddp" or name not in WHOLE]
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """2 × 16 in two processes, and 1 × 32 in one."""
    folder = tmp_path_factory.mktemp("runs")
    command = [sys.executable, str(HERE / "distributed_run.py"), str(folder), *STRATEGIES, "--short"]
    env = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    run = subprocess.run(command, env=env, capture_output=True, text=True, cwd=HERE, timeout=600)
    assert run.returncode == 0, run.stderr[-3000:]
    return folder


def recorded(folder, strategy, name):
    """What both ranks saw."""
    return [torch.load(folder / f"{strategy}-{name}-{rank}-of-2.pt") for rank in (0, 1)]


@pytest.mark.parametrize(("strategy", "name"), RUNS)
def test_masks_agree_on_both_ranks_and_with_one_process(runs, strategy, name):
    first, second = recorded(runs, strategy, name)
    assert first["world"] == second["world"] == 2 and first["steps"] == list(range(1, STEPS + 1))
    assert first["sharded"] == second["sharded"] == (strategy in ("fsdp", "zero3"))
    for one, two in zip(first["masks"], second["masks"], strict=True):
        assert torch.equal(one, two)
    assert first["penalties"] == second["penalties"]
    for one, two in zip(first["trained"], second["trained"], strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))

    alone = torch.load(runs / f"ddp-{name}-0-of-1.pt")
    assert alone["world"] == 1
    for together, single in zip(first["masks"], alone["masks"], strict=True):
        assert (together == single).float().mean() > 0.99
    assert first["penalties"] == pytest.approx(alone["penalties"], rel=1e-4)


@pytest.mark.parametrize(("strategy", "name"), RUNS)
def test_what_two_processes_save_loads_in_one(runs, strategy, name):
    first, _ = recorded(runs, strategy, name)
    base = sparse_base() if name == "zeros" else make_bert()
    loaded = PeftModel.from_pretrained(base, runs / f"{strategy}-{name}-adapter-of-2").eval()
    masks = torch.cat([layer.get_mask("default").reshape(-1) for layer in pruning_layers(loaded)])
    assert torch.equal(masks, first["masks"][-1])
    if first["logits"] is not None:
        with torch.no_grad():
            found = loaded(torch.arange(2, 26).view(3, 8)).logits
        assert torch.allclose(found, first["logits"], atol=1e-5)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_two_killed_processes_resume_to_the_same_masks(runs, strategy):
    whole, resumed = recorded(runs, strategy, "score"), recorded(runs, strategy, "score-resumed")
    assert KILLED < STEPS and (runs / f"{strategy}-killed" / f"checkpoint-{SAVED}").exists()
    for before, after in zip(whole, resumed, strict=True):
        assert after["steps"] == list(range(SAVED + 1, STEPS + 1))
        for one, two in zip(before["masks"][SAVED:], after["masks"], strict=True):
            assert torch.equal(one, two)


@pytest.mark.parametrize("method", [*CALIBRATED, "low rank", "owl", "start", "start of low rank"])
def test_calibration_of_other_data_in_each_process_gives_one_choice(runs, method):
    first, second = (torch.load(runs / f"{method}-{rank}.pt") for rank in (0, 1))
    assert torch.equal(first["masks"], second["masks"]) and 0 < (~first["masks"]).sum() < len(first["masks"])
    assert torch.equal(first["weights"], second["weights"])


def test_wrappings_that_lose_scores_are_refused_by_name(runs):
    for rank in (0, 1):
        said = torch.load(runs / f"refused-{rank}.pt")
        assert set(said) == set(REFUSED)
        assert "fsdp_config={'version': 2}" in said["fsdp1"]
        assert "gradient_checkpointing=True" in said["checkpointing"]
        assert "'base_layer'" in said["linears"] and str(BLOCKS) in said["linears"]


def test_a_weight_that_is_split_already_is_refused(bert):
    layer = bert.bert.encoder.layer[0].output.dense
    layer.module_name = "output.dense"
    layer.weight.ds_id = 7  # as DeepSpeed marks it
    with pytest.raises(ValueError, match="'output.dense'.*get_peft_model before TrainingArguments"):
        unsplit("output.dense", layer)
    with pytest.raises(ValueError, match="calibrate: the weight of 'output.dense' is split"):
        refuse_sharded([layer], "calibrate")
