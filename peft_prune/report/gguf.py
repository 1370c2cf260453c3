"""Models of the Llama family as GGUF files, for llama.cpp. Layers may differ in heads and neurons."""

from __future__ import annotations

import importlib.util
import json
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Optional

import numpy as np
import torch
from transformers import PreTrainedModel

from ..structure.sites import HEADS, find_sites


DTYPES = {"float32": np.float32, "float16": np.float16}
_FAMILY = ("llama", "mistral")
_BLOCK = 32  # numbers that llama.cpp quantises, and multiplies, at once
# how llama.cpp calls what splits a text before byte-level BPE, by what the tokenizer's own file says
_SPLITS = {
    ("ByteLevel",): "gpt-2",
    ("Digits", "ByteLevel"): "smollm",
    (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
        r"|\s+(?!\S)|\s+",
        "ByteLevel",
    ): "llama-bpe",  # Llama 3
}


def save_gguf(
    model: PreTrainedModel,
    path: str | Path,
    tokenizer: Any = None,
    dtype: str = "float16",
    pre_tokenizer: Optional[str] = None,
) -> Path:
    """Write a model as a GGUF file: as `llama` where all layers are alike, otherwise as `deci`.

    llama.cpp reads heads, key/value heads and neurons of each layer for the architecture `deci` (Nemotron's), which
    computes the same as `llama` otherwise. llama.cpp's own tools quantise the file further. It warns if layers have a
    number of neurons that is no multiple of 32: llama.cpp reads prompts with them much more slowly, and leaves a matrix
    of each unquantised.

    Args:
        model (`PreTrainedModel`): a Llama or Mistral, dense or compact, such as `merge_and_unload()` returns.
        path (`str` or `Path`): file to write; its folder is made if it is not there.
        tokenizer (*optional*): the model's fast tokenizer, byte-level BPE. Without one the file takes token ids only.
        dtype (`str`): of the matrices, `"float16"` or `"float32"`; norms are float32.
        pre_tokenizer (`str`, *optional*): what llama.cpp calls the tokenizer's splitting of a text, such as `"qwen2"`;
            found by itself for `"gpt-2"`, `"smollm"` and `"llama-bpe"`.

    Returns:
        `Path`: the file.

    Raises:
        ImportError: the package `gguf` is not installed.
        ValueError: the model or the tokenizer is of another kind.
    """
    if importlib.util.find_spec("gguf") is None:
        raise ImportError("A GGUF file needs the package gguf, which is not installed: pip install 'peft_prune[gguf]'")
    import gguf

    _check(model, dtype)
    vocabulary = None if tokenizer is None else _vocabulary(tokenizer, model.config.vocab_size, pre_tokenizer)
    shapes = _Shapes(model)
    _warn_of_odd_widths(shapes.neurons)
    arch = gguf.MODEL_ARCH.LLAMA if shapes.uniform else gguf.MODEL_ARCH.DECI
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    writer = gguf.GGUFWriter(str(path), gguf.MODEL_ARCH_NAMES[arch])
    _describe(writer, model, shapes, dtype)
    if vocabulary is None:
        writer.add_tokenizer_model("no_vocab")
    else:
        _add_vocabulary(writer, tokenizer, vocabulary)
    names = gguf.get_tensor_name_map(arch, model.config.num_hidden_layers)
    for name, tensor in _tensors(model, shapes):
        new = names.get_name(name, try_suffixes=(".weight",))
        if new is None:
            raise ValueError(f"save_gguf: {name!r} is no tensor of the Llama family.")
        kind = np.float32 if tensor.dim() == 1 else DTYPES[dtype]
        writer.add_tensor(new, tensor.float().cpu().numpy().astype(kind))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return Path(path)


def _check(model: PreTrainedModel, dtype: str) -> None:
    config: Any = model.config
    if config.model_type not in _FAMILY or not hasattr(model, "lm_head"):
        raise ValueError(
            f"save_gguf writes causal language models of the Llama family ({', '.join(_FAMILY)}), not "
            f"{type(model).__name__}. Save others by save_standard, and convert them with llama.cpp's own script."
        )
    if dtype not in DTYPES:
        raise ValueError(f"dtype={dtype!r} must be one of {', '.join(map(repr, DTYPES))}.")
    kind = (config.rope_parameters or {}).get("rope_type", "default")
    if kind != "default":
        raise ValueError(f"save_gguf: positions of rope_type={kind!r} are not supported. Only 'default' is.")
    if getattr(config, "attention_bias", False) or getattr(config, "mlp_bias", False):
        raise ValueError("save_gguf: biases of attention or feed-forward layers are not supported.")
    window = getattr(config, "sliding_window", None)
    if window is not None and window < config.max_position_embeddings:
        raise ValueError(f"save_gguf: sliding_window={window} is not supported. Only models without one are.")


def _warn_of_odd_widths(neurons: list[int]) -> None:
    odd = [count for count in neurons if count % _BLOCK]
    if odd:
        warnings.warn(
            f"{len(odd)} of {len(neurons)} layers have a number of neurons that is no multiple of {_BLOCK}, such as "
            f"{odd[0]}. llama.cpp reads prompts more slowly with them, and leaves the matrices that these neurons feed "
            f"in float16 when it quantises the file. Prune with multiple_of={_BLOCK}.",
            UserWarning,
            stacklevel=3,
        )


