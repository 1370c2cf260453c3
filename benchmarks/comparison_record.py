"""Records of runs in the format of PEFT's `method_comparison`: JSON with `run_info`, `train_info` and `meta_info`."""

from __future__ import annotations

import json
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch


PACKAGES = ("transformers", "peft", "datasets", "bitsandbytes", "torch", "peft_prune")
# what PEFT's page reads of each part; ours adds `sparsity` and `speed` to `train_info`
RUN = ("created_at", "total_time", "experiment_name", "peft_branch", "train_config", "peft_config", "error_msg")
TRAIN = (
    "accelerator_memory_reserved_avg", "accelerator_memory_max", "accelerator_memory_reserved_99th", "train_time",
    "file_size", "num_trainable_params", "num_total_params", "status", "metrics", "sparsity", "speed",
)  # fmt: skip
META = ("model_info", "dataset_info", "package_info", "system_info", "pytorch_info")


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def meta_info(datasets: tuple[str, ...], device: torch.device) -> dict[str, Any]:
    """Versions and machine. Commit hashes, and the Hub's of model and data, are `None`: nothing asks for them."""
    packages: dict[str, str | None] = {}
    for package in PACKAGES:
        packages |= {f"{package}-version": _version(package), f"{package}-commit-hash": None}
    unknown = {"sha": None, "created_at": None}
    names = {"system": platform.system(), "release": platform.release(), "version": platform.version()}
    names |= {"machine": platform.machine(), "processor": platform.processor()}
    accelerator = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return {
        "model_info": unknown,
        "dataset_info": dict.fromkeys(datasets, unknown),
        "package_info": packages,
        "system_info": names | {"accelerator": accelerator},
        "pytorch_info": torch.__config__.show(),
    }


class Memory:
    """Bytes that an accelerator holds for this process, beyond those at the start; 0 on a CPU."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.start = device, 0
        self.reserved: list[int] = []
        self.held: list[int] = []
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            self.start = torch.cuda.max_memory_reserved(device)

    def note(self) -> None:
        """Once a step."""
        if self.device.type == "cuda":
            self.reserved.append(torch.cuda.memory_reserved(self.device) - self.start)
            self.held.append(torch.cuda.memory_allocated(self.device) - self.start)

    def allocated(self) -> int:
        return int(np.mean(self.held or [0]))

    def summary(self) -> dict[str, int]:
        cuda = self.device.type == "cuda"
        return {
            "accelerator_memory_reserved_avg": int(np.mean(self.reserved or [0])),
            "accelerator_memory_max": torch.cuda.max_memory_reserved(self.device) - self.start if cuda else 0,
            "accelerator_memory_reserved_99th": int(np.percentile(self.reserved or [0], 99)),
        }


def plain(value: Any) -> Any:
    """A config's value as JSON has it: sets as sorted lists, enums and paths as strings."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (set, frozenset)):
        return sorted(plain(item) for item in value)
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if value is None or type(value) in (bool, int, float, str):
        return value
    return str(getattr(value, "value", value))


def write_record(folder: Path, record: dict[str, Any]) -> Path:
    """Write a run where PEFT's page would look for it, `method--name.json`.

    Raises:
        ValueError: a field is missing, or one is there that the format does not have.
    """
    for part, fields in (("run_info", RUN), ("train_info", TRAIN), ("meta_info", META)):
        if set(record[part]) != set(fields):
            wrong = sorted(set(record[part]) ^ set(fields))
            raise ValueError(f"{part}: {wrong} are missing or superfluous; the format has {', '.join(fields)}.")
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{record['run_info']['experiment_name'].replace('/', '--')}.json"
    path.write_text(json.dumps(plain(record), indent=2) + "\n")
    return path


def table(folder: Path) -> str:
    """The records of a folder as a table in Markdown."""
    lines = ["| experiment | test accuracy | forgetting | trained | file, bytes | sparsity | speed |", "|---" * 7 + "|"]
    for path in sorted(folder.glob("*.json")):
        record = json.loads(path.read_text())
        train, last = record["train_info"], record["train_info"]["metrics"][-1]
        cells = [record["run_info"]["experiment_name"], f"{100 * last['test accuracy']:.1f} %"]
        cells += [f"{last['forgetting']:+.3f}", f"{train['num_trainable_params']:,}", f"{train['file_size']:,}"]
        cells += [f"{train['sparsity']:.3f}", f"{train['speed']:.2f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)
