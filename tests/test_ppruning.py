"""P-pruning through PEFT: calibrate, save, load, merge."""

from dataclasses import replace

import pytest
import torch
from helpers.architectures import ARCHITECTURES, batches, inputs, logits, make
from helpers.models import make_bert, make_gpt2, make_llama, snapshot
from peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from safetensors.torch import load_file
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import BatchEncoding, BertConfig, BertForSequenceClassification

import peft_prune
from peft_prune import PPruningConfig, calibrate, model_size
from peft_prune.calibration import walk as walking
from peft_prune.calibration.observers import TokenReservoir, TokenSample
from peft_prune.layers.layer import pruning_layers
from peft_prune.structure.clustering import column_similarity, head_similarity
from peft_prune.structure.sites import HEADS, find_sites


def pruned(name="bert", **fields):
    fields = {"keep_ratio": 0.6, "num_tokens": 40, "sequence_length": 10, "lambda_ffn": 1.0} | fields
    model = get_peft_model(make(name), PPruningConfig(**fields))
    return model, calibrate(model, batches(name))


@pytest.mark.parametrize("name", list(ARCHITECTURES))
def test_every_architecture(name, tmp_path):
    model, shares = pruned(name)
    assert shares["flops"] <= 0.6 + 1e-9 and 0.45 < shares["flops"]
    whole = model_size(model, 10).macs
    masked = logits(model, inputs(name))
    with model.disable_adapter():
        assert (logits(model, inputs(name)) - masked).abs().max() > 1e-3
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(make(name), tmp_path)
    assert torch.equal(logits(again, inputs(name)), masked)
    smaller = again.merge_and_unload()
    torch.testing.assert_close(logits(smaller, inputs(name)), masked, atol=1e-5, rtol=1e-5)
    assert model_size(smaller, 10).macs == pytest.approx(whole * shares["flops"])
    assert model_size(smaller, 10).macs < 0.6 * whole + 1


@pytest.mark.parametrize(
    ("linkage", "matching"), [("complete", "assignment"), ("average", "greedy"), ("single", "greedy")]
)
def test_the_units_that_stay_are_those_of_the_definition(linkage, matching):
    """Clusters cut by hand at the height that the budget needs, on activations gathered by hand."""
    model, _ = pruned(num_tokens=10_000, num_samples=16, linkage=linkage, head_similarity=matching)
    base = make("bert")
    sites = find_sites(base)
    seen = {site.output: [] for site in sites}
    hooks = [
        base.get_submodule(site.output).register_forward_pre_hook(
            lambda _, args, name=site.output: seen[name].append(args[0])
        )
        for site in sites
    ]
    masks = []
    with torch.no_grad():
        for batch in batches():
            base(**batch)
            masks.append(batch["attention_mask"].bool().flatten())
    for hook in hooks:
        hook.remove()
    real = torch.cat(masks)
    tokens = {name: torch.cat([x.flatten(0, 1) for x in xs])[real] for name, xs in seen.items()}
    layers = {layer.module_name: layer for layer in pruning_layers(model)}
    for site in sites:
        acts = tokens[site.output]
        similarity = head_similarity(acts, 8, matching) if site.kind == HEADS else column_similarity(acts)
        importance = acts.abs().mean(0).view(site.units, -1).mean(1)
        kept = layers[site.output].get_mask("default")[0].view(site.units, -1)[:, 0]
        removed = (~kept).nonzero().flatten().tolist()
        assert removed or site.kind == HEADS
        # linkage by definition: merge the two clusters whose farthest, average or closest members are closest
        between = {"complete": max, "average": lambda all: sum(all) / len(all), "single": min}[linkage]
        clusters = [[i] for i in range(site.units)]
        for _ in removed:
            a, b = min(
                ((a, b) for a in range(len(clusters)) for b in range(a)),
                key=lambda p: between([1 - float(similarity[i, j]) for i in clusters[p[0]] for j in clusters[p[1]]]),
            )
            clusters[b] += clusters.pop(a)
        stays = sorted(max(cluster, key=lambda i: float(importance[i])) for cluster in clusters)
        assert kept.nonzero().flatten().tolist() == stays


