"""The `peft-prune` command on adapters that were saved, and on what is none."""

import importlib.util
import os

import numpy as np
import pytest
import torch
from helpers.architectures import ARCHITECTURES
from helpers.commands import run
from helpers.damage import DAMAGE
from helpers.data import tokenizer
from helpers.methods import final_adapter, prune, randomize_scores
from helpers.models import BERT_TARGET_WEIGHTS, logits, make_bert, make_llama, make_masked_lm
from huggingface_hub import ModelCard
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, BartModel

import peft_prune
from peft_prune import (
    PPruningConfig,
    StructuredPruningConfig,
    calibrate,
    finalize,
    load_compact,
    model_size,
    update_schedule,
)
from peft_prune.cli import main
from peft_prune.layers.layer import pruning_layers


def test_inspect(saved, capsys):
    folder, model = saved
    answer = run(capsys, "inspect", folder / "adapter", "--json")
    masks = {layer.module_name: layer.get_mask("default") for layer in pruning_layers(model)}
    assert {r["name"]: r["density"] for r in answer["layers"]} == {
        name: pytest.approx(mask.float().mean().item()) for name, mask in masks.items()
    }
    kept = sum(int(mask.sum()) for mask in masks.values())
    assert answer["kinds"][-1]["kept"] == kept and answer["sparsity"] == pytest.approx(1 - kept / BERT_TARGET_WEIGHTS)
    p = np.array([mask.float().mean().item() for mask in masks.values()])
    n = np.array([mask.numel() for mask in masks.values()])
    entropy = (n * -(p * np.log2(p) + (1 - p) * np.log2(1 - p))).sum() / 8
    assert answer["entropy_bytes"] == pytest.approx(entropy, abs=1)
    assert answer["other_bytes"] == 4 * (3 * 32 + 3) and answer["base_model"].endswith("base")
    text = run(capsys, "inspect", folder / "adapter").out
    assert "attention.self.query" in text and f"{kept:,}" in text


def test_diff(saved, capsys):
    folder, model = saved
    same = run(capsys, "diff", folder / "adapter", folder / "adapter", "--json")
    assert same["identical"] and same["overlap"] == 1 and same["only_a"] == same["only_b"] == 0
    other = final_adapter(folder / "other", at=0.5)
    answer = run(capsys, "diff", folder / "adapter", folder / "other", "--json")
    pairs = [
        (one.get_mask("default"), two.get_mask("default"))
        for one, two in zip(pruning_layers(model), pruning_layers(other), strict=True)
    ]
    assert answer["both"] == sum(int((a & b).sum()) for a, b in pairs)
    assert answer["only_b"] == sum(int((b & ~a).sum()) for a, b in pairs)
    assert answer["overlap"] == pytest.approx(answer["both"] / sum(int((a | b).sum()) for a, b in pairs))
    assert not answer["identical"] and "overlap" in run(capsys, "diff", folder / "adapter", folder / "other").out


def test_diff_shortens_names_and_says_what_overlap_is(saved, capsys):
    folder, _ = saved
    final_adapter(folder / "few", target_modules=["query"])
    arguments = ("diff", folder / "adapter", folder / "few")
    missing = run(capsys, *arguments, "--json")["not_in_b"]
    assert len(missing) == 10
    text = run(capsys, *arguments).out
    assert all(name in text for name in missing[:3]) and missing[3] not in text and "and 7 more" in text
    assert "intersection over union" in text and "not_in_a           none" in text


