"""Data sets, training arguments and tokenizers that need no network."""

import json
from pathlib import Path

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, TrainingArguments

from helpers.models import make_bert, make_llama, make_masked_lm


def data(n=64, seed=0, length=8):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(2, 90, (n, length), generator=generator)
    labels = (ids[:, 1] > 45).long()
    return Dataset.from_dict(
        {"input_ids": ids.tolist(), "attention_mask": torch.ones_like(ids).tolist(), "labels": labels.tolist()}
    )


def arguments(folder, **changes):
    settings = {
        "max_steps": 10,
        "per_device_train_batch_size": 8,
        "learning_rate": 1e-3,
        "use_cpu": True,
        "report_to": "none",
        "save_strategy": "no",
        "logging_steps": 1,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "seed": 3,
    }
    return TrainingArguments(output_dir=str(folder), **settings | changes)


def tokenizer():
    words = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", "[MASK]", "it", "was", "film", "good", "bad", "terrible", "great"]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="[UNK]", mask_token="[MASK]", pad_token="[PAD]", cls_token="[CLS]"
    )


def hub(folder: Path) -> None:
    """What `from_pretrained` and `load_dataset` find instead of the Hub."""
    model = folder / "google-bert" / "bert-base-uncased"
    make_masked_lm().save_pretrained(model)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"architectures": ["BertForMaskedLM"]}))
    tokenizer().save_pretrained(model)
    teacher = folder / "textattack" / "bert-base-uncased-SST-2"
    make_bert().save_pretrained(teacher)
    for name in ("SmolLM2-135M", "SmolLM2-135M-Instruct"):
        language_model = folder / "HuggingFaceTB" / name
        make_llama(max_position_embeddings=512).save_pretrained(language_model)
        tokenizer().save_pretrained(language_model)
    data = folder / "stanfordnlp" / "sst2"
    data.mkdir(parents=True)
    text = folder / "Salesforce" / "wikitext"
    text.mkdir(parents=True)
    (text / "README.md").write_text("---\nconfigs:\n- config_name: wikitext-2-raw-v1\n  data_files: train.jsonl\n---\n")
    (text / "train.jsonl").write_text(
        "\n".join(json.dumps({"text": "it was a good film " * n}) for n in (1, 2, 0, 3) * 8)
    )
    rows = [{"sentence": "it was good", "label": 1}, {"sentence": "it was bad", "label": 0}] * 16
    for split in ("train", "validation"):
        (data / f"{split}.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