@pytest.mark.parametrize("ratio", [0.25, 4.0])
def test_heads_and_neurons_lose_what_lambda_says(ratio):
    fields = {"criterion": "magnitude", "keep_ratio": 0.8, "sequence_length": 10}
    shares = calibrate(get_peft_model(make("bert"), PPruningConfig(lambda_ffn=ratio, **fields)))
    n, d, width = 10, 32, 8  # 3 layers of 4 heads and 48 neurons
    head, neuron = 4 * n * d * width + 2 * n * n * width, 2 * n * d
    wanted = 0.2 * 3 * (4 * head + 48 * neuron)
    assert 0 <= (1 - shares["heads"]) * 12 * head - wanted / (1 + ratio) < head
    assert 0 <= (1 - shares["neurons"]) * 144 * neuron - wanted * ratio / (1 + ratio) < neuron


def test_padding_never_counts():
    """What stands at padded places changes nothing, neither the tokens taken nor the masks."""
    one = [inputs("bert", batch=4) for _ in range(3)]
    two = [{**batch, "input_ids": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, 77)} for batch in one]
    masks = []
    for data in (one, two):
        model = get_peft_model(make("bert"), PPruningConfig(num_tokens=60))
        calibrate(model, data)
        masks.append([layer.get_mask("default") for layer in pruning_layers(model)])
    assert all(torch.equal(a, b) for a, b in zip(*masks, strict=True))


def test_pad_tokens_do_not_count_without_an_attention_mask():
    base = make("bert")
    site = find_sites(base)[0]
    module = base.get_submodule(site.output)
    ids = inputs("bert", batch=4)["input_ids"]
    found = sample_of(base, module, [{"input_ids": ids}], 4, 1000)
    assert len(found) == int((ids != 0).sum()) < ids.numel()


def sample_of(base, module, batches, num_samples, num_tokens):
    """What a sample of tokens holds of the inputs of a module."""
    sample = TokenSample(num_tokens, seed=0)
    walking.walk(base, {"o": (module, False)}, batches, sample, num_samples)
    return sample.result("o")


def test_same_seed_same_masks_and_labels_are_not_needed():
    def masks(**more):
        model = get_peft_model(make("bert"), PPruningConfig(num_tokens=20, sequence_length=10, **more))
        calibrate(model, [batch | {"labels": torch.zeros(4).long(), "idx": torch.arange(4)} for batch in batches()])
        return torch.cat([layer.get_mask("default").flatten() for layer in pruning_layers(model)])

    assert torch.equal(masks(), masks())
    assert not torch.equal(masks(), masks(seed=1))


def test_the_reservoir_is_a_uniform_sample():
    """Tokens come in batches of very different sizes; each has the same chance."""
    hits = torch.zeros(60)
    for seed in range(600):
        reservoir, held = TokenReservoir(10, seed), torch.zeros(10, dtype=torch.int64)
        start = 0
        for size in (1, 4, 40, 15):
            positions, slots = reservoir.offer(torch.ones(size, dtype=torch.bool))
            held[slots] = positions + start
            start += size
        assert len(set(held.tolist())) == len(reservoir) == 10
        hits[held] += 1
    # 600 draws of 10 of 60: 100 hits each, standard deviation 9.1
    assert hits.min() > 60 and hits.max() < 140


def test_memory_is_bounded_by_the_tokens():
    base = make("bert")
    module = base.get_submodule(find_sites(base)[0].output)
    many = ({"input_ids": torch.randint(3, 120, (8, 16))} for _ in range(50))  # a stream
    found = {"o": sample_of(base, module, many, 10_000, 30)}
    assert found["o"].shape == (30, 32)
    assert not module._forward_pre_hooks


def test_num_samples_ends_it_and_the_model_is_left_as_it_was():
    model = get_peft_model(make("bert"), PPruningConfig(num_samples=8))
    model.train()
    before, seen = snapshot(model), []

    def stream():
        for batch in batches(count=100):
            seen.append(1)
            yield batch

    calibrate(model, stream())
    assert len(seen) == 2 and model.training and all(m.training for m in model.modules())
    after = snapshot(model)
    assert all(torch.equal(before[key], after[key]) for key in before)


