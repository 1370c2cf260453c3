"""Sparse kernels: the same numbers as dense, an ordinary checkpoint, and a choice that is never slower."""

import copy

import pytest
import torch
from helpers.models import make_bert, make_gpt2, make_llama
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from peft_prune import SMPConfig, model_size, shrink, use_dense_kernels, use_sparse_kernels
from peft_prune.inference import SparseLinear
from peft_prune.inference.csr import CSRKernel
from peft_prune.inference.semi_structured import SemiStructuredKernel, can_run, has_pattern


def cut(model, density=0.1, seed=3):
    """A model with random zeros in its linear layers."""
    torch.manual_seed(seed)
    for layer in model.modules():
        if type(layer) in (nn.Linear, Conv1D):
            layer.weight.data *= torch.rand_like(layer.weight) < density
    return model


def timer(dense, sparse):
    """A clock that reads the given seconds for a call of a dense, of a sparse layer, by the rows it is given."""

    def read(call):
        cells = dict(zip(call.__code__.co_freevars, (c.cell_contents for c in call.__closure__), strict=True))
        layer = cells.get("layers", cells.get("dense"))[0]
        seconds = sparse if isinstance(layer, SparseLinear) else dense
        call()
        return seconds(cells["x"].shape[0]) if callable(seconds) else seconds

    return read


FAST, SLOW = timer(2.0, 1.0), timer(1.0, 2.0)


@pytest.mark.parametrize("shape", [(24,), (1, 24), (5, 24), (2, 40, 24), (1, 1, 24), (0, 24)])
@pytest.mark.parametrize("rows_at_once", [None, 7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("bias", [True, False])
def test_product_equals_dense(shape, rows_at_once, dtype, bias):
    dense = cut(nn.Sequential(nn.Linear(24, 16, bias=bias))).to(dtype)[0]
    sparse = SparseLinear(dense, CSRKernel(dense.weight, rows_at_once))
    x = torch.randn(shape, dtype=dtype)
    torch.testing.assert_close(sparse(x), dense(x))
    with torch.no_grad():
        torch.testing.assert_close(sparse(x), dense(x))
        assert sparse(x).dtype == dtype
    assert torch.equal(sparse.weight, dense.weight)


def test_rows_and_matrices_of_zeros():
    dense = nn.Linear(8, 6)
    dense.weight.data.zero_()
    dense.weight.data[2, 3] = 1.5
    sparse = SparseLinear(dense, CSRKernel(dense.weight))
    x = torch.randn(4, 8)
    torch.testing.assert_close(sparse(x), dense(x))
    dense.weight.data.zero_()
    sparse.load_state_dict(dense.state_dict())
    torch.testing.assert_close(sparse(x), dense(x))


def test_gradient_reaches_the_input_only():
    dense = cut(nn.Sequential(nn.Linear(24, 16)))[0]
    sparse = SparseLinear(dense, CSRKernel(dense.weight)).train()
    assert not any(p.requires_grad for p in sparse.parameters())
    grads = []
    for layer in (dense, sparse):
        x = torch.linspace(-1, 1, 72).view(3, 24).requires_grad_()
        layer(x).square().sum().backward()
        grads.append(x.grad)
    torch.testing.assert_close(grads[1], grads[0])


def test_autocast_and_copies_and_dtypes():
    dense = cut(nn.Sequential(nn.Linear(24, 16)))
    sparse = copy.deepcopy(dense)
    use_sparse_kernels(sparse, tokens=4, timer=FAST)
    assert isinstance(sparse[0], SparseLinear)
    x = torch.randn(4, 24)
    with torch.autocast("cpu", torch.bfloat16):
        assert sparse(x).dtype == torch.bfloat16
        torch.testing.assert_close(sparse(x), dense(x), atol=0.02, rtol=0.02)
    sparse(x)
    copied = copy.deepcopy(sparse)
    torch.testing.assert_close(copied(x), dense(x))
    copied[0].kernel.values.zero_()
    assert not torch.equal(sparse(x), copied(x))
    torch.testing.assert_close(copy.deepcopy(sparse).double()(x.double()), dense(x).double())
    half = copy.deepcopy(sparse).to(torch.bfloat16)
    with pytest.raises(TypeError, match="use_dense_kernels"):
        half(x.bfloat16())
    torch.testing.assert_close(use_dense_kernels(half)(x.bfloat16()), copy.deepcopy(dense).bfloat16()(x.bfloat16()))


def test_bfloat16_on_cpu_stays_dense():
    model = cut(make_bert()).to(torch.bfloat16)
    report = use_sparse_kernels(model, timer=FAST)
    assert not report.sparse and not any(isinstance(m, SparseLinear) for m in model.modules())


@pytest.mark.parametrize("make", [make_bert, make_gpt2, make_llama])
def test_whole_models_and_back(make):
    model = cut(make())
    dense = copy.deepcopy(model)
    report = use_sparse_kernels(model, tokens=(36, 1), timer=FAST)
    assert len(report.sparse) >= 8
    ids = torch.randint(0, 90, (4, 9))
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=ids).logits, dense(input_ids=ids).logits)
    assert use_dense_kernels(model) is model
    assert [type(m) for m in model.modules()] == [type(m) for m in dense.modules()]
    for name, value in dense.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name