def test_version(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0 and capsys.readouterr().out == f"peft-prune {peft_prune.__version__}\n"


def test_verify(saved, capsys):
    folder, _ = saved
    assert run(capsys, "verify", folder / "adapter", "--json") == {
        "ok": True,
        "masks": 12,
        "base": str(folder / "base"),
    }
    make_bert(num_labels=3, seed=1).save_pretrained(folder / "stranger")
    error = run(capsys, "verify", folder / "adapter", "--base", folder / "stranger", code=1).err
    assert "layer.0.attention.self.query" in error and "another base model" in error


@pytest.mark.parametrize("kind", ["two tensors swapped", "one bit flipped", "one tensor missing", "wrong dtype"])
def test_damage_has_exit_code_1(saved, capsys, kind):
    folder, _ = saved
    DAMAGE[kind][0](folder / "adapter")
    for command in ("inspect", "verify"):
        answer = run(capsys, command, folder / "adapter", "--json", code=1)
        assert answer["type"] == "MaskFormatError" and "'bert.encoder.layer" in answer["error"]


def test_what_is_no_adapter_has_exit_code_2(tmp_path, capsys):
    assert "Can't find" in run(capsys, "inspect", tmp_path / "nothing", code=2).err
    get_peft_model(make_bert(), LoraConfig(target_modules=["query"])).save_pretrained(tmp_path / "lora")
    assert "not a pruning method" in run(capsys, "inspect", tmp_path / "lora", code=2).err
    prune(make_bert()).save_pretrained(tmp_path / "checkpoint")
    assert "training checkpoint" in run(capsys, "inspect", tmp_path / "checkpoint", code=2).err
    final_adapter(tmp_path / "mask")
    assert "Give it with --base" in run(capsys, "verify", tmp_path / "mask", code=2).err
    for evaluation in ("accuracy", "=0.5", "f1=nan", "f1=inf"):
        assert "NAME=VALUE" in run(capsys, "card", tmp_path / "mask", "--evaluation", evaluation, code=2).err
    with pytest.raises(SystemExit) as stop:
        main(["prune"])
    assert stop.value.code == 2


def test_export_dense(saved, capsys, batch):
    folder, model = saved
    expected = logits(model, batch)
    assert run(capsys, "export", folder / "adapter", "--output", folder / "dense").out.strip() == str(folder / "dense")
    exported = AutoModelForSequenceClassification.from_pretrained(folder / "dense")
    assert torch.equal(logits(exported, batch), expected)
    weights = exported.bert.encoder.layer[0].intermediate.dense.weight
    assert 0.7 < (weights == 0).float().mean() < 0.9


@pytest.mark.parametrize("to", ["dense", "compact", "onnx"])
def test_export_refuses_a_head_that_is_stored_nowhere(tmp_path, capsys, to):
    make_masked_lm().save_pretrained(tmp_path / "base")  # an encoder, whose classifier is new
    base = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base")
    final_adapter(tmp_path / "adapter", make=lambda: base)
    arguments = ("export", tmp_path / "adapter", "--to", to, "--output", tmp_path / "out")
    error = run(capsys, *arguments, code=2).err
    assert "'classifier.bias', 'classifier.weight'" in error and "modules_to_save" in error
    assert "task_type='SEQ_CLS'" in error and not (tmp_path / "out").exists()


def test_export_takes_a_head_from_modules_to_save(tmp_path, capsys, batch):
    make_masked_lm().save_pretrained(tmp_path / "base")
    base = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base")
    modules = ["classifier", "pooler"]  # new as well: a masked language model has none
    model = final_adapter(tmp_path / "adapter", make=lambda: base, modules_to_save=modules)
    run(capsys, "export", tmp_path / "adapter", "--output", tmp_path / "out")
    exported = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    assert torch.equal(logits(exported, batch), logits(model, batch))


def test_a_base_model_with_another_head(tmp_path, capsys, batch):
    make_bert(num_labels=2).save_pretrained(tmp_path / "base")
    base = AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "base", num_labels=3, ignore_mismatched_sizes=True
    )
    model = final_adapter(tmp_path / "adapter", make=lambda: base, task_type="SEQ_CLS")
    run(capsys, "verify", tmp_path / "adapter")
    run(capsys, "export", tmp_path / "adapter", "--output", tmp_path / "out")
    exported = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    assert torch.equal(logits(exported, batch), logits(model, batch))


def test_the_head_of_bart(tmp_path, capsys):
    config = ARCHITECTURES["bart"][0]()
    BartModel(config).save_pretrained(tmp_path / "base")
    base = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=5)
    final_adapter(tmp_path / "adapter", make=lambda: base, modules_to_save=["classification_head"])
    assert "error" not in run(capsys, "verify", tmp_path / "adapter").out.lower()


def test_export_to_onnx_without_the_package_is_told_at_once(saved, capsys, monkeypatch):
    folder, _ = saved
    find_spec = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *a: None if name == "onnx" else find_spec(name, *a))
    monkeypatch.setattr("peft_prune.report.export.load_with_base", lambda *a: pytest.fail("work was done"))
    error = run(capsys, "export", folder / "adapter", "--to", "onnx", "--output", folder / "onnx", code=2).err
    assert "pip install" in error and "onnx" in error and not (folder / "onnx").exists()