@pytest.mark.parametrize("criterion", ["magnitude", "random"])
def test_baselines_need_no_data(criterion):
    model = get_peft_model(make("bert"), PPruningConfig(criterion=criterion, keep_ratio=0.6, sequence_length=10))
    assert calibrate(model)["flops"] == pytest.approx(0.6, abs=0.05)
    if criterion == "magnitude":
        base = make("bert")
        norms, kept = [], []
        for block in base.bert.encoder.layer:
            up, down = block.intermediate.dense.weight, block.output.dense.weight
            norms.append((up.square().sum(1) + down.square().sum(0)).sqrt())
        for layer in pruning_layers(model)[1::2]:
            kept.append(layer.get_mask("default")[0])
        norms, kept = torch.cat(norms), torch.cat(kept)
        assert norms[kept].min() >= norms[~kept].max()


def test_the_adapter_of_bert_base_is_a_few_kilobytes(tmp_path):
    with torch.device("meta"):
        shape = BertForSequenceClassification(BertConfig())
    model = BertForSequenceClassification(BertConfig(num_hidden_layers=1))  # real width, one layer of twelve
    model = get_peft_model(model, PPruningConfig(criterion="random"))
    calibrate(model)
    model.save_pretrained(tmp_path)
    stored = sum(layer.mask["default"].numel() for layer in pruning_layers(model))
    assert stored * shape.config.num_hidden_layers < 5_000


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama"])
def test_random_choice_until_calibrated(name, tmp_path):
    dense, batch = logits(make(name), inputs(name)), inputs(name)
    torch.manual_seed(0)
    model = get_peft_model(make(name), PPruningConfig(keep_ratio=0.5, num_tokens=40, init_weights=False))
    random = logits(model, batch)
    assert (random - dense).abs().max() > 1e-3
    sites = {site.output: site for site in find_sites(model)}
    for layer in pruning_layers(model):
        site = sites["base_model.model." + layer.module_name]
        mask = layer.get_mask("default")
        units = mask[:, site.columns].float().mean((0, 2))
        assert set(units.tolist()) == {0.0, 1.0}, "whole units go"
        assert units.sum() == round(0.5 * site.units) and layer.kept("default") == int(mask.sum())
    model.add_adapter("other", PPruningConfig(keep_ratio=0.5, num_tokens=40, init_weights=False))
    model.set_adapter("other")
    assert (logits(model, batch) - random).abs().max() > 1e-3, "another draw"
    mixed = model.eval()(**batch, adapter_names=["default", "__base__"])[0]
    torch.testing.assert_close(mixed[0], random[0])
    torch.testing.assert_close(mixed[1], dense[1])
    model.set_adapter("default")
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(make(name), tmp_path)
    assert torch.equal(logits(again, batch), random)
    torch.testing.assert_close(logits(again.merge_and_unload(), batch), random, atol=1e-5, rtol=1e-5)
    calibrate(model, batches(name), adapter_name="default")
    model.save_pretrained(tmp_path)
    assert not any("columns" in key for key in load_file(tmp_path / "adapter_model.safetensors"))
    calibrated = get_peft_model(make(name), PPruningConfig(keep_ratio=0.5, num_tokens=40))
    calibrate(calibrated, batches(name))
    assert torch.equal(logits(model, batch), logits(calibrated, batch)), "nothing of the draw is left"


def test_modules_without_heads_and_neurons_are_refused():
    for how in (True, False):
        with pytest.raises(ValueError, match="heads and neurons of model_type=None live is not known"):
            get_peft_model(torch.nn.Sequential(torch.nn.Linear(4, 4)), PPruningConfig(init_weights=how))


def test_after_inject_and_beside_lora():
    base = make("bert")
    inject_adapter_in_model(PPruningConfig(num_tokens=20), base)
    assert calibrate(base, batches())["flops"] <= 0.5
    # on top of a P-pruned model an ordinary LoRA trains the other layers
    smaller = pruned()[0].merge_and_unload()
    lora = get_peft_model(smaller, LoraConfig(target_modules=["query", "value"], init_lora_weights=False))
    expected = logits(lora.eval(), inputs("bert"))
    torch.testing.assert_close(logits(lora.merge_and_unload(), inputs("bert")), expected, atol=1e-5, rtol=1e-5)


