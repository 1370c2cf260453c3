"""Structured pruning by the loss of the output: budget, choice, repair, adapters, small models."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers.architectures import ARCHITECTURES, batches, inputs, logits, make
from helpers.models import make_bert, make_gpt2, make_llama, snapshot
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file

from peft_prune import PPruningConfig, StructuredPruningConfig, calibrate, model_size
from peft_prune.layers.layer import pruning_layers
from peft_prune.structure.flops import unit_macs, unit_parameters
from peft_prune.structure.sites import HEADS, find_sites, linear_matrix


def pruned(name="llama", base=None, **fields):
    exact = {"value_dtype": "float32"} if fields.get("repair", True) else {}
    fields = {"keep_ratio": 0.6, "sequence_length": 10} | exact | fields
    model = get_peft_model(make(name) if base is None else base, StructuredPruningConfig(**fields))
    return model, calibrate(model, batches(name))


def alive(model, name="default"):
    """Units that are kept, by the path of the module in the base model."""
    sites = {site.output: site for site in find_sites(model)}
    found = {}
    for layer in pruning_layers(model, name):
        site = sites["base_model.model." + layer.module_name]
        found[layer.module_name] = layer.get_mask(name)[0][site.columns[:, 0]]
    return found


def inputs_of(model, modules, data):
    """What comes into modules, padding left out: float64, (tokens, in) by path."""
    seen = {path: [] for path in modules}
    hooks = [
        model.get_submodule(path).register_forward_pre_hook(lambda m, args, path=path: seen[path].append(args[0]))
        for path in modules
    ]
    with torch.no_grad():
        for batch in data:
            model(**batch)
    for hook in hooks:
        hook.remove()
    real = torch.cat([batch["attention_mask"].bool().flatten() for batch in data])
    return {path: torch.cat([x.flatten(0, 1) for x in xs])[real].double() for path, xs in seen.items()}


# ------------------------------------------------------------------ every architecture


@pytest.mark.parametrize("name", list(ARCHITECTURES))
def test_every_architecture(name, tmp_path):
    model, shares = pruned(name)
    sites = find_sites(model)
    whole = model_size(make(name), 10).macs
    largest = max(unit_macs(model, site, 10) for site in sites) / whole
    assert 0.6 - largest <= shares["flops"] <= 0.6 + 1e-9
    masked, batch = logits(model, inputs(name)), inputs(name)
    with model.disable_adapter():
        assert torch.equal(logits(model, batch), logits(make(name), batch))
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(make(name), tmp_path)
    assert torch.equal(logits(again, batch), masked)
    smaller = again.merge_and_unload()
    torch.testing.assert_close(logits(smaller, batch), masked, atol=1e-5, rtol=1e-5)
    assert model_size(smaller, 10).macs == pytest.approx(whole * shares["flops"])


def check_repaired(model, name):
    """In every layer that loses units the output moves less than with the same mask alone, on the data that it saw."""
    layers = {"base_model.model." + layer.module_name: layer for layer in pruning_layers(model)}
    changed = 0
    for path, x in inputs_of(model, list(layers), batches(name)).items():
        weight, mask = layers[path].matrix.detach().double(), layers[path].get_mask("default")
        found = layers[path].adapted("default", layers[path].matrix).detach().double()
        repaired, masked = ((x @ (value - weight).T).square().sum() for value in (found, weight * mask))
        changed += bool(repaired < masked)
        assert repaired < masked or bool(mask.all()), path
    assert changed > 2


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "modernbert", "gemma3_text"])
def test_the_repair_helps(name):
    check_repaired(pruned(name)[0], name)


# ------------------------------------------------------------------ by hand


def greedy_by_hand(weight, x, units, ridge_share):
    """Unit by unit, each time the one that costs least after refitting: order and what each costs (float64)."""
    gram = x.T @ x
    gram = gram + ridge_share * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
    left, order, totals = list(range(len(units))), [], [0.0]

    def cost(gone):
        lost = units[gone].flatten()
        kept = np.setdiff1d(np.arange(len(gram)), lost)
        error = torch.zeros_like(weight)
        error[:, lost] = weight[:, lost]
        error[:, kept] = -weight[:, lost] @ torch.linalg.solve(gram[kept][:, kept], gram[lost][:, kept].T).T
        return float(torch.trace(error @ gram @ error.T))

    while len(left) > 1:
        costs = {unit: cost([*order, unit]) for unit in left}
        best = min(costs, key=costs.get)
        left.remove(best)
        order.append(best)
        totals.append(costs[best])
    return order, np.diff(totals)


def sensitivities(base, sites, data):
    """`‖g‖²` a token and output, of the gradient of the log-likelihood of labels drawn from the model's predictions."""
    noise = {site.output: [] for site in sites}  # is added to outputs, and is zero

    def hook(path):
        def add(module, args, out):
            noise[path].append(torch.zeros_like(out, requires_grad=True))
            return out + noise[path][-1]

        return base.get_submodule(path).register_forward_hook(add)

    hooks, generator, tokens = [hook(path) for path in noise], torch.Generator().manual_seed(0), 0
    for batch in data:
        for i in range(len(batch["input_ids"])):
            one = {key: value[i : i + 1] for key, value in batch.items()}
            real = one["attention_mask"].bool()
            if hasattr(base, "bert"):  # its head is one of the sequence: the body's states are means of normals
                states = base.bert(**one).last_hidden_state[real]
                (states * torch.randn(states.shape, generator=generator)).sum().backward()
            else:
                scores = base(**one).logits.log_softmax(-1)[real]
                drawn = torch.multinomial(scores.detach().exp(), 1, generator=generator)
                scores.gather(1, drawn).sum().backward()
            tokens += int(one["attention_mask"].sum())
    for handle in hooks:
        handle.remove()
    return {
        path: sum(float(x.grad.square().sum()) for x in xs) / xs[0].shape[-1] / tokens for path, xs in noise.items()
    }


