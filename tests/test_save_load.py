"""What is written, how it is read back, and what is refused."""

import json
import os

import pytest
import torch
from helpers.damage import DAMAGE
from helpers.methods import final_adapter, prune, randomize_scores
from helpers.models import BERT_TARGET_WEIGHTS, logits, make_bert, make_gpt2, make_masked_lm, snapshot
from helpers.versions import OLD_PEFT
from peft import AutoPeftModelForSequenceClassification, PeftModel, get_peft_model, inject_adapter_in_model
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file

from peft_prune import MaskFormatError, MovementPruningConfig, SMPConfig, finalize, update_schedule
from peft_prune.layers.layer import pruning_layers


def test_final_adapter_is_one_bit_a_weight(tmp_path, batch):
    base = make_bert(hidden_size=128, intermediate_size=512)
    model = prune(base, 0.5)
    before = logits(model, batch)
    finalize(model)
    assert torch.equal(logits(model, batch), before)
    model.save_pretrained(tmp_path)
    n = 2 * (4 * 128 * 128 + 2 * 128 * 512)
    stored = load_file(tmp_path / "adapter_model.safetensors")
    assert {t.dtype for t in stored.values()} == {torch.uint8} and all(k.endswith(".smp_mask") for k in stored)
    assert sum(t.numel() for t in stored.values()) <= n / 8 + 12
    # 1.01 of it at BERT's size; the names of 12 tensors weigh more at this one
    assert os.path.getsize(tmp_path / "adapter_model.safetensors") <= n / 8 + 12 * 160
    assert not (tmp_path / "pytorch_model.bin").exists()
    assert not [p for p in model.parameters() if p.requires_grad]


@pytest.mark.parametrize("final", [True, False])
@pytest.mark.parametrize("make", [make_bert, make_gpt2])
def test_loads_by_every_road(tmp_path, batch, final, make):
    model = prune(make(), 0.7, allocation="score")
    expected = logits(model, batch)
    if final:
        finalize(model)
    model.save_pretrained(tmp_path)
    dense = logits(make(), batch)
    assert not torch.equal(expected, dense)

    by_peft = PeftModel.from_pretrained(make(), tmp_path)
    assert torch.equal(logits(by_peft, batch), expected)
    low_memory = PeftModel.from_pretrained(make(), tmp_path, low_cpu_mem_usage=True)
    assert torch.equal(logits(low_memory, batch), expected)
    by_transformers = make()
    by_transformers.load_adapter(str(tmp_path), adapter_name="mask")
    assert torch.equal(logits(by_transformers, batch), expected)
    if not OLD_PEFT:
        by_transformers.disable_adapters()
        assert torch.equal(logits(by_transformers, batch), dense)
    config = by_peft.peft_config["default"]
    injected = inject_adapter_in_model(config, make())
    set_peft_model_state_dict(injected, get_peft_model_state_dict(by_peft))
    assert torch.equal(logits(injected, batch), expected)


def test_auto_model_and_second_adapter(tmp_path, batch):
    make_bert().save_pretrained(tmp_path / "base")
    from transformers import AutoModelForSequenceClassification

    base = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base")
    model = prune(base, 0.6, task_type="SEQ_CLS")
    model.base_model.model.classifier.modules_to_save["default"].weight.data.add_(1.0)
    finalize(model)
    expected = logits(model, batch)
    model.save_pretrained(tmp_path / "adapter")
    loaded = AutoPeftModelForSequenceClassification.from_pretrained(tmp_path / "adapter")
    assert torch.equal(logits(loaded, batch), expected)
    final_adapter(tmp_path / "other", at=0.3, task_type="SEQ_CLS")
    loaded.load_adapter(tmp_path / "other", "other")
    assert torch.equal(logits(loaded, batch), expected)
    assert torch.equal(logits(loaded.merge_and_unload(), batch), expected)


def test_unfinished_adapter_goes_on_where_it_was(tmp_path, batch):
    model = get_peft_model(make_bert(), SMPConfig(sparsity=0.9, total_steps=10))
    randomize_scores(model)
    update_schedule(model, 3)
    with pytest.warns(UserWarning, match="saved with its scores.*finalize"):
        model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(make_bert(), tmp_path, is_trainable=True)
    assert torch.equal(logits(loaded, batch), logits(model, batch))
    layer = pruning_layers(loaded)[0]
    assert layer.scores["default"].requires_grad and layer.progress["default"][:2].tolist() == [3, 10]
    for either in (model, loaded):
        update_schedule(either, 10)
    assert torch.equal(logits(loaded, batch), logits(model, batch))


def test_loaded_final_adapter_is_saved_again_alike(tmp_path):
    final_adapter(tmp_path / "one")
    PeftModel.from_pretrained(make_bert(), tmp_path / "one").save_pretrained(tmp_path / "two")
    one, two = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("one", "two"))
    assert one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)