def test_merge_without_shrinking_keeps_the_shape_and_unmerges():
    model, _ = pruned()
    masked, before = logits(model, inputs("bert")), snapshot(model)
    model.merge_adapter()
    torch.testing.assert_close(logits(model, inputs("bert")), masked, atol=1e-6, rtol=1e-6)
    model.unmerge_adapter()
    assert all(torch.equal(value, before[key]) for key, value in snapshot(model).items())
    dense = model.merge_and_unload(shrink=False)
    assert model_size(dense, 10) == model_size(make("bert"), 10)


def test_what_is_left_can_be_trained_as_before():
    """PEFT freezes the base model; what was frozen by the user stays so."""
    base = make("bert")
    base.bert.embeddings.requires_grad_(False)
    model = get_peft_model(base, PPruningConfig(task_type="SEQ_CLS", num_tokens=40, keep_ratio=0.6))
    calibrate(model, batches())
    smaller = model.merge_and_unload()
    frozen = {name for name, p in smaller.named_parameters() if not p.requires_grad}
    assert frozen == {name for name, _ in smaller.named_parameters() if "embeddings" in name}
    smaller(**inputs("bert"), labels=torch.tensor([0, 1])).loss.backward()
    assert all(p.grad is not None for name, p in smaller.named_parameters() if name not in frozen)


def test_layers_and_kinds_can_be_chosen():
    fields = {"keep_ratio": 0.7, "sequence_length": 10, "criterion": "random"}
    config = PPruningConfig(layers_to_transform=[1], **fields)
    model = get_peft_model(make("bert"), config)
    calibrate(model)
    assert {layer.module_name.split(".")[3] for layer in pruning_layers(model)} == {"1"}
    model = get_peft_model(make_llama(), PPruningConfig(target_modules=["down_proj"], **fields))
    assert calibrate(model)["heads"] == 1.0
    assert all(layer.module_name.endswith("down_proj") for layer in pruning_layers(model))


def test_two_tasks_on_one_backbone():
    model = get_peft_model(make("bert"), PPruningConfig(criterion="random", keep_ratio=0.7))
    model.add_adapter("other", PPruningConfig(criterion="random", keep_ratio=0.7, seed=1))
    calibrate(model, adapter_name="other")
    calibrate(model)
    model.eval()
    batch = inputs("bert")
    one = logits(model, batch)
    model.set_adapter("other")
    two = logits(model, batch)
    assert not torch.allclose(one, two)
    mixed = logits(model, batch | {"adapter_names": ["default", "other"]})
    torch.testing.assert_close(mixed, torch.stack([one[0], two[1]]), atol=1e-6, rtol=1e-5)
    model.base_model.add_weighted_adapter(["default", "other"], adapter_name="both", combination_type="union")
    stored = [layer.mask["both"].numel() for layer in pruning_layers(model)]
    assert max(stored) <= 1 + 48 // 8, "a union of columns is stored by columns"


def test_config_survives_replace():
    assert replace(PPruningConfig(keep_ratio=0.3), seed=2).keep_ratio == 0.3


BAD = [
    ({"sparsity": 0.5}, "keep_ratio"),
    ({"density": 0.5}, "keep_ratio"),
    ({"keep_ratio": 0.0}, "keep_ratio=0.0"),
    ({"keep_ratio": 1.5}, "keep_ratio=1.5"),
    ({"lambda_ffn": -1}, "lambda_ffn=-1"),
    ({"head_similarity": "cosine"}, "'assignment', 'greedy'"),
    ({"linkage": "ward"}, "'complete', 'average', 'single'"),
    ({"criterion": "wanda"}, "criterion='wanda'"),
    ({"num_tokens": 0}, "num_tokens=0"),
    ({"num_samples": 2.5}, "num_samples=2.5"),
]


@pytest.mark.parametrize(("fields", "message"), BAD, ids=[str(fields) for fields, _ in BAD])
def test_bad_fields_are_told(fields, message):
    with pytest.raises(ValueError, match=message):
        PPruningConfig(**fields)


@pytest.mark.parametrize(("stream", "most", "total"), [(False, 3000, 16), (False, 6, 6), (True, 3000, 3000)])
def test_progress_counts_to_the_examples_that_there_are(monkeypatch, stream, most, total):
    bars = []

    class Bar(tqdm):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            bars.append(self)

    monkeypatch.setattr(walking, "tqdm", Bar)
    model = get_peft_model(make("bert"), PPruningConfig(num_samples=most, num_tokens=40))
    calibrate(model, iter(batches()) if stream else batches())  # four batches of four
    assert [bar.total for bar in bars] == [total]


