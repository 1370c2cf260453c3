"""Why P-pruning breaks a language model: parts of its choice exchanged for those of the choice by loss, one at a time.

    python benchmarks/ppruning_why.py
    python benchmarks/ppruning_why.py --table

SmolLM2-135M at 80 % of its FLOPs. `P-pruning` and `loss` choose; every row then takes the heads, the neurons, the
numbers of units of each layer or the units within each layer from one or the other, and repairs what stays in the same
way. `--floor` is a `min_share` of P-pruning. Perplexity is that of windows of 512 tokens of WikiText-2's validation
text. The dense model is in the first row.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from language_model import LENGTH, as_tokens, calibration_windows, load, perplexity, wikitext_2
from peft import get_peft_model
from scaffold import FOLDER, append, environment, make_parser, markdown, read, settings

from peft_prune import StructuredPruningConfig, calibrate
from peft_prune.importance.output_loss import OutputLoss
from peft_prune.importance.similarity import Similarity
from peft_prune.recipe import Moment, Recipe
from peft_prune.rules.budget import Budget, sites_of
from peft_prune.updates.base import Keep
from peft_prune.updates.rewrite import Repair


RESULTS = FOLDER / "ppruning_why.jsonl"
KEEP = 0.8
LAMBDA = 5.0
Orders = dict[str, torch.Tensor]  # by layer: the units in the order in which they go
Counts = dict[str, int]  # by layer: how many go


@dataclass(frozen=True)
class Noting(Budget):
    """The rule of P-pruning or of the choice by loss; it notes orders and numbers."""

    orders: Orders = field(default_factory=dict)
    counts: Counts = field(default_factory=dict)

    def _plan(self, model: Any, site: Any, *args: Any) -> Any:
        self.orders[site.output] = torch.from_numpy(args[1].copy())
        return super()._plan(model, site, *args)

    def choose_all(self, model: Any, name: str, layers: list[Any], seen: Any) -> dict[str, torch.Tensor]:
        masks, sites = super().choose_all(model, name, layers, seen), sites_of(model, layers)
        for key, mask in masks.items():
            site = sites[key]
            self.counts[site.output] = site.units - int(mask[0][site.columns[:, 0]].sum())
        return masks


@dataclass(frozen=True)
class Given(Budget):
    """The first units of an order, as many as it is told."""

    orders: Orders = field(default_factory=dict)
    counts: Counts = field(default_factory=dict)

    def choose_all(self, model: Any, name: str, layers: list[Any], seen: Any) -> dict[str, torch.Tensor]:
        masks, sites = {}, sites_of(model, layers)
        for layer in layers:
            site = sites[layer.module_name]
            masks[layer.module_name] = torch.ones(layer.shape, dtype=torch.bool)
            gone = self.orders[site.output][: self.counts[site.output]]
            masks[layer.module_name][:, site.columns[gone].flatten()] = False
        return masks


@dataclass(frozen=True)
class Again(OutputLoss):
    """As many units as were given, chosen by loss behind pruned layers."""

    reads_activations = False
    by_block = False


@dataclass
class ByHand(StructuredPruningConfig):
    """A config whose parts are given."""

    parts: Any = None

    def recipe(self) -> Recipe:
        return Recipe(*self.parts, Moment.CALIBRATION)


def pruned(windows: torch.Tensor, importance: Any, rule: Any, update: Any) -> Any:
    """The smaller model."""
    config = ByHand(task_type="CAUSAL_LM", num_samples=len(windows), parts=(importance, rule, update))
    model = get_peft_model(load()[0], config)
    calibrate(model, [{"input_ids": rows} for rows in windows.split(4)])
    return model.merge_and_unload()


def run(args: Any) -> None:
    done = {row["what"] for row in read(args.results)}
    base, tokenizer = load()
    windows = calibration_windows(tokenizer, args)
    text = as_tokens(tokenizer, wikitext_2("valid")[:100_000])[: args.windows * LENGTH].view(-1, LENGTH)

    def note(what: str, model: Any, **more: Any) -> None:
        if what not in done:
            found = {"what": what, "perplexity": perplexity(model, text)}
            append(args.results, settings(args) | found | more | environment())

    note("dense", base)
    ours = Noting(KEEP, None, LENGTH, "flops", 0.05)
    note("loss, repair", pruned(windows, OutputLoss(), ours, Repair()), gone=ours.counts)
    paper = Noting(KEEP, LAMBDA, LENGTH)
    note("P-pruning", pruned(windows, Similarity(), paper, Keep()), gone=paper.counts)
    floor = Noting(KEEP, LAMBDA, LENGTH, min_share=args.floor)
    note(f"P-pruning, min_share={args.floor}", pruned(windows, Similarity(), floor, Keep()), gone=floor.counts)

    def mixed(heads: Counts, neurons: Counts) -> Counts:
        return {key: (heads if _is_attention(key) else neurons)[key] for key in heads}

    same, by_loss = Similarity("random"), Again()
    trials = {
        "P-pruning, repair": (same, paper.orders, paper.counts),
        f"P-pruning, min_share={args.floor}, repair": (same, floor.orders, floor.counts),
        "numbers of P-pruning, units by loss, repair": (by_loss, paper.orders, paper.counts),
        "numbers by loss, units of P-pruning, repair": (same, paper.orders, ours.counts),
        "heads of P-pruning, neurons by loss, repair": (
            same, {k: (paper if _is_attention(k) else ours).orders[k] for k in ours.orders},
            mixed(paper.counts, ours.counts),
        ),
        "heads by loss, neurons of P-pruning, repair": (
            same, {k: (ours if _is_attention(k) else paper).orders[k] for k in ours.orders},
            mixed(ours.counts, paper.counts),
        ),
    }  # fmt: skip
    for what, (importance, orders, counts) in trials.items():
        if what in done:
            continue
        rule = Given(KEEP, None, LENGTH, orders=orders, counts=counts)
        note(what, pruned(windows, importance, rule, Repair()))


def _is_attention(key: str) -> bool:
    return "attn" in key


def table(path: Path) -> str:
    rows = read(path)
    return markdown(["choice", "perplexity"], [[row["what"], f"{row['perplexity']:,.1f}"] for row in rows])


if __name__ == "__main__":
    parser = make_parser(__doc__, RESULTS, table=True)
    parser.add_argument("--windows", type=int, default=8, help="windows of 512 tokens of WikiText-2's validation text")
    parser.add_argument("--calibration", type=int, default=8, help="windows of 512 tokens to calibrate on")
    parser.add_argument("--floor", type=float, default=0.65, help="min_share of P-pruning with a floor")
    parser.set_defaults(text="wikitext", seed=1)
    args = parser.parse_args()
    print(table(args.results)) if args.table else run(args)
