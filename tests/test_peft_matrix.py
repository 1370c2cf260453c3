"""A few of PEFT's own tests with our methods in them; `make peft-matrix` runs all."""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest


sys.path.insert(0, str(Path(__file__).parent))

from peft_matrix import plugin
from peft_matrix.cases import METHODS
from peft_matrix.contradictions import CONTRADICTIONS, contradiction
from peft_matrix.report import NOT_FETCHED, OUTCOMES, markdown, summary
from peft_matrix.run import run_matrix
from peft_matrix.suite import SuiteUnavailable


@pytest.mark.slow
def test_some_of_pefts_own_tests():
    try:
        (part,) = run_matrix(
            ["test_seq_classifier"],
            "BertFor and (autocast or test_adapter_name or test_forward_with_labels)",
        )
    except SuiteUnavailable as error:
        pytest.skip(str(error))
    records = part["tests"]
    assert not [record for record in records if record["outcome"] == "failed"]
    counts = summary(records)
    assert set(counts) == set(METHODS)
    assert all(counts[method]["passed"] >= 2 for method in METHODS)
    assert counts["PPRUNING"]["contradicts"] == 2 and sum(counts["SMP"].values()) == counts["SMP"]["passed"]


def test_contradictions_are_told_by_test_and_method():
    assert contradiction("PPRUNING", "m.py::C::test_training(x)") is not None
    assert contradiction("SMP", "m.py::C::test_training[SMP-x]") is None
    assert contradiction("SMP head", "m.py::C::test_generate[SMP head-peft/tiny-random-DebertaModel]") is not None
    assert all(entry.reason.endswith((".", ")")) and entry.error for entry in CONTRADICTIONS)


@pytest.mark.parametrize(
    ("outcome", "expected", "message", "told"),
    [
        ("passed", False, "", "passed"),
        ("failed", False, "KeyError: 'x'", "failed"),
        ("failed", False, "OSError: We couldn't connect to 'https://huggingface.co' to load the files", "skipped"),
        ("failed", False, "[XPASS(strict)] a reason", "failed"),
        (
            "skipped",
            True,
            "ValueError: Where heads and neurons of model_type='deberta' live is not known.",
            "contradicts",
        ),
        ("skipped", True, "KeyError: 'x'", "failed"),
    ],
)
def test_only_the_error_that_is_listed_is_taken_for_a_contradiction(outcome, expected, message, told):
    report = SimpleNamespace(outcome=outcome, longrepr=SimpleNamespace(reprcrash=SimpleNamespace(message=message)))
    if expected:
        report.wasxfail = "a reason"
    assert plugin._outcome(report, 0)[0] == told


def test_the_page_counts_every_record():
    tests = [
        {"method": "SMP", "test": f"test_x.py::test_{i}[SMP]", "outcome": outcome, "why": "w", "entry": 0}
        for outcome in OUTCOMES
        for i in range(2)
    ]
    tests[OUTCOMES.index("skipped") * 2]["why"] = NOT_FETCHED
    other = [{"method": "DSEE", "test": "test_y.py::test_z[DSEE]", "outcome": "failed", "why": "w"}]
    parts = [
        {"seconds": 90, "date": "2020-01-01", "tests": tests},
        {"seconds": 30, "date": "2020-01-02", "tests": other},
    ]
    counts = summary(tests + other)
    assert counts["SMP"] == dict.fromkeys(OUTCOMES, 2)
    assert counts["DSEE"] == dict.fromkeys(OUTCOMES, 0) | {"failed": 1}
    page = markdown(parts)
    assert "| SMP | 2 | 2 | 2 | 2 |" in page and "| all | 2 | 3 | 2 | 2 |" in page
    assert "| `test_x.py` | 2 | 2 | 2 | 2 | 1.5 |" in page and "2020-01-01 to 2020-01-02" in page
    assert f"| 2 | SMP | `test_0`, `test_1` | {CONTRADICTIONS[0].reason} |" in page
    assert "1 tests because something of the Hub" in page and f"| 1 | {NOT_FETCHED} |" in page
