"""Numbers, base weights and wrappers that pass a first check and break something later."""

import copy
import json

import numpy as np
import pytest
import torch
from helpers.data import arguments, data
from helpers.methods import CALIBRATED, METHODS, TRAINED, adapter, advance, config
from helpers.models import logits, make_bert
from peft import PeftConfig, PeftModel, get_peft_model
from torch import nn

from peft_prune import (
    DSEEConfig,
    MovementPruningConfig,
    PPruningConfig,
    PruningTrainer,
    SMPConfig,
    calibrate,
    finalize,
    update_schedule,
)
from peft_prune.layers.layer import pruning_layers
from peft_prune.stages.once import prune_once


# ------------------------------------------------------------- numbers of NumPy

COMMON = {
    "sparsity_pattern": {np.str_("query"): np.float32(0.25)},
    "layers_to_transform": [np.int64(0)],
    "schedule_end": np.float32(0.75),
    "total_steps": np.int32(7),
    "check_base": np.bool_(True),
    "init_weights": np.bool_(True),
}
NUMPY = [
    (SMPConfig, COMMON | {"sparsity": np.float32(0.5), "score_rank": np.int16(3), "penalty": np.float16(2)}),
    (SMPConfig, COMMON | {"density": np.float32(0.5), "layers_to_transform": np.arange(2), "score_init": np.int64(1)}),
    (MovementPruningConfig, COMMON | {"sparsity": np.float64(0.5), "seed": np.int64(2)}),
    (MovementPruningConfig, {"from_existing_zeros": np.bool_(True), "sparsity": np.float32(0), "seed": np.uint8(2)}),
    (
        DSEEConfig,
        {"r": np.int64(2), "num_sparse": np.int32(3), "heads_to_prune": np.int64(1), "seed": np.uint8(1)}
        | {"lora_alpha": np.float32(4), "lora_dropout": np.float32(0), "neuron_sparsity": np.float32(0.5)}
        | {"update_sparsity": np.float16(0.5), "keep_sparse": np.bool_(False)},
    ),
    (PPruningConfig, {"keep_ratio": np.float32(0.5), "num_samples": np.int64(9), "seed": np.int32(1)}),
]


def as_python(value):
    """Independent of the package: what JSON makes of it when NumPy has turned it into Python's numbers."""
    return json.loads(json.dumps(value, default=lambda v: sorted(v) if isinstance(v, set) else v.tolist()))


@pytest.mark.parametrize(("kind", "fields"), NUMPY, ids=lambda v: v.__name__ if isinstance(v, type) else "")
def test_numbers_of_numpy_are_saved(kind, fields, tmp_path):
    made = kind(**fields)
    made.save_pretrained(tmp_path)
    loaded = PeftConfig.from_pretrained(tmp_path)
    for name, value in fields.items():
        name, wanted = ("sparsity", 1 - value) if name == "density" else (name, value)
        assert as_python(getattr(loaded, name)) == as_python(wanted)
        assert type(getattr(made, name)) in (bool, int, float, list, dict)
    assert loaded.to_dict() == made.to_dict()


def test_numbers_of_numpy_that_are_set_later_are_saved(tmp_path):
    made = SMPConfig()
    made.total_steps, made.score_lr = np.int64(3), np.float32(0.5)
    made.save_pretrained(tmp_path)
    assert (SMPConfig.from_pretrained(tmp_path).total_steps, made.score_lr) == (3, 0.5)


@pytest.mark.parametrize("method", METHODS)
def test_a_model_with_numbers_of_numpy_is_saved_after_training(method, tmp_path, batch):
    fields = {
        "smp": {"sparsity": np.float32(0.5)},
        "movement": {"sparsity": np.float32(0.5), "seed": np.int64(1)},
        "dsee": {"r": np.int64(2), "num_sparse": np.int64(3), "seed": np.int64(1), "heads_to_prune": np.int64(1)},
        "ppruning": {"seed": np.int64(1), "keep_ratio": np.float32(0.5)},
        "structured": {"seed": np.int64(1), "keep_ratio": np.float32(0.5), "min_share": np.float32(0.1)},
        "wanda": {"seed": np.int64(1), "sparsity": np.float32(0.5)},
        "sparsegpt": {"seed": np.int64(1), "sparsity": np.float32(0.5), "block_size": np.int64(64)},
    }[method]
    model = adapter(make_bert(), method, **fields)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(make_bert(), tmp_path)
    assert torch.equal(logits(loaded, batch), logits(model, batch))


