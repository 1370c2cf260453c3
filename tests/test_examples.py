"""The quick start in a short form, with its real model and data."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from test_docs import hub


EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.mark.slow
def test_quickstart(tmp_path):
    command = [sys.executable, str(EXAMPLES / "quickstart.py"), "--output", str(tmp_path), "--sparsity", "0.7"]
    short = ["--steps", "6", "--dense-steps", "2", "--max-train", "96", "--max-eval", "40"]
    run = subprocess.run(command + short, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
    accuracies = [float(a) for a in re.findall(r"accuracy, pruned.*?([\d.]+) %", run.stdout)]
    assert len(accuracies) == 2 and accuracies[0] == accuracies[1]
    assert re.search(r"sparsity of the encoder's matrices\D+0\.7000", run.stdout)
    assert (tmp_path / "density.png").exists()
    masks = 10_616_832 // 8  # 6 blocks of 4 · 384 · 384 + 2 · 384 · 1536 weights
    head = 4 * (384 * 384 + 384 + 2 * 384 + 2)
    written = (tmp_path / "adapter" / "adapter_model.safetensors").stat().st_size
    assert head < written <= 1.01 * masks + head


@pytest.mark.slow
def test_quickstart_with_a_model_and_a_data_set_of_the_hub(tmp_path):
    hub(tmp_path)  # what the names below lead to where the Hub is not at hand
    command = [sys.executable, str(EXAMPLES / "quickstart.py"), "--model", "google-bert/bert-base-uncased"]
    command += ["--dataset", "stanfordnlp/sst2", "--text-column", "sentence", "--eval-split", "validation"]
    command += ["--method", "smp", "--sparsity", "0.9", "--steps", "3", "--dense-steps", "2", "--output", "out"]
    env = os.environ | {"HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(tmp_path / "cache")}
    run = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=env)
    assert run.returncode == 0, run.stderr[-2000:]
    assert "stanfordnlp/sst2" in run.stdout and re.search(r"encoder's matrices\D+0\.(90|89)", run.stdout)
    assert (tmp_path / "out" / "adapter" / "adapter_model.safetensors").exists()


@pytest.mark.slow
def test_accelerate_loop_in_two_processes(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += [str(EXAMPLES / "accelerate_loop.py"), "--cpu", "--sparsity", "0.7", "--output", str(tmp_path)]
    short = ["--steps", "3", "--batch-size", "8", "--max-train", "24", "--max-eval", "24"]
    run = subprocess.run(command + short, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert run.returncode == 0, run.stderr[-2000:]
    assert "2 process(es) on cpu" in run.stdout and "sparsity 0.700" in run.stdout
    accuracies = re.findall(r"accuracy.*?: ([\d.]+) %", run.stdout)
    assert len(accuracies) == 2 and accuracies[0] == accuracies[1]


def test_movie_sentences_are_balanced_and_split():
    spec = importlib.util.spec_from_file_location("offline_data", EXAMPLES / "offline_data.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    train, held_out = module.movie_sentences()
    assert len(train) == 9072 and len(held_out) == 1000
    assert not {text for text, _ in held_out} & {text for text, _ in train}
    assert 0.45 < sum(label for _, label in held_out) / 1000 < 0.55
