"""SparseGPT in the middle of training: what is removed, and what stays, is what SparseGPT says of the model by then."""

import copy

import pytest
import torch
from helpers.callbacks import Record
from helpers.data import arguments, data
from helpers.models import logits, make_bert, make_llama
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import Trainer

from peft_prune import (
    MovementPruningConfig,
    PruningCallback,
    PruningTrainer,
    SparseGPTConfig,
    calibrate,
    create_pruning_optimizer,
    finalize,
    prune_once,
    update_schedule,
)
from peft_prune.layers.layer import pruning_layers


STEPS = 10


def batches(count=4):
    generator = torch.Generator().manual_seed(4)
    return [{"input_ids": torch.randint(5, 90, (8, 12), generator=generator)} for _ in range(count)]


def bert(**fields):
    fields = {"task_type": "SEQ_CLS", "variant": "sparsegpt", "sparsity": 0.5, "num_samples": 32} | fields
    return get_peft_model(make_bert(initializer_range=0.2), MovementPruningConfig(total_steps=STEPS, **fields))


def step(model, optimizer, batch):
    labels = batch["input_ids"][:, 0] % 2
    model(**batch, labels=labels).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def trained(model, until, seen=None):
    """A plain loop up to some step of the schedule."""
    optimizer = create_pruning_optimizer(model, lr=1e-2)
    update_schedule(model, 0, batches=batches())
    for number in range(until):
        step(model, optimizer, batches()[number % 4])
        update_schedule(model, number + 1, batches=batches())
        if seen is not None:
            seen.append((model, number + 1))
    return model


def weights(model):
    """The matrices that an adapter makes, merged by PEFT."""
    merged = copy.deepcopy(model).merge_and_unload()
    return {name: tensor for name, tensor in merged.state_dict().items() if ".layer." in name and tensor.dim() == 2}


def sparsegpt(base, sparsity):
    """What SparseGPT makes of a model without training."""
    config = SparseGPTConfig(task_type="SEQ_CLS", sparsity=sparsity, value_dtype="float32", num_samples=32)
    model = get_peft_model(copy.deepcopy(base), config)
    calibrate(model, batches())
    return weights(model)


def sparsity(model):
    tensors = weights(model).values()
    return sum(int((t == 0).sum()) for t in tensors) / sum(t.numel() for t in tensors)


def assert_alike(found, expected):
    """The same weights are zero, and the others equal; rounding grows from block to block."""
    assert torch.equal(found == 0, expected == 0)
    torch.testing.assert_close(found, expected, atol=1e-2, rtol=1e-2)


def test_weights_at_once_are_those_of_sparsegpt_on_what_was_trained():
    model = bert(sparsity_schedule="constant", schedule_start=0.3)
    trained(model, 2)
    assert sparsity(model) < 0.01
    optimizer = create_pruning_optimizer(model, lr=1e-2)
    step(model, optimizer, batches()[0])
    fine_tuned = copy.deepcopy(model).merge_and_unload()
    update_schedule(model, 3, batches=batches())
    expected = sparsegpt(fine_tuned, 0.5)
    for name, found in weights(model).items():
        assert_alike(found, expected[name])
    assert sparsity(model) == pytest.approx(0.5, abs=0.01)


def test_each_stage_prunes_what_was_trained_since_the_last_one():
    model = bert(schedule_start=0.0, schedule_end=0.9)
    stages = model.peft_config["default"].stages(STEPS)
    assert list(stages) == [3, 6, 9]
    optimizer = create_pruning_optimizer(model, lr=1e-2)
    update_schedule(model, 0, batches=batches())
    for number in range(1, STEPS + 1):
        step(model, optimizer, batches()[number % 4])
        before = copy.deepcopy(model).merge_and_unload()
        update_schedule(model, number, batches=batches())
        after = weights(model)
        expected = sparsegpt(before, 0.5 * stages[number]) if number in stages else None
        for name, found in after.items():
            if expected is None:
                assert torch.equal(found, before.state_dict()[name])
            else:
                assert_alike(found, expected[name])
    assert sparsity(model) == pytest.approx(0.5, abs=0.01)


def test_kept_weights_are_trained_on_and_removed_ones_stay_zero():
    model = trained(bert(schedule_start=0.0, schedule_end=0.5), 5)
    before = weights(model)
    optimizer = create_pruning_optimizer(model, lr=1e-2)
    step(model, optimizer, batches()[1])
    for name, after in weights(model).items():
        assert torch.equal(after == 0, before[name] == 0)
        moved = (after - before[name])[before[name] != 0].abs()
        assert (moved > 0).float().mean() > 0.9


def test_what_is_saved_and_loaded_computes_the_same(tmp_path):
    model = trained(bert(), STEPS)
    expected = logits(model, batches()[0])
    finalize(model)
    assert torch.equal(logits(model, batches()[0]), expected)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(make_bert(initializer_range=0.2), tmp_path)
    torch.testing.assert_close(logits(loaded, batches()[0]), expected)
    torch.testing.assert_close(logits(loaded.merge_and_unload(), batches()[0]), expected)


def test_n_m_is_pruned_in_one_stage():
    model = trained(bert(granularity="2:4"), STEPS)
    assert len(model.peft_config["default"].stages(100)) == 1
    for tensor in weights(model).values():
        assert int((tensor.view(-1, 4) != 0).sum(1).max()) <= 2


