"""The distillation loss for every kind of head, against PyTorch's own."""

import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from helpers.callbacks import Gradients
from helpers.data import arguments, data
from helpers.methods import TRAINED, adapter, smp_bert
from helpers.models import BERT, make_bert, make_llama
from peft import LoraConfig, get_peft_model
from transformers import BertConfig, BertForTokenClassification
from transformers.modeling_outputs import (
    QuestionAnsweringModelOutput,
    SequenceClassifierOutput,
    TokenClassifierOutput,
)

from peft_prune import (
    DistillationTrainer,
    PruningCallback,
    PruningTrainer,
    SMPConfig,
    distillation_loss,
    update_schedule,
)
from peft_prune.training import divergence
from peft_prune.training.divergence import token_divergence
from peft_prune.training.teacher import as_base


def kl(student, teacher, temperature):
    p = F.softmax(teacher / temperature, -1)
    return (p * (p.log() - F.log_softmax(student / temperature, -1))).sum(-1) * temperature**2


def test_classification_and_regression():
    student, teacher = torch.randn(4, 3), torch.randn(4, 3)
    ours = distillation_loss(SequenceClassifierOutput(logits=student), SequenceClassifierOutput(logits=teacher), 2.0)
    torch.testing.assert_close(ours, kl(student, teacher, 2.0).mean())
    student, teacher = torch.randn(4, 1), torch.randn(4, 1)
    ours = distillation_loss(SequenceClassifierOutput(logits=student), SequenceClassifierOutput(logits=teacher))
    torch.testing.assert_close(ours, F.mse_loss(student, teacher))


@pytest.mark.parametrize("num_items", [None, 20])
def test_positions_without_a_label_do_not_count(num_items):
    student, teacher = torch.randn(2, 5, 3), torch.randn(2, 5, 3)
    labels = torch.tensor([[0, 1, 2, -100, -100], [1, 1, -100, -100, -100]])
    outputs = TokenClassifierOutput(logits=student), TokenClassifierOutput(logits=teacher)
    ours = distillation_loss(*outputs, 2.0, labels, num_items)
    torch.testing.assert_close(ours, kl(student, teacher, 2.0)[labels != -100].sum() / (num_items or 5))


def test_question_answering():
    s1, s2, t1, t2 = (torch.randn(3, 7) for _ in range(4))
    outputs = (
        QuestionAnsweringModelOutput(start_logits=s1, end_logits=s2),
        QuestionAnsweringModelOutput(start_logits=t1, end_logits=t2),
    )
    expected = (kl(s1, t1, 3.0).mean() + kl(s2, t2, 3.0).mean()) / 2
    torch.testing.assert_close(distillation_loss(*outputs, 3.0), expected)


def test_another_head_is_told():
    with pytest.raises(ValueError, match=r"teacher's logits are \(4, 3\) but the student's are \(4, 2\)"):
        outputs = (SequenceClassifierOutput(logits=torch.randn(4, n)) for n in (2, 3))
        distillation_loss(*outputs)


def test_trainer_mixes_task_and_teacher(tmp_path):
    teacher = make_bert(seed=7).train()
    model = smp_bert()
    trainer = PruningTrainer(
        model=model,
        args=arguments(tmp_path),
        train_dataset=data(),
        teacher=teacher,
        distillation_alpha=0.3,
        distillation_temperature=4.0,
    )
    assert not teacher.training and not any(p.requires_grad for p in teacher.parameters())
    update_schedule(model, 5, 10)
    inputs = {name: torch.tensor(data(8)[name][:]) for name in ("input_ids", "attention_mask", "labels")}
    model.train()
    loss = trainer.compute_loss(model, dict(inputs))
    student, answers = model(**inputs), teacher(**inputs)
    expected = 0.7 * F.cross_entropy(student.logits, inputs["labels"])
    expected = expected + 0.3 * kl(student.logits, answers.logits, 4.0).mean()
    torch.testing.assert_close(loss, expected)
    model.eval()
    torch.testing.assert_close(trainer.compute_loss(model, dict(inputs)), model(**inputs).loss)