def expected_counts(base, data, keep, length):
    """How many units each site loses by the definition: one list by running maximum, sensitivity and FLOPs."""
    sites = find_sites(base)
    seen = inputs_of(base, [site.output for site in sites], data)
    sensitivity = sensitivities(base, sites, data)
    steps = []
    for site in sites:
        scale = 1 / sensitivity[site.output]
        weight = linear_matrix(base.get_submodule(site.output)).detach().double()
        _, losses = greedy_by_hand(weight, seen[site.output], site.columns, 0.01)
        cost = unit_macs(base, site, length)
        steps += [(height / scale / cost, site.output, cost) for height in np.maximum.accumulate(losses)]
    gone, removed = dict.fromkeys(seen, 0), 0.0
    goal = (1 - keep) * sum(unit_macs(base, site, length) * site.units for site in sites)
    smallest = min(cost for _, _, cost in steps)
    for _, path, cost in sorted(steps):
        if removed < goal and removed + cost <= goal + smallest:
            gone[path], removed = gone[path] + 1, removed + cost
    return gone


SMALL = {"num_hidden_layers": 2, "intermediate_size": 14}


def small(name):
    torch.manual_seed(3)
    base = make_llama() if name == "llama" else make_bert()
    base = type(base)(type(base.config)(**base.config.to_dict() | SMALL)).eval()
    for parameter in base.parameters():
        parameter.data.normal_(0, 0.2) if parameter.dim() > 1 else parameter.data.add_(
            0.1 * torch.randn_like(parameter)
        )
    return base


