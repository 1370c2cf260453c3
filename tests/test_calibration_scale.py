"""What calibration holds in memory, in which precision it sums, and what an interrupt leaves."""

import gc
from collections import Counter
from contextlib import contextmanager

import pytest
import torch
from helpers.methods import effective
from helpers.models import logits, make_llama, snapshot
from peft import get_peft_model
from tqdm.auto import tqdm

from peft_prune import SparseGPTConfig, WandaConfig, cache_masked_weights, calibrate
from peft_prune.calibration import walk as walking
from peft_prune.calibration.observers import GramMatrices, InputNorms
from peft_prune.layers.layer import PruningLayer, pruning_layers


pytestmark = pytest.mark.filterwarnings("ignore:calibrate")  # few examples, few tokens

CONFIGS = {
    "wanda": lambda: WandaConfig(refine=None),
    "wanda, swaps": lambda: WandaConfig(),
    "wanda, low rank": lambda: WandaConfig(update="low_rank", r=4),
    "admm": lambda: SparseGPTConfig(solver="admm"),
    "sparsegpt": lambda: SparseGPTConfig(solver="sparsegpt"),
}


def batches(count=3, batch=2, tokens=24):
    generator = torch.Generator().manual_seed(4)
    return [{"input_ids": torch.randint(0, 90, (batch, tokens), generator=generator)} for _ in range(count)]


# --------------------------------------------------------------------- memory


@contextmanager
def looked():
    """Shapes and dtypes of the floating-point tensors that have come, whenever a mask is chosen."""
    gc.collect()
    gc.freeze()  # what is there is not looked at
    found, set_bits = [], PruningLayer.set_bits

    def look(layer, *args):
        new = [t for t in gc.get_objects() if issubclass(type(t), torch.Tensor) and t.is_floating_point()]
        places = {t.untyped_storage().data_ptr(): (tuple(t.shape), t.dtype) for t in new if t.numel() > 1}
        found.append(Counter(places.values()))
        return set_bits(layer, *args)

    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(PruningLayer, "set_bits", look)
            yield found
    finally:
        gc.unfreeze()


def most_bytes(found):
    return max(sum(torch.Size(s).numel() * d.itemsize * n for (s, d), n in counts.items()) for counts in found)


@pytest.mark.parametrize("method", CONFIGS)
def test_memory_does_not_grow_with_the_number_of_blocks(method):
    most = {}
    for blocks in (3, 6):
        model = get_peft_model(make_llama(num_hidden_layers=blocks).bfloat16(), CONFIGS[method]())
        with looked() as found:
            calibrate(model, batches())
        assert len(found) == 7 * blocks
        most[blocks] = most_bytes(found)
        assert not any(layer.cached_weight._weight is not None for layer in pruning_layers(model))
    # where an update is trained, what it was is kept, to be put back after an error: factors of rank 4 of seven layers
    kept = 4 * (2 * (32 + 32) + 2 * (32 + 16) + 3 * (32 + 48)) * 4 if "low rank" in method else 0
    assert most[6] == most[3] + 3 * kept


def test_samples_are_kept_as_hidden_states_in_the_dtype_of_the_model():
    held = {}
    for count in (3, 9):
        model = get_peft_model(make_llama(num_hidden_layers=3).bfloat16(), WandaConfig())
        with looked() as found:
            calibrate(model, batches(count, tokens=20))
        held[count] = found[7]  # as the second block is chosen
    states = ((2, 20, 32), torch.bfloat16)
    assert held[9][states] - held[3][states] == 6
    more = held[9] - held[3]
    # rotary embeddings are those of 20 positions, whatever the number of texts: (1, tokens, 8), an eighth of a state
    assert set(more) <= {states, ((1, 20, 8), torch.bfloat16)}, "one hidden state a batch, and nothing of float32"


def test_a_cache_that_was_switched_off_stays_off():
    model = get_peft_model(make_llama(), WandaConfig())
    cache_masked_weights(model, False)
    calibrate(model, batches())
    assert not any(layer.cached_weight.enabled for layer in pruning_layers(model))


