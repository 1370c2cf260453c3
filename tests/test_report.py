"""Reports say what the masks are."""

import numpy as np
import pytest
import torch
from helpers.data import arguments, data
from helpers.methods import prune
from helpers.models import BERT_TARGET_WEIGHTS, make_bert, make_gpt2, make_llama
from peft import get_peft_model
from rich.console import Console
from transformers import TrainerCallback
from transformers.integrations.integration_utils import rewrite_logs

from peft_prune import (
    DSEEConfig,
    MovementPruningConfig,
    PPruningConfig,
    PruningCallback,
    PruningTrainer,
    SMPConfig,
    calibrate,
    finalize,
    model_size,
    update_schedule,
)
from peft_prune.layers.layer import pruning_layers
from peft_prune.report import (
    layer_densities,
    plot_density,
    plot_scores,
    plot_training,
    plot_units,
    summary_table,
    training_curves,
    units_alive,
    units_table,
)


def printed(table):
    console = Console(width=120, record=True, file=open("/dev/null", "w"))
    console.print(table)
    return console.export_text()


def with_scores(config):
    """A model with random scores, one for each block of weights, at its final sparsity."""
    model = get_peft_model(make_bert(), config)
    generator = torch.Generator().manual_seed(0)
    for layer in pruning_layers(model):
        with torch.no_grad():
            layer.scores["default"].copy_(torch.randn(layer.scores["default"].shape, generator=generator))
    update_schedule(model, 10, 10)
    return model


@pytest.mark.parametrize("final", [False, True])
def test_rows_and_table(final):
    model = prune(make_bert(), 0.9, allocation="score")
    if final:
        finalize(model)
    rows = {row.name: row for row in layer_densities(model)}
    for layer in pruning_layers(model):
        mask = layer.get_mask("default")
        row = rows[layer.module_name]
        assert (row.kept, row.size) == (mask.sum(), mask.numel())
        assert row.density == pytest.approx(mask.float().mean().item())
    assert {row.kind for row in rows.values()} >= {"attention.self.query", "output.dense"}
    assert {row.block for row in rows.values()} == {0, 1}
    text = printed(summary_table(model))
    assert "attention.self.query" in text and f"{BERT_TARGET_WEIGHTS:,}" in text


def test_picture_holds_every_density(tmp_path):
    model = prune(make_bert(), 0.9, allocation="score")
    figure = plot_density(model)
    texts = [text.get_text() for text in figure.axes[0].texts]
    assert sorted(texts) == sorted(f"{100 * row.density:.1f}" for row in layer_densities(model))
    figure.savefig(tmp_path / "density.png")
    assert (tmp_path / "density.png").stat().st_size > 5000


def test_unknown_adapter_is_told():
    with pytest.raises(ValueError, match="adapter_name='other'"):
        layer_densities(prune(make_bert()), "other")
    with pytest.raises(ValueError, match="no such pruning adapter"):
        layer_densities(make_bert())


@pytest.mark.parametrize("make", [make_bert, make_gpt2, make_llama])
def test_units_alive_are_those_that_shrinking_keeps(make):
    model = get_peft_model(make(), PPruningConfig(keep_ratio=0.5, criterion="random"))
    calibrate(model)
    counts = units_alive(model)
    figure, text = plot_units(model), printed(units_table(model))
    merged = model.merge_and_unload()
    sums = {kind: sum(c.alive for c in counts if c.kind == kind) for kind in ("heads", "neurons")}
    totals = {kind: sum(c.total for c in counts if c.kind == kind) for kind in ("heads", "neurons")}
    assert sums == {"heads": model_size(merged).heads, "neurons": model_size(merged).neurons}
    dense = model_size(make())
    assert totals == {"heads": dense.heads, "neurons": dense.neurons}
    for kind in sums:
        assert f"{sums[kind]} of {totals[kind]}" in text
        assert f"{sums[kind]} of {totals[kind]} {kind}" in figure.axes[0].get_title()
    assert [t.get_text() for t in figure.axes[0].texts] == [str(c.alive) for c in counts]
    shares = {(c.kind, c.block): 100 * c.alive / c.total for c in counts}
    image = np.asarray(figure.axes[0].images[0].get_array())
    assert image.tolist() == [[shares[kind, block] for block in (0, 1)] for kind in ("heads", "neurons")]


def test_units_die_by_whatever_mask_and_not_while_something_reads_them():
    dense_units = units_alive(prune(make_bert(), 0.5))
    assert all(count.alive == count.total for count in dense_units)  # single weights seldom kill a unit
    model = with_scores(SMPConfig(sparsity=0.5, granularity="column", target_modules=["output.dense"]))
    for count in units_alive(model):
        mask = next(layer for layer in pruning_layers(model) if layer.module_name == count.name).get_mask("default")
        # column granularity removes single dimensions; a head is dead when all of its 8 are
        assert count.alive == mask.any(0).view(count.total, -1).any(1).sum()
    assert {count.alive < count.total for count in units_alive(model) if count.kind == "neurons"} == {True}


