"""Warnings where a training cannot work as it is set up: they come, once, and not for what the docs show."""

import json
import re
import warnings
from pathlib import Path

import pytest
from helpers.data import arguments, data
from helpers.models import make_bert
from peft import get_peft_model

from peft_prune import DSEEConfig, MovementPruningConfig, PruningTrainer, SMPConfig, doubts


RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"
DOUBTS = [
    (SMPConfig(sparsity=0.9), (160, 1e-3), r"total_steps=160 is likely too few for sparsity=0\.9.*variant='sparsegpt'"),
    (SMPConfig(score_lr=1e-4), (300, 1e-3), r"score_lr=0\.0001 is likely too low for scores.*between 0\.001 and 1"),
    (MovementPruningConfig(), (300, 1e-2), r"learning_rate=0\.01 is likely too high for weights.*1e-05 and 0\.001"),
    (MovementPruningConfig(update="low_rank"), (300, 5e-5), r"learning_rate=5e-05 is likely too low for factors"),
    (
        MovementPruningConfig(variant="soft"),
        (300, 1e-4),
        r"score_lr=0\.01 moves a score by 1\.5 at most in 300 steps.*at 0",
    ),
    (MovementPruningConfig(variant="soft", penalty=6000.0), (3000, 1e-4), r"penalty=6000 .*nearly all.*Lower it"),
    (MovementPruningConfig(variant="soft", penalty=0.0), (3000, 1e-4), r"penalty=0\.0 draws no score down.*a sparsity"),
    (
        MovementPruningConfig(variant="l0"),
        (50, 1e-4),
        r"score_lr=0\.1 moves a score by 2\.5 at most.*start at 2\.2.*-2\.4",
    ),
    (DSEEConfig(sparsity=0.5), (300, 5e-5), r"learning_rate=5e-05 is likely too low for factors of low rank"),
    (DSEEConfig(preset="paper", sparsity=0.5), (240, 2e-3), r"prune_at=0\.5 leaves 120 steps.*prune_from=0\.0"),
    (DSEEConfig(update_sparsity=0.9), (100, 2e-3), r"total_steps=100 is likely too few for sparsity=0\.9"),
]


@pytest.mark.parametrize(("config", "how", "message"), DOUBTS, ids=[message[:30] for *_, message in DOUBTS])
def test_a_doubt_names_field_value_and_fix(config, how, message):
    (doubt,) = config.doubts(*how)
    assert re.search(message, doubt)


# what the docs train, with the steps that their epochs of SST-2 or SQuAD have
FINE = [
    (SMPConfig(sparsity=0.9, allocation="score"), (6300, 1e-3)),
    (SMPConfig(task_type="CAUSAL_LM", sparsity=0.5), (100, 5e-5)),
    (MovementPruningConfig(sparsity=0.9, value_dtype="int8"), (12600, 3e-5)),
    (MovementPruningConfig(sparsity=0.5, update="low_rank", r=8), (2100, 1e-3)),
    (MovementPruningConfig(from_existing_zeros=True), (2100, 1e-3)),
    (MovementPruningConfig(variant="soft"), (55000, 3e-5)),
    (MovementPruningConfig(variant="soft", sparsity=0.9), (600, 1e-4)),
    (MovementPruningConfig(variant="sparsegpt", sparsity=0.9), (300, 1e-4)),
    (MovementPruningConfig(variant="l0", penalty_schedule="constant"), (55000, 3e-5)),
    (DSEEConfig(r=8, num_sparse=32, heads_to_prune=1, sparsity=0.2), (6300, 5e-4)),
    (DSEEConfig(preset="paper", r=16, lora_alpha=32, num_sparse=16, sparsity=0.2), (240, 2e-3)),
    (MovementPruningConfig(sparsity=0.9), (600, 1e-4)),
    (DSEEConfig(sparsity=0.9), (600, 1e-3)),
]


@pytest.mark.parametrize(("config", "how"), FINE, ids=str)
def test_what_the_docs_train_raises_none(config, how):
    assert config.doubts(*how) == []


def test_scores_that_do_not_decay_move_twice_as_far():
    soft = MovementPruningConfig(variant="soft")
    assert soft.doubts(300, 1e-4, decays=True) and not soft.doubts(300, 1e-4, decays=False)


def told(folder, config, **fields):
    model = get_peft_model(make_bert(), config)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        PruningTrainer(model=model, args=arguments(folder, **fields), train_dataset=data()).train()
    return [str(w.message) for w in caught if str(w.message).startswith("Adapter 'default': ")]


def test_a_trainer_warns_once_before_the_first_step(tmp_path):
    (doubt,) = told(tmp_path, SMPConfig(task_type="SEQ_CLS", sparsity=0.9))
    assert "total_steps=10" in doubt
    assert told(tmp_path, SMPConfig(task_type="SEQ_CLS", sparsity=0.5)) == []


def test_limits_are_those_of_the_results():
    def rows(name):
        return [json.loads(line) for line in (RESULTS / name).read_text().splitlines()]

    accuracies = rows("methods_accuracy.jsonl")
    dense = min(row["scores"]["accuracy"] for row in accuracies if (row["task"], row["method"]) == ("movies", "dense"))
    ours = [row for row in accuracies if row["asked"] <= 0.1 and row["steps"] <= doubts.FEW_STEPS]
    assert all(row["scores"]["accuracy"] < dense - 5 for row in ours if row["task"] == "movies" and row["asked"] == 0.1)
    assert all(row["scores"]["pearson"] < 20 for row in ours if row["task"] == "stsb")
    first = [row for row in rows("first_runs.jsonl") if row["sparsity"] == 0.9 and row["task"] == "stsb"]
    learned = [row for row in first if row["method"] in ("smp", "hard", "soft", "magnitude", "dsee")]
    assert learned and all(row["steps"] <= doubts.FEW_STEPS and row["scores"]["pearson"] < 20 for row in learned)
    half = [row for row in rows("dsee_accuracy.jsonl") if row.get("task") == "stsb" and "50" in str(row["setting"])]
    assert half and all(row["steps"] // 2 <= doubts.STEPS_AFTER_ONCE and row["scores"]["pearson"] < 40 for row in half)
    soft = [row for row in rows("methods_probes.jsonl") if row["penalty"] == doubts.LARGE_PENALTY["threshold"]]
    assert soft and all(row["density"] < 0.01 for row in soft)
