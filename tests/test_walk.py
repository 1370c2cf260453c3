"""The calibration walk: what it runs, and that what it leaves out would have shown nothing else."""

from collections import Counter

import pytest
import torch
from helpers import architectures
from helpers.models import make_llama
from peft import get_peft_model
from torch import nn

from peft_prune import PPruningConfig, SparseGPTConfig, StructuredPruningConfig, WandaConfig, calibrate
from peft_prune.calibration import capture as capturing
from peft_prune.calibration.capture import capture
from peft_prune.calibration.observers import GramMatrices, InputNorms
from peft_prune.calibration.walk import walk
from peft_prune.layers.layer import pruning_layers
from peft_prune.stages import across_layers
from peft_prune.structure.sites import find_sites


def llama_batches(count=4):
    generator = torch.Generator().manual_seed(4)
    return [{"input_ids": torch.randint(0, 90, (2, 11), generator=generator)} for _ in range(count)]


def count_calls(model, *endings):
    calls = Counter()
    for name, module in model.named_modules():
        if name.endswith(endings):
            module.register_forward_hook(lambda *args, name=name: calls.update([name]))
    return calls


def test_a_block_is_run_twice_and_the_head_never():
    model = get_peft_model(make_llama(), SparseGPTConfig(task_type="CAUSAL_LM"))
    calls = count_calls(model, "self_attn", "lm_head", "down_proj")
    calibrate(model, llama_batches(4))
    last = max(name.split(".")[4] for name in calls)
    for name, times in calls.items():
        whole = name.split(".")[4] != last  # nothing comes after the last block
        if "self_attn" in name:  # the first batch shows what the other blocks are called with, and four twice
            assert times == (9 if whole else 4), name
        else:  # nothing has to be seen behind the last layer of a block, which the first batch tells
            assert times == (6 if whole else 1), name
    assert len(calls) == 4


def test_the_head_is_not_run_where_all_layers_are_seen_at_once():
    model = get_peft_model(make_llama(), PPruningConfig(task_type="CAUSAL_LM", keep_ratio=0.5))
    calls = count_calls(model, "lm_head")
    calibrate(model, llama_batches(4))
    assert sum(calls.values()) == 1  # the first batch, which tells how often layers are called


def blocks_of(model):
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    return list(next(entries for entries in lists if len(entries) > 1 and len(list(entries[0].parameters())) > 4))


@pytest.mark.parametrize("name", sorted(set(architectures.ARCHITECTURES) - {"albert"}))  # has one block
def test_blocks_are_called_with_what_the_whole_model_calls_them_with(name, monkeypatch):
    model, batches = architectures.make(name).eval(), 2 * list(architectures.batches(name))
    blocks = blocks_of(model)
    with torch.no_grad():
        found = capture(model, blocks, batches)
        monkeypatch.setattr(capturing, "_hands_on", lambda *args: False)
        expected = capture(model, blocks, batches)
    assert len(found[0]) == len(expected[0]) == len(batches)
    torch.testing.assert_close(found[0], expected[0], rtol=0, atol=0)
    for one, other in zip(found[1], expected[1], strict=True):
        for a, b in zip(one, other, strict=True):
            assert capturing._same((a.args, a.kwargs), (b.args, b.kwargs))
    assert not any("forward" in vars(block) for block in blocks)


class Block(nn.Module):
    def __init__(self, again=False):
        super().__init__()
        self.linear, self.again, self.runs = nn.Linear(4, 4), again, 0

    def forward(self, hidden_states, scale):
        self.runs += 1
        result = self.linear(hidden_states) * scale
        if self.again and hidden_states.sum() > 0:  # control flow that follows the data
            result = self.linear(result)
        return result


class Stack(nn.Module):
    def __init__(self, follows, again=False):
        super().__init__()
        torch.manual_seed(0)
        self.layers, self.follows = nn.ModuleList(Block(again) for _ in range(3)), follows

    def forward(self, x):
        scale = torch.ones(())
        for block in self.layers:
            x = block(x, scale)
            if self.follows:
                scale = x.std()
        return x


@pytest.mark.parametrize(("follows", "runs"), [(False, [9, 9, 4]), (True, [12 + 1, 12, 4])])
def test_blocks_that_depend_on_each_other_in_other_ways_are_run_for_that(follows, runs):
    model = Stack(follows)
    batches = [{"inputs_embeds": torch.randn(2, 3, 4)} for _ in range(4)]
    inputs = [[] for _ in model.layers]
    handles = [
        block.linear.register_forward_pre_hook(lambda module, args, i=i: inputs[i].append(args[0].flatten(0, 1)))
        for i, block in enumerate(model.layers)
    ]
    wrapped = Takes(model)
    with torch.no_grad():
        for batch in batches:
            wrapped(**batch)
    for handle in handles:
        handle.remove()
    for block in model.layers:
        block.runs = 0
    watched = {f"model.layers.{i}.linear": (block.linear, False) for i, block in enumerate(model.layers)}
    observer, results = GramMatrices(), {}
    walk(wrapped, watched, batches, observer, 100, lambda ps: results.update({p: observer.result(p) for p in ps}))
    for i in range(3):
        x = torch.cat(inputs[i])
        torch.testing.assert_close(results[f"model.layers.{i}.linear"], x.T @ x)
    found = [block.runs for block in model.layers]
    assert found[2] == 4 and all(a <= b for a, b in zip(found, runs, strict=True)), found


