"""A pytest plugin that puts our configurations into PEFT's tests, from outside, and notes what came of them.

It is loaded with `-p` in a process of its own, see `run.py`.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Optional
from unittest import mock

import pytest
from peft import LoraConfig

from . import cases
from .contradictions import CONTRADICTIONS, contradiction
from .report import NOT_FETCHED
from .stand_ins import redirect_hub
from .suite import PACKAGE


RESULTS = "PEFT_MATRIX_RESULTS"  # environment: file that the outcomes are written to
# what Hugging Face's libraries say of a file that is neither in their cache nor to be had
_OFFLINE = "OfflineModeIsEnabled|LocalEntryNotFoundError|[Cc]ouldn't connect to|Cannot reach https"
_records: dict[str, dict[str, Any]] = {}


# ------------------------------------------------------------------- before collection


def pytest_configure(config: pytest.Config) -> None:
    root = Path(str(config.rootpath))
    sys.path.insert(0, str(root))
    _stub_diffusers()
    redirect_hub(root / "hub")
    utils = importlib.import_module(f"{PACKAGE}.testing_utils")
    utils.hub_online_once = _no_hub
    _adapt_common(importlib.import_module(f"{PACKAGE}.testing_common"))


def _stub_diffusers() -> None:
    """The tests name one class of it, to tell Stable Diffusion from other models."""
    try:
        importlib.import_module("diffusers")
    except ImportError:
        stub = types.ModuleType("diffusers")
        stub.StableDiffusionPipeline = type("StableDiffusionPipeline", (), {})  # type: ignore[attr-defined]
        sys.modules["diffusers"] = stub


@contextmanager
def _no_hub(model_id: str) -> Iterator[None]:
    yield


def _adapt_common(common: Any) -> None:
    """What is run for methods that are listed by name is run for ours, too."""
    common._skip_if_conv1d_not_supported = lambda *args: None
    tester = common.PeftCommonTester
    for name in ("_test_mixed_adapter_batches", "_test_generate_with_mixed_adapter_batches_and_beam_search"):
        setattr(tester, name, _as_lora(common, getattr(tester, name)))


def _as_lora(common: Any, test: Any) -> Any:
    """These tests ask for one thing about the class: is it one of those that can mix adapters in a batch?"""

    def run(self, model_id, config_cls, config_kwargs):
        with mock.patch.object(common, "LoraConfig", config_cls):
            test(self, model_id, config_cls, config_kwargs)

    return run


# ------------------------------------------------------------------- collection


@pytest.hookimpl(wrapper=True)
def pytest_pycollect_makemodule(module_path: Path, parent: Any) -> Any:
    collected = yield
    tables = cases.tables().get(module_path.stem)
    if tables is None:
        return collected  # a neighbour, which is not run
    module = collected.obj
    if hasattr(module, "PEFT_MODELS_TO_TEST"):
        module.PEFT_MODELS_TO_TEST[:] = [(_lora_adapter(Path(str(parent.config.rootpath))), "test")]
    for test in _functions(module):
        marks = getattr(test, "pytestmark", [])
        test.pytestmark = [_with_ours(mark, module, tables, module_path.stem) for mark in marks]
    return collected


def _functions(module: Any) -> Iterator[Any]:
    """Functions and methods that a module defines itself."""
    classes = [value for value in vars(module).values() if isinstance(value, type)]
    for holder in [module, *(c for c in classes if c.__module__ == module.__name__)]:
        yield from (value for value in vars(holder).values() if isinstance(value, types.FunctionType))


def _lora_adapter(root: Path) -> str:
    """Folder with the configuration of a LoRA, which the tests load from the Hub."""
    folder = root / "hub" / "tiny-opt-lora-revision"
    if not folder.exists():
        LoraConfig(task_type="CAUSAL_LM").save_pretrained(str(folder))
    return str(folder)


def _with_ours(mark: pytest.Mark, module: Any, tables: dict[str, list[Any]], name: str) -> pytest.Mark:
    """A `parametrize` mark with our rows in the place of PEFT's; any other mark as it is."""
    if mark.name != "parametrize":
        return mark
    names = mark.args[0] if isinstance(mark.args[0], str) else ",".join(mark.args[0])
    rows = next((ours for table, ours in tables.items() if getattr(module, table) is mark.args[1]), None)
    if rows is None and names in ("config_cls", "config_class"):
        rows = cases.classes_for(name)
    if rows is None and names.replace(" ", "") == "test_name,config0,config1":
        rows = _mixed_rows(mark.args[1])
    return mark if rows is None else pytest.mark.parametrize(mark.args[0], rows).mark


def _mixed_rows(theirs: Any) -> list[Any]:
    """LoRA's rows of two adapters on linear layers, for each of our methods."""
    rows = []
    for row in theirs:
        configs = [config for config in row[1:] if type(config) is LoraConfig]
        if len(configs) == 2 and all(set(c.target_modules) <= {"lin0", "lin1"} for c in configs):
            for label in cases.ANYWHERE:
                ours = [cases.like_lora(config, label) for config in configs]
                rows.append(pytest.param(row[0], *ours, id=f"{label} {row[0]}"))
    return rows


@pytest.hookimpl(trylast=True)  # after `-k`
def pytest_collection_modifyitems(config: pytest.Config, items: list[Any]) -> None:
    kept, others = [], []
    for item in items:
        label = cases.label_of(item.callspec.params) if hasattr(item, "callspec") else None
        if label is None:
            others.append(item)
            continue
        kept.append(item)
        _records[item.nodeid] = {"method": label, "test": item.nodeid.removeprefix(f"{PACKAGE}/")}
        found = contradiction(label, _records[item.nodeid]["test"])
        if found is not None:
            _records[item.nodeid]["entry"] = CONTRADICTIONS.index(found)
            item.add_marker(pytest.mark.xfail(reason=found.reason, strict=True))
    config.hook.pytest_deselected(items=others)
    items[:] = kept


# ------------------------------------------------------------------- outcomes


def pytest_runtest_logreport(report: Any) -> None:
    record = _records[report.nodeid]
    record["seconds"] = round(record.get("seconds", 0.0) + report.duration, 3)
    if report.when == "call" or report.outcome != "passed":
        record["outcome"], record["why"] = _outcome(report, record.get("entry"))


def _outcome(report: Any, entry: Optional[int]) -> tuple[str, str]:
    if report.outcome == "passed":
        return "passed", ""
    crash = getattr(report.longrepr, "reprcrash", None)
    message = crash.message if crash else str(report.longrepr)
    if report.outcome == "failed":
        return ("skipped", NOT_FETCHED) if re.search(_OFFLINE, message) else ("failed", message)
    if not hasattr(report, "wasxfail"):
        return "skipped", str(report.longrepr[2]).removeprefix("Skipped: ")
    assert entry is not None
    if re.search(CONTRADICTIONS[entry].error, message):
        return "contradicts", message
    return "failed", f"another error than the one that entry {entry} of contradictions.py expects: {message}"


def pytest_sessionfinish(session: Any) -> None:
    if RESULTS in os.environ:
        Path(os.environ[RESULTS]).write_text(json.dumps(list(_records.values()), indent=1))
