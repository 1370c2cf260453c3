"""The verbalizer head against the masked LM's own logits."""

import copy

import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from helpers.data import tokenizer
from helpers.models import make_bert, make_masked_lm, snapshot
from helpers.verbalizer import IDS, MASK, POSITIONS, verbalizer
from peft import AutoPeftModel, PeftModel, get_peft_model
from transformers import BertConfig, BertForMaskedLM, RobertaConfig, RobertaForMaskedLM

from peft_prune import PruningTrainer, SMPConfig, make_verbalizer
from peft_prune.layers.layer import pruning_layers


def make_roberta():
    torch.manual_seed(0)
    config = RobertaConfig(
        vocab_size=120,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        max_position_embeddings=40,
    )
    return RobertaForMaskedLM(config).eval()


def test_label_words_are_looked_up():
    assert verbalizer() == {
        "task": "SEQ_CLS",
        "words": ["terrible", "great"],
        "token_ids": [10, 11],
        "mask_token_id": MASK,
    }


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({0: "terrible", 1: "unknown"}, "'unknown' is .* Use a word that is one token"),
        ({0: "terrible", 1: "good bad"}, "one token"),
        ({0: "great", 1: "great"}, "same token"),
        ({1: "terrible", 2: "great"}, "class ids 0, 1, 2"),
        ({0: "great"}, "at least two"),
    ],
)
def test_bad_label_words_are_told(words, message):
    with pytest.raises(ValueError, match=message):
        make_verbalizer(tokenizer(), words)
    with pytest.raises(ValueError, match="task='NER'"):
        verbalizer(task="NER")


@pytest.mark.parametrize("make", [make_masked_lm, make_roberta])
def test_logits_are_those_of_the_label_words_at_the_mask(make):
    base = make()
    with torch.no_grad():
        full = base(input_ids=IDS).logits
    expected = torch.stack([full[i, position, [10, 11]] for i, position in enumerate(POSITIONS)])
    before = {name for name, _ in base.named_parameters()}
    model = get_peft_model(base, SMPConfig(verbalizer=verbalizer()))
    labels = torch.tensor([0, 1, 1])
    output = model(input_ids=IDS, labels=labels)
    torch.testing.assert_close(output.logits, expected)
    torch.testing.assert_close(output.loss, F.cross_entropy(expected, labels))
    part = model(input_ids=IDS, labels=labels, num_items_in_batch=12).loss  # one of four batches of three
    torch.testing.assert_close(part, F.cross_entropy(expected, labels, reduction="sum") / 12)
    as_tuple = model(input_ids=IDS, labels=labels, return_dict=False)
    torch.testing.assert_close(as_tuple[:2], (output.loss, output.logits))
    assert model(IDS).loss is None
    # no new parameter but the scores
    after = {n.replace(".base_layer", "") for n, _ in model.get_base_model().named_parameters() if "smp_" not in n}
    assert after == before


def test_question_answering_reads_every_position():
    base = make_masked_lm()
    with torch.no_grad():
        full = base(input_ids=IDS).logits
    model = get_peft_model(base, SMPConfig(verbalizer=verbalizer(task="QUESTION_ANS")))
    start, end = torch.tensor([1, 2, 9]), torch.tensor([2, 2, 9])  # 9 lies outside: it does not count
    output = model(input_ids=IDS, start_positions=start, end_positions=end)
    torch.testing.assert_close(output.start_logits, full[..., 10])
    torch.testing.assert_close(output.end_logits, full[..., 11])
    expected = (F.cross_entropy(full[:2, :, 10], start[:2]) + F.cross_entropy(full[:2, :, 11], end[:2])) / 2
    torch.testing.assert_close(output.loss, expected)


def test_follows_the_active_adapter_and_disabling(batch):
    base = make_masked_lm()
    with torch.no_grad():
        full = base(input_ids=IDS).logits
    model = get_peft_model(base, SMPConfig(verbalizer=verbalizer()))
    model.add_adapter("plain", SMPConfig())
    other = verbalizer() | {"words": ["bad", "fair", "good"], "token_ids": [5, 6, 7]}
    model.add_adapter("other", SMPConfig(verbalizer=other))
    assert model(input_ids=IDS).logits.shape == (3, 2)
    model.set_adapter("other")
    assert model(input_ids=IDS).logits.shape == (3, 3)
    model.set_adapter("plain")
    torch.testing.assert_close(model(input_ids=IDS).logits, full)


def test_an_error_inside_leaves_the_head_usable():
    model = get_peft_model(make_masked_lm(), SMPConfig(verbalizer=verbalizer()))
    with pytest.raises(IndexError):
        model(input_ids=IDS + 1000)
    assert model(input_ids=IDS).logits.shape == (3, 2)


@pytest.mark.slow
def test_trains_with_trainer_and_loads_from_the_config(tmp_path):
    make_masked_lm().save_pretrained(tmp_path / "base")
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, 100, (128, 6), generator=generator)
    ids[:, 2] = MASK
    labels = torch.randint(0, 2, (128,), generator=generator)
    ids[:, 1] = 20 + 40 * labels  # one of two tokens tells the class
    data = Dataset.from_dict({"input_ids": ids.tolist(), "labels": labels.tolist()})
    base = BertForMaskedLM.from_pretrained(tmp_path / "base")
    before = snapshot(base)
    config = SMPConfig(sparsity=0.3, verbalizer=verbalizer(), penalty=0, score_init="magnitude")
    model = get_peft_model(base, config)
    from helpers.data import arguments

    args = arguments(tmp_path / "run", max_steps=150, per_device_train_batch_size=32)
    trainer = PruningTrainer(model=model, args=args, train_dataset=data, eval_dataset=data)
    trainer.train()
    prediction = trainer.predict(data).predictions
    assert prediction.shape == (128, 2)
    assert (prediction.argmax(-1) == labels.numpy()).mean() > 0.95
    trainer.save_model(str(tmp_path / "adapter"))

    stored = PeftModel.from_pretrained(BertForMaskedLM.from_pretrained(tmp_path / "base"), tmp_path / "adapter")
    automatic = AutoPeftModel.from_pretrained(tmp_path / "adapter")
    for loaded in (stored, automatic):
        with torch.no_grad():
            torch.testing.assert_close(loaded.eval()(input_ids=ids).logits.numpy(), prediction)
    assert set(trainer.model.peft_config["default"].mask_info) == {m.module_name for m in pruning_layers(model)}
    after = snapshot(model.unload())
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_models_without_a_masked_lm_head_are_told():
    for base in (make_bert(), BertForMaskedLM(BertConfig(vocab_size=9, hidden_size=8, num_attention_heads=1)).bert):
        with pytest.raises(ValueError, match="has no masked-LM head.*AutoModelForMaskedLM"):
            get_peft_model(base, SMPConfig(verbalizer=verbalizer()))


def test_a_deep_copy_has_a_head_of_its_own():
    model = get_peft_model(make_masked_lm(), SMPConfig(sparsity=0.5, verbalizer=verbalizer())).eval()
    copied = copy.deepcopy(model)
    with torch.no_grad():
        before = model(input_ids=IDS).logits
        assert torch.equal(copied(input_ids=IDS).logits, before)
        copied.get_output_embeddings().weight.zero_()
        assert torch.equal(model(input_ids=IDS).logits, before)
