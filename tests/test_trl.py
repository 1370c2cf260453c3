"""TRL's SFTTrainer prunes with the callback, or with the mixin before it."""

import pytest
import torch
from datasets import Dataset
from helpers.data import tokenizer
from helpers.methods import TRAINED, config
from helpers.models import make_llama
from peft import PeftModel

from peft_prune import PruningCallback, PruningTrainerMixin, SMPConfig
from peft_prune.layers.layer import pruning_layers


@pytest.mark.slow
@pytest.mark.parametrize("method", TRAINED)
def test_sft_trainer_prunes_a_causal_lm(method, tmp_path):
    trl = pytest.importorskip("trl")
    texts = Dataset.from_dict({"text": ["it was good film", "it was bad film"] * 16})
    args = trl.SFTConfig(
        output_dir=str(tmp_path),
        max_steps=6,
        per_device_train_batch_size=4,
        max_length=16,
        use_cpu=True,
        bf16=False,
        report_to="none",
        save_strategy="no",
        logging_steps=1,
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    words = tokenizer()
    words.eos_token = "[SEP]"
    trainer = trl.SFTTrainer(
        model=make_llama(),
        args=args,
        train_dataset=texts,
        processing_class=words,
        peft_config=config(method, task_type="CAUSAL_LM", sparsity=0.8),
        callbacks=[PruningCallback()],
    )
    trainer.train()
    logged = [entry["sparsity"] for entry in trainer.state.log_history if "sparsity" in entry]
    assert logged == sorted(logged) and logged[-1] == pytest.approx(0.8, abs=1e-3)
    trainer.save_model(str(tmp_path / "adapter"))
    loaded = PeftModel.from_pretrained(make_llama(), tmp_path / "adapter")
    ids = torch.randint(0, 12, (2, 5))
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=ids).logits, trainer.model.eval()(input_ids=ids).logits)


def sft_trainer(folder, rows, callbacks=(), mixed=True, **changes):
    trl = pytest.importorskip("trl")

    class PruningSFTTrainer(PruningTrainerMixin, trl.SFTTrainer):
        """As the docs show it."""

    words = tokenizer()
    words.eos_token = "[SEP]"
    settings = {
        "max_steps": 6, "per_device_train_batch_size": 4, "max_length": 16, "use_cpu": True, "bf16": False,
        "report_to": "none", "save_strategy": "no", "logging_steps": 1, "disable_tqdm": True, "seed": 3,
        "dataloader_pin_memory": False,
    }  # fmt: skip
    config = SMPConfig(
        task_type="CAUSAL_LM", sparsity=0.5, allocation="row", score_init="wanda", sparsity_schedule="constant",
        penalty=0.0, score_betas=[0.9, 0.99], num_samples=8,
    )  # fmt: skip
    torch.manual_seed(0)
    return (PruningSFTTrainer if mixed else trl.SFTTrainer)(
        model=make_llama(), args=trl.SFTConfig(output_dir=str(folder), **settings | changes), train_dataset=rows,
        processing_class=words, peft_config=config, callbacks=list(callbacks),
    )  # fmt: skip


TEXTS = {"text": ["it was good film", "it was bad film", "terrible film", "great"] * 8}
PAIRS = {"prompt": ["it was ", "film was "] * 16, "completion": ["good film", "bad"] * 16}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:You are using packing")
@pytest.mark.parametrize(
    ("rows", "changes"),
    [
        (TEXTS, {}),
        (TEXTS, {"bf16": True, "gradient_checkpointing": True}),
        (TEXTS, {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}),
        (TEXTS, {"packing": True}),
        (TEXTS, {"packing": True, "packing_strategy": "wrapped"}),
        (PAIRS, {"completion_only_loss": True}),
    ],
    ids=["plain", "bf16", "reentrant", "packed", "wrapped", "completions"],
)
def test_sft_trainer_calibrates_the_start_and_trains_the_scores_at_their_rate(rows, changes, tmp_path, caplog):
    trainer = sft_trainer(tmp_path, Dataset.from_dict(rows), **changes)
    trainer.train()
    assert "score_init='wanda': calibrating on up to 8 examples" in caplog.text
    (group,) = [g for g in trainer.optimizer.param_groups if g["params"]]
    assert group["initial_lr"] == trainer.model.peft_config["default"].score_lr and group["betas"] == (0.9, 0.99)
    assert group["weight_decay"] == 0
    logged = [entry["sparsity"] for entry in trainer.state.log_history if "sparsity" in entry]
    assert logged == pytest.approx([0.5] * 6), "the final one from the first step on"
    trainer.save_model(str(tmp_path / "adapter"))
    loaded = PeftModel.from_pretrained(make_llama(), tmp_path / "adapter")
    for one, two in zip(pruning_layers(loaded), pruning_layers(trainer.model), strict=True):
        assert torch.equal(one.get_mask("default"), two.get_mask("default"))


@pytest.mark.slow
def test_sft_trainer_with_the_callback_alone_is_calibrated_too(tmp_path, caplog):
    trainer = sft_trainer(tmp_path, Dataset.from_dict(TEXTS), [PruningCallback()], mixed=False)
    with pytest.warns(UserWarning, match="PruningTrainerMixin"):
        trainer.train()
    assert "calibrating" in caplog.text and trainer.model.peft_config["default"].finalized