def texts(vocabulary=90):
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(3, vocabulary, (4, 3, 12), generator=generator)
    masks = torch.ones_like(ids)
    masks[1, 1, 9:] = 0
    return [{"input_ids": i, "attention_mask": m} for i, m in zip(ids, masks, strict=True)]


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_choice_and_repair_are_those_of_the_definition(name):
    """Counts from the dense model; then each layer chosen and refitted behind what is pruned before it."""
    model = get_peft_model(
        small(name),
        StructuredPruningConfig(
            keep_ratio=0.65, sequence_length=12, value_dtype="float32", min_share=0.0, lambda_ffn=None
        ),
    )
    calibrate(model, texts())
    units, layers = alive(model), {layer.module_name: layer for layer in pruning_layers(model)}
    gone = expected_counts(small(name), texts(), 0.65, 12)
    assert {path: int((~kept).sum()) for path, kept in units.items()} == gone
    assert len({count for path, count in gone.items()}) > 2, "layers differ"
    base = small(name)  # is pruned site by site
    for site in find_sites(base):
        module, weight = base.get_submodule(site.output), base.get_submodule(site.output).weight
        x = inputs_of(base, [site.output], texts())[site.output]
        order, _ = greedy_by_hand(weight.detach().double(), x, site.columns, 0.01)
        kept = torch.ones(site.units, dtype=torch.bool)
        kept[order[: gone[site.output]]] = False
        assert torch.equal(units[site.output], kept), site.output
        columns = torch.zeros(weight.shape[1], dtype=torch.bool)
        columns[site.columns[kept].flatten()] = True
        ridge = float(0.01 * x.square().sum(0).mean()) ** 0.5 * torch.eye(int(columns.sum()), dtype=x.dtype)
        old = weight.detach().double()
        wanted = torch.linalg.lstsq(
            torch.cat([x[:, columns], ridge]), torch.cat([x @ old.T, ridge @ old[:, columns].T])
        ).solution.T
        found = layers[site.output].adapted("default", layers[site.output].matrix).detach()
        torch.testing.assert_close(found[:, columns].double(), wanted, atol=2e-4, rtol=2e-3)
        assert not found[:, ~columns].any()
        with torch.no_grad():
            module.weight.copy_(found)


def test_activation_is_the_size_of_weights_times_activations():
    model, _ = pruned("bert", criterion="activation", repair=False, keep_ratio=0.7)
    base = make("bert")
    seen = inputs_of(base, [site.output for site in find_sites(base)], batches("bert"))
    for site in find_sites(base):
        weight = linear_matrix(base.get_submodule(site.output)).detach().double()
        single = weight.square().sum(0) * seen[site.output].square().mean(0)
        size = single[site.columns].sum(1)
        kept = alive(model)[site.output]
        assert size[kept].min() >= size[~kept].max() if bool((~kept).any()) else True


# ------------------------------------------------------------------ budgets and criteria


@pytest.mark.parametrize("keep", [0.9, 0.7, 0.5])
def test_parameters_can_be_counted_instead(keep):
    base = make("bert")
    sites = find_sites(base)
    units = sum(unit_parameters(base, site) * site.units for site in sites)
    total = sum(p.numel() for p in base.parameters())
    model, shares = pruned("bert", base, keep_ratio=keep, budget="parameters")
    left = sum(p.numel() for p in model.merge_and_unload().parameters())
    largest = max(unit_parameters(base, site) for site in find_sites(make("bert")))
    assert keep * units - largest <= left - (total - units) <= keep * units
    assert shares["parameters"] == pytest.approx(1 - (total - left) / units)


def test_each_layer_keeps_a_floor():
    for share in (0.3, 0.0):
        model, _ = pruned("llama", keep_ratio=0.45, min_share=share)
        for kept in alive(model).values():
            assert int(kept.sum()) >= max(1, share * len(kept))
    with pytest.raises(ValueError, match=r"keep_ratio=0.2 cannot be reached: with the units that every layer keeps"):
        pruned("llama", keep_ratio=0.2, min_share=0.5)


@pytest.mark.parametrize("ratio", [0.5, 3.0])
def test_heads_and_neurons_lose_what_lambda_says(ratio):
    model, _ = pruned("bert", keep_ratio=0.7, lambda_ffn=ratio)
    lost = {"heads": 0, "neurons": 0}
    for site in find_sites(make("bert")):
        lost[site.kind] += unit_macs(make("bert"), site, 10) * int((~alive(model)[site.output]).sum())
    costs = {site.kind: unit_macs(make("bert"), site, 10) for site in find_sites(make("bert"))}
    wanted = 0.3 * model_size(make("bert"), 10).macs
    assert 0 <= lost["heads"] - wanted / (1 + ratio) < costs["heads"]
    assert 0 <= lost["neurons"] - wanted * ratio / (1 + ratio) < costs["neurons"]