@pytest.mark.parametrize("make", [make_gpt2, make_llama])
def test_generate_gives_the_same_tokens(make):
    dense = cut(make(), density=0.4)
    sparse = copy.deepcopy(dense)
    use_sparse_kernels(sparse, tokens=1, timer=FAST)
    ids = torch.randint(5, 90, (2, 6))
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "attention_mask": torch.ones_like(ids)}
    assert torch.equal(sparse.generate(ids, **options), dense.generate(ids, **options))


@pytest.mark.parametrize("make", [make_gpt2, make_llama])
def test_checkpoint_is_the_dense_one(make, tmp_path):
    dense = cut(make())
    sparse = copy.deepcopy(dense)
    use_sparse_kernels(sparse, timer=FAST)
    assert list(sparse.state_dict()) == list(dense.state_dict()) or set(sparse.state_dict()) == set(dense.state_dict())
    sparse.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert not any(isinstance(m, SparseLinear) for m in loaded.modules())
    for name, value in dense.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name


def test_dense_checkpoint_loads():
    sparse, other = cut(make_gpt2()), cut(make_gpt2(seed=5), seed=6)
    use_sparse_kernels(sparse, timer=FAST)
    ids = torch.randint(0, 90, (2, 5))
    assert sparse.load_state_dict(other.state_dict()).missing_keys == []
    with torch.no_grad():
        torch.testing.assert_close(sparse(input_ids=ids).logits, other(input_ids=ids).logits)
    key = "transformer.h.0.attn.c_attn.weight"
    state = dict(other.state_dict())
    state[key] = state[key][:3]
    with pytest.raises(RuntimeError, match="c_attn.weight has shape"):
        sparse.load_state_dict(state)
    del state[key]
    with pytest.raises(RuntimeError, match="Missing.*c_attn.weight"):
        sparse.load_state_dict(state)


def test_slower_forms_are_not_taken():
    model = cut(make_bert())
    layers = dict(model.named_modules())
    report = use_sparse_kernels(model, timer=SLOW)
    assert report and not report.sparse
    assert dict(model.named_modules()) == layers


def test_rows_are_taken_32_at_a_time_where_that_is_faster():
    def by_form(call):
        cells = dict(zip(call.__code__.co_freevars, (c.cell_contents for c in call.__closure__), strict=True))
        layer = cells.get("layers", cells.get("dense"))[0]
        call()
        if not isinstance(layer, SparseLinear):
            return 2.0
        return 1.5 if layer.kernel.rows_at_once is None else 1.0

    for tokens, form in ((64, "csr/32"), ((1, 64), "csr/32"), (32, "csr"), (1, "csr")):
        report = use_sparse_kernels(cut(make_bert()), tokens=tokens, timer=by_form)
        assert {row.form for row in report.sparse} == {form}


