"""Compact models live on: save, load, train, LoRA, compile, ONNX."""

import json

import numpy as np
import pytest
import torch
from helpers.architectures import ARCHITECTURES, inputs, logits, make, zero_some
from helpers.models import make_bert
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    BertForSequenceClassification,
    BertModel,
    Trainer,
    TrainingArguments,
)

from peft_prune import SMPConfig, load_compact, model_size, save_compact, shrink
from peft_prune.structure.record import FIELD, read_record, write_record
from peft_prune.structure.seal import SEAL
from peft_prune.structure.sites import find_sites


def compact(name="bert", attention="sdpa"):
    if name in ("mpnet", "deberta-v2", "deberta-v3"):
        attention = "eager"
    model = make(name, attention)
    zero_some(model)
    return shrink(model)


@pytest.mark.parametrize(
    "config", [SMPConfig(task_type="SEQ_CLS"), LoraConfig(task_type="SEQ_CLS", target_modules=["query"])]
)
def test_size_is_that_of_the_model_without_its_adapters(config):
    size = model_size(make_bert())
    assert model_size(get_peft_model(make_bert(), config)) == size


@pytest.mark.parametrize("name", list(ARCHITECTURES))
def test_saved_and_loaded(name, tmp_path):
    model, batch = compact(name), inputs(name)
    save_compact(model, tmp_path)
    again = load_compact(tmp_path, attn_implementation=model.config._attn_implementation)
    assert type(again) is type(model) and not again.training
    assert model_size(again) == model_size(model)
    torch.testing.assert_close(logits(again, batch), logits(model, batch), atol=1e-6, rtol=1e-6)
    assert again.config.to_dict()[FIELD] == model.config.to_dict()[FIELD]


def test_saved_again_and_shrunk_further(tmp_path):
    model = load_after_saving(compact(), tmp_path / "one")
    zero_some(model, seed=3)
    batch = inputs("bert")
    expected = logits(model, batch)
    again = load_after_saving(shrink(model), tmp_path / "two")
    torch.testing.assert_close(logits(again, batch), expected, atol=1e-6, rtol=1e-5)
    original = make("bert")
    for site in find_sites(original):
        record = again.config.to_dict()[FIELD].get(site.key)
        assert record is None or record["units"] == site.units, "in numbers of the model before anything was removed"


def load_after_saving(model, folder, **kwargs):
    save_compact(model, folder)
    return load_compact(folder, **kwargs)


def test_only_what_is_left_is_on_disk(tmp_path):
    model = compact()
    save_compact(model, tmp_path)
    stored = sum(tensor.numel() * 4 for tensor in load_file(tmp_path / "model.safetensors").values())
    assert stored == model_size(model).bytes < model_size(make("bert")).bytes


def test_another_head_and_another_dtype(tmp_path):
    model = compact()
    save_compact(model, tmp_path)
    backbone = load_compact(tmp_path, model_class=AutoModel)
    assert type(backbone) is BertModel
    ids = inputs("bert")
    with torch.no_grad():
        expected = model.bert(**ids).last_hidden_state
        torch.testing.assert_close(backbone(**ids).last_hidden_state, expected)
    half = load_compact(tmp_path, AutoModelForSequenceClassification, dtype=torch.bfloat16)
    assert type(half) is BertForSequenceClassification and half.dtype == torch.bfloat16


def test_pipelines_of_transformers_do_not_load_it_by_mistake(tmp_path):
    save_compact(compact(), tmp_path)
    with pytest.raises(RuntimeError, match="(?i)mismatch"):
        BertForSequenceClassification.from_pretrained(tmp_path)