@pytest.mark.parametrize(
    ("fields", "message"),
    [({"sparsity": np.float32(1.5)}, "sparsity=1.5"), ({"total_steps": np.float64(1.5)}, "total_steps=1.5"),
     ({"total_steps": np.bool_(True)}, "total_steps=True"), ({"density": np.float32(0)}, "density=0")],
)  # fmt: skip
def test_numbers_of_numpy_are_checked_like_others(fields, message):
    with pytest.raises(ValueError, match=message):
        SMPConfig(**fields)


# ---------------------------------------------------------- fields without effect


@pytest.mark.parametrize(
    ("fields", "message"),
    [({"allocation": "global"}, "allocation='global'"), ({"sparsity_pattern": {"query": 0.5}}, "sparsity_pattern=")],
)
def test_existing_zeros_refuse_what_they_would_ignore(fields, message):
    with pytest.raises(ValueError, match=f"{message}.*from_existing_zeros=True"):
        MovementPruningConfig(from_existing_zeros=True, **fields)


# ---------------------------------------------------------------- base weights

BROKEN = "bert.encoder.layer.1.attention.output.dense"


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("method", METHODS)
def test_a_broken_base_weight_is_named_at_once(method, dtype, value):
    base = make_bert().to(dtype)
    with torch.no_grad():
        base.get_submodule(BROKEN).weight[3, 5] = value
    before = {name: type(module) for name, module in base.named_modules()}
    with pytest.raises(ValueError, match=f"base weight of '{BROKEN}' .*holds NaN or infinity"):
        get_peft_model(base, config(method))
    assert {name: type(module) for name, module in base.named_modules()} == before, "nothing was replaced"


def test_a_base_weight_that_breaks_later_is_not_called_a_divergence_only():
    base = make_bert()
    model = get_peft_model(base, config("movement", variant="magnitude"))
    with torch.no_grad():
        base.bert.encoder.layer[0].intermediate.dense.weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match="base weights .* hold NaN"):
        update_schedule(model, 10, 10)


