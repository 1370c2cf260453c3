"""Tiny random models in the place of those that PEFT's tests load from the Hub, of the same architectures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers as hf


_HEADS = ("CausalLM", "Seq2SeqLM", "SequenceClassification", "TokenClassification", "QuestionAnswering")
_AUTO_CLASSES = ("AutoModel", *(f"AutoModelFor{head}" for head in _HEADS))

_WIDE = {"initializer_range": 0.3}  # wide enough for a mask alone to change what the model says
_IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_SIZES = {"vocab_size": 120, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
_BERT = {**_SIZES, **_WIDE, "intermediate_size": 48, "max_position_embeddings": 64}
_BERT |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
_ROBERTA = {**_BERT, "pad_token_id": 1}
_GROUPED = {**_SIZES, **_WIDE, **_IDS, "intermediate_size": 48, "num_key_value_heads": 2}
_GPT = {"vocab_size": 120, "n_positions": 64, "n_embd": 32, "n_layer": 3, "n_head": 4, **_IDS, **_WIDE}
_GPT |= {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
_DEBERTA = {**_BERT, "relative_attention": True, "pos_att_type": ["c2p", "p2c"], "pooler_hidden_size": 32}
_OPT = {**_SIZES, **_IDS, "init_std": 0.3, "ffn_dim": 48, "word_embed_proj_dim": 32, "dropout": 0.0}
_T5 = {"vocab_size": 120, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 3, "num_heads": 4, "dropout_rate": 0.0}
_T5 |= {"initializer_factor": 3.0}  # wide, too
_BART = {"vocab_size": 120, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4}
_BART |= {"decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "init_std": 0.3, "dropout": 0.0}
_GEMMA = {**_GROUPED, "head_dim": 8, "sliding_window": 16, "query_pre_attn_scalar": 8}

# by the last part of the name on the Hub: configuration, and class that is saved
STAND_INS = {
    "tiny-random-OPTForCausalLM": (lambda: hf.OPTConfig(**_OPT), hf.OPTForCausalLM),
    "tiny-random-GPT2LMHeadModel": (lambda: hf.GPT2Config(**_GPT), hf.GPT2LMHeadModel),
    "tiny-random-gpt2": (lambda: hf.GPT2Config(**_GPT), hf.GPT2LMHeadModel),
    "tiny-random-GPTJForCausalLM": (lambda: hf.GPTJConfig(**_GPT, rotary_dim=4), hf.GPTJForCausalLM),
    "tiny-random-LlamaForCausalLM": (lambda: hf.LlamaConfig(**_GROUPED), hf.LlamaForCausalLM),
    "tiny-random-MistralForCausalLM": (lambda: hf.MistralConfig(**_GROUPED, head_dim=8), hf.MistralForCausalLM),
    "tiny-dummy-qwen2": (lambda: hf.Qwen2Config(**_GROUPED), hf.Qwen2ForCausalLM),
    "tiny-random-Gemma3ForCausalLM": (lambda: hf.Gemma3TextConfig(**_GEMMA), hf.Gemma3ForCausalLM),
    "tiny-random-T5ForConditionalGeneration-calibrated": (
        lambda: hf.T5Config(**_T5, decoder_start_token_id=0),
        hf.T5ForConditionalGeneration,
    ),
    "tiny-random-BartForConditionalGeneration": (lambda: hf.BartConfig(**_BART), hf.BartForConditionalGeneration),
    "tiny-random-BertModel": (lambda: hf.BertConfig(**_BERT), hf.BertModel),
    "tiny-random-RobertaModel": (lambda: hf.RobertaConfig(**_ROBERTA), hf.RobertaModel),
    "tiny-random-DebertaModel": (lambda: hf.DebertaConfig(**_DEBERTA), hf.DebertaModel),
    "tiny-random-DebertaV2Model": (
        lambda: hf.DebertaV2Config(**_DEBERTA, position_buckets=8),
        hf.DebertaV2Model,
    ),
    "tiny-random-BertForSequenceClassification": (
        lambda: hf.BertConfig(**_BERT),
        hf.BertForSequenceClassification,
    ),
    "tiny-random-RobertaForSequenceClassification": (
        lambda: hf.RobertaConfig(**_ROBERTA),
        hf.RobertaForSequenceClassification,
    ),
    "tiny-LlamaForSequenceClassification-3.2": (
        lambda: hf.LlamaConfig(**_GROUPED),
        hf.LlamaForSequenceClassification,
    ),
}


def local_copy(model_id: str, folder: Path) -> Path:
    """Folder of the model that stands in for one of the Hub, made if it is not there.

    Raises:
        KeyError: there is none for it.
    """
    make_config, model_class = STAND_INS[model_id.split("/")[-1]]
    target = folder / model_id
    if not target.exists():
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model_class(make_config()).save_pretrained(target)
    return target


def redirect_hub(folder: Path) -> None:
    """Have the `from_pretrained` of the Auto classes load the models in here under their names on the Hub."""
    for name in _AUTO_CLASSES:
        _redirect(getattr(hf, name), folder)


def _redirect(auto: Any, folder: Path) -> None:
    original = auto.from_pretrained

    def from_pretrained(cls, model_id, *args, **kwargs):
        if str(model_id).split("/")[-1] not in STAND_INS:
            return original(model_id, *args, **kwargs)
        model = original(local_copy(model_id, folder), *args, **kwargs)
        model.config._name_or_path = model.name_or_path = model_id
        return model

    auto.from_pretrained = classmethod(from_pretrained)
