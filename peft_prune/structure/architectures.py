"""Anatomies of the architectures that Transformers has, one short entry each."""

from __future__ import annotations

from .anatomy import Attention, Block, FeedForward, register_anatomy


def _separate(module: str, q: str, k: str, v: str, output: str, **more) -> Attention:
    return Attention(module, f"{module}.{q}", f"{module}.{k}", f"{module}.{v}", output, **more)


def _fused(module: str, qkv: str, output: str, layout: str = "stacked") -> Attention:
    name = f"{module}.{qkv}"
    return Attention(module, name, name, name, f"{module}.{output}", layout)


_INTERMEDIATE = FeedForward(("intermediate.dense",), "output.dense")

_BERT = Block(
    "encoder.layer.*",
    (_separate("attention.self", "query", "key", "value", "attention.output.dense"),),
    (_INTERMEDIATE,),
)
for _name in ("bert", "roberta", "xlm-roberta", "camembert", "electra"):
    register_anatomy(_name, _BERT)

register_anatomy(
    "distilbert",
    Block(
        "transformer.layer.*",
        (_separate("attention", "q_lin", "k_lin", "v_lin", "attention.out_lin"),),
        (FeedForward(("ffn.lin1",), "ffn.lin2"),),
    ),
)

register_anatomy(
    "mpnet",
    Block(
        "encoder.layer.*",
        (_separate("attention.attn", "q", "k", "v", "attention.attn.o", position_bias="given"),),
        (_INTERMEDIATE,),
    ),
)

register_anatomy(
    "deberta-v2",
    Block(
        "encoder.layer.*",
        (
            _separate(
                "attention.self",
                "query_proj",
                "key_proj",
                "value_proj",
                "attention.output.dense",
                also=("attention.self.pos_key_proj", "attention.self.pos_query_proj"),
            ),
        ),
        (_INTERMEDIATE,),
    ),
)

# one block for all layers: what is removed is removed from each of them
register_anatomy(
    "albert",
    Block(
        "encoder.albert_layer_groups.*.albert_layers.*",
        (_separate("attention", "query", "key", "value", "attention.dense"),),
        (FeedForward(("ffn",), "ffn_output"),),
        repeats="num_hidden_layers",
    ),
)

register_anatomy(
    "modernbert",
    Block("layers.*", (_fused("attn", "Wqkv", "Wo"),), (FeedForward(("mlp.Wi",), "mlp.Wo", fused=2),), prenorm=True),
)

register_anatomy(
    "gpt2",
    Block("h.*", (_fused("attn", "c_attn", "c_proj"),), (FeedForward(("mlp.c_fc",), "mlp.c_proj"),), prenorm=True),
)

register_anatomy(
    "opt",
    Block(
        "decoder.layers.*",
        (_separate("self_attn", "q_proj", "k_proj", "v_proj", "self_attn.out_proj"),),
        (FeedForward(("fc1",), "fc2"),),
        prenorm="do_layer_norm_before",
    ),
)

register_anatomy(
    "gpt_neox",
    Block(
        "layers.*",
        (_fused("attention", "query_key_value", "dense", layout="interleaved"),),
        (FeedForward(("mlp.dense_h_to_4h",), "mlp.dense_4h_to_h"),),
        prenorm=True,
    ),
)

_LLAMA = Block(
    "layers.*",
    (_separate("self_attn", "q_proj", "k_proj", "v_proj", "self_attn.o_proj"),),
    (FeedForward(("mlp.gate_proj", "mlp.up_proj"), "mlp.down_proj"),),
    prenorm=True,
)
for _name in ("llama", "mistral", "qwen2", "qwen3", "gemma3_text"):
    register_anatomy(_name, _LLAMA)

register_anatomy(
    "gptj",
    Block(
        "h.*",
        (_separate("attn", "q_proj", "k_proj", "v_proj", "attn.out_proj"),),
        (FeedForward(("mlp.fc_in",), "mlp.fc_out"),),
        prenorm=True,
    ),
)


def _bart_attention(module: str) -> Attention:
    return _separate(module, "q_proj", "k_proj", "v_proj", f"{module}.out_proj")


register_anatomy(
    "bart",
    Block("encoder.layers.*", (_bart_attention("self_attn"),), (FeedForward(("fc1",), "fc2"),)),
    Block(
        "decoder.layers.*",
        (_bart_attention("self_attn"), _bart_attention("encoder_attn")),
        (FeedForward(("fc1",), "fc2"),),
        decoder=True,
    ),
)


def _t5_attention(module: str) -> Attention:
    return _separate(module, "q", "k", "v", f"{module}.o", position_bias="shared")


def _t5_feed_forward(module: str) -> FeedForward:
    return FeedForward((f"{module}.wi", f"{module}.wi_0", f"{module}.wi_1"), f"{module}.wo")


register_anatomy(
    "t5",
    Block("encoder.block.*", (_t5_attention("layer.0.SelfAttention"),), (_t5_feed_forward("layer.1.DenseReluDense"),)),
    Block(
        "decoder.block.*",
        (_t5_attention("layer.0.SelfAttention"), _t5_attention("layer.1.EncDecAttention")),
        (_t5_feed_forward("layer.2.DenseReluDense"),),
        decoder=True,
    ),
)

register_anatomy(
    "vit",
    Block(
        "layers.*",
        (_separate("attention", "q_proj", "k_proj", "v_proj", "attention.o_proj"),),
        (FeedForward(("mlp.fc1",), "mlp.fc2"),),
        prenorm=True,
    ),
)
