"""What calibration notes for solvers, against the product of the inputs that are no padding."""

import pytest
import torch
from torch import nn

from peft_prune.calibration import observers
from peft_prune.calibration.observers import GramMatrices, InputNorms


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.k = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x):
        return self.q(x) + self.k(x)


def batches(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        x = torch.randn(2, 5, 6, generator=generator).to(dtype)
        yield x, torch.rand(2, 5, generator=generator) > 0.3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("accumulated", [torch.float32, torch.float64])
def test_gram_matrices_leave_padding_out(dtype, accumulated):
    observer, norms, tokens = GramMatrices(accumulated), InputNorms(), []
    for x, counts in batches(dtype):
        for each in (observer, norms):
            each.start((counts, None))
            each.see("layer", False, x)
        tokens.append(x[counts].double())
    gram, kept = observer.result("layer"), torch.cat(tokens)
    assert gram.dtype == accumulated
    torch.testing.assert_close(gram.double(), kept.T @ kept, rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(gram.diagonal().sqrt().float(), norms.result("layer"))
    with pytest.raises(ValueError, match="'layer' was not called"):
        observer.result("layer")  # it is forgotten


def watch(model, observer):
    for name in ("q", "k"):
        layer = model.get_submodule(name)
        layer.register_forward_pre_hook(lambda module, args, name=name: observer.see(name, False, args[0]))


def test_layers_with_the_same_input_cost_one_product_and_one_matrix(monkeypatch):
    products, add = [], observers.add_triangle
    monkeypatch.setattr(observers, "add_triangle", lambda gram, x: products.append(len(x)) or add(gram, x))
    model, observer, tokens = Attention(), GramMatrices(), []
    watch(model, observer)
    for x, counts in batches():
        observer.start((counts, None))
        model(x)
        tokens.append(x[counts])
    assert len(products) == 3
    q, k, kept = observer.result("q"), observer.result("k"), torch.cat(tokens)
    assert q.data_ptr() == k.data_ptr()
    torch.testing.assert_close(q, kept.T @ kept)
    with pytest.raises(ValueError, match="'k' was not called"):
        observer.result("k")


def test_layers_that_share_an_input_later_or_no_longer():
    x, counts = next(batches())
    kept, other = x[counts], 3 * x
    observer = GramMatrices()
    for inputs in ((x, other), (x, x)):  # only the first batch tells who shares, so each has its own
        observer.start((counts, None))
        observer.see("q", False, inputs[0])
        observer.see("k", False, inputs[1])
    torch.testing.assert_close(observer.result("k"), 10 * kept.T @ kept)
    torch.testing.assert_close(observer.result("q"), 2 * kept.T @ kept)
    for inputs in ((x, x), (x, other)):
        observer.start((counts, None))
        observer.see("q", False, inputs[0])
        observer.see("k", False, inputs[1])
    with pytest.raises(ValueError, match="'k' and 'q' have the same input in some batches but not in others"):
        observer.result("k")


def test_an_input_that_was_changed_in_place_is_seen_again():
    observer, x = GramMatrices(), torch.ones(1, 2, 3)
    observer.start((torch.ones(1, 2, dtype=torch.bool), None))
    observer.see("a", False, x)
    observer.see("b", False, x.mul_(2))
    assert torch.equal(observer.result("b"), 4 * observer.result("a"))


def test_inputs_that_are_not_finite():
    observer = GramMatrices()
    observer.start((torch.ones(1, 2, dtype=torch.bool), None))
    observer.see("a", False, torch.tensor([[[1.0, float("nan")], [0.0, 0.0]]]))
    with pytest.raises(ValueError, match="'a' is not finite"):
        observer.result("a")
