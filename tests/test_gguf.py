"""GGUF files, read back by the package `gguf`, and run by llama.cpp where that is installed."""

import warnings

import gguf
import numpy as np
import pytest
import torch
from helpers import architectures
from helpers.models import make_bert
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from peft_prune.report import save_gguf
from peft_prune.structure.shrink import keep_units
from peft_prune.structure.sites import HEADS, find_sites


def model(uneven=True, **fields):
    """Eight heads in four groups; layers lose other numbers of groups and neurons, or all the same."""
    torch.manual_seed(0)
    sizes = architectures._GROUPED | {"num_attention_heads": 8, "num_key_value_heads": 4, "rope_theta": 5000.0}
    made = LlamaForCausalLM(LlamaConfig(**sizes | fields)).eval()
    kept = {}
    for site in find_sites(made):
        layer = int(site.block.rpartition(".")[2]) if uneven else 1
        kept[site.output] = torch.arange(site.units - 1 - layer if site.kind == HEADS else 40 - 8 * layer)
    return keep_units(made, kept)


def byte_tokenizer():
    """Byte-level BPE with one merge and a special token."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())[:100]
    vocabulary = {token: number for number, token in enumerate([*letters, letters[0] + letters[1]])}
    inner = Tokenizer(models.BPE(vocabulary, [(letters[0], letters[1])]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<end>")


def read(path):
    reader = gguf.GGUFReader(path)
    return {name: field.contents() for name, field in reader.fields.items()}, {t.name: t.data for t in reader.tensors}


@pytest.mark.parametrize("uneven", [True, False])
def test_a_file_says_what_the_model_is(uneven, tmp_path):
    made = model(uneven)
    fields, tensors = read(save_gguf(made, tmp_path / "model.gguf", byte_tokenizer(), "float32"))
    arch = "deci" if uneven else "llama"
    assert fields["general.architecture"] == arch
    each = [3, 2, 1] if uneven else 2
    assert fields[f"{arch}.attention.head_count_kv"] == each
    assert fields[f"{arch}.attention.head_count"] == ([6, 4, 2] if uneven else 4)
    assert fields[f"{arch}.feed_forward_length"] == ([40, 32, 24] if uneven else 32)
    assert fields[f"{arch}.rope.freq_base"] == 5000.0 and fields[f"{arch}.attention.key_length"] == 4
    tokens = fields["tokenizer.ggml.tokens"]
    assert len(tokens) == 120 and tokens[101] == "<end>" and fields["tokenizer.ggml.pre"] == "gpt-2"
    assert fields["tokenizer.ggml.token_type"][101] == gguf.TokenType.CONTROL
    assert fields["tokenizer.ggml.eos_token_id"] == 101 and len(fields["tokenizer.ggml.merges"]) == 1
    layer = made.model.layers[1]
    np.testing.assert_array_equal(tensors["blk.1.ffn_down.weight"], layer.mlp.down_proj.weight.detach())
    # a head's rows: pairs that positions turn stand side by side
    rows = tensors["blk.1.attn_q.weight"].reshape(-1, 2, 2, 32)  # heads, pairs, halves
    plain = layer.self_attn.q_proj.weight.detach().numpy().reshape(-1, 2, 2, 32)  # heads, halves, pairs
    np.testing.assert_array_equal(rows, plain.transpose(0, 2, 1, 3))
    assert len(tensors) == 3 * 9 + 3


def test_float16_and_tied_embeddings(tmp_path):
    fields, tensors = read(save_gguf(model(tie_word_embeddings=True), tmp_path / "model.gguf"))
    assert "output.weight" not in tensors and tensors["token_embd.weight"].dtype == np.float16
    assert tensors["output_norm.weight"].dtype == np.float32 and fields["tokenizer.ggml.model"] == "no_vocab"


@pytest.mark.parametrize(("uneven", "layers"), [(True, 3), (False, 3), (False, 2)])
def test_llama_cpp_answers_as_transformers_does(uneven, layers, tmp_path):
    llama_cpp = pytest.importorskip("llama_cpp")
    made, ids = model(uneven, num_hidden_layers=layers), [5, 17, 99, 3, 42]
    path = save_gguf(made, tmp_path / "model.gguf", byte_tokenizer(), "float32")
    other = llama_cpp.Llama(str(path), n_ctx=64, n_threads=1, logits_all=True, verbose=False)
    other.eval(ids)
    with torch.no_grad():
        expected = made(torch.tensor([ids])).logits[0]
    torch.testing.assert_close(torch.tensor(other.scores[: len(ids)]), expected, atol=1e-3, rtol=1e-3)


def test_widths_that_llama_cpp_cannot_quantise_are_told(tmp_path):
    with pytest.warns(UserWarning, match="2 of 3 layers.*multiple of 32, such as 40.*multiple_of=32"):
        save_gguf(model(), tmp_path / "odd.gguf")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        save_gguf(model(uneven=False), tmp_path / "even.gguf")


def test_what_has_no_such_form_is_told(tmp_path):
    path = tmp_path / "model.gguf"
    with pytest.raises(ValueError, match="not BertForSequenceClassification"):
        save_gguf(make_bert(), path)
    with pytest.raises(ValueError, match="dtype='int8'"):
        save_gguf(model(), path, dtype="int8")
    with pytest.raises(ValueError, match="rope_type='linear'"):
        save_gguf(model(rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}), path)
    with pytest.raises(ValueError, match="biases"):
        save_gguf(model(attention_bias=True), path)
    strange = byte_tokenizer()
    parts = [pre_tokenizers.Whitespace(), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    strange.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(parts)
    with pytest.raises(ValueError, match="splitting of texts, .'Whitespace', 'ByteLevel'.*pre_tokenizer"):
        save_gguf(model(), path, strange)
    assert not path.exists()
    save_gguf(model(), path, strange, pre_tokenizer="qwen2")
    words = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, "a")))
    with pytest.raises(ValueError, match="byte-level BPE"):
        save_gguf(model(), path, words)