@pytest.mark.parametrize(("density", "tried"), [(0.6, False), (0.4, True)])
def test_csr_is_tried_where_half_of_the_weights_are_zeros(density, tried):
    assert bool(use_sparse_kernels(cut(nn.Sequential(nn.Linear(64, 64)), density), timer=FAST).sparse) == tried


def test_a_form_with_another_result_is_not_taken(monkeypatch):
    forward = SparseLinear.forward
    monkeypatch.setattr(SparseLinear, "forward", lambda self, x: 1.01 * forward(self, x))
    model = cut(make_bert())
    assert not use_sparse_kernels(model, timer=FAST).sparse
    assert not any(isinstance(module, SparseLinear) for module in model.modules())


def test_margin():
    almost = timer(1.09, 1.0)
    assert not use_sparse_kernels(cut(make_bert()), timer=almost).sparse
    rows = use_sparse_kernels(cut(make_bert()), timer=almost, margin=1.05).sparse
    assert rows and all(row.speed_up == pytest.approx(1.09) for row in rows)


def test_noise_is_not_taken_for_speed():
    """Half of the pairs much faster, half slower: the median says little."""
    numbers = iter([5.0, 0.9] * 10_000)
    noisy = timer(lambda rows: next(numbers), 1.0)
    assert not use_sparse_kernels(cut(make_bert()), timer=noisy).sparse


def test_a_form_has_to_win_at_each_number_of_tokens():
    only_short = timer(lambda rows: 2.0 if rows == 1 else 0.5, 1.0)
    assert use_sparse_kernels(cut(make_gpt2()), tokens=1, timer=only_short).sparse
    assert not use_sparse_kernels(cut(make_gpt2()), tokens=64, timer=only_short).sparse
    assert not use_sparse_kernels(cut(make_gpt2()), tokens=(1, 64), timer=only_short).sparse


def test_dense_models_are_left_alone_and_layers_share_measurements():
    calls = []

    def counting(call):
        calls.append(1)
        return FAST(call)

    model = make_bert()
    report = use_sparse_kernels(model, timer=counting)
    assert not calls and not report.sparse and all(row.density == 1 for row in report)
    small, large = (cut(make_bert(num_hidden_layers=n, hidden_size=64)) for n in (1, 4))
    use_sparse_kernels(small, timer=counting)
    once = len(calls)
    assert len(use_sparse_kernels(large, timer=counting).sparse) > 20
    assert len(calls) - once < 3 * once  # densities of random masks may fall on two sides of a border


def test_tied_weights_and_hooks_stay():
    model = cut(make_gpt2())
    hooked = model.transformer.h[0].mlp.c_fc
    hooked.register_forward_hook(lambda *_: None)
    use_sparse_kernels(model, timer=FAST)
    assert model.lm_head.weight is model.transformer.wte.weight
    assert model.transformer.h[0].mlp.c_fc is hooked
    assert isinstance(model.transformer.h[1].mlp.c_fc, SparseLinear)


def test_second_call_measures_again():
    model = cut(make_bert())
    assert use_sparse_kernels(model, timer=FAST).sparse
    assert not use_sparse_kernels(model, timer=SLOW).sparse
    assert not any(isinstance(m, SparseLinear) for m in model.modules())


@pytest.mark.parametrize("config", [SMPConfig(task_type="SEQ_CLS"), LoraConfig(task_type="SEQ_CLS")])
def test_adapters_have_to_be_merged(config):
    model = get_peft_model(make_bert(), config)
    with pytest.raises(ValueError, match="merge_and_unload"):
        use_sparse_kernels(model)
    with pytest.raises(ValueError, match="merge_and_unload"):
        use_sparse_kernels(model.base_model.model)
    use_sparse_kernels(model.merge_and_unload(), timer=FAST)