class Small(nn.Module):
    """A matrix of one weight between two of eight."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.one, self.last = nn.Linear(8, 1), nn.Linear(1, 1), nn.Linear(1, 8)

    def forward(self, x):
        return self.last(self.one(self.first(x)))


@pytest.mark.parametrize(
    "fields",
    [{}, {"allocation": "score"}, {"allocation": "global"}],
    ids=str,
)
@pytest.mark.parametrize("fill", [None, 0.1, -3.0, 5.0, 0.0])
@pytest.mark.parametrize("kind", [SMPConfig, MovementPruningConfig])
@pytest.mark.filterwarnings("error:std")
def test_one_weight_and_constant_matrices_are_pruned(kind, fill, fields, tmp_path):
    base = Small()
    if fill is not None:
        for parameter in base.parameters():
            nn.init.constant_(parameter, fill)
    original = copy.deepcopy(base)
    targets = ["first", "one", "last"]
    fields = {"score_init": "magnitude", "sparsity": 0.5, "penalty": 1.0} | fields
    model = get_peft_model(base, kind(target_modules=targets, **fields)).train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01)
    generator = torch.Generator().manual_seed(0)
    update_schedule(model, 0, 4)
    for step in range(1, 5):
        model(torch.randn(5, 8, generator=generator)).tanh().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        update_schedule(model, step, 4)
    trained = [p for p in model.parameters() if p.requires_grad]
    assert trained and all(bool(p.isfinite().all()) for p in trained)
    if "allocation" not in fields:
        kept = {layer.module_name: int(layer.get_mask("default").sum()) for layer in pruning_layers(model)}
        assert kept["first"] == kept["last"] == 4
    finalize(model)
    x = torch.randn(5, 8, generator=generator)
    expected = model.eval()(x)
    model.save_pretrained(tmp_path)
    assert torch.equal(PeftModel.from_pretrained(original, tmp_path)(x), expected)


@pytest.mark.parametrize("constant", [0.0, 0.1, -7.0])
@pytest.mark.parametrize("granularity", ["weight", "2x3"])
def test_low_rank_scores_of_a_constant_matrix(granularity, constant):
    base = nn.Sequential(nn.Linear(12, 10))
    nn.init.constant_(base[0].weight, constant)
    fields = {"score": "low_rank", "score_rank": 2, "granularity": granularity, "allocation": "score"}
    model = get_peft_model(base, SMPConfig(target_modules=["0"], sparsity=0.5, **fields))
    (layer,) = pruning_layers(model)
    start = layer.ranking("default").detach()
    torch.testing.assert_close(start, torch.full_like(start, constant != 0))
    update_schedule(model, 10, 10)
    assert int(layer.get_mask("default").sum()) == 60


@pytest.mark.parametrize("constant", [0.1, 1e-3, 7.0])
def test_scores_of_a_constant_matrix_start_where_they_can_be_trained(constant):
    """A standard deviation that is a rounding error would start them in the millions, out of reach of any step."""
    base = nn.Sequential(nn.Linear(300, 70))
    nn.init.constant_(base[0].weight, constant)
    model = get_peft_model(base, SMPConfig(target_modules=["0"], sparsity=0.5))
    (layer,) = pruning_layers(model)
    torch.testing.assert_close(layer.scores["default"].detach(), torch.ones(70, 300))


# ---------------------------------------------------------------- DataParallel

DP = "DataParallel.*torchrun.*accelerate launch"


@pytest.mark.parametrize("method", METHODS)
def test_data_parallel_is_refused_by_name(method):
    model = get_peft_model(make_bert(), config(method))
    wrapped = nn.DataParallel(model)
    calls = [lambda: calibrate(wrapped, [])] if method in CALIBRATED else [
        lambda: update_schedule(wrapped, 1, 2), lambda: finalize(wrapped),
    ]  # fmt: skip
    if method == "dsee":
        calls.append(lambda: prune_once(wrapped))
    for call in calls:
        with pytest.raises(ValueError, match=DP):
            call()


def test_heads_of_dsee_in_data_parallel():
    fields = {"heads_to_prune": 1, "neuron_sparsity": 0.5}
    wrapped = nn.DataParallel(get_peft_model(make_bert(), DSEEConfig(r=2, num_sparse=3, **fields)))
    for call in (lambda: update_schedule(wrapped, 0, 2), lambda: prune_once(wrapped)):
        with pytest.raises(ValueError, match=DP):
            call()


@pytest.mark.parametrize("inject", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_copies_of_data_parallel_are_refused(method, inject, monkeypatch):
    """`replicate` copies modules in the same way whatever the devices are; only its copies of tensors need GPUs."""
    replicate = __import__("torch.nn.parallel.replicate", fromlist=["replicate"])
    monkeypatch.setattr(replicate, "_get_device_index", lambda device, *args: device)
    monkeypatch.setattr(replicate, "_broadcast_coalesced_reshape", lambda tensors, devices, detach=False: [tensors] * 2)
    model = advance(get_peft_model(make_bert(), config(method)), method)
    assert len(replicate.replicate(make_bert(), [0, 1])) == 2
    with pytest.raises(ValueError, match=DP):
        replicate.replicate(model.get_base_model() if inject else model, [0, 1])


@pytest.mark.parametrize("method", TRAINED)
def test_trainer_with_several_gpus_is_refused_before_it_trains(method, tmp_path, monkeypatch):
    model = get_peft_model(make_bert(), config(method, task_type="SEQ_CLS"))
    trainer = PruningTrainer(model=model, args=arguments(tmp_path, max_steps=2), train_dataset=data())
    monkeypatch.setattr(trainer.args, "_n_gpu", 2)
    monkeypatch.setattr(trainer, "_wrap_model", lambda model, *args, **kwargs: model)  # there are none to wrap it for
    with pytest.raises(ValueError, match=DP):
        trainer.train()
    assert trainer.state.global_step == 0
