"""How much a model's predictions change with what its layers put out: the trace of the Fisher information.

With δ added to the output of a layer at a token, the KL divergence between the model's predictions before and after is
`½ E[(gᵀδ)²]` to second order, where g is the gradient of the log-likelihood of what the model predicts itself, and the
expectation is over that (Martens 2020, arXiv 1412.1193, section 9). Where δ has no preferred direction, that is
`½ E‖g‖² ‖δ‖² / outputs`. One draw for each prediction and a few thousand tokens are enough.

A model with one prediction per sequence, such as a classifier, is asked for its last hidden states instead, which count
as the means of normal distributions. Its head may be new, and reads one token: then the last layers seem to be all that
matters, and what the others lose is missing when the model is fine-tuned.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.functional import cross_entropy
from transformers.utils.logging import tqdm

from ..peft_api import base_of
from .calls import hidden_states
from .observers import Counts
from .place import device_of
from .walk import Watched, quiet, taken_batches


TOKENS = 2048  # after so many that are no padding, no further example is looked at
_EXAMPLES = 256


def output_sensitivity(
    model: nn.Module, watched: Watched, batches: Iterable[Any], num_samples: int, seed: int = 0
) -> dict[str, float]:
    """`Σ_t E‖g_t‖² / outputs` of layers, over the tokens t of an example: the mean over examples.

    The model runs forwards and backwards, one example at a time, where it is. No gradient of a parameter is computed.

    Args:
        model (`nn.Module`): the model; if its output holds no `logits` of each token, its last hidden states, or its
            first output, count as the means of normal distributions.
        watched (`Mapping`): layers by their name in the model.
        batches (`Iterable`): batches of inputs.
        num_samples (`int`): the most examples, if [`TOKENS`] does not end it before.
        seed (`int`): of what is drawn from the model's predictions.

    Returns:
        `dict[str, float]`: by name. It is 0 for a layer that nothing depends on.

    Raises:
        ValueError: there are no batches, or they do not fit the model.
    """
    generator = torch.Generator().manual_seed(seed)
    sums = dict.fromkeys(watched, 0.0)
    examples = tokens = 0
    with quiet(model), torch.enable_grad(), tqdm(desc="calibrate: sensitivity", total=TOKENS, unit="token") as bar:
        for example, counts in _one_by_one(taken_batches(model, batches, num_samples, device_of(model))):
            for key, squares in _of_example(model, watched, example, counts, generator).items():
                sums[key] += squares
            seen = int(counts[0].sum())  # type: ignore[union-attr]
            bar.update(seen)
            examples, tokens = examples + 1, tokens + seen
            if tokens >= TOKENS or examples >= _EXAMPLES:
                break
    return {key: total / examples for key, total in sums.items()}


def _one_by_one(
    taken: Iterable[tuple[dict[str, torch.Tensor], Counts]],
) -> Iterator[tuple[dict[str, torch.Tensor], Counts]]:
    """Examples of batches, for logits of a whole batch may take more memory than the model."""
    for inputs, counts in taken:
        size = len(next(iter(inputs.values())))
        for i in range(size):
            rows = {key: x[i : i + 1] if x.dim() and len(x) == size else x for key, x in inputs.items()}
            yield rows, [None if count is None else count[i : i + 1] for count in counts]


def _of_example(
    model: nn.Module, watched: Watched, inputs: dict[str, torch.Tensor], counts: Counts, generator: torch.Generator
) -> dict[str, float]:
    with _outputs(watched) as noted, _last_states(model) as last:
        likelihood = _likelihood(model(**inputs), last, counts, generator)
    flat = [(key, output) for key, outputs in noted.items() for output in outputs]
    if not likelihood.requires_grad:
        return {}
    gradients = torch.autograd.grad(likelihood, [output for _, output in flat], allow_unused=True)
    found = dict.fromkeys(noted, 0.0)
    for (key, _), gradient in zip(flat, gradients, strict=True):
        if gradient is not None:
            found[key] += float(gradient.float().square().sum()) / gradient.shape[-1]
    return found


@contextmanager
def _outputs(watched: Watched) -> Iterator[dict[str, list[torch.Tensor]]]:
    """What layers put out while the context lasts; the graph begins with the first of them."""
    noted: dict[str, list[torch.Tensor]] = {key: [] for key in watched}

    def note(key: str) -> Any:
        def hook(module: nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor:
            output = output if output.requires_grad else output.detach().requires_grad_()
            noted[key].append(output)
            return output

        return hook

    with ExitStack() as stack:
        for key, (layer, _) in watched.items():
            stack.callback(layer.register_forward_hook(note(key)).remove)
        yield noted


@contextmanager
def _last_states(model: nn.Module) -> Iterator[list[torch.Tensor]]:
    """Hidden states that the body of a Transformers model puts out while the context lasts; none of other models."""
    inner: Any = base_of(model)
    body = getattr(inner, "base_model", None)
    noted: list[torch.Tensor] = []
    if not isinstance(body, nn.Module):
        yield noted
        return
    hook = body.register_forward_hook(lambda module, args, output: noted.append(_first(output)))
    try:
        yield noted
    finally:
        hook.remove()


def _first(output: Any) -> torch.Tensor:
    return hidden_states(output.to_tuple()) if hasattr(output, "to_tuple") else hidden_states(output)


def _predicted(output: Any, states: list[torch.Tensor]) -> tuple[torch.Tensor, bool]:
    """What a model says of each token, and whether that is the logits of a distribution."""
    logits = getattr(output, "logits", None)
    if logits is not None and logits.dim() > 2 and logits.shape[-1] > 1:
        return logits.float(), True
    if states:
        return states[-1].float(), False
    return (_first(output) if logits is None else logits).float(), False


def _likelihood(output: Any, last: list[torch.Tensor], counts: Counts, generator: torch.Generator) -> torch.Tensor:
    """Log-likelihood, but for a constant, of one draw for each of the model's predictions: 0-dim."""
    states, are_logits = _predicted(output, last)
    real = next((count for count in reversed(counts) if count is not None and count.shape == states.shape[:-1]), None)
    if real is not None:  # nobody reads what is predicted from padding
        states = states[real.to(states.device)]
    states = states.flatten(0, -2)
    if not are_logits:
        noise = torch.randn(states.shape, generator=generator)
        return (states * noise.to(states.device)).sum()
    drawn = torch.multinomial(states.detach().softmax(-1).cpu(), 1, generator=generator)[:, 0]
    return -cross_entropy(states, drawn.to(states.device), reduction="sum")