@pytest.mark.parametrize("kind", DAMAGE)
def test_damaged_file_is_told_and_the_base_stays_whole(tmp_path, kind):
    damage, error, message = DAMAGE[kind]
    final_adapter(tmp_path)
    damage(tmp_path)
    base = make_bert()
    weights = {name: p.clone() for name, p in base.named_parameters()}
    with pytest.raises(error, match=message):
        PeftModel.from_pretrained(base, tmp_path)
    after = {name.replace(".base_layer", ""): p for name, p in base.named_parameters()}
    assert all(torch.equal(weights[name], after[name]) for name in weights)


@pytest.mark.parametrize("kind", ["two tensors swapped", "one bit flipped", "another adapter's file"])
def test_damage_is_told_on_transformers_own_road_too(tmp_path, kind, batch):
    final_adapter(tmp_path)
    DAMAGE[kind][0](tmp_path)
    model = make_bert()
    # a tensor of another size is what Transformers itself notices
    with pytest.raises((MaskFormatError, RuntimeError), match="does not match its record|ignore_mismatched_sizes"):
        model.load_adapter(str(tmp_path))
        logits(model, batch)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 64}, r"query' is \(64, 64\) in this model, but the adapter's mask is for \(32, 32\)"),
        ({"intermediate_size": 64}, "intermediate.dense.*another base model"),
        ({"num_hidden_layers": 3}, "has no mask for 'bert.encoder.layer.2"),
        ({"num_hidden_layers": 1}, "mask for the absent module 'bert.encoder.layer.1"),
    ],
)
def test_another_base_model_is_told_before_anything_is_replaced(tmp_path, changes, message):
    final_adapter(tmp_path)
    base = make_bert(**changes)
    before = snapshot(base)
    with pytest.raises(MaskFormatError, match=message):
        PeftModel.from_pretrained(base, tmp_path)
    with pytest.raises(MaskFormatError, match=message):
        base.load_adapter(str(tmp_path))
    after = snapshot(base)
    assert before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before)


def test_another_class_of_the_same_model_is_told(tmp_path):
    final_adapter(tmp_path)
    with pytest.raises(
        MaskFormatError, match=r"another class of the same one: the adapter's modules begin with 'bert\.'"
    ):
        PeftModel.from_pretrained(make_bert().bert, tmp_path)


def test_scores_of_another_model_are_told(tmp_path):
    prune(make_bert()).save_pretrained(tmp_path)
    with pytest.raises(MaskFormatError, match=r"scores of .* are \(32, 32\) in the file but \(64, 64\)"):
        PeftModel.from_pretrained(make_bert(hidden_size=64), tmp_path)


def test_newer_format_is_told(tmp_path):
    final_adapter(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"mask_format": 7}))
    with pytest.raises(ValueError, match="mask_format=7.*pip install -U"):
        PeftModel.from_pretrained(make_bert(), tmp_path)


def test_adapter_readme_says_to_import(tmp_path):
    model = final_adapter(tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert card.count("import peft_prune") == 1 and "sparsity of 50%" in card and "library_name: peft" in card
    model.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == card
    (tmp_path / "README.md").write_text("# My own words\n")
    model.save_pretrained(tmp_path)
    assert "import peft_prune" in (tmp_path / "README.md").read_text().split("# My own words")[1]

    project = tmp_path / "project"
    project.mkdir()
    (project / "README.md").write_text("# Not an adapter\n")
    SMPConfig().save_pretrained(project / "adapter")
    SMPConfig().save_pretrained(project)
    assert (project / "README.md").read_text() == "# Not an adapter\n"


def test_readme_of_a_checkpoint_says_that_it_is_one(tmp_path):
    model = get_peft_model(make_bert(), SMPConfig(sparsity=0.9, granularity="weight"))
    model.save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert "training checkpoint" in card and "sparsity was 0%" in card and "target is a sparsity of 90%" in card
    update_schedule(model, 5, 10)
    reached = 1 - sum(int(m.get_mask("default").sum()) for m in pruning_layers(model)) / BERT_TARGET_WEIGHTS
    model.save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert 0 < reached < 0.9 and f"sparsity was {100 * reached:.3g}%" in card and "was 0%" not in card
    with pytest.warns(UserWarning, match="finalized at sparsity"):
        finalize(model)
    model.save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert f"prunes the base model to a sparsity of {100 * reached:.3g}%" in card and "training checkpoint" not in card
    assert card.count("import peft_prune") == 1


def test_readme_of_a_checkpoint_that_finds_its_sparsity_names_no_target(tmp_path):
    config = MovementPruningConfig(variant="soft")
    assert config.recipe().rule.finds_sparsity
    get_peft_model(make_bert(), config).save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert "training checkpoint" in card and "Training decides the sparsity" in card and "target is" not in card


def test_masked_lm_adapter(tmp_path, batch):
    model = final_adapter(tmp_path, make=make_masked_lm)
    assert torch.equal(logits(PeftModel.from_pretrained(make_masked_lm(), tmp_path), batch), logits(model, batch))
    assert sum(m.shape[0] * m.shape[1] for m in pruning_layers(model)) == BERT_TARGET_WEIGHTS