def test_lambda_is_five_unless_tokens_are_predicted():
    def kept(name, **fields):
        return {key: units.tolist() for key, units in alive(pruned(name, keep_ratio=0.5, **fields)[0]).items()}

    for fields in ({}, {"criterion": "activation"}):
        assert kept("bert", **fields) == kept("bert", lambda_ffn=5, **fields) != kept("bert", lambda_ffn=None, **fields)
        assert kept("llama", **fields) == kept("llama", lambda_ffn=None, **fields)
    fields = {"criterion": "random"}  # a baseline takes equal shares
    assert kept("bert", **fields) == kept("bert", lambda_ffn=None, **fields) != kept("bert", lambda_ffn=5, **fields)


@pytest.mark.parametrize("criterion", ["similarity", "magnitude", "random"])
def test_baselines_take_equal_shares_of_layers(criterion):
    model, shares = pruned("bert", criterion=criterion, keep_ratio=0.55)
    assert shares["flops"] == pytest.approx(0.55, abs=0.05)
    for kept in alive(model).values():
        assert float(kept.float().mean()) == pytest.approx(0.55, abs=0.25 if len(kept) == 4 else 0.08)
    bare, _ = pruned("bert", criterion=criterion, keep_ratio=0.55, repair=False)
    assert all(torch.equal(a, b) for a, b in zip(alive(bare).values(), alive(model).values(), strict=True))
    check_repaired(model, "bert")


def test_seeds_are_for_random_choices():
    def masks(**fields):
        return torch.cat(list(alive(pruned("bert", **fields)[0]).values()))

    assert torch.equal(masks(seed=0), masks(seed=1))
    assert torch.equal(masks(criterion="random", seed=0), masks(criterion="random", seed=0))
    assert not torch.equal(masks(criterion="random", seed=0), masks(criterion="random", seed=1))


def test_ppruning_keeps_the_papers_choice_and_gains_the_repair():
    models = {}
    for repair in (False, True):
        config = PPruningConfig(keep_ratio=0.6, num_tokens=40, sequence_length=10, repair=repair)
        models[repair] = get_peft_model(make("bert"), config)
        calibrate(models[repair], batches("bert"))
    for plain, mended in zip(pruning_layers(models[False]), pruning_layers(models[True]), strict=True):
        assert torch.equal(plain.get_mask("default"), mended.get_mask("default"))
        assert not plain.changes_weights("default")
        assert mended.changes_weights("default") == (not bool(mended.get_mask("default").all()))
    check_repaired(models[True], "bert")


def test_ppruning_can_have_a_floor_for_each_layer():
    kept = {}
    for share in (0.0, 0.5):
        model = get_peft_model(
            make("bert"), PPruningConfig(keep_ratio=0.65, num_tokens=40, sequence_length=10, min_share=share)
        )
        calibrate(model, batches("bert"))
        kept[share] = [float(units.float().mean()) for units in alive(model).values()]
    assert min(kept[0.5]) >= 0.5 > min(kept[0.0])
    assert PPruningConfig().min_share == 0.0
    with pytest.raises(ValueError, match=r"min_share=-0.1"):
        PPruningConfig(min_share=-0.1)


# ------------------------------------------------------------------ adapters


def test_without_repair_it_is_a_mask(tmp_path):
    model, _ = pruned("llama", repair=False)
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert tensors and all(key.endswith("structured_mask") for key in tensors)
    assert sum(tensor.numel() for tensor in tensors.values()) < 200


@pytest.mark.parametrize(("dtype", "size"), [("float32", 4), ("float16", 2), ("bfloat16", 2), ("int8", 1)])
def test_values_are_stored_as_asked_and_seen_by_the_blocks_behind(dtype, size, tmp_path):
    model, _ = pruned("gpt2", value_dtype=dtype)
    expected = logits(model, inputs("gpt2"))
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    for layer in pruning_layers(model):
        if layer.changes_weights("default"):
            rows = 4 * layer.shape[0] if dtype == "int8" else 0
            stored = tensors[f"base_model.model.{layer.module_name}.structured_values"]
            assert stored.numel() == size * int(layer.get_mask("default").sum()) + rows
    assert torch.equal(logits(PeftModel.from_pretrained(make("gpt2"), tmp_path), inputs("gpt2")), expected)


