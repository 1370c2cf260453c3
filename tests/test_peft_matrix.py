"""A few of PEFT's own tests with our methods in them; `make peft-matrix` runs all."""

import sys
from collections import Counter
from pathlib import Path

import pytest


sys.path.insert(0, str(Path(__file__).parent))

from peft_matrix.cases import METHODS
from peft_matrix.contradictions import CONTRADICTIONS, contradiction
from peft_matrix.report import OUTCOMES, summary
from peft_matrix.run import run_matrix
from peft_matrix.suite import SuiteUnavailable


@pytest.mark.slow
def test_some_of_pefts_own_tests():
    try:
        (part,) = run_matrix(
            ["test_seq_classifier"],
            "BertFor and (test_adapter_name or test_save_pretrained or test_forward_with_labels or autocast)",
        )
    except SuiteUnavailable as error:
        pytest.skip(str(error))
    records = part["tests"]
    assert not [record for record in records if record["outcome"] == "failed"]
    counts = summary(records)
    assert set(counts) == set(METHODS)
    assert all(counts[method]["passed"] >= 6 for method in METHODS)
    assert counts["PPRUNING"]["contradicts"] >= 2 and sum(counts["SMP"].values()) == counts["SMP"]["passed"]


def test_contradictions_are_told_by_test_and_method():
    assert contradiction("PPRUNING", "m.py::C::test_training(x)") is not None
    assert contradiction("SMP", "m.py::C::test_training[SMP-x]") is None
    assert contradiction("SMP head", "m.py::C::test_generate[SMP head-peft/tiny-random-DebertaModel]") is not None
    assert all(entry.reason.endswith((".", ")")) and entry.error for entry in CONTRADICTIONS)


def test_the_summary_counts_every_record():
    records = [{"method": "SMP", "outcome": outcome} for outcome in OUTCOMES for _ in range(2)]
    counts = summary([*records, {"method": "DSEE", "outcome": "failed"}])
    assert counts["SMP"] == dict.fromkeys(OUTCOMES, 2) and Counter(counts["DSEE"])["failed"] == 1