def test_export_of_a_folder_that_is_not_there(tmp_path, capsys):
    source = str(tmp_path / "nothing")
    assert main(["export", source, "--to", "onnx", "--output", str(tmp_path / "out")]) == 2
    assert f"{source!r} is not there. Name a folder" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_export_compact(tmp_path, capsys, batch):
    make_bert().save_pretrained(tmp_path / "base")
    base = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base")
    model = get_peft_model(base, PPruningConfig(task_type="SEQ_CLS", keep_ratio=0.6, criterion="random"))
    calibrate(model)
    model.save_pretrained(tmp_path / "adapter")
    expected = logits(model.eval(), batch)
    answer = run(capsys, "inspect", tmp_path / "adapter", "--json")
    assert answer["method"] == "PPRUNING" and answer["mask_bytes"] < 60
    output = run(capsys, "export", tmp_path / "adapter", "--to", "compact", "--output", tmp_path / "small").out.strip()
    small = load_compact(output)
    torch.testing.assert_close(logits(small, batch), expected, atol=1e-5, rtol=1e-5)
    assert model_size(small).parameters < model_size(base).parameters


def test_export_to_transformers(tmp_path, capsys):
    make_llama().save_pretrained(tmp_path / "base")
    tokenizer().save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    fields = {"task_type": "CAUSAL_LM", "keep_ratio": 0.6, "criterion": "magnitude", "repair": False}
    model = get_peft_model(base, StructuredPruningConfig(**fields, shapes="uniform"))
    calibrate(model)
    model.save_pretrained(tmp_path / "adapter")
    ids = torch.tensor([[5, 6, 7, 8]])
    run(capsys, "export", tmp_path / "adapter", "--to", "transformers", "--output", tmp_path / "small")
    small = AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    torch.testing.assert_close(small(ids).logits, model.eval()(ids).logits, atol=1e-5, rtol=1e-5)
    assert AutoTokenizer.from_pretrained(tmp_path / "small").vocab_size == tokenizer().vocab_size


@pytest.mark.parametrize("to", ["dense", "compact"])
def test_an_exported_folder_has_the_tokenizer(to, tmp_path, capsys, batch):
    make_bert().save_pretrained(tmp_path / "base")
    tokenizer().save_pretrained(tmp_path / "base")
    base = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base")
    model = get_peft_model(base, PPruningConfig(task_type="SEQ_CLS", keep_ratio=0.6, criterion="random"))
    calibrate(model)
    model.save_pretrained(tmp_path / "adapter")
    run(capsys, "export", tmp_path / "adapter", "--to", to, "--output", tmp_path / "out")
    text = "a film that I liked"
    assert AutoTokenizer.from_pretrained(tmp_path / "out")(text)["input_ids"] == tokenizer()(text)["input_ids"]


def test_an_export_that_is_refused_leaves_no_folder(tmp_path, capsys):
    make_bert().save_pretrained(tmp_path / "base")
    base = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base")
    model = get_peft_model(base, PPruningConfig(task_type="SEQ_CLS", keep_ratio=0.6, criterion="random"))
    calibrate(model)  # heads go, too, which BERT's config has no place for
    model.save_pretrained(tmp_path / "adapter")
    folder = tmp_path / "new" / "small"
    error = run(capsys, "export", tmp_path / "adapter", "--to", "transformers", "--output", folder, code=2).err
    assert "save_compact" in error and not folder.exists()


def test_export_to_gguf(tmp_path, capsys):
    gguf = pytest.importorskip("gguf")
    make_llama().save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    fields = {"task_type": "CAUSAL_LM", "keep_ratio": 0.6, "criterion": "magnitude", "repair": False}
    model = get_peft_model(base, StructuredPruningConfig(**fields))
    calibrate(model)
    model.save_pretrained(tmp_path / "adapter")
    path = run(capsys, "export", tmp_path / "adapter", "--to", "gguf", "--output", tmp_path / "out").out.strip()
    sizes = {t.name: tuple(t.shape) for t in gguf.GGUFReader(path).tensors}
    smaller = model.merge_and_unload()
    for i, layer in enumerate(smaller.model.layers):
        assert sizes[f"blk.{i}.ffn_down.weight"] == tuple(layer.mlp.down_proj.weight.T.shape)


def test_export_compact_of_a_mask_that_leaves_no_unit_empty(saved, capsys):
    folder, _ = saved
    arguments = ("export", folder / "adapter", "--to", "compact", "--output", folder / "compact")
    assert "cannot be made smaller. Use --to dense" in run(capsys, *arguments, code=2).err