def test_a_layer_that_loses_nothing_stays_as_it_is(tmp_path):
    model, _ = pruned("bert", keep_ratio=0.97)
    model.save_pretrained(tmp_path)
    whole = [layer for layer in pruning_layers(model) if bool(layer.get_mask("default").all())]
    assert whole and not any(layer.changes_weights("default") for layer in whole)
    for layer in whole:
        assert torch.equal(layer.adapted("default", layer.matrix), layer.matrix)
    keys = load_file(tmp_path / "adapter_model.safetensors")
    assert sum("structured_values" in key for key in keys) == len(pruning_layers(model)) - len(whole)
    again = PeftModel.from_pretrained(make("bert"), tmp_path)
    assert torch.equal(logits(again, inputs("bert")), logits(model, inputs("bert")))


def test_merging_and_unmerging():
    model, _ = pruned("llama")
    expected, before = logits(model, inputs("llama")), snapshot(model)
    model.merge_adapter()
    torch.testing.assert_close(logits(model, inputs("llama")), expected)
    model.unmerge_adapter()
    assert all(torch.equal(value, before[key]) for key, value in snapshot(model).items())
    dense = model.merge_and_unload(shrink=False)
    assert model_size(dense, 10) == model_size(make("llama"), 10)
    torch.testing.assert_close(logits(dense, inputs("llama")), expected)


def test_two_adapters_on_one_base():
    model, _ = pruned("bert")
    one = logits(model, inputs("bert"))
    model.add_adapter("other", StructuredPruningConfig(keep_ratio=0.8, sequence_length=10, repair=False))
    model.set_adapter("other")
    calibrate(model, batches("bert"))
    two = logits(model, inputs("bert"))
    mixed = logits(model.eval(), inputs("bert") | {"adapter_names": ["default", "other"]})
    torch.testing.assert_close(mixed, torch.stack([one[0], two[1]]), atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="'default' has weights of its own, which cannot be combined"):
        model.base_model.add_weighted_adapter(["default", "other"], adapter_name="both")


def test_the_small_model_generates_with_a_cache_and_can_be_trained():
    model, _ = pruned("llama")
    smaller = model.merge_and_unload()
    ids = inputs("llama")["input_ids"][:1]
    with_cache = smaller.generate(ids, max_new_tokens=5, do_sample=False)
    assert torch.equal(with_cache, smaller.generate(ids, max_new_tokens=5, do_sample=False, use_cache=False))
    smaller(input_ids=ids, labels=ids).loss.backward()
    assert all(p.grad is not None for p in smaller.parameters())


# ------------------------------------------------------------------ calibration


def test_a_stream_is_read_once_and_no_further_than_needed():
    read = []

    def stream():
        for batch in batches("llama", count=9):
            read.append(batch)
            yield batch

    config = StructuredPruningConfig(keep_ratio=0.6, sequence_length=10, num_samples=8)
    model = get_peft_model(make("llama"), config)
    calibrate(model, stream())
    assert len(read) == 2  # of four examples each
    again = get_peft_model(make("llama"), config)
    calibrate(again, batches("llama", count=9))
    assert torch.equal(logits(model, inputs("llama")), logits(again, inputs("llama")))


def test_padding_does_not_count():
    one = batches("bert")
    two = [batch | {"input_ids": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, 77)} for batch in one]
    outputs = []
    for data in (one, two):
        model = get_peft_model(make("bert"), StructuredPruningConfig(sequence_length=10, keep_ratio=0.6))
        calibrate(model, data)
        outputs.append(logits(model, inputs("bert")))
    assert torch.equal(*outputs)