@pytest.mark.parametrize("bad", [{"tokens": 0}, {"tokens": ()}, {"tokens": (4, -1)}, {"margin": 0.9}])
def test_misuse(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        use_sparse_kernels(make_bert(), **bad)
    with pytest.raises(ValueError, match="model"):
        use_sparse_kernels(nn.Linear(4, 4))


def test_the_measurement_itself_runs():
    model = cut(nn.Sequential(nn.Linear(256, 256)), density=0.01)
    dense = copy.deepcopy(model)
    report = use_sparse_kernels(model, tokens=(1, 64))
    assert report[0].form in ("dense", "csr", "csr/32") and report[0].density < 0.02
    x = torch.randn(64, 256)
    torch.testing.assert_close(model(x), dense(x))


def test_report_table():
    pytest.importorskip("rich")
    from rich.console import Console

    report = use_sparse_kernels(cut(make_bert()), timer=FAST)
    console = Console(width=200, record=True)
    console.print(report.table())
    text = console.export_text()
    assert "bert.encoder.layer.0.attention.self.query" in text and "2.00" in text
    assert str(report).startswith("csr")


@pytest.mark.slow
@pytest.mark.parametrize("grad", [False, True])
def test_compile_keeps_one_graph(grad):
    dense = cut(nn.Sequential(nn.Linear(24, 16), nn.GELU(), nn.Linear(16, 8)))
    sparse = copy.deepcopy(dense)
    use_sparse_kernels(sparse, timer=FAST)
    compiled = torch.compile(sparse, fullgraph=True, backend="aot_eager")
    for rows in (1, 5):
        x = torch.randn(2, rows, 24, requires_grad=grad)
        with torch.set_grad_enabled(grad):
            torch.testing.assert_close(compiled(x), dense(x))
            if grad:
                (got,) = torch.autograd.grad(compiled(x).sum(), x)
                (expected,) = torch.autograd.grad(dense(x).sum(), x)
                torch.testing.assert_close(got, expected)


def two_four(out, in_features):
    torch.manual_seed(0)
    weight = torch.randn(out, in_features // 4, 4)
    weight.scatter_(-1, torch.rand_like(weight).topk(2).indices, 0)
    return weight.view(out, in_features)


def test_two_four_pattern_is_told():
    weight = two_four(32, 64)
    assert has_pattern(weight) and not has_pattern(torch.ones(4, 8)) and not has_pattern(torch.zeros(4, 6))
    assert not can_run(weight)  # on CPU
    with pytest.raises(ValueError, match="2:4"):
        SemiStructuredKernel(weight)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU with 2:4 tensor cores")
def test_two_four_on_gpu():
    if torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("needs compute capability 8.0")
    dense = nn.Sequential(nn.Linear(256, 128)).half().cuda()
    dense[0].weight.data.copy_(two_four(128, 256))
    sparse = copy.deepcopy(dense)
    report = use_sparse_kernels(sparse, tokens=128, timer=FAST)
    assert [row.form for row in report] == ["2:4"]
    x = torch.randn(2, 64, 256, dtype=torch.half, device="cuda")
    with torch.no_grad():
        torch.testing.assert_close(sparse(x), dense(x), atol=2e-2, rtol=2e-2)
    assert torch.equal(sparse.state_dict()["0.weight"], dense[0].weight)
    assert torch.equal(use_dense_kernels(sparse)[0].weight, dense[0].weight)


def test_a_checkpoint_that_lacks_a_bias_is_told():
    model = cut(make_bert())
    state = model.state_dict()
    use_sparse_kernels(model, timer=FAST)
    name = "bert.encoder.layer.0.attention.self.query"
    state[f"{name}.junk"] = state.pop(f"{name}.bias")
    with pytest.raises(RuntimeError) as error:
        model.load_state_dict(state)
    assert f"{name}.bias" in str(error.value) and f"{name}.junk" in str(error.value)


def test_nothing_is_taken_out_of_sparse_layers():
    model = cut(make_bert())
    use_sparse_kernels(model, timer=FAST)
    for function in (shrink, model_size):
        with pytest.raises(ValueError, match="use_dense_kernels"):
            function(model)