@pytest.mark.parametrize("trainer_class", [PruningTrainer, Trainer])
def test_a_trainer_shows_its_own_data(trainer_class, tmp_path):
    model = bert(num_samples=16)
    record = Record()
    callbacks = [record] if trainer_class is PruningTrainer else [PruningCallback(), record]
    trainer = trainer_class(
        model=model, args=arguments(tmp_path, max_steps=STEPS, learning_rate=1e-3), train_dataset=data(),
        callbacks=callbacks,
    )  # fmt: skip
    trainer.train()
    assert model.peft_config["default"].finalized
    assert sparsity(model) == pytest.approx(0.5, abs=0.02)


def test_a_trainer_that_is_resumed_goes_on_with_the_same_masks(tmp_path):
    def run(folder, resume=None):
        model = bert(num_samples=16, schedule_start=0.0, schedule_end=0.8)
        args = arguments(folder, max_steps=STEPS, save_steps=5, save_strategy="steps", learning_rate=1e-3)
        trainer = PruningTrainer(model=model, args=args, train_dataset=data())
        trainer.train(resume_from_checkpoint=resume)
        return weights(model)

    whole = run(tmp_path / "whole")
    resumed = run(tmp_path / "again", str(tmp_path / "whole" / "checkpoint-5"))
    for name, tensor in whole.items():
        torch.testing.assert_close(tensor, resumed[name], atol=1e-6, rtol=1e-5)


def test_what_was_pruned_by_hand_is_not_taken_back_by_a_stage():
    model = bert(schedule_start=0.0, schedule_end=0.9)
    assert prune_once(model, batches=batches()) == pytest.approx(0.5, abs=0.01)
    for number in range(STEPS + 1):
        update_schedule(model, number, batches=batches())
        assert sparsity(model) == pytest.approx(0.5, abs=0.01)
        kept = sum(int(layer.get_mask("default").sum()) for layer in pruning_layers(model))
        assert kept <= 0.51 * sum(layer.weight.numel() for layer in pruning_layers(model))


def test_rows_that_cannot_keep_the_share_asked_for_are_told():
    model = trained(bert(sparsity=0.95), STEPS)  # of 32 weights in a row 2 stay
    with pytest.warns(UserWarning, match=r"at sparsity 0\.9\d*, not at the 0\.9500 .*a whole number"):
        finalize(model)


def test_by_hand_and_on_a_language_model():
    config = MovementPruningConfig(task_type="CAUSAL_LM", variant="sparsegpt", sparsity=0.75, num_samples=32)
    model = get_peft_model(make_llama(initializer_range=0.2), config)
    assert prune_once(model, batches=batches()) == pytest.approx(0.75, abs=0.03)
    finalize(model)
    assert model.peft_config["default"].finalized


def test_what_cannot_work_is_told_before_the_first_step():
    model = bert()
    for given, match in ((None, "no batches"), (iter(batches()), "can be read once only")):
        with pytest.raises(ValueError, match=f"update_schedule: .*{match}.*PruningTrainer"):
            update_schedule(model, 0, batches=given)
    for given, match in (([], "is empty"), ([{"text": "a"}], "entries .'text'. is a tensor"), ([1], "mappings")):
        with pytest.raises(ValueError, match=match):
            update_schedule(model, 0, batches=given)
    with pytest.raises(ValueError, match=r"update_schedule: batches is a single batch .*'input_ids'.*batches=.batch"):
        update_schedule(model, 0, batches=batches()[0])
    with pytest.raises(ValueError, match=r"prune_once: .*no batches"):
        prune_once(model)
    for fields, match in (
        ({"update": "none"}, "update='none'.*score='sparsegpt'"),
        ({"update": "low_rank"}, "update='low_rank'.*score='sparsegpt'"),
        ({"mask": "threshold", "sparsity": None}, "mask='threshold'"),
        ({"allocation": "global"}, "allocation='global'.*score='sparsegpt'"),
        ({"initial_sparsity": 0.2}, "initial_sparsity=0.2"),
        ({"granularity": "row"}, "granularity='row'"),
        ({"penalty": 3.0}, "penalty=3.0 has no effect"),
        ({"score_init": "wanda"}, "score_init='wanda'"),
    ):
        with pytest.raises(ValueError, match=match):
            bert(**fields)


def test_an_interrupted_stage_leaves_nothing_half_pruned(monkeypatch):
    model = bert(sparsity_schedule="constant", schedule_start=0.0)
    before = weights(model)
    calls = []

    def fail(layer, name, mask):
        calls.append(layer)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return plain(layer, name, mask)

    kind = type(pruning_layers(model)[0])
    plain = kind.set_bits
    monkeypatch.setattr(kind, "set_bits", fail)
    with pytest.raises(KeyboardInterrupt):
        update_schedule(model, 0, batches=batches())
    monkeypatch.undo()
    for name, tensor in weights(model).items():
        assert torch.equal(tensor, before[name])


def test_layers_that_have_no_solution_are_named():
    torch.manual_seed(0)
    base = nn.Sequential(nn.Embedding(50, 8), nn.Linear(8, 8))
    config = MovementPruningConfig(variant="sparsegpt", sparsity=0.5, target_modules=["0"], total_steps=4)
    with pytest.raises(TypeError, match="'0'.*Linear"):
        get_peft_model(base, config)