@pytest.mark.parametrize("granularity", ["weight", "8x8"])
def test_score_histogram_holds_every_score_and_the_thresholds(granularity):
    model = with_scores(SMPConfig(sparsity=0.7, allocation="score", granularity=granularity))
    figure = plot_scores(model, bins=30)
    kinds = {row.name: row.kind for row in layer_densities(model)}
    assert len(figure.axes) == len(set(kinds.values()))
    for axes in figure.axes:
        kind = axes.get_title().split(":")[0]
        layers = [layer for layer in pruning_layers(model) if kinds[layer.module_name] == kind]
        area = 1 if granularity == "weight" else 64
        kept, removed = ([bar.get_height() for bar in bars] for bars in axes.containers)
        assert sum(kept) * area == sum(int(layer.get_mask("default").sum()) for layer in layers)
        assert (sum(kept) + sum(removed)) * area == sum(layer.get_mask("default").numel() for layer in layers)
        thresholds = sorted(line.get_xdata()[0] for line in axes.lines)
        expected = []
        for layer in layers:
            flat = layer.scores["default"].detach().flatten().sort(descending=True).values
            expected.append(flat[layer.kept("default") // area - 1].item())
        assert thresholds == pytest.approx(sorted(expected))


def test_scores_that_are_gone_are_told():
    model = prune(make_bert())
    finalize(model)
    with pytest.raises(ValueError, match="finalize_at_end=False"):
        plot_scores(model)
    with pytest.raises(ValueError, match="its method has none"):
        plot_scores(get_peft_model(make_bert(), DSEEConfig(num_sparse=4)))
    magnitude = get_peft_model(make_bert(), MovementPruningConfig(variant="magnitude", sparsity=0.5))
    update_schedule(magnitude, 1, 1)
    assert plot_scores(magnitude).axes[0].get_xlim()[0] >= -0.1  # magnitudes


class Reporter(TrainerCallback):
    """Sees what TensorBoard and W&B see, which stand before all other callbacks, and the masks of that moment."""

    def __init__(self):
        self.seen = []

    def on_log(self, args, state, control, logs=None, model=None, **kwargs):
        masks = {layer.module_name: layer.get_mask("default") for layer in pruning_layers(model)}
        self.seen.append((state.global_step, dict(logs), masks))


def test_training_is_logged_and_drawn(tmp_path, monkeypatch):
    reports = []
    report = PruningCallback.report
    monkeypatch.setattr(PruningCallback, "report", lambda self, model: reports.append(1) or report(self, model))
    reporter = Reporter()
    model = get_peft_model(make_bert(), SMPConfig(task_type="SEQ_CLS", sparsity=0.9, allocation="score"))
    args = arguments(tmp_path, max_steps=8, logging_steps=2)
    trainer = PruningTrainer(model=model, args=args, train_dataset=data(), callbacks=[reporter])
    trainer.train()
    assert len(reports) == 4  # nothing is computed for steps that are not logged
    seen = [entry for entry in reporter.seen if "loss" in entry[1]]
    assert [step for step, *_ in seen] == [2, 4, 6, 8]
    queries = []
    for _, logs, masks in seen:
        chosen = [mask for name, mask in masks.items() if name.endswith("query")]
        queries.append(sum(int(m.sum()) for m in chosen) / sum(m.numel() for m in chosen))
        assert logs["density/attention.self.query"] == pytest.approx(queries[-1])
        everything = sum(int(m.sum()) for m in masks.values()) / BERT_TARGET_WEIGHTS
        assert logs["sparsity"] == pytest.approx(1 - everything)
        assert sum(key.startswith("density/") for key in logs) == 6 and logs["penalty"] > 0
        assert all(key.startswith("train/") for key in rewrite_logs(logs))

    history = trainer.state.log_history
    curves = training_curves(history)
    assert curves["density/attention.self.query"] == ([2, 4, 6, 8], pytest.approx(queries))
    loss, sparsity, density, penalty = plot_training(history).axes
    assert list(loss.lines[0].get_ydata()) == [logs["loss"] for _, logs, _ in seen]
    assert list(sparsity.lines[0].get_ydata()) == [logs["sparsity"] for _, logs, _ in seen]
    assert list(penalty.lines[0].get_ydata()) == [logs["penalty"] for _, logs, _ in seen]
    drawn = {line.get_label(): list(line.get_ydata()) for line in density.lines}
    assert len(drawn) == 6 and drawn["attention.self.query"] == pytest.approx(queries)
    with pytest.raises(ValueError, match="logging_steps"):
        plot_training([{"loss": 1.0, "step": 1}])
