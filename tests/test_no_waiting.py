"""What an accelerator runs, on a CPU: the same masks, and no number that the host would have to wait for."""

import copy
import math

import pytest
import torch
from helpers.masks import brute_force
from helpers.models import make_bert
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import get_peft_model
from torch.utils._python_dispatch import TorchDispatchMode

from peft_prune import MovementPruningConfig, SMPConfig, create_pruning_optimizer, finalize, update_schedule
from peft_prune.layers.layer import pruning_layers
from peft_prune.selection import device, topk
from peft_prune.selection.granularity import spread
from peft_prune.selection.radix import radix_topk
from peft_prune.selection.topk import compile_selection, tie_order, topk_mask


# what has no output before the host knows a number of the device
WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "unique", "bincount")


class NothingWaits(TorchDispatchMode):
    """Raises where the host would wait for a device."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert not any(name in str(func) for name in WAITS), f"the host waits: {func}"
        if "index" in str(func) and "select" not in str(func):
            indices = [i for arg in args if isinstance(arg, (list, tuple)) for i in arg if i is not None]
            assert not any(i.dtype == torch.bool for i in indices if isinstance(i, torch.Tensor)), "bool index"
        return func(*args, **(kwargs or {}))


@pytest.fixture
def as_on_an_accelerator(monkeypatch):
    monkeypatch.setattr(device, "HOST", "none that there is")


@settings(max_examples=200, deadline=None)
@given(
    values=st.lists(st.floats(width=32, allow_nan=False) | st.integers(-2, 2).map(float), min_size=1, max_size=80),
    share=st.floats(0, 1),
)
def test_counting_digits_finds_what_a_sort_finds(values, share):
    scores = torch.tensor(values, dtype=torch.float32)
    k = round(share * len(values))
    found = radix_topk(scores, torch.tensor(k), tie_order(torch.arange(len(values))))
    assert torch.equal(found, brute_force(scores, k))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_same_mask_on_real_shapes(as_on_an_accelerator, monkeypatch, dtype):
    torch.manual_seed(0)
    for scores in (torch.randn(768, 768).to(dtype), torch.zeros(768, 768, dtype=dtype)):
        for k in (0, 1, 58_982, 768 * 768 - 1, 768 * 768):
            found = topk_mask(scores, torch.tensor(k))
            with monkeypatch.context() as patch:
                patch.setattr(device, "HOST", "cpu")
                assert torch.equal(found, topk_mask(scores, k))


def test_scores_that_differ_in_float64_only(as_on_an_accelerator):
    scores = 1 + torch.arange(64, dtype=torch.float64).flip(0) * 1e-15
    assert topk_mask(scores, torch.tensor(10)).nonzero().squeeze(1).tolist() == list(range(10))


def test_selection_is_one_graph(as_on_an_accelerator):
    torch.manual_seed(0)
    scores, k = torch.randn(60, 70), torch.tensor(1000)
    expected = topk_mask(scores, k)
    try:
        compile_selection()
        topk._on_device = torch.compile(radix_topk, fullgraph=True, backend="aot_eager")
        assert torch.equal(topk_mask(scores, k), expected)
    finally:
        compile_selection(False)
    assert topk._on_device is radix_topk
    with pytest.raises(ValueError, match="enabled='no' must be True or False"):
        compile_selection("no")


CONFIGS = {
    "SMP-S": SMPConfig(sparsity=0.8, allocation="score", penalty=50.0),
    "SMP-L": SMPConfig(sparsity=0.8, allocation="local"),
    "global": SMPConfig(sparsity=0.8, allocation="global"),
    "low rank": SMPConfig(sparsity=0.8, allocation="score", score="low_rank", score_rank=2, penalty=50.0),
    "every other step": SMPConfig(sparsity=0.8, allocation="score", mask_interval=2),
    "2:4": SMPConfig(sparsity=0.5, granularity="2:4"),
    "heads": SMPConfig(sparsity=0.5, granularity="head", target_modules=["query", "key", "value"]),
    "hard": MovementPruningConfig(variant="hard", sparsity=0.8),
    "soft": MovementPruningConfig(variant="soft", penalty=100.0),
    "soft, to a sparsity": MovementPruningConfig(variant="soft", sparsity=0.8),
    "L0": MovementPruningConfig(variant="l0", penalty=100.0),
    "magnitude": MovementPruningConfig(variant="magnitude", sparsity=0.8),
}


def train(config, batch, guard=None):
    """Masks after each of six steps, and the sparsity that each update reports."""
    torch.manual_seed(0)
    config = copy.deepcopy(config)
    config.task_type = "SEQ_CLS"
    model = get_peft_model(make_bert(), config).train()
    optimizer = create_pruning_optimizer(model, 1e-3)
    masks, reported = [], [update_schedule(model, 0, 6)["sparsity"]]
    for step in range(6):
        with guard or torch.enable_grad():
            model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        with guard or torch.enable_grad():
            reported.append(update_schedule(model, step + 1)["sparsity"])
        masks.append(torch.cat([layer.get_mask("default").flatten() for layer in pruning_layers(model)]))
    return model, masks, [float(value) for value in reported]


@pytest.mark.parametrize("name", list(CONFIGS))
def test_a_step_waits_for_nothing_and_finds_the_same_masks(name, batch, request, monkeypatch):
    _, expected, reported = train(CONFIGS[name], batch)
    request.getfixturevalue("as_on_an_accelerator")
    with monkeypatch.context() as patch:
        originals = {read: getattr(torch.Tensor, read) for read in ("tolist", "numpy")}
        guard = NothingWaits()

        def guarded(read):
            def call(tensor, *args, **kwargs):
                assert torch.utils._python_dispatch._get_current_dispatch_mode() is not guard, f"the host reads: {read}"
                return originals[read](tensor, *args, **kwargs)

            return call

        for read in originals:
            patch.setattr(torch.Tensor, read, guarded(read))
        model, masks, found = train(CONFIGS[name], batch, guard)
    assert all(torch.equal(one, other) for one, other in zip(masks, expected, strict=True))
    assert found == pytest.approx(reported, abs=1e-6)
    finalize(model)


def test_nan_is_told_before_masks_become_final(as_on_an_accelerator, batch):
    model, _, _ = train(CONFIGS["SMP-L"], batch)
    with torch.no_grad():
        pruning_layers(model)[1].scores["default"][0, 0] = float("nan")
    update_schedule(model, 6)
    with pytest.raises(ValueError, match="NaN"):
        finalize(model)
    assert all("default" in layer.scores for layer in pruning_layers(model))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", list(CONFIGS))
def test_a_step_on_a_gpu_waits_for_nothing(name, batch):
    torch.manual_seed(0)
    config = copy.deepcopy(CONFIGS[name])
    config.task_type = "SEQ_CLS"
    model = get_peft_model(make_bert(), config).cuda().train()
    batch = {key: tensor.cuda() for key, tensor in batch.items()}
    optimizer = create_pruning_optimizer(model, 1e-3, fused=True)
    update_schedule(model, 0, 6)
    for step in range(6):
        torch.cuda.set_sync_debug_mode("error" if step and name != "L0" else "default")
        try:
            model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            update_schedule(model, step + 1)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        for layer in pruning_layers(model):
            ranking = layer.ranking("default").detach().cpu()
            units = layer.granularity["default"].units(
                ranking, layer.kept("default") // math.prod(layer.block("default"))
            )
            assert torch.equal(layer.get_mask("default").cpu(), spread(units, layer.block("default")))
