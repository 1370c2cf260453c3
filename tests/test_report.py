"""Reports say what the masks are."""

import pytest
from conftest import BERT_TARGET_WEIGHTS, make_bert
from test_layer import prune

from peft_prune import finalize
from peft_prune.report.plots import plot_density
from peft_prune.report.summary import layer_densities, summary_table
from peft_prune.tuners.layer import pruning_layers


@pytest.mark.parametrize("final", [False, True])
def test_rows_and_table(final):
    from rich.console import Console

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
    console = Console(width=120, record=True, file=open("/dev/null", "w"))
    console.print(summary_table(model))
    text = console.export_text()
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