def test_labels_that_do_not_exclude_each_other_and_regression_with_several_outputs():
    student, teacher = torch.randn(4, 3), torch.randn(4, 3)
    outputs = SequenceClassifierOutput(logits=student), SequenceClassifierOutput(logits=teacher)
    p, q = torch.sigmoid(teacher / 2), torch.sigmoid(student / 2)
    expected = 4 * (p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()).mean()
    torch.testing.assert_close(distillation_loss(*outputs, problem_type="multi_label_classification"), expected)
    torch.testing.assert_close(distillation_loss(*outputs, problem_type="regression"), F.mse_loss(student, teacher))


def token_classifier(seed):
    torch.manual_seed(seed)
    return BertForTokenClassification(BertConfig(**BERT, num_labels=3)).eval()


def distance_in_trainer(folder, student, teacher, batch, func=None, **changes):
    model = get_peft_model(student, SMPConfig(sparsity=0.5))
    update_schedule(model, 0, 10)
    args = arguments(folder, **changes)
    rows = Dataset.from_dict({name: tensor.tolist() for name, tensor in batch.items()})
    trainer = PruningTrainer(
        model=model, args=args, train_dataset=rows, teacher=teacher, distillation_alpha=1.0, compute_loss_func=func
    )
    model.train()
    loss = trainer.compute_loss(model, dict(batch))
    return loss, kl(model(input_ids=batch["input_ids"]).logits, teacher(input_ids=batch["input_ids"]).logits, 2.0)


def token_loss(outputs, labels, num_items_in_batch=None):
    loss = F.cross_entropy(outputs["logits"].flatten(0, 1), labels.flatten(), reduction="sum")
    return loss / (num_items_in_batch or (labels != -100).sum())


@pytest.mark.parametrize("func, smoothing", [(None, 0.0), (None, 0.1), (token_loss, 0.0)])
def test_positions_without_a_label_do_not_count_where_trainer_takes_the_labels_out(tmp_path, func, smoothing):
    labels = torch.randint(0, 3, (4, 8))
    labels[:, 3:] = -100
    batch = {"input_ids": torch.randint(2, 90, (4, 8)), "labels": labels}
    models = token_classifier(0), token_classifier(5)
    loss, rows = distance_in_trainer(tmp_path, *models, batch, func, label_smoothing_factor=smoothing)
    torch.testing.assert_close(loss, rows[:, :3].mean())


def test_a_causal_lm_is_compared_where_it_predicts_a_label(tmp_path):
    ids = torch.randint(2, 90, (2, 8))
    labels = ids.clone()
    labels[:, :5] = -100
    loss, rows = distance_in_trainer(tmp_path, make_llama(), make_llama(5), {"input_ids": ids, "labels": labels})
    torch.testing.assert_close(loss, rows[:, 4:7].mean())


def class_loss(outputs, labels, num_items_in_batch=None):
    return F.cross_entropy(outputs["logits"], labels, reduction="sum") / num_items_in_batch


@pytest.mark.parametrize("head", ["class_loss", "tokens"])
@pytest.mark.parametrize("alpha", [0.0, 0.5])
def test_accumulation_changes_neither_task_nor_distillation(tmp_path, head, alpha):
    torch.manual_seed(0)
    tokens = {name: torch.randint(0, 3, (32, 8)).tolist() for name in ("input_ids", "labels")}
    seen = []
    for batch_size, accumulation in ((32, 1), (8, 4)):
        changes = {"per_device_train_batch_size": batch_size, "gradient_accumulation_steps": accumulation}
        args = arguments(tmp_path, max_steps=2, max_grad_norm=0.0, learning_rate=0.0, **changes)
        gradients = Gradients()
        base, teacher = (make_bert(), make_bert(seed=7)) if head == "class_loss" else map(token_classifier, (0, 7))
        PruningTrainer(
            model=get_peft_model(base, SMPConfig(sparsity=0.5, modules_to_save=["classifier"])),
            args=args,
            train_dataset=data(32) if head == "class_loss" else Dataset.from_dict(tokens),
            compute_loss_func=class_loss if head == "class_loss" else None,
            teacher=teacher,
            distillation_alpha=alpha,
            score_lr=0.0,
            callbacks=[PruningCallback(), gradients],
        ).train()
        seen.append(gradients.seen)
    for name, gradient in seen[0].items():
        torch.testing.assert_close(seen[1][name], gradient, rtol=1e-3, atol=1e-3 * gradient.abs().max().item())