def test_misuse_is_told(tmp_path):
    with pytest.raises(ValueError, match=r"'attention.self.query'|not where heads or neurons end"):
        get_peft_model(make_bert(), PPruningConfig(target_modules=["query"]))
    model = get_peft_model(make_bert(), PPruningConfig(task_type="SEQ_CLS"))
    with pytest.warns(UserWarning, match="not been calibrated"):
        logits(model, inputs("bert"))
    for function in (model.merge_and_unload, lambda: model.save_pretrained(tmp_path)):
        with pytest.raises(ValueError, match=r"not been calibrated.*calibrate\(model"):
            function()
    with pytest.raises(ValueError, match="needs batches"):
        calibrate(model)
    with pytest.raises(ValueError, match="batches is empty"):
        calibrate(model, [])
    with pytest.raises(ValueError, match="mappings"):
        calibrate(model, DataLoader(torch.arange(6).view(3, 2)))
    with pytest.raises(ValueError, match=r"is a tensor that the model accepts.*"):
        calibrate(model, [{"text": ["good"]}])
    for batch in (inputs("bert"), BatchEncoding(inputs("bert"))):
        with pytest.raises(ValueError, match=r"single batch.*input_ids.*calibrate\(model, \[batch\]\)"):
            calibrate(model, batch)
    with pytest.raises(ValueError, match=r"adapter_name='else' is no adapter to calibrate.*\['default'\]"):
        calibrate(model, batches(), adapter_name="else")
    with pytest.raises(ValueError, match=r"keep_ratio=0.001 cannot be reached"):
        calibrate(get_peft_model(make_gpt2(), PPruningConfig(keep_ratio=0.001, criterion="random")))
    calibrate(model, batches())
    with pytest.raises(ValueError, match=r"\['default'\] is calibrated already"):
        calibrate(model, batches())
    with pytest.raises(ValueError, match="'default' is calibrated already"):
        calibrate(model, batches(), adapter_name="default")
    with pytest.raises(ValueError, match=r"no adapter of a calibrated method"):
        calibrate(make_bert(), batches())
    for name in ("b", "c"):
        model.add_adapter(name, PPruningConfig(task_type="SEQ_CLS"))
    with pytest.raises(ValueError, match=r"several adapters wait.*'b', 'c'.*adapter_name"):
        calibrate(model, batches())
    with pytest.raises(ValueError, match="not trained. Calibrate them"):
        peft_prune.update_schedule(model, 0, 10)


def test_data_and_models_that_say_nothing_are_told():
    padding = inputs("bert")
    padding["attention_mask"] = torch.zeros_like(padding["attention_mask"])
    model = get_peft_model(make("bert"), PPruningConfig())
    with pytest.raises(ValueError, match="the examples contain padding only"):
        calibrate(model, [padding])
    with torch.no_grad():
        model.base_model.model.bert.encoder.layer[1].intermediate.dense.weight.fill_(float("nan"))
    with pytest.raises(ValueError, match=r"input of '.*layer.1.output.dense' is not finite"):
        calibrate(model, [inputs("bert")])
    assert not any(layer.mask for layer in pruning_layers(model)), "nothing was chosen"


def test_a_mask_for_another_model_is_refused(tmp_path):
    pruned()[0].save_pretrained(tmp_path)
    with pytest.raises(peft_prune.MaskFormatError, match="another base"):
        PeftModel.from_pretrained(make("bert", seed=1), tmp_path)


def test_the_classifier_of_a_loaded_adapter_can_be_trained(tmp_path):
    config = PPruningConfig(task_type="SEQ_CLS", keep_ratio=0.7, criterion="magnitude")
    model = get_peft_model(make_bert(), config)
    calibrate(model)
    model.save_pretrained(tmp_path)
    base = make_bert()
    base.bert.embeddings.requires_grad_(False)
    smaller = PeftModel.from_pretrained(base, tmp_path).merge_and_unload()
    frozen = {name for name, parameter in smaller.named_parameters() if not parameter.requires_grad}
    assert frozen == {name for name, _ in smaller.named_parameters() if "bert.embeddings" in name}