class _Shapes:
    """Heads, groups of heads and neurons of each layer."""

    def __init__(self, model: PreTrainedModel) -> None:
        sites = find_sites(model)
        attentions = [site for site in sites if site.kind == HEADS]
        keys = [site.output.removesuffix("o_proj") + "k_proj" for site in attentions]
        self.head_dim = attentions[0].rows[keys[0]].shape[1]
        self.groups = [site.units for site in attentions]
        self.heads = [site.units * site.width // self.head_dim for site in attentions]
        self.neurons = [site.units for site in sites if site.kind != HEADS]

    @property
    def uniform(self) -> bool:
        """Whether all layers are alike."""
        return all(len(set(counts)) == 1 for counts in (self.groups, self.heads, self.neurons))


def _describe(writer: Any, model: PreTrainedModel, shapes: _Shapes, dtype: str) -> None:
    import gguf

    config: Any = model.config
    each = (lambda counts: counts[0]) if shapes.uniform else list
    writer.add_name(Path(config.name_or_path or "model").name)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(each(shapes.neurons))
    writer.add_head_count(each(shapes.heads))
    writer.add_head_count_kv(each(shapes.groups))
    writer.add_key_length(shapes.head_dim)
    writer.add_value_length(shapes.head_dim)
    writer.add_rope_dimension_count(shapes.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    kinds = {"float16": gguf.LlamaFileType.MOSTLY_F16, "float32": gguf.LlamaFileType.ALL_F32}
    writer.add_file_type(kinds[dtype])


def _tensors(model: PreTrainedModel, shapes: _Shapes) -> Iterator[tuple[str, torch.Tensor]]:
    """Weights by name; queries and keys in llama.cpp's order of a head's rows."""
    tied = bool(model.config.tie_word_embeddings)
    for name, tensor in model.state_dict().items():
        if tied and name == "lm_head.weight":
            continue
        layer = name.removeprefix("model.layers.").split(".")[0]
        if name.endswith("q_proj.weight"):
            tensor = _interleaved(tensor, shapes.heads[int(layer)])
        elif name.endswith("k_proj.weight"):
            tensor = _interleaved(tensor, shapes.groups[int(layer)])
        yield name, tensor


def _interleaved(matrix: torch.Tensor, heads: int) -> torch.Tensor:
    """Row i of a head's first half, then row i of its second half: the pairs that positions turn."""
    return matrix.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)


# ------------------------------------------------------------------- tokenizer


def _vocabulary(tokenizer: Any, size: int, pre_tokenizer: Optional[str]) -> dict[str, Any]:
    """Tokens and their kinds by id, and how a text is split."""
    import gguf

    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(f"save_gguf needs a fast tokenizer, not {type(tokenizer).__name__}.")
    file = json.loads(tokenizer.backend_tokenizer.to_str())
    splits = _splits(file.get("pre_tokenizer") or {})
    if file["model"]["type"] != "BPE" or splits[-1:] != ("ByteLevel",):
        raise ValueError(
            "save_gguf writes tokenizers of byte-level BPE, and this one is another. Convert what save_standard writes "
            "with llama.cpp's own script, or leave the tokenizer out."
        )
    pre = pre_tokenizer or _SPLITS.get(splits)
    if pre is None:
        raise ValueError(
            f"save_gguf does not know what llama.cpp calls this tokenizer's splitting of texts, {splits!r:.200}. Give "
            "its name as pre_tokenizer, such as 'qwen2'."
        )
    tokens = [f"[PAD{number}]" for number in range(size)]
    kinds = [gguf.TokenType.UNUSED] * size
    for token, number in tokenizer.get_vocab().items():
        if number < size:
            tokens[number], kinds[number] = token, gguf.TokenType.NORMAL
    for number, added in tokenizer.added_tokens_decoder.items():
        if number < size:
            kinds[number] = gguf.TokenType.CONTROL if added.special else gguf.TokenType.USER_DEFINED
    return {"tokens": tokens, "kinds": kinds, "pre": pre}


def _splits(pre: dict[str, Any]) -> tuple[str, ...]:
    """What a tokenizer does before BPE, by the name of each part, or its regular expression."""
    if pre.get("type") == "Sequence":
        return tuple(part for inner in pre["pretokenizers"] for part in _splits(inner))
    if pre.get("type") == "Split":
        return (str(pre["pattern"].get("Regex", pre["pattern"])),)
    return (str(pre.get("type")),)


def _add_vocabulary(writer: Any, tokenizer: Any, vocabulary: dict[str, Any]) -> None:
    import gguf

    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(vocabulary["pre"])
    writer.add_token_list(vocabulary["tokens"])
    writer.add_token_types(vocabulary["kinds"])
    with tempfile.TemporaryDirectory() as folder:  # merges, special tokens, chat template
        tokenizer.save_pretrained(folder)
        special = gguf.SpecialVocab(folder, load_merges=True, n_vocab=len(vocabulary["tokens"]))
    special.add_to_gguf(writer)
    for kind in ("bos", "eos", "pad", "unk"):
        number = getattr(tokenizer, f"{kind}_token_id", None)
        if number is not None and kind not in special.special_token_ids:
            getattr(writer, f"add_{kind}_token_id")(number)
    if "bos" not in special.add_special_token:
        adds = tokenizer("a").input_ids[:1] == [tokenizer.bos_token_id]
        writer.add_add_bos_token(adds)