class Takes(nn.Module):
    """Gives a stack its inputs by the name that batches have for them."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, inputs_embeds):
        return self.model(inputs_embeds)


def test_layers_that_are_called_a_second_time_for_some_inputs_are_seen_each_time():
    model = Stack(follows=False, again=True)
    batches = [{"inputs_embeds": sign * torch.rand(1, 3, 4)} for sign in (1, -1, 1, 1)]
    calls = []
    handle = model.layers[0].linear.register_forward_pre_hook(lambda module, args: calls.append(args[0][0]))
    with torch.no_grad():
        for batch in batches:
            model(**{"x": batch["inputs_embeds"]})
    handle.remove()
    observer, results = InputNorms(), {}
    watched = {"model.layers.0.linear": (model.layers[0].linear, False)}
    walk(Takes(model), watched, batches, observer, 100, lambda ps: results.update({p: observer.result(p) for p in ps}))
    torch.testing.assert_close(results["model.layers.0.linear"], torch.cat(calls).square().sum(0).sqrt())


def test_forward_methods_that_others_put_in_place_are_left_there():
    model = get_peft_model(make_llama(), WandaConfig(task_type="CAUSAL_LM"))
    block = model.base_model.model.model.layers[0]
    own = block.forward
    block.forward = lambda *args, **kwargs: own(*args, **kwargs)
    before = block.forward
    calibrate(model, llama_batches())
    assert block.forward is before
    plain = get_peft_model(make_llama(), WandaConfig(task_type="CAUSAL_LM"))
    calibrate(plain, llama_batches())
    for one, other in zip(pruning_layers(model), pruning_layers(plain), strict=True):
        assert torch.equal(one.get_mask("default"), other.get_mask("default"))


def test_a_block_that_is_called_again_and_again_is_seen_each_time():
    """ALBERT has one block, called once a layer: the mask follows from the inputs of all calls."""
    batches = [{"input_ids": batch["input_ids"].clamp(min=3)} for batch in architectures.batches("albert", count=2)]
    model = get_peft_model(architectures.make("albert"), WandaConfig(num_samples=8, refine=None))
    calibrate(model, batches)
    plain = architectures.make("albert")
    for layer in pruning_layers(model):
        module, seen = plain.get_submodule(layer.module_name), []
        handle = module.register_forward_pre_hook(lambda m, args, seen=seen: seen.append(args[0].flatten(0, 1)))
        with torch.no_grad():
            for batch in batches:
                plain(**batch)
        handle.remove()
        assert len(seen) == 2 * 3
        scores = module.weight.detach().abs() * torch.cat(seen).square().sum(0).sqrt()
        expected = scores >= scores.topk(scores.shape[1] // 2, dim=1).values[:, -1:]
        assert torch.equal(layer.get_mask("default"), expected), layer.module_name


class InPlace(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, hidden_states):
        return self.linear(hidden_states.mul_(2))


def test_blocks_that_change_their_input_in_place():
    torch.manual_seed(0)
    model = nn.Sequential()
    model.layers = nn.ModuleList(InPlace() for _ in range(3))
    model.forward = lambda x: model.layers[2](model.layers[1](model.layers[0](x)))
    batches = [{"inputs_embeds": torch.randn(2, 3, 4)} for _ in range(3)]
    seen = [[] for _ in model.layers]
    handles = [
        block.linear.register_forward_pre_hook(lambda m, args, i=i: seen[i].append(args[0].flatten(0, 1).clone()))
        for i, block in enumerate(model.layers)
    ]
    with torch.no_grad():
        for batch in batches:
            model(batch["inputs_embeds"].clone())
    for handle in handles:
        handle.remove()
    watched = {f"model.layers.{i}.linear": (block.linear, False) for i, block in enumerate(model.layers)}
    observer, results = GramMatrices(), {}
    copies = [{key: value.clone() for key, value in batch.items()} for batch in batches]
    walk(Takes(model), watched, copies, observer, 6, lambda ps: results.update({p: observer.result(p) for p in ps}))
    for i in range(3):
        x = torch.cat(seen[i])
        torch.testing.assert_close(results[f"model.layers.{i}.linear"], x.T @ x)


@pytest.mark.parametrize("name", sorted(architectures.ARCHITECTURES))
def test_what_only_a_seen_layer_reads_is_run_once_with_the_same_outcome(name, monkeypatch):
    outcomes, calls = [], []
    for plain in (False, True):
        if plain:
            monkeypatch.setattr(across_layers, "find_feeders", lambda model, sites: {})
        model = get_peft_model(architectures.make(name), StructuredPruningConfig(keep_ratio=0.6, sequence_length=10))
        named, runs = dict(model.named_modules()), Counter()
        for path in {path for site in find_sites(model) for path in site.rows}:
            named[path].register_forward_pre_hook(
                lambda module, args, path=path, runs=runs: runs.update([path] if "forward" not in vars(module) else [])
            )
        calibrate(model, architectures.batches(name))
        outcomes.append(architectures.logits(model, architectures.inputs(name)))
        calls.append(runs)
        assert not any("forward" in vars(module) for module in named.values())
    assert torch.equal(*outcomes)
    assert calls[0].keys() == calls[1].keys()
    assert all(calls[0][path] <= calls[1][path] for path in calls[0])
    assert sum(calls[0].values()) < 0.9 * sum(calls[1].values()) or name == "albert"  # is run as a whole
