"""Activations of a few tokens at many layers, gathered from any number of batches in bounded memory."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Optional

import torch
from peft import PeftModel
from torch import nn
from transformers.utils.logging import tqdm  # which Transformers' disable_progress_bar() switches off


class TokenReservoir:
    """A uniform sample, without replacement, of the tokens of a stream of batches whose length is not known.

    Every token draws a random number; those with the largest numbers are in the sample.

    Args:
        size (`int`): tokens in the sample.
        seed (`int`): seed of the draw.
    """

    def __init__(self, size: int, seed: int) -> None:
        self.size = size
        self._generator = torch.Generator().manual_seed(seed)
        self._keys = torch.empty(0)

    def __len__(self) -> int:
        return len(self._keys)

    def offer(self, counts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Offer the tokens of a batch.

        Args:
            counts (`torch.Tensor`): bool, any shape: which tokens count.

        Returns:
            `tuple[torch.Tensor, torch.Tensor]`: flat positions of the tokens taken, and the slots that they take; both
            int64 of the same length.
        """
        tokens = counts.flatten().nonzero().flatten()
        keys = torch.rand(len(tokens), generator=self._generator, dtype=torch.float64)
        filled = len(self._keys)
        everyone = torch.cat([self._keys.double(), keys])
        best = everyone.topk(min(self.size, len(everyone))).indices
        stay, new = best[best < filled], best[best >= filled]
        taken = torch.ones(len(best), dtype=torch.bool)
        taken[stay] = False  # slots never exceed the size, so the stayers keep theirs
        slots = taken.nonzero().flatten()
        self._keys = torch.cat([self._keys.double(), torch.zeros(len(best) - filled)])
        self._keys[slots] = everyone[new]
        return tokens[new - filled], slots