@pytest.mark.slow
def test_export_onnx(saved, capsys, batch):
    runtime = pytest.importorskip("onnxruntime")
    folder, model = saved
    path = run(capsys, "export", folder / "adapter", "--to", "onnx", "--output", folder / "onnx", "--json")["output"]
    session = runtime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for ids in (batch["input_ids"], batch["input_ids"][:1, :5]):  # other sizes than those it was traced with
        mask = torch.ones_like(ids)
        (found,) = session.run(["logits"], {"input_ids": ids.numpy(), "attention_mask": mask.numpy()})
        np.testing.assert_allclose(found, logits(model, {"input_ids": ids}).numpy(), atol=1e-5)


def test_card(saved, capsys):
    folder, _ = saved
    command = ["card", folder / "adapter", "--evaluation", "accuracy=0.847", "--dataset", "stanfordnlp/sst2"]
    run(capsys, *command)
    run(capsys, *command)
    card = ModelCard.load(folder / "adapter" / "README.md")
    assert card.data.library_name == "peft" and "pruning" in card.data.tags
    assert card.data.eval_results[0].metric_value == 0.847
    assert card.data.eval_results[0].dataset_name == "stanfordnlp/sst2"
    for part in ("import peft_prune", "attention.self.query", "density.png", "accuracy: 0.847"):
        assert card.text.count(part) >= 1
    assert os.path.getsize(folder / "adapter" / "density.png") > 5000


def test_card_keeps_what_a_person_wrote(saved, capsys):
    folder, _ = saved
    readme = folder / "adapter" / "README.md"
    run(capsys, "card", folder / "adapter")  # over PEFT's empty template
    assert "[More Information Needed]" not in readme.read_text()
    own = readme.read_text() + "\n## Licence\n\nAsk [me](mailto:me).\n"
    readme.write_text(own.replace("# A mask adapter", "# Our film critic"))
    run(capsys, "card", folder / "adapter", "--evaluation", "accuracy=0.847")
    run(capsys, "card", folder / "adapter", "--evaluation", "accuracy=0.9")
    text = readme.read_text()
    assert "# Our film critic" in text and "Ask [me](mailto:me)." in text
    assert "accuracy: 0.9" in text and "0.847" not in text and text.count("density.png") == 1


@pytest.mark.parametrize(
    "words",
    [
        "# Mine\n\nTrained on a boat.\n",
        "# Mine\n\n## How to Get Started with the Model\n\nLoad it.\n\n## Trained\n\nOn a boat.\n",
        "<!-- peft_prune:begin -->\n\nThe end of the block was deleted here.\n",
        "The block stands between `<!-- peft_prune:begin -->` and `<!-- peft_prune:end -->`.\n",
    ],
)
def test_card_is_added_to_a_readme_without_a_block(saved, capsys, words):
    folder, _ = saved
    readme = folder / "adapter" / "README.md"
    readme.write_text(f"---\nlicense: mit\n---\n{words}")
    for _ in range(2):
        run(capsys, "card", folder / "adapter")
        card = ModelCard.load(readme)
        lines = [line for line in card.text.splitlines() if line]
        assert [line for line in words.splitlines() if line and line not in lines] == []
        assert card.data.license == "mit" and card.text.count("import peft_prune") == 1


def test_card_keeps_results_of_other_data(saved, capsys):
    folder, _ = saved
    for value, dataset in (("0.8", "a"), ("0.7", "b"), ("0.9", "a")):
        run(capsys, "card", folder / "adapter", "--evaluation", f"accuracy={value}", "--dataset", dataset)
    results = ModelCard.load(folder / "adapter" / "README.md").data.eval_results
    assert {r.dataset_name: r.metric_value for r in results} == {"a": 0.9, "b": 0.7}


def test_saving_again_keeps_the_table_of_the_card(saved, capsys):
    folder, model = saved
    run(capsys, "card", folder / "adapter")
    model.save_pretrained(folder / "adapter")
    assert "density.png" in (folder / "adapter" / "README.md").read_text()


def test_command_is_installed():
    from importlib.metadata import entry_points

    (entry,) = entry_points(group="console_scripts", name="peft-prune")
    assert entry.load() is main


def test_diff_of_other_seeds_is_like_chance(tmp_path, capsys):
    final_adapter(tmp_path / "a", at=0.9)
    model = prune(make_bert(), 0.9)
    randomize_scores(model, seed=9)
    update_schedule(model, 10, 10)
    finalize(model)
    model.save_pretrained(tmp_path / "b")
    answer = run(capsys, "diff", tmp_path / "a", tmp_path / "b", "--json")
    assert abs(answer["both"] - answer["both_if_unrelated"]) < 60
