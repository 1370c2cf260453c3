"""The quick start in a short form, with its real model and data."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers.data import hub, tokenizer
from helpers.models import make_bert, make_llama
from peft import PeftModel
from transformers import BertForQuestionAnswering, DefaultFlowCallback

from peft_prune import load_compact


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


def main_of(name, monkeypatch):
    """`main` of an example, whose modules lie beside it."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    return importlib.import_module(name).main


@pytest.mark.slow
def test_sts_b(tmp_path, monkeypatch, capsys):
    run = main_of("sts_b", monkeypatch)
    run(["--steps", "3", "--teacher-steps", "2", "--max-rows", "48", "--sparsity", "0.75", "--output", str(tmp_path)])
    out = capsys.readouterr().out
    assert re.search(r"dense: +\{'eval_pearson': .*pruned: +\{'eval_pearson'", out, re.DOTALL)
    # one byte for each kept weight and four for each row: 6 blocks of 4 · 384 + 1536 + 384 rows
    assert f"kept values {10_616_832 // 4 + 4 * 6 * (5 * 384 + 1536):,} bytes" in out


@pytest.mark.slow
def test_question_answering(tmp_path, monkeypatch, capsys):
    model = make_bert()
    folder = tmp_path / "model"
    BertForQuestionAnswering(model.config).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    data = tmp_path / "squad"
    data.mkdir()
    row = {"question": "was it good", "context": "it was good film", "answers": {"text": ["good"], "answer_start": [7]}}
    for split in ("train", "validation"):
        (data / f"{split}.jsonl").write_text("\n".join([json.dumps(row)] * 16))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    run = main_of("question_answering", monkeypatch)
    names = [
        "--model",
        str(folder),
        "--teacher",
        str(folder),
        "--dataset",
        str(data),
        "--output",
        str(tmp_path / "out"),
    ]
    run([*names, "--steps", "40", "--length", "12", "--max-rows", "8"])
    assert "both ends of the answer right: 100.0 %" in capsys.readouterr().out  # one answer, and it is learned
    assert (tmp_path / "out" / "adapter_model.safetensors").exists()


@pytest.mark.slow
@pytest.mark.parametrize("options", [[], ["--rank", "3"], ["--teacher"]])
def test_causal_lm(options, tmp_path, monkeypatch, capsys):
    make_llama().save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "text").write_text("it was good film bad " * 400)
    run = main_of("causal_lm", monkeypatch)
    names = ["--model", str(tmp_path / "model"), "--text", str(tmp_path / "text"), "--output", str(tmp_path / "out")]
    run([*names, "--steps", "30", "--length", "16", "--samples", "16", *options])
    dense, wanda, learned, loaded = map(float, re.findall(r"perplexity ([\d.]+)", capsys.readouterr().out))
    assert learned == loaded
    if options != ["--teacher"]:  # a random model that has seen nothing, and one that has
        assert learned < min(dense, wanda)
    sparse = PeftModel.from_pretrained(make_llama(), tmp_path / "out").merge_and_unload()
    rows = sparse.model.layers[0].mlp.up_proj.weight
    assert ((rows == 0).sum(1) * 2 == rows.shape[1]).all()


@pytest.mark.slow
@pytest.mark.parametrize("options", [["--sparsity", "0.5"], ["--method", "wanda", "--granularity", "2:4"]])
def test_prune_language_model(options, tmp_path, monkeypatch, capsys):
    make_llama().save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "text").write_text("it was good film bad " * 400)
    run = main_of("prune_language_model", monkeypatch)
    names = ["--model", str(tmp_path / "model"), "--text", str(tmp_path / "text"), "--output", str(tmp_path / "out")]
    run([*names, "--length", "16", "--samples", "16", *options])
    out = capsys.readouterr().out
    _, pruned, loaded = re.findall(r"perplexity ([\d.]+)", out)
    assert pruned == loaded and "sparsity 0.5000" in out
    sparse = PeftModel.from_pretrained(make_llama(), tmp_path / "out").merge_and_unload()
    weight = sparse.model.layers[0].mlp.up_proj.weight
    assert (weight == 0).sum() * 2 == weight.numel()


@pytest.mark.slow
def test_prune_llm(tmp_path, monkeypatch, capsys):
    make_llama().save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "text").write_text("it was good film bad " * 400)
    run = main_of("prune_llm", monkeypatch)
    names = ["--model", str(tmp_path / "model"), "--text", str(tmp_path / "text"), "--output", str(tmp_path / "out")]
    names += ["--length", "32", "--samples", "16", "--keep", "0.6"]
    run([*names, "--steps", "20"])
    dense, pruned, recovered = measured = re.findall(
        r"([\d,]+) parameters; perplexity: .* ([\d.]+)", capsys.readouterr().out
    )
    assert int(pruned[0].replace(",", "")) < int(dense[0].replace(",", "")) and recovered[0] == pruned[0]
    assert float(recovered[1]) < float(dense[1])  # a random model that has seen nothing, and one that has
    run([*names, "--steps", "20"])  # nothing is left to do
    assert re.findall(r"([\d,]+) parameters; perplexity: .* ([\d.]+)", capsys.readouterr().out) == measured
    with pytest.raises(SystemExit, match="holds a run with other settings"):
        run([*names, "--steps", "21"])
    small = load_compact(tmp_path / "out" / "recovered")
    assert sum(p.numel() for p in small.parameters()) == int(pruned[0].replace(",", ""))
    run([*names, "--steps", "20", "--dense", "--output", str(tmp_path / "yardstick")])
    assert "dense + LoRA: " + dense[0] in capsys.readouterr().out


