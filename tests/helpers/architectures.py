"""A tiny random model of every architecture that has an anatomy, and inputs for it."""

from __future__ import annotations

import torch
import transformers as hf

from peft_prune.structure.sites import find_sites, linear_matrix


_SIZES = {"vocab_size": 120, "hidden_size": 32, "num_hidden_layers": 3, "intermediate_size": 48}
_BERT = {**_SIZES, "num_attention_heads": 4, "max_position_embeddings": 64}
_GROUPED = {**_BERT, "num_key_value_heads": 2, "pad_token_id": 0}
_IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_DEBERTA = {**_BERT, "relative_attention": True, "pos_att_type": ["c2p", "p2c"], "position_buckets": 8}
_T5 = {"vocab_size": 120, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 3, "num_heads": 4} | {
    "decoder_start_token_id": 0
}
_BART = {"vocab_size": 120, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "max_position_embeddings": 64} | {
    "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48
}  # fmt: skip
_CLASSIFIER, _CAUSAL = hf.AutoModelForSequenceClassification, hf.AutoModelForCausalLM

ARCHITECTURES = {
    "bert": (lambda: hf.BertConfig(**_BERT), _CLASSIFIER),
    "roberta": (lambda: hf.RobertaConfig(**_BERT), _CLASSIFIER),
    "electra": (lambda: hf.ElectraConfig(**_BERT, embedding_size=32), _CLASSIFIER),
    "distilbert": (
        lambda: hf.DistilBertConfig(vocab_size=120, dim=32, n_layers=3, n_heads=4, hidden_dim=48),
        _CLASSIFIER,
    ),
    "mpnet": (lambda: hf.MPNetConfig(**_BERT), _CLASSIFIER),
    "deberta-v2": (lambda: hf.DebertaV2Config(**_DEBERTA, share_att_key=False, pooler_hidden_size=32), _CLASSIFIER),
    "deberta-v3": (lambda: hf.DebertaV2Config(**_DEBERTA, share_att_key=True, pooler_hidden_size=32), _CLASSIFIER),
    "albert": (lambda: hf.AlbertConfig(**_BERT, embedding_size=16), _CLASSIFIER),
    "modernbert": (
        lambda: hf.ModernBertConfig(**_BERT, **_IDS, cls_token_id=1, sep_token_id=2, global_attn_every_n_layers=2),
        _CLASSIFIER,
    ),
    "gpt2": (lambda: hf.GPT2Config(vocab_size=120, n_positions=64, n_embd=32, n_layer=3, n_head=4, **_IDS), _CAUSAL),
    "opt": (
        lambda: hf.OPTConfig(**_SIZES, ffn_dim=48, num_attention_heads=4, word_embed_proj_dim=32, **_IDS),
        _CAUSAL,
    ),
    "gpt_neox": (lambda: hf.GPTNeoXConfig(**_BERT), _CAUSAL),
    "llama": (lambda: hf.LlamaConfig(**_GROUPED), _CAUSAL),
    "mistral": (lambda: hf.MistralConfig(**_GROUPED, head_dim=16), _CAUSAL),
    "qwen2": (lambda: hf.Qwen2Config(**_GROUPED), _CAUSAL),
    "qwen3": (lambda: hf.Qwen3Config(**_GROUPED, head_dim=16), _CAUSAL),
    "gemma3_text": (
        lambda: hf.Gemma3TextConfig(**_GROUPED, head_dim=16, sliding_window=8, query_pre_attn_scalar=16),
        _CAUSAL,
    ),
    "gptj": (
        lambda: hf.GPTJConfig(vocab_size=120, n_positions=64, n_embd=32, n_layer=3, n_head=4, rotary_dim=4, **_IDS),
        _CAUSAL,
    ),
    "bart": (lambda: hf.BartConfig(**_BART), hf.AutoModelForSeq2SeqLM),
    "t5": (lambda: hf.T5Config(**_T5), hf.AutoModelForSeq2SeqLM),
    "t5-gated": (lambda: hf.T5Config(**_T5, feed_forward_proj="gated-gelu"), hf.AutoModelForSeq2SeqLM),
    "vit": (
        lambda: hf.ViTConfig(
            hidden_size=32,
            num_hidden_layers=3,
            num_attention_heads=4,
            intermediate_size=48,
            image_size=16,
            patch_size=4,
        ),
        hf.AutoModelForImageClassification,
    ),
}
# from which an empty block is removed as a whole
PRENORM = (
    "modernbert", "gpt2", "opt", "gpt_neox", "llama", "mistral", "qwen2", "qwen3", "gemma3_text", "gptj", "vit",
)  # fmt: skip
GENERATE = [name for name, (_, auto) in ARCHITECTURES.items() if auto not in (_CLASSIFIER, ARCHITECTURES["vit"][1])]


def make(name, attn_implementation="eager", seed=0):
    """A model with weights large enough for every head and neuron to matter."""
    config, auto = ARCHITECTURES[name]
    torch.manual_seed(seed)
    if name == "gptj":
        attn_implementation = "eager"  # all that it has
    model = auto.from_config(config(), attn_implementation=attn_implementation).eval()
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.2) if parameter.dim() > 1 else parameter.data.add_(
            0.1 * torch.randn_like(parameter)
        )
    model.tie_weights()
    return model


def inputs(name, batch=2, tokens=10):
    """A batch, the second half of which is padded."""
    generator = torch.Generator().manual_seed(1)
    if name == "vit":
        return {"pixel_values": torch.randn(batch, 3, 16, 16, generator=generator)}
    ids = torch.randint(3, 120, (batch, tokens), generator=generator)
    mask = torch.ones_like(ids)
    mask[batch // 2 :, tokens - 3 :] = 0
    result = {"input_ids": ids.masked_fill(mask == 0, 0), "attention_mask": mask}
    if name.startswith(("t5", "bart")):
        result["decoder_input_ids"] = torch.randint(3, 120, (batch, 6), generator=generator)
    return result


def zero_units(model, site, units):
    """Set the columns of some heads or neurons to zero, which removes them from what the model computes."""
    with torch.no_grad():
        linear_matrix(model.get_submodule(site.output))[:, site.columns[units].flatten()] = 0


def logits(model, batch):
    with torch.no_grad():
        return model(**batch).logits


def zero_some(model, seed=0):
    """Remove 40 % of the units, and all of the second block; say how many are left."""
    generator = torch.Generator().manual_seed(seed)
    left = {"heads": 0, "neurons": 0}
    for i, site in enumerate(find_sites(model)):
        gone = torch.rand(site.units, generator=generator) < 0.4
        if i in (2, 3):  # heads and neurons of the second block
            gone[:] = True
        zero_units(model, site, gone)
        # of a layer that loses all, one stays, unless the block goes
        left[site.kind] += max(int(model.config.model_type not in PRENORM), int((~gone).sum()))
    return left


def batches(name="bert", count=4):
    return [inputs(name, batch=4, tokens=8 + i) for i in range(count)]