# --------------------------------------------------------------------- a few tokens at a time


def plain_divergence(student, teacher, weights, temperature):
    """All at once, by PyTorch."""
    ours, theirs = (F.log_softmax(logits.float() / temperature, -1) for logits in (student, teacher))
    rows = F.kl_div(ours, theirs, reduction="none", log_target=True).sum(-1)
    return (rows * weights).sum() * temperature**2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_divergence_in_chunks_is_that_of_all_tokens_at_once(dtype, overwrite, temperature, monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr(divergence, "_AT_ONCE", 3 * 50)
    student, teacher = (3 * torch.randn(2, 8, 50, dtype=dtype) for _ in range(2))
    weights = torch.rand(2, 8)
    weights[0, 2:6] = 0
    one, two = (student.clone().requires_grad_() for _ in range(2))
    expected = plain_divergence(one, teacher, weights, temperature)
    (5 * expected).backward()
    given = teacher.clone()
    found = token_divergence(two, given, weights, temperature, overwrite)
    (5 * found).backward()
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected.detach())
    torch.testing.assert_close(two.grad, one.grad, rtol=1e-5 if dtype == torch.float32 else 0.02, atol=1e-6)
    assert overwrite or torch.equal(given, teacher)
    with torch.no_grad():
        torch.testing.assert_close(token_divergence(student, teacher, weights, temperature), expected.detach())


def test_divergence_keeps_one_tensor_of_the_size_of_the_logits_and_that_is_the_teachers():
    student, teacher = torch.randn(64, 500, requires_grad=True), torch.randn(64, 500)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        loss = token_divergence(student, teacher, torch.ones(64), 2.0, overwrite_teacher=True)
    assert [t.data_ptr() for t in kept if t.numel() > 64] == [teacher.data_ptr()]
    loss = token_divergence(student, teacher, torch.ones(64), 2.0)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_tokens_that_do_not_count_need_not_be_finite():
    student, teacher = torch.randn(4, 9, requires_grad=True), torch.randn(4, 9)
    teacher[1] = float("nan")
    token_divergence(student, teacher, torch.tensor([1.0, 0, 1, 1]), 1.0, overwrite_teacher=True).backward()
    assert bool(torch.isfinite(student.grad).all()) and not student.grad[1].any()


# --------------------------------------------------------------------- the base as the teacher


def llama_adapter(**fields):
    model = get_peft_model(
        make_llama(), SMPConfig(**{"task_type": "CAUSAL_LM", "sparsity": 0.6, "preset": "encoder"} | fields)
    )
    update_schedule(model, 10, 10)
    return model


@pytest.mark.parametrize("method", TRAINED)
def test_the_base_is_the_model_without_its_adapter_and_no_copy(method, batch):
    model, ids = adapter(make_llama(), method, final=False, task_type="CAUSAL_LM").train(), batch["input_ids"]
    with torch.no_grad():
        pruned, dense = model(input_ids=ids).logits, make_llama()(input_ids=ids).logits
    before = {name: (id(p), p.requires_grad) for name, p in model.named_parameters()}
    modes = [module.training for module in model.modules()]
    with as_base(model) as base:
        answers = base(input_ids=ids).logits
        assert not torch.is_grad_enabled() and not base.training
    assert torch.equal(answers, dense) and not torch.equal(answers, pruned)
    assert {name: (id(p), p.requires_grad) for name, p in model.named_parameters()} == before
    assert [module.training for module in model.modules()] == modes
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, pruned)
    with pytest.raises(KeyError), as_base(model):
        raise KeyError
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, pruned), "whatever happens"


