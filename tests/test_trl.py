"""TRL's SFTTrainer needs the callback and nothing else."""

import pytest
import torch
from datasets import Dataset
from helpers.data import tokenizer
from helpers.methods import TRAINED, config
from helpers.models import make_llama
from peft import PeftModel

from peft_prune import PruningCallback


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