@pytest.mark.slow
def test_prune_llm_continues_where_it_was_stopped(tmp_path, monkeypatch):
    main_of("prune_llm", monkeypatch)
    recover = importlib.import_module("prune_llm").recover
    rows = torch.randint(3, 90, (40, 12), generator=torch.Generator().manual_seed(0))

    def stop(self, args, state, control, **kwargs):
        if state.global_step == 9:
            raise KeyboardInterrupt

    whole = recover(make_llama(), rows, tmp_path / "whole", make_llama(seed=1), steps=12)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(DefaultFlowCallback, "on_step_begin", stop, raising=False)
        recover(make_llama(), rows, tmp_path / "parts", make_llama(seed=1), steps=12)
    for _ in range(2):  # to the end; and once more, where nothing is left to train
        resumed = recover(make_llama(), rows, tmp_path / "parts", make_llama(seed=1), steps=12)
        for key, value in whole.state_dict().items():
            torch.testing.assert_close(resumed.state_dict()[key], value, msg=key)


@pytest.mark.slow
def test_demo_llm(tmp_path, monkeypatch, capsys):
    make_llama().save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    run = main_of("demo_llm", monkeypatch)
    monkeypatch.setitem(run.__globals__, "wikitext_2", lambda split: "it was good film bad " * 400)
    short = ["--length", "32", "--samples", "16", "--keep", "0.6", "--windows", "2"]
    run(["--model", str(tmp_path / "model"), "--output", str(tmp_path / "out"), *short])
    out = capsys.readouterr().out
    before, after = (int(number.replace(",", "")) for number in re.findall(r"parameters +([\d,]+) ", out))
    assert after < before and out.count("perplexity") == 2
    assert len(re.findall(r"^  \[UNK\]", out, re.MULTILINE)) == 2  # what both generate: unknown words
    assert sum(p.numel() for p in load_compact(tmp_path / "out").parameters()) == after


@pytest.mark.slow
def test_serving(tmp_path, monkeypatch, capsys):
    main_of("serving", monkeypatch)(["--tasks", "3", "--steps", "2", "--max-train", "64", "--output", str(tmp_path)])
    out = capsys.readouterr().out
    assert "one batch, 3 masks" in out and out.count("the same as alone") == 3


@pytest.mark.slow
def test_serving_two_masks_of_a_language_model(tmp_path, monkeypatch, capsys):
    make_llama().save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    names = ["--language-model", "--model", str(tmp_path / "model"), "--output", str(tmp_path / "out")]
    main_of("serving", monkeypatch)([*names, "--steps", "2", "--max-train", "64"])
    out = capsys.readouterr().out
    assert "encyclopedia: " in out and "reviews: " in out and out.count("the same as alone") == 2


@pytest.mark.slow
def test_compact_export(tmp_path, monkeypatch, capsys):
    short = ["--steps", "2", "--max-train", "64", "--max-eval", "32", "--output", str(tmp_path)]
    main_of("compact_export", monkeypatch)(short)
    out = capsys.readouterr().out
    before, after = (int(n.replace(",", "")) for n in re.findall(r"[\d,]{7,}", out)[:2])
    assert after < before and "onnxruntime answers as PyTorch does" in out


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_export_language_model(tmp_path, monkeypatch, capsys):
    make_llama().save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "text").write_text("it was good film bad " * 100)
    names = ["--model", str(tmp_path / "model"), "--text", str(tmp_path / "text"), "--output", str(tmp_path / "out")]
    main_of("export_language_model", monkeypatch)([*names, "--length", "16", "--keep", "0.6", "--multiple-of", "8"])
    out = capsys.readouterr().out
    before, after = (int(n.replace(",", "")) for n in re.search(r"([\d,]+) -> ([\d,]+)", out).groups())
    assert after < before and "onnxruntime continues as Transformers does: True" in out
    files = ("standard/model.safetensors", "model.gguf", "model.onnx", "model-int8.onnx")
    sizes = [int(n.replace(",", "")) for n in re.findall(r"([\d,]+) bytes", out)]
    assert sizes == [(tmp_path / "out" / name).stat().st_size for name in files]
    config = json.loads((tmp_path / "out" / "standard" / "config.json").read_text())
    assert config["intermediate_size"] % 8 == 0 and config["intermediate_size"] < 48


def test_movie_sentences_are_balanced_and_split():
    spec = importlib.util.spec_from_file_location("offline_data", EXAMPLES / "offline_data.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    train, held_out = module.movie_sentences()
    assert len(train) == 9072 and len(held_out) == 1000
    assert not {text for text, _ in held_out} & {text for text, _ in train}
    assert 0.45 < sum(label for _, label in held_out) / 1000 < 0.55
