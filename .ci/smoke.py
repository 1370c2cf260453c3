"""An installed peft_prune works: prune a tiny random model, save, load, and compare. Run it from an empty folder."""

import importlib.metadata
import pathlib
import subprocess
import sys
import tempfile

import torch
from peft import PeftModel, get_peft_model
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM

import peft_prune
from peft_prune import SMPConfig, WandaConfig, calibrate, finalize, update_schedule


def trained() -> None:
    """A learned mask of an encoder: one step of training, then saved and loaded."""
    torch.manual_seed(0)
    small = BertConfig(
        vocab_size=60, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, num_labels=2
    )
    base = BertForSequenceClassification(small).eval()
    weights = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    ids, labels = torch.randint(60, (4, 8)), torch.tensor([0, 1, 0, 1])
    model = get_peft_model(base, SMPConfig(task_type="SEQ_CLS", sparsity=0.5))
    model(input_ids=ids, labels=labels).loss.backward()
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1).step()
    update_schedule(model, 1, 1)
    finalize(model)
    model.eval()
    fresh = BertForSequenceClassification(small).eval()
    fresh.load_state_dict(weights)
    compare(model, fresh, ids)


def calibrated() -> None:
    """A mask of a language model that calibration chooses, saved and loaded."""
    torch.manual_seed(0)
    small = LlamaConfig(vocab_size=60, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
    base = LlamaForCausalLM(small).eval()
    weights = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    ids = torch.randint(60, (4, 16))
    model = get_peft_model(base, WandaConfig(task_type="CAUSAL_LM", sparsity=0.5, num_samples=4))
    calibrate(model, [{"input_ids": ids}])
    model.eval()
    fresh = LlamaForCausalLM(small).eval()
    fresh.load_state_dict(weights)
    compare(model, fresh, ids)


def compare(model: PeftModel, base: torch.nn.Module, ids: torch.Tensor) -> None:
    """What is saved computes the same on a fresh copy of the base, and half of its pruned weights are zeros."""
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        expected = model(input_ids=ids).logits
        model.save_pretrained(folder)
        loaded = PeftModel.from_pretrained(base, folder)
        assert torch.allclose(loaded(input_ids=ids).logits, expected, atol=1e-5)
        merged = loaded.merge_and_unload()
        assert torch.allclose(merged(input_ids=ids).logits, expected, atol=1e-5)
        zeros = [(p == 0).float().mean().item() for n, p in merged.named_parameters() if "layer" in n and p.dim() == 2]
        assert any(abs(share - 0.5) < 0.05 for share in zeros), zeros
        command = [str(pathlib.Path(sys.executable).with_name("peft-prune")), "inspect", folder]
        subprocess.run(command, check=True, capture_output=True)


def main() -> None:
    folder = pathlib.Path(peft_prune.__file__).parent
    assert "site-packages" in folder.parts, f"{folder} is not an installed package"
    assert (folder / "py.typed").exists()
    assert peft_prune.__version__ == importlib.metadata.version("peft_prune")
    trained()
    calibrated()
    names = ("torch", "transformers", "peft", "accelerate", "numpy", "scipy", "safetensors", "constriction")
    print(", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("peft_prune", *names)))


if __name__ == "__main__":
    main()