def test_an_interrupted_calibration_leaves_nothing_half_pruned():
    model = get_peft_model(make("llama"), StructuredPruningConfig(sequence_length=10, keep_ratio=0.6))
    before, keys = logits(make("llama"), inputs("llama")), set(model.state_dict())
    calls = []

    def interrupt(module, args):
        calls.append(module)
        if len(calls) == 7:  # in the second walk, when other layers are pruned and repaired already
            raise KeyboardInterrupt

    handle = pruning_layers(model)[-1].register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        calibrate(model, batches("llama"))
    handle.remove()
    assert set(model.state_dict()) == keys
    with pytest.warns(UserWarning, match="not been calibrated"):
        assert torch.equal(logits(model, inputs("llama")), before)
    calibrate(model, batches("llama"))
    assert not torch.equal(logits(model, inputs("llama")), before)


def test_what_needs_no_data_takes_none():
    for criterion in ("magnitude", "random"):
        config = StructuredPruningConfig(criterion=criterion, repair=False, sequence_length=10)
        assert calibrate(get_peft_model(make("llama"), config))["flops"] <= 0.8
    model = get_peft_model(make("llama"), StructuredPruningConfig(criterion="random"))
    with pytest.raises(ValueError, match="this method needs batches"):
        calibrate(model)


def test_layers_and_kinds_can_be_chosen():
    model = get_peft_model(
        make_llama(), StructuredPruningConfig(keep_ratio=0.7, target_modules=["down_proj"], layers_to_transform=[1])
    )
    shares = calibrate(model, [{"input_ids": torch.randint(3, 90, (4, 12))} for _ in range(4)])
    assert shares["heads"] == 1.0 and [layer.module_name for layer in pruning_layers(model)] == [
        "model.layers.1.mlp.down_proj"
    ]


# ------------------------------------------------------------------ errors

BAD = [
    ({"sparsity": 0.5}, "keep_ratio"),
    ({"keep_ratio": 0.0}, "keep_ratio=0.0"),
    ({"keep_ratio": 1.5, "budget": "parameters"}, "keep_ratio=1.5.*share of the parameters"),
    ({"budget": "latency"}, "budget='latency' is unknown. Use one of 'flops', 'parameters'"),
    ({"criterion": "wanda"}, "criterion='wanda' is unknown"),
    ({"lambda_ffn": -1}, "lambda_ffn=-1"),
    ({"lambda_ffn": "free"}, "lambda_ffn='free' must be a number"),
    ({"min_share": 1.2}, "min_share=1.2"),
    ({"repair": "yes"}, "repair='yes' must be True or False"),
    ({"damping": 0.0}, "damping=0.0"),
    ({"value_dtype": "int4"}, "value_dtype='int4'"),
    ({"value_dtype": "int8", "repair": False}, "value_dtype='int8' has no effect with repair=False"),
    ({"sequence_length": 0}, "sequence_length=0"),
    ({"num_samples": 2.5}, "num_samples=2.5"),
]


@pytest.mark.parametrize(("fields", "message"), BAD, ids=[str(fields) for fields, _ in BAD])
def test_bad_fields_are_told(fields, message):
    with pytest.raises(ValueError, match=message):
        StructuredPruningConfig(**fields)


def test_misuse_is_told(tmp_path):
    with pytest.raises(ValueError, match="not where heads or neurons end, and this method removes only those"):
        get_peft_model(make_bert(), StructuredPruningConfig(target_modules=["query"]))
    with pytest.raises(ValueError, match="heads and neurons of model_type=None live is not known"):
        get_peft_model(torch.nn.Sequential(torch.nn.Linear(4, 4)), StructuredPruningConfig())
    model = get_peft_model(make_gpt2(), StructuredPruningConfig())
    with pytest.raises(ValueError, match=r"not been calibrated.*calibrate\(model"):
        model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="batches is empty"):
        calibrate(model, [])
    with pytest.raises(ValueError, match="mappings"):
        calibrate(model, [torch.arange(4)])
    model.add_adapter("other", StructuredPruningConfig())
    with pytest.raises(ValueError, match="adapter 'other' is not active"):
        calibrate(model, batches("gpt2"), adapter_name="other")


def test_config_survives_replace():
    assert replace(StructuredPruningConfig(keep_ratio=0.3), seed=2).keep_ratio == 0.3
    assert HEADS in {site.kind for site in find_sites(make("llama"))}