class _Recorder:
    """Takes the sampled tokens from a layer's input."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.positions: Optional[torch.Tensor] = None
        self.slots: Optional[torch.Tensor] = None
        self.tokens = 0
        self.calls = 0
        self.stored: list[torch.Tensor] = []

    def start(self, positions: torch.Tensor, slots: torch.Tensor, tokens: int) -> None:
        self.positions, self.slots, self.tokens, self.calls = positions, slots, tokens, 0

    def __call__(self, module: nn.Module, args: tuple) -> None:
        flat = args[0].detach().flatten(0, -2)
        if len(flat) != self.tokens or self.positions is None or self.slots is None:
            raise ValueError(
                f"A layer saw {len(flat)} tokens where the batch has {self.tokens}, so padding cannot be told from "
                "text. Use an attn_implementation that does not unpad, such as 'sdpa'."
            )
        if self.calls == len(self.stored):  # a shared layer is called several times in a forward pass
            self.stored.append(torch.zeros(self.size, flat.shape[1]))
        rows = flat[self.positions.to(flat.device)].float().cpu()
        self.stored[self.calls][self.slots] = rows
        self.calls += 1


def collect_inputs(
    model: nn.Module,
    modules: Mapping[str, tuple[nn.Module, bool]],
    dataloader: Iterable[Any],
    num_samples: int,
    num_tokens: int,
    seed: int = 0,
) -> dict[str, torch.Tensor]:
    """Inputs of some modules at the same sampled tokens. Padding never counts; labels are not needed.

    Args:
        model (`nn.Module`): the model; it is run in eval mode, without gradients, and left as it was.
        modules (`Mapping[str, tuple[nn.Module, bool]]`): by name, a module and whether it sees the decoder's tokens.
        dataloader (`Iterable`): batches, each a mapping of tensors by name of the model's arguments.
        num_samples (`int`): examples after which to stop.
        num_tokens (`int`): tokens in the sample.
        seed (`int`): seed of the sample.

    Returns:
        `dict[str, torch.Tensor]`: float32 on the CPU, shape (tokens, features), by name.

    Raises:
        ValueError: the dataloader is empty, its batches are no mappings or nothing but padding, or the model computes
            values that are not finite.
    """
    reservoirs = [TokenReservoir(num_tokens, seed), TokenReservoir(num_tokens, seed)]
    recorders = {name: _Recorder(num_tokens) for name in modules}
    device = next(model.parameters()).device
    seen = 0
    with _recording(model, {recorders[name]: module for name, (module, _) in modules.items()}):
        with tqdm(total=num_samples, desc="calibrate: run the model", unit="example") as bar:
            for batch in dataloader:
                inputs = _model_inputs(model, batch, device)
                counts = (_real_tokens(model, inputs), _decoder_tokens(model, inputs))
                offers = _offers(reservoirs, counts)
                for name, (_, decoder) in modules.items():
                    recorders[name].start(*offers[decoder])
                model(**inputs)
                examples = len(next(iter(inputs.values())))
                if not seen:
                    bar.total = _examples_ahead(dataloader, examples, num_samples)
                seen += examples
                bar.update(examples)
                if seen >= num_samples:
                    break
    if not seen:
        raise ValueError("calibrate: the dataloader is empty. Give it a few hundred examples of the task.")
    tokens = {False: len(reservoirs[0]), True: len(reservoirs[1]) or len(reservoirs[0])}
    if not all(tokens.values()):
        raise ValueError(
            f"calibrate: the {seen} examples hold no token that is no padding. Check attention_mask and pad token."
        )
    inputs_of = {
        name: torch.cat([stored[: tokens[decoder]] for stored in recorders[name].stored])
        for name, (_, decoder) in modules.items()
    }
    for name, values in inputs_of.items():
        if not bool(torch.isfinite(values).all()):
            raise ValueError(f"calibrate: the input of {name!r} is not finite. The base model seems to be broken.")
    return inputs_of


def _offers(
    reservoirs: Sequence[TokenReservoir], counts: Sequence[Optional[torch.Tensor]]
) -> list[tuple[torch.Tensor, torch.Tensor, int]]:
    """What a batch gives to the samples of encoder and decoder: positions, slots, and number of tokens.

    A model without a decoder of its own gives to both what it has.
    """
    first, *others = [
        None if c is None else (*reservoir.offer(c.cpu()), c.numel())
        for reservoir, c in zip(reservoirs, counts, strict=True)
    ]
    assert first is not None
    return [first, *(first if other is None else other for other in others)]


def _examples_ahead(dataloader: Iterable[Any], batch_size: int, most: int) -> int:
    """Examples that the progress bar counts to; a last batch may be smaller."""
    try:
        return min(most, len(dataloader) * batch_size)  # type: ignore[arg-type]
    except TypeError:  # a stream
        return most


@contextmanager
def _recording(model: nn.Module, recorders: Mapping[_Recorder, nn.Module]) -> Iterator[None]:
    training = {module: module.training for module in model.modules()}
    handles = [module.register_forward_pre_hook(recorder) for recorder, module in recorders.items()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for handle in handles:
            handle.remove()
        for module, mode in training.items():
            module.training = mode


def _model_inputs(model: nn.Module, batch: Any, device: torch.device) -> dict[str, torch.Tensor]:
    """The tensors of a batch that the model takes, without labels unless decoder inputs are made of them."""
    if not isinstance(batch, Mapping):
        raise ValueError(
            f"calibrate needs batches that are mappings, such as {{'input_ids': ..., 'attention_mask': ...}}, but the "
            f"dataloader gave a {type(batch).__name__}. Use a collate_fn, for instance DataCollatorWithPadding."
        )
    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    parameters = inspect.signature(base.forward).parameters
    anything = any(p.kind is p.VAR_KEYWORD for p in parameters.values()) and len(parameters) <= 2
    config = getattr(base, "config", None)
    needs_labels = getattr(config, "is_encoder_decoder", False) and "decoder_input_ids" not in batch
    inputs = {
        name: value.to(device)
        for name, value in batch.items()
        if isinstance(value, torch.Tensor) and (anything or name in parameters) and (name != "labels" or needs_labels)
    }
    if not inputs:
        raise ValueError(
            f"calibrate: of the batch's entries {list(batch)} the model takes none that is a tensor. Tokenize first, "
            "and return tensors."
        )
    return inputs


def _ids_and_pads(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    pad = getattr(getattr(model, "config", None), "pad_token_id", None)
    return torch.ones_like(ids, dtype=torch.bool) if pad is None else ids != pad


def _real_tokens(model: nn.Module, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Which tokens are no padding: bool, shape (batch, tokens)."""
    mask = inputs.get("attention_mask")
    if mask is not None and mask.dim() == 2:
        return mask.bool()
    if "input_ids" in inputs:
        return _ids_and_pads(model, inputs["input_ids"])
    if "inputs_embeds" in inputs:
        return torch.ones(inputs["inputs_embeds"].shape[:2], dtype=torch.bool)
    return _image_tokens(model, inputs)


def _image_tokens(model: nn.Module, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Patches of images and the class token, all of them real."""
    pixels = inputs.get("pixel_values")
    size = getattr(getattr(model, "config", None), "patch_size", None)
    if pixels is None or not isinstance(size, int):
        raise ValueError(
            f"calibrate cannot tell how many tokens a batch of {list(inputs)} has. Batches need input_ids, "
            "inputs_embeds or pixel_values."
        )
    patches = (pixels.shape[-2] // size) * (pixels.shape[-1] // size)
    return torch.ones(len(pixels), patches + 1, dtype=torch.bool)


def _decoder_tokens(model: nn.Module, inputs: Mapping[str, torch.Tensor]) -> Optional[torch.Tensor]:
    if "decoder_attention_mask" in inputs:
        return inputs["decoder_attention_mask"].bool()
    if "decoder_input_ids" in inputs:
        counts = _ids_and_pads(model, inputs["decoder_input_ids"])
        counts[:, 0] = True  # T5 starts with what it pads with
        return counts
    if "labels" in inputs and inputs["labels"].dim() == 2:
        return inputs["labels"] != -100
    return None
