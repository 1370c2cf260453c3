"""Adapters by way of a Hub: pushed by one process, loaded by another, with the real client and a server of our own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers.hub_server import TOKEN, Hub, running_hub


pytestmark = pytest.mark.slow

# The client reads its settings once, and conftest.py puts everything offline: so the client has to read them first.
START = """
import os

import huggingface_hub.constants
import torch
from helpers.models import logits, make_bert

os.environ["HF_HUB_OFFLINE"] = "0"
batch = {"input_ids": torch.arange(36).reshape(4, 9)}
out = {"dense": logits(make_bert(), batch)}
"""

PUSH = """
from helpers.architectures import make
from peft_prune import finalize, save_compact, shrink
from helpers.methods import prune
from helpers.methods import final_adapter
from helpers.architectures import zero_some
from transformers import AutoModelForSequenceClassification

first = final_adapter("first", at=0.5)
first.push_to_hub("user/mask")
out["first"] = logits(first, batch)
second = final_adapter("second", at=0.8)
second.push_to_hub("user/mask", revision="v2")
out["second"] = logits(second, batch)

api = huggingface_hub.HfApi()
api.create_repo("user/shared")
api.upload_folder(repo_id="user/shared", folder_path="first", path_in_repo="masks/a")
api.upload_folder(repo_id="user/shared", folder_path="second", path_in_repo="masks/b")

make_bert(num_labels=3, seed=5).push_to_hub("user/base")
base = AutoModelForSequenceClassification.from_pretrained("user/base")
third = prune(base, 0.6, task_type="SEQ_CLS")
third.base_model.model.classifier.modules_to_save["default"].weight.data.add_(1.0)
finalize(third)
third.push_to_hub("user/mask2")
out["third"] = logits(third, batch)

compact = make("bert")
zero_some(compact)
shrink(compact).push_to_hub("user/compact")
save_compact(compact, "compact", push_to_hub=True, repo_id="user/compact-2")
out["compact"] = logits(compact, batch)

out["name"] = api.whoami()["name"]
out["listed"] = api.list_repo_files("user/shared")
out["sha"] = api.model_info("user/mask", revision="v2").sha
out["exist"] = [api.file_exists("user/mask", name) for name in ("adapter_model.safetensors", "pytorch_model.bin")]
"""

LOAD = """

import peft_prune
from peft import AutoPeftModelForSequenceClassification, PeftModel


def load(*where, **which):
    return logits(PeftModel.from_pretrained(make_bert(), *where, **which), batch)


def failure(*where, **which):
    try:
        load(*where, **which)
    except Exception as error:
        cause = type(error.__cause__ or error.__context__).__name__
        return {"message": str(error), "cause": cause}


out["v2"] = load("user/mask", revision="v2")
out["main"] = load("user/mask")
out["sub a"] = load("user/shared", subfolder="masks/a")
out["sub b"] = load("user/shared", subfolder="masks/b")
out["auto"] = logits(AutoPeftModelForSequenceClassification.from_pretrained("user/mask2"), batch)
for name in ("compact", "compact-2"):
    out[name] = logits(peft_prune.load_compact("user/" + name), batch)
out["no repository"] = failure("user/absent")
out["no revision"] = failure("user/mask", revision="v3")
"""


def run_client(hub: Hub, script: str, folder: Path) -> dict:
    """Run a script in a process with an empty cache of its own, and return what it put into `out`."""
    here = Path(__file__).parent
    env = os.environ | {
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(folder / "home"),
        "HF_HUB_CACHE": str(folder / "home" / "hub"),
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_OFFLINE": "0",
        "HF_TOKEN": TOKEN,
        "no_proxy": "127.0.0.1,localhost",
        "PYTHONPATH": os.pathsep.join(map(str, [here, here.parent, *filter(None, [os.environ.get("PYTHONPATH")])])),
    }
    command = [sys.executable, "-c", f"{START}{script}\ntorch.save(out, 'out.pt')"]
    run = subprocess.run(command, env=env, cwd=folder, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr[-4000:]
    return torch.load(folder / "out.pt")


@pytest.fixture(scope="module")
def hub():
    with running_hub() as hub:
        yield hub


@pytest.fixture(scope="module")
def pushed(hub, tmp_path_factory):
    return run_client(hub, PUSH, tmp_path_factory.mktemp("push"))


@pytest.fixture(scope="module")
def loaded(hub, pushed, tmp_path_factory):
    return run_client(hub, LOAD, tmp_path_factory.mktemp("load"))


def test_pushed_mask_is_the_mask_that_is_loaded(hub, pushed, loaded):
    assert torch.equal(loaded["main"], pushed["first"])
    assert torch.equal(loaded["dense"], pushed["dense"]) and not torch.equal(loaded["main"], loaded["dense"])
    assert {"adapter_config.json", "adapter_model.safetensors", "README.md"} < hub.files("user/mask").keys()
    assert not [name for name in hub.files("user/mask") if name.endswith(".bin")]


def test_pushed_readme_says_to_import(hub, pushed):
    card = hub.files("user/mask")["README.md"].decode()
    assert card.count("import peft_prune") == 1 and "library_name: peft" in card


def test_a_branch_has_a_mask_of_its_own(hub, pushed, loaded):
    assert not torch.equal(pushed["second"], pushed["first"])
    assert torch.equal(loaded["v2"], pushed["second"]) and torch.equal(loaded["main"], pushed["first"])
    heads = {name: commits[-1].oid for name, commits in hub.branches("user/mask").items()}
    assert heads.keys() == {"main", "v2"} and heads["v2"] == pushed["sha"] != heads["main"]
    weights = [hub.files("user/mask", branch)["adapter_model.safetensors"] for branch in heads]
    assert weights[0] != weights[1]


def test_subfolders(hub, pushed, loaded):
    assert torch.equal(loaded["sub a"], pushed["first"]) and torch.equal(loaded["sub b"], pushed["second"])
    files = hub.files("user/shared")
    assert all("import peft_prune" in files[f"masks/{name}/README.md"].decode() for name in "ab")
    assert not [name for name in files if name.startswith("adapter_")]


def test_auto_model_finds_base_and_mask(hub, pushed, loaded):
    assert pushed["third"].shape == (4, 3) and torch.equal(loaded["auto"], pushed["third"])
    assert "model.safetensors" in hub.files("user/base") and "model.safetensors" not in hub.files("user/mask2")


def test_compact_models(hub, pushed, loaded):
    for name in ("compact", "compact-2"):
        torch.testing.assert_close(loaded[name], pushed["compact"], atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(
    ("what", "name", "cause"),
    [
        ("no repository", "user/absent", "RepositoryNotFoundError"),
        ("no revision", "user/mask", "RevisionNotFoundError"),
    ],
)
def test_what_is_not_there_is_told_by_name(hub, loaded, what, name, cause):
    assert name in loaded[what]["message"] and loaded[what]["cause"] == cause
    wrong = "v3" if what == "no revision" else name
    assert 0 < sum(wrong in path for _, path, _ in hub.requests) < 5  # not asked for again and again


def test_server_answers_as_the_client_expects(hub, pushed, loaded):
    assert pushed["name"] == "user" and pushed["exist"] == [True, False]
    assert pushed["listed"] == sorted(hub.files("user/shared"))
    assert not [request for request in hub.requests if request[2] >= 500]
    stored = [path for method, path, _ in hub.requests if method == "PUT"]
    assert len(stored) == len(hub.objects) == 5  # three masks, a base, a compact one; what is there is not sent again
    assert {path for method, path, _ in hub.requests if method == "GET" and path in stored} == set(stored)