def test_the_base_has_its_own_head_and_ignores_adapters_that_are_off_already(batch):
    base = make_bert()
    model = get_peft_model(base, SMPConfig(sparsity=0.5, modules_to_save=["classifier"]))
    update_schedule(model, 10, 10)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "modules_to_save" in name:
                parameter.add_(1.0)
        with as_base(model):
            answers = model(input_ids=batch["input_ids"]).logits
        assert torch.equal(answers, make_bert()(input_ids=batch["input_ids"]).logits)
        with model.disable_adapter():
            with as_base(model):
                pass
            assert torch.equal(model(input_ids=batch["input_ids"]).logits, answers), "still off"


@pytest.mark.parametrize("alpha", [0.3, 1.0])
def test_a_trainer_distils_from_the_base_where_labels_count(alpha, tmp_path):
    """As completion-only training has it: the prompt's labels are -100."""
    ids = torch.randint(2, 90, (4, 8))
    labels = ids.clone()
    labels[:, :5] = -100
    rows = Dataset.from_dict({"input_ids": ids.tolist(), "labels": labels.tolist()})
    model = llama_adapter(penalty=0.0)
    trainer = PruningTrainer(
        model=model, args=arguments(tmp_path), train_dataset=rows, teacher="base", distillation_alpha=alpha
    )
    model.train()
    batch = {"input_ids": ids, "labels": labels}
    loss, outputs = trainer.compute_loss(model, dict(batch), return_outputs=True)
    assert ("loss" in outputs) == (alpha < 1), "where it has no weight, the task's loss is not computed"
    loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()

    student = model(**batch)
    with torch.no_grad():
        teacher = make_llama()(**batch)
    task = F.cross_entropy(student.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    expected = (1 - alpha) * task + alpha * kl(student.logits, teacher.logits, 2.0)[:, 4:7].mean()
    torch.testing.assert_close(loss, expected)
    expected.backward()
    assert len(found) == 14
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, model.get_parameter(name).grad, rtol=1e-3, atol=1e-7)


def test_training_towards_the_base_comes_closer_to_it(tmp_path):
    torch.manual_seed(0)
    ids = torch.randint(2, 90, (16, 12))
    rows = Dataset.from_dict({"input_ids": ids.tolist(), "labels": ids.tolist()})
    model = get_peft_model(
        make_llama(initializer_range=0.3),
        SMPConfig(
            task_type="CAUSAL_LM", sparsity=0.5, allocation="row", score_init="wanda", sparsity_schedule="constant",
            penalty=0.0, score_lr=5e-2, score_betas=[0.9, 0.99],
        ),
    )  # fmt: skip
    args = arguments(
        tmp_path, max_steps=40, per_device_train_batch_size=8, gradient_accumulation_steps=2, bf16=True,
        gradient_checkpointing=True,
    )  # fmt: skip
    trainer = PruningTrainer(model=model, args=args, train_dataset=rows, teacher="base", distillation_alpha=1.0)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.6 * losses[0]
    assert all(group["betas"] == (0.9, 0.99) for group in trainer.optimizer.param_groups)


def test_a_model_without_masks_learns_from_a_teacher_too(tmp_path):
    model = get_peft_model(make_llama(), LoraConfig(target_modules="all-linear"))
    trainer = DistillationTrainer(
        model, arguments(tmp_path), train_dataset=data(), teacher=make_llama(seed=3), distillation_alpha=0.4
    )
    ids = torch.randint(3, 90, (4, 9))
    loss = trainer.compute_loss(model.train(), {"input_ids": ids, "labels": ids})
    ours, theirs = (m(input_ids=ids).logits[:, :-1] for m in (model, make_llama(seed=3)))
    task = F.cross_entropy(ours.flatten(0, 1), ids[:, 1:].flatten())
    torch.testing.assert_close(loss, 0.6 * task + 0.4 * kl(ours, theirs, 2.0).mean())


def test_a_teacher_that_is_none_is_told(tmp_path):
    with pytest.raises(TypeError, match="teacher='dense' must be a model, loaded with from_pretrained, or 'base'"):
        PruningTrainer(model=smp_bert(), args=arguments(tmp_path), train_dataset=data(), teacher="dense")
