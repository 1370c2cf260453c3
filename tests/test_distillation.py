"""The distillation loss for every kind of head, against PyTorch's own."""

import pytest
import torch
import torch.nn.functional as F
from conftest import make_bert
from test_training import arguments, data, smp_bert
from transformers.modeling_outputs import (
    QuestionAnsweringModelOutput,
    SequenceClassifierOutput,
    TokenClassifierOutput,
)

from peft_prune import PruningTrainer, distillation_loss, update_schedule


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
