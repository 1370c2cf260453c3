"""`benchmarks/method_comparison.py` on a tiny random model: the fields that PEFT reads, and our two columns."""

import json
import sys
from pathlib import Path

import pytest
from helpers.data import tokenizer
from helpers.models import make_llama


sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import comparison_tasks
import method_comparison


@pytest.fixture
def arguments(tmp_path, monkeypatch):
    rows = [{"query": f"is {word} a film", "response": f" The answer is: {word}"} for word in ("good", "bad")] * 4
    for split in ("train", "valid", "test"):
        (tmp_path / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    words = tokenizer()
    words.eos_token = "[SEP]"
    make_llama(vocab_size=len(words)).save_pretrained(tmp_path / "model")
    words.save_pretrained(tmp_path / "model")
    monkeypatch.setattr(comparison_tasks, "wikitext_2", lambda split: "good bad film " * 400)
    paths = ["--model", str(tmp_path / "model"), "--data", str(tmp_path), "--results", str(tmp_path / "records")]
    return [*paths, "--steps", "2", "--batch-size", "2", "--max-eval", "4", "--new-tokens", "2", "--calibration", "4"]


@pytest.mark.parametrize("method, sparsity", [("lora", 0.0), ("smp", 0.5), ("wanda", 0.5)])
def test_records(method, sparsity, arguments, tmp_path, capsys):
    method_comparison.main(["--experiment", f"{method}/tiny", *arguments])
    record = json.loads((tmp_path / "records" / f"{method}--tiny.json").read_text())
    info, train, meta = record["run_info"], record["train_info"], record["meta_info"]
    assert info["experiment_name"] == f"{method}/tiny" and info["peft_config"]["peft_type"] == method.upper()
    assert train["status"] == "success" and train["file_size"] > 0 and train["speed"] > 0
    assert train["num_trainable_params"] == 0 if method == "wanda" else train["num_trainable_params"] > 0
    assert train["sparsity"] == pytest.approx(sparsity, abs=0.02)  # norms are dense
    assert {"test accuracy", "train loss", "train total tokens", "forgetting"} <= set(train["metrics"][-1])
    assert meta["package_info"]["peft-version"] and meta["system_info"]["accelerator"] == "cpu"
    method_comparison.main(["--table", *arguments])
    assert f"| {method}/tiny |" in capsys.readouterr().out


@pytest.mark.parametrize(
    "text, found",
    [(" The answer is: good.", "good"), ("#### 1,200", "1200.0"), ("The answer is: 50%\n\nmore", "50.0"), ("?", None)],
)
def test_answers(text, found):
    assert comparison_tasks.answer(text) == found


def test_an_unknown_method_is_named(arguments, capsys):
    with pytest.raises(SystemExit):
        method_comparison.main(["--experiment", "none/tiny", *arguments])
    assert "none/tiny" in capsys.readouterr().err
