"""`calibrate(..., device=...)`: one block at a time on a device, on a machine that has none."""

import multiprocessing
import traceback
import warnings

import pytest
import torch
from helpers import architectures
from helpers.models import make_llama
from peft import get_peft_model

from peft_prune import PPruningConfig, SparseGPTConfig, WandaConfig, calibrate
from peft_prune.layers.layer import pruning_layers


def _answer(pipe, function, arguments):
    from helpers import fake_device

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    try:
        fake_device.install()
        with fake_device.FakeDevice():
            pipe.send((function(*arguments), None))
    except BaseException:
        pipe.send((None, traceback.format_exc()))


def on_the_fake_device(function, *arguments):
    """What a function returns in a process of its own, in which the device is there."""
    if not hasattr(torch.utils.backend_registration, "_setup_privateuseone_for_python_backend"):
        pytest.skip("torch is too old for backends in Python")
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("fork").Process(target=_answer, args=(theirs, function, arguments))
    process.start()
    result, error = ours.recv() if ours.poll(120) else (None, "no answer")
    process.join(10)
    assert error is None, error
    return result


def llama_batches():
    generator = torch.Generator().manual_seed(4)
    padded = {"attention_mask": (torch.arange(24) < 20).long().expand(2, -1)}
    ids = [torch.randint(0, 90, (2, 24), generator=generator) for _ in range(3)]
    return [{"input_ids": ids[0]} | padded, {"input_ids": ids[1][:, :17]}, {"input_ids": ids[2]}]


def make(name):
    return make_llama(num_hidden_layers=3) if name == "llama" else architectures.make(name)


def batches(name):
    return llama_batches() if name == "llama" else architectures.batches(name, count=2)


def places(model):
    """Kinds of devices that parameters and buffers are on."""
    return {tensor.device.type for tensor in [*model.parameters(), *model.buffers()]}


def calibrated(name, config, device):
    model = get_peft_model(make(name), config)
    blocks = model.base_model.model.get_submodule("model.layers") if name == "llama" else []
    together = set()
    for layer in pruning_layers(model):
        layer.register_forward_pre_hook(
            lambda module, args: together.add(tuple(next(b.parameters()).device.type for b in blocks))
        )
    shares = calibrate(model, batches(name), device=device)
    masks = [layer.get_mask("default").numpy() for layer in pruning_layers(model)]
    return masks, shares, set(model.state_dict()), places(model), together


CONFIGS = {
    "wanda": lambda: WandaConfig(refine=None),
    "wanda, swaps": lambda: WandaConfig(),
    "wanda, low rank": lambda: WandaConfig(update="low_rank", r=4),
    "admm": lambda: SparseGPTConfig(solver="admm"),
    "sparsegpt": lambda: SparseGPTConfig(solver="sparsegpt", granularity="2:4"),
}


@pytest.mark.filterwarnings("ignore:calibrate")
@pytest.mark.parametrize(
    ("name", "method"),
    [*(("llama", method) for method in CONFIGS), *((name, "sparsegpt") for name in ("t5", "gpt2", "vit"))],
)
def test_blocks_on_a_device_give_the_same(name, method):
    """Masks, rotary embeddings and what calibration keeps move along, and everything comes back."""
    masks, shares, keys, *_ = calibrated(name, CONFIGS[method](), None)
    found, reported, stored, where, together = on_the_fake_device(calibrated, name, CONFIGS[method](), "privateuseone")
    assert where == {"cpu"} and stored == keys
    assert reported == pytest.approx(shares, rel=1e-2)
    for mask, other in zip(masks, found, strict=True):
        assert (mask == other).mean() > 0.97  # sums are rounded in another order, and near ties turn
    if name == "llama":
        one = [("privateuseone", "cpu", "cpu"), ("cpu", "privateuseone", "cpu"), ("cpu", "cpu", "privateuseone")]
        assert together == {("cpu", "cpu", "cpu"), *one}, "all on the CPU while arguments are captured, then one by one"


def broken(error, at):
    """Where everything is after an error in the middle of a block."""
    model = get_peft_model(make("llama"), WandaConfig())
    calls = []

    def fail(module, args):
        calls.append(module.weight.device.type)
        if calls.count("privateuseone") == at:
            raise error

    pruning_layers(model)[8].register_forward_pre_hook(fail)  # in the second block
    with pytest.raises(error):
        calibrate(model, llama_batches(), device="privateuseone")
    return places(model), calls.count("privateuseone")


@pytest.mark.filterwarnings("ignore:calibrate")
@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_a_block_is_moved_back_after_an_error(error):
    assert on_the_fake_device(broken, error, 2) == ({"cpu"}, 2)


def test_a_device_that_is_not_there_or_not_used_is_told():
    model = get_peft_model(make_llama(), WandaConfig())
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="device='cuda' cannot be used: Torch not compiled with"):
            calibrate(model, llama_batches(), device="cuda")
    with pytest.raises(ValueError, match="device='warp' cannot be used: Expected one of"):
        calibrate(model, llama_batches(), device="warp")
    model = get_peft_model(architectures.make("bert"), PPruningConfig())
    with pytest.raises(ValueError, match=r"device='cpu' is for methods that are calibrated block by block.*model.to"):
        calibrate(model, architectures.batches("bert"), device="cpu")
