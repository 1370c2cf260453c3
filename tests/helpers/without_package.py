"""Saved models in a process of their own, in which `peft_prune` cannot be imported."""

from __future__ import annotations

import subprocess
import sys

import torch


_LOADER = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "peft_prune":
            raise ImportError("this process has no peft_prune")
sys.meta_path.insert(0, Refuse())
import pathlib, torch, transformers
for folder in sorted(pathlib.Path(sys.argv[1]).iterdir()):
    saved = torch.load(folder / "expected.pt")
    model = getattr(transformers, saved["auto"]).from_pretrained(folder, attn_implementation="eager").eval()
    with torch.no_grad():
        found = {"logits": model(**saved["inputs"]).logits}
        if saved["generates"]:
            ids = saved["inputs"]["input_ids"][:1]
            found["ids"] = model.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=0)
    torch.save(found | {"class": type(model).__name__}, folder / "found.pt")
assert "peft_prune" not in sys.modules
"""


def expect(model, folder, auto, inputs):
    """Note beside a saved model what is to be found there, by the class `auto`."""
    with torch.no_grad():
        expected = {"auto": auto, "inputs": inputs, "logits": model(**inputs).logits}
    expected["generates"] = auto == "AutoModelForCausalLM"
    if expected["generates"]:
        ids = inputs["input_ids"][:1]
        expected["ids"] = model.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=0)
    torch.save(expected, folder / "expected.pt")


def load_there(folder):
    """Load each model below a folder there: by the folder's name what was noted, and what was found."""
    done = subprocess.run([sys.executable, "-c", _LOADER, str(folder)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return {p.name: (torch.load(p / "expected.pt"), torch.load(p / "found.pt")) for p in folder.iterdir()}
