"""Tiny random models of real architectures, and what is looked at in them; no network."""

from __future__ import annotations

import torch
import transformers
from torch import nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)


BERT = {
    "vocab_size": 120,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
LLAMA = {
    "vocab_size": 90,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
}
# query, key, value, attention output, and the two of the feed-forward, in two layers
BERT_TARGET_WEIGHTS = 2 * (4 * 32 * 32 + 2 * 32 * 48)


def make_bert(num_labels=2, seed=0, **changes):
    torch.manual_seed(seed)
    return BertForSequenceClassification(BertConfig(**BERT | changes, num_labels=num_labels)).eval()


def make_masked_lm(seed=0):
    torch.manual_seed(seed)
    # wide enough for a mask alone to change what the model says
    return BertForMaskedLM(BertConfig(**BERT, initializer_range=0.3)).eval()


def make_gpt2(seed=0):
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=90, n_positions=32, n_embd=32, n_layer=2, n_head=4, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0
    )
    return GPT2LMHeadModel(config).eval()


LLAMA = {
    "vocab_size": 90,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
}


def make_llama(seed=0, **changes):
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**LLAMA | changes)).eval()


def make_mixture(kind="Mixtral"):
    """A mixture of experts, `"Mixtral"`, `"Qwen2Moe"` or `"Qwen3Moe"`, whose experts are parameters."""
    torch.manual_seed(0)
    own = {"num_local_experts": 4} if kind == "Mixtral" else {"num_experts": 4, "moe_intermediate_size": 24}
    own |= {"shared_expert_intermediate_size": 24} if kind == "Qwen2Moe" else {}
    config = getattr(transformers, f"{kind}Config")(**LLAMA | own | {"num_experts_per_tok": 2})
    return getattr(transformers, f"{kind}ForCausalLM")(config).eval()


def snapshot(module):
    """Copies of all parameters and buffers."""
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def logits(model, batch):
    model.eval()
    with torch.no_grad():
        return model(input_ids=batch["input_ids"]).logits


def sparse_base(share=0.7):
    base = make_bert()
    generator = torch.Generator().manual_seed(2)
    for block in base.bert.encoder.layer:
        for module in block.modules():
            if isinstance(module, nn.Linear):
                module.weight.data[torch.rand(module.weight.shape, generator=generator) < share] = 0
    return base