def test_bad_input_is_told(tmp_path):
    with pytest.raises(TypeError, match="merge_and_unload"):
        save_compact(get_peft_model(make_bert(), LoraConfig()), tmp_path)
    with pytest.raises(ValueError, match=r"Nothing was taken out.*shrink"):
        save_compact(make_bert(), tmp_path)
    make_bert().save_pretrained(tmp_path / "dense")
    with pytest.raises(ValueError, match="no compact model"):
        load_compact(tmp_path / "dense")
    save_compact(compact(), tmp_path / "ok")
    path = tmp_path / "ok" / "config.json"
    config = json.loads(path.read_text())
    config.pop(SEAL)  # or the checksum is what is told
    key = next(iter(config[FIELD]))
    for damage, message in [
        ({key: {"units": 4, "kept": "ff"}}, "damaged"),
        ({key: {"units": 4, "kept": "00"}}, "keeps no unit"),
        ({key: {"units": 2**62, "kept": "01"}}, "damaged"),
        ({key: {"units": 8, "kept": "01"}}, "which has 4"),
        ({"nowhere": {"units": 4, "kept": "01"}}, "is not there"),
        ({key: 7}, "damaged"),
    ]:
        path.write_text(json.dumps(config | {FIELD: damage}))
        with pytest.raises(ValueError, match=message):
            load_compact(tmp_path / "ok")
    path.write_text(json.dumps(config | {"architectures": ["Nothing"]}))
    with pytest.raises(ValueError, match="model_class"):
        load_compact(tmp_path / "ok")


def test_records_count_from_the_first_model():
    record = write_record(None, torch.tensor([0, 2, 3, 9]), 10)
    assert read_record(record).tolist() == [0, 2, 3, 9]
    again = write_record(record, torch.tensor([1, 3]), 4)
    assert again["units"] == 10 and read_record(again).tolist() == [2, 9]


def examples(count=32):
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 120, (count, 10), generator=generator)
    return [{"input_ids": row, "attention_mask": torch.ones_like(row), "labels": int(row[0] % 2)} for row in ids]


def test_trainer_trains_saves_and_resumes(tmp_path):
    model = compact()
    arguments = TrainingArguments(
        str(tmp_path), max_steps=4, save_steps=2, report_to="none", use_cpu=True, disable_tqdm=True, learning_rate=1e-3
    )
    Trainer(model, arguments, train_dataset=examples()).train()
    again = load_compact(tmp_path / "checkpoint-4")
    assert torch.equal(logits(again, inputs("bert")), logits(model.eval(), inputs("bert")))
    half_way = load_compact(tmp_path / "checkpoint-2")
    Trainer(half_way, arguments, train_dataset=examples()).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    torch.testing.assert_close(logits(half_way.eval(), inputs("bert")), logits(model, inputs("bert")))


def test_lora_on_top(tmp_path):
    model = load_after_saving(compact(), tmp_path / "base")
    torch.manual_seed(0)
    adapted = get_peft_model(model, LoraConfig(target_modules="all-linear", init_lora_weights=False)).eval()
    expected = logits(adapted, inputs("bert"))
    adapted.save_pretrained(tmp_path / "lora")
    again = PeftModel.from_pretrained(load_compact(tmp_path / "base"), tmp_path / "lora")
    torch.testing.assert_close(logits(again, inputs("bert")), expected)
    torch.testing.assert_close(logits(again.merge_and_unload(), inputs("bert")), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["bert", "llama", "mpnet", "t5"])
def test_compiles_without_graph_breaks(name):
    model, batch = compact(name), inputs(name)
    expected = logits(model, batch)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=name != "t5")
    torch.testing.assert_close(logits(compiled, batch), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["bert", "distilbert", "gpt2", "llama"])
def test_onnx_runs_with_equal_outputs(name, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    from peft_prune.report import export_onnx

    model = compact(name, "eager")
    use_cache = getattr(model.config, "use_cache", None)
    session = onnxruntime.InferenceSession(export_onnx(model, tmp_path / "model.onnx"))
    assert getattr(model.config, "use_cache", None) == use_cache, "exporting leaves the model as it was"
    for batch in (inputs(name), inputs(name, batch=4, tokens=13)):
        found = session.run(None, {key: value.numpy() for key, value in batch.items()})[0]
        np.testing.assert_allclose(found, logits(model, batch).numpy(), atol=1e-4, rtol=1e-4)


def test_fields_of_the_config_and_what_transformers_says_of_loading(tmp_path):
    save_compact(compact(), tmp_path)
    model = load_compact(tmp_path, num_labels=3, ignore_mismatched_sizes=True, hidden_dropout_prob=0.3)
    assert model.classifier.out_features == 3 and model.dropout.p == 0.3
    model, report = load_compact(tmp_path, output_loading_info=True, attn_implementation="eager")
    assert type(model) is BertForSequenceClassification and not report["missing_keys"]
    assert model.config._attn_implementation == "eager"