# ------------------------------------------------------------------ precision


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_summed_in_float32(dtype):
    norms, grams = InputNorms(), GramMatrices()
    generator, seen = torch.Generator().manual_seed(0), []
    for _ in range(40):  # sums of which half precision would lose all digits
        x = (1 + torch.rand(4, 64, 12, generator=generator)).to(dtype)
        for observer in (norms, grams):
            observer.start((torch.ones(4, 64, dtype=torch.bool), None))
            observer.see("layer", False, x)
        seen.append(x.flatten(0, 1).double())
    exact = torch.cat(seen)
    torch.testing.assert_close(norms.result("layer").double(), exact.square().sum(0).sqrt(), rtol=1e-6, atol=0)
    torch.testing.assert_close(grams.result("layer").double(), exact.T @ exact, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_masks_of_half_precision_bases_are_those_of_float64(dtype):
    make = lambda: make_llama(num_hidden_layers=1).to(dtype)  # noqa: E731
    model = get_peft_model(make(), WandaConfig(refine=None))
    calibrate(model, batches())
    plain = make()
    for layer in pruning_layers(model):
        module, seen = plain.get_submodule(layer.module_name), []
        handle = module.register_forward_pre_hook(lambda m, args, seen=seen: seen.append(args[0].flatten(0, 1)))
        for batch in batches():
            logits(plain, batch)
        handle.remove()
        scores = module.weight.double().abs() * torch.cat(seen).double().square().sum(0).sqrt()
        kept = scores >= scores.topk(scores.shape[1] // 2, dim=1).values[:, -1:]
        assert (kept == layer.get_mask("default")).float().mean() > 0.995  # values that are all but equal


# ------------------------------------------------------------- progress, losses


def bars_of(monkeypatch, model):
    shown = []

    class Bar(tqdm):
        def update(self, n=1):
            shown.append((self.n + n, self.total, self.postfix))
            return super().update(n)

    monkeypatch.setattr(walking, "tqdm", Bar)
    return shown, calibrate(model, batches())


@pytest.mark.parametrize("method", CONFIGS)
def test_progress_shows_the_block_and_its_loss(monkeypatch, method):
    model = get_peft_model(make_llama(num_hidden_layers=1), CONFIGS[method]())
    shown, reported = bars_of(monkeypatch, model)
    if method == "wanda":  # norms do not say what an output loses
        assert shown == [(1, 1, None)] and set(reported) == {"sparsity"}
        return
    # all layers of a block are seen before one is pruned, so in a model of one block by the dense model
    plain, losses = make_llama(num_hidden_layers=1), []
    for layer in pruning_layers(model):
        module, seen = plain.get_submodule(layer.module_name), []
        handle = module.register_forward_pre_hook(lambda m, args, seen=seen: seen.append(args[0].flatten(0, 1)))
        for batch in batches():
            logits(plain, batch)
        handle.remove()
        x, weight = torch.cat(seen).double(), module.weight.detach().double()
        error = (effective(layer).double() - weight) @ x.T
        losses.append(float(error.square().sum() / (weight @ x.T).square().sum()))
    assert reported["loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-3)
    assert shown == [(1, 1, f"loss={reported['loss']:.2g}")]


def test_a_mask_with_an_update_says_its_sparsity():
    model = get_peft_model(make_llama(), CONFIGS["wanda, low rank"]())
    assert calibrate(model, batches())["sparsity"] == pytest.approx(0.5)
    assert model.peft_config["default"].sparsity == pytest.approx(0.5)


# ----------------------------------------------------------------- interrupted


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
@pytest.mark.parametrize("method", CONFIGS)
def test_an_interrupt_in_the_middle_leaves_what_was_there(method, error):
    model = get_peft_model(make_llama(num_hidden_layers=3), CONFIGS[method]())
    before, masked = snapshot(model), logits(model, batches()[0])
    chosen, set_bits = [], PruningLayer.set_bits

    def interrupted(layer, *args):
        set_bits(layer, *args)
        chosen.append(layer)
        if len(chosen) == 10:  # the third layer of the second block
            raise error

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PruningLayer, "set_bits", interrupted)
        with pytest.raises(error):
            calibrate(model, batches())
    after = snapshot(model)
    assert after.keys() == before.keys() and all(torch.equal(after[key], before[key]) for key in before)
    assert torch.equal(logits(model, batches()[0]), masked)
    calibrate(model, batches())
    assert not torch.equal(logits(model, batches()[0]), masked)
