"""Verbalizer head: a classifier without a new parameter, made of a frozen masked-LM head and label words.

The hidden state at the `[MASK]` token (at the first token where there is none) goes through the head, and the logits of
the label words are the logits of the classes (SMP, section 3.3; after Schick & Schütze 2021). For extractive question
answering two label words give start and end logits at every position.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Optional, cast

import torch
import torch.nn.functional as F
from torch import nn
from transformers.modeling_outputs import QuestionAnsweringModelOutput, SequenceClassifierOutput

from ..layers.layer import PruningLayer


_TASKS = ("SEQ_CLS", "QUESTION_ANS")
_LABELS = {"SEQ_CLS": ("labels",), "QUESTION_ANS": ("start_positions", "end_positions")}


def make_verbalizer(tokenizer: Any, label_words: Mapping[int, str], task: str = "SEQ_CLS") -> dict[str, Any]:
    """Look up label words for `SMPConfig(verbalizer=...)`; what it returns is saved in `adapter_config.json`.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): the tokenizer of the base model.
        label_words (`Mapping[int, str]`): word of each class id, such as `{0: "terrible", 1: "great"}`; for
            `"QUESTION_ANS"` 0 is the start and 1 the end.
        task (`str`): `"SEQ_CLS"` or `"QUESTION_ANS"`.

    Returns:
        `dict[str, Any]`: words, token ids, the id of `[MASK]`, and the task.

    Raises:
        ValueError: class ids are not 0, 1, 2, …; a word is not one token; two words are the same token.
    """
    if task not in _TASKS:
        raise ValueError(f"task={task!r} is unknown. Use one of {', '.join(map(repr, _TASKS))}.")
    if sorted(label_words) != list(range(len(label_words))) or len(label_words) < 2:
        raise ValueError(f"label_words={dict(label_words)!r} must have the class ids 0, 1, 2, … as keys, at least two.")
    words = [label_words[i] for i in range(len(label_words))]
    token_ids = []
    for word in words:
        # byte-level tokenizers have another token for a word after a space, which is the usual one in running text
        candidates = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in (" " + word, word)]
        ids = next((ids for ids in candidates if len(ids) == 1 and ids[0] != tokenizer.unk_token_id), None)
        if ids is None:
            raise ValueError(
                f"label_words: {word!r} is {tokenizer.tokenize(word)} to this tokenizer. Use a word that is one token."
            )
        token_ids.append(ids[0])
    if len(set(token_ids)) < len(token_ids):
        raise ValueError(f"label_words={dict(label_words)!r}: two classes have the same token.")
    return {"task": task, "words": words, "token_ids": token_ids, "mask_token_id": tokenizer.mask_token_id}


def install_verbalizer(model: nn.Module) -> None:
    """Make a masked LM answer with class logits while the active adapter has a verbalizer.

    Args:
        model (`nn.Module`): a Transformers masked LM; nothing happens the second time.

    Raises:
        ValueError: the model has no masked-LM head.
    """
    decoder = cast(Any, model).get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if not isinstance(decoder, nn.Linear) or not type(model).__name__.endswith("ForMaskedLM"):
        raise ValueError(
            f"verbalizer: {type(model).__name__} has no masked-LM head to read label words from. Load the base model "
            "with AutoModelForMaskedLM, or leave `verbalizer` out and train a classifier (task_type='SEQ_CLS')."
        )
    if not hasattr(model, "_peft_prune_verbalizer"):
        model._peft_prune_verbalizer = _Head(model, decoder)  # type: ignore[assignment]


@contextmanager
def label_words_of(model: nn.Module, adapter_names: Sequence[str]) -> Iterator[None]:
    """While this is entered, a verbalizer reads the label words of the adapters named.

    Raises:
        ValueError: they have different ones.
    """
    layers = [layer for layer in model.modules() if isinstance(layer, PruningLayer)]
    known = {name: host.config.verbalizer for layer in layers for name, host in layer.host.items()}
    named = {name: known[name] for name in adapter_names if name in known}
    heads = [m._peft_prune_verbalizer for m in model.modules() if hasattr(m, "_peft_prune_verbalizer")]
    spec = next(iter(named.values()), None)
    if heads and any(other != spec for other in named.values()):
        raise ValueError(
            f"adapter_names: {sorted(named)} have different label words, but a batch can be read with only one set. "
            "Pass their samples in separate batches."
        )
    for head in heads:
        head.asked = (spec,)  # type: ignore[union-attr]
    try:
        yield
    finally:
        for head in heads:
            head.asked = ()  # type: ignore[union-attr]


def keep_label_words(merge: Callable[[], nn.Module], model: nn.Module) -> nn.Module:
    """Merge, and have the model that comes out go on to answer with the label words of the adapter that was active."""
    spec = model._peft_prune_verbalizer.active_spec() if hasattr(model, "_peft_prune_verbalizer") else None  # type: ignore[union-attr,operator]
    merged = merge()
    head = getattr(merged, "_peft_prune_verbalizer", None)
    if spec is not None and head is not None:
        head.merged = spec
        warnings.warn(
            f"The merged model uses the label words {spec['words']!r} in this process only. They are not part of a "
            "Transformers model: its save_pretrained and peft_prune.save_compact write the masked LM without them. "
            "To share the classifier, save the adapter instead, or its label words with the model.",
            UserWarning,
            stacklevel=3,
        )
    return merged


class _Head:
    """Three places where a model is intercepted: before it, at its decoder, after it."""

    def __init__(self, model: nn.Module, decoder: nn.Linear) -> None:
        self.spec: Optional[dict[str, Any]] = None
        self.input_ids: Optional[torch.Tensor] = None
        self.labels: tuple[Optional[torch.Tensor], ...] = ()
        self.num_items: Optional[torch.Tensor | int] = None
        self.asked: tuple[Optional[dict[str, Any]], ...] = ()  # one: instead of that of the active adapter
        self.merged: Optional[dict[str, Any]] = None  # of an adapter that is part of the base model now
        self.model, self.decoder, self.decoder_forward = model, decoder, decoder.forward
        decoder.forward = self.decoder_or_words  # type: ignore  # a method, which copies and pickles can follow
        model.register_forward_pre_hook(self.before, with_kwargs=True)
        model.register_forward_hook(self.after, with_kwargs=True, always_call=True)

    def active_spec(self) -> Optional[dict[str, Any]]:
        if self.asked:
            return self.asked[0] or self.merged
        for layer in self.model.modules():  # an adapter need not be in all of them
            if not isinstance(layer, PruningLayer) or layer.disable_adapters:
                continue
            for name in layer.active_adapters:
                host = layer.host.get(name)
                if host is not None and host.config.verbalizer:
                    return host.config.verbalizer
        return self.merged

    def decoder_or_words(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.decoder_forward(hidden) if self.spec is None else self.decode(self.decoder, hidden)

    def before(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        self.spec = self.active_spec()
        if self.spec is not None:
            self.input_ids = args[0] if args else kwargs.get("input_ids")
            names = _LABELS[self.spec["task"]]
            self.labels = tuple(kwargs.get(name) for name in names)
            self.num_items = kwargs.get("num_items_in_batch")
            dropped = (*names, "num_items_in_batch")
            kwargs = {name: value for name, value in kwargs.items() if name not in dropped}
        return args, kwargs

    def decode(self, decoder: nn.Linear, hidden: torch.Tensor) -> torch.Tensor:
        """Logits of the label words: (batch, labels), or (batch, positions, 2) for question answering."""
        assert self.spec is not None
        if self.spec["task"] == "SEQ_CLS":
            position = torch.zeros(hidden.shape[0], dtype=torch.long, device=hidden.device)
            if self.input_ids is not None and self.spec["mask_token_id"] is not None:
                # argmax gives the first of equals: the first [MASK], or position 0 where there is none
                position = (self.input_ids == self.spec["mask_token_id"]).int().argmax(dim=1)
            hidden = hidden[torch.arange(hidden.shape[0], device=hidden.device), position]
        ids = torch.tensor(self.spec["token_ids"], device=hidden.device)
        bias = None if decoder.bias is None else decoder.bias[ids]
        return F.linear(hidden, decoder.weight[ids], bias)

    def after(self, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> Any:
        spec, labels = self.spec, self.labels
        self.spec, self.input_ids, self.labels = None, None, ()
        if spec is None or output is None:
            return output
        is_tuple = isinstance(output, tuple)
        logits = output[0] if is_tuple else output.logits
        question = spec["task"] == "QUESTION_ANS"
        result = _answers(logits, labels) if question else _classes(logits, labels, self.num_items)
        if is_tuple:
            return result.to_tuple() + output[1:]
        return type(result)(**result, hidden_states=output.hidden_states, attentions=output.attentions)


def _classes(
    logits: torch.Tensor, labels: tuple[Optional[torch.Tensor], ...], num_items: Optional[torch.Tensor | int]
) -> SequenceClassifierOutput:
    (target,) = labels
    loss = None
    if target is not None:
        # a Trainer that accumulates gradients says by what the sum of the whole batch is to be divided
        total = F.cross_entropy(logits.float(), target.view(-1), reduction="sum")
        loss = total / (len(logits) if num_items is None else num_items)
    return SequenceClassifierOutput(loss=loss, logits=logits)  # type: ignore[arg-type]


def _answers(logits: torch.Tensor, labels: tuple[Optional[torch.Tensor], ...]) -> QuestionAnsweringModelOutput:
    start, end = logits.unbind(-1)
    loss = None
    if all(target is not None for target in labels):
        # as Transformers does: answers outside the window (at or beyond its length) do not count
        losses = [
            F.cross_entropy(part.float(), target.view(-1).clamp(0, part.shape[1]), ignore_index=part.shape[1])
            for part, target in zip((start, end), labels, strict=True)
            if target is not None
        ]
        loss = (losses[0] + losses[1]) / 2
    return QuestionAnsweringModelOutput(loss=loss, start_logits=start, end_logits=end)  # type: ignore[arg-type]
