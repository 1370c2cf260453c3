"""What the command, the cards, the pictures and the logs say, of names and masks that are not the usual ones."""

import io
import json
import logging
import os
import pickle
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers.commands import run
from helpers.data import arguments, data
from helpers.methods import METHODS, adapter, config, final_adapter, prune, randomize_scores
from helpers.models import BERT_TARGET_WEIGHTS, logits, make_bert, make_masked_lm
from huggingface_hub import ModelCard
from peft import PeftModel, get_peft_model, inject_adapter_in_model
from rich.console import Console
from torch import nn
from transformers import AutoModelForSequenceClassification, PrinterCallback, Trainer, TrainerCallback
from transformers.integrations import peft as transformers_peft

from peft_prune import (
    MovementPruningConfig,
    PruningCallback,
    PruningTrainer,
    SMPConfig,
    create_pruning_optimizer,
    finalize,
    update_schedule,
)
from peft_prune.model_card import BEGIN, END
from peft_prune.report import plot_density, plot_training, plot_units, read_adapter, summary_table, write_model_card


@pytest.fixture
def adapters(saved):
    """Folder with a base model and an adapter that names it."""
    return saved[0]


def bytes_of(folder):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir() if path.is_file()}


# ------------------------------------------------------- what export would overwrite


@pytest.mark.parametrize("to", ["dense", "compact", "onnx"])
@pytest.mark.parametrize("where", ["base", "base/../base", "base/new/..", "link", "adapter", "named base"])
def test_export_refuses_folders_that_it_reads(adapters, capsys, where, to):
    os.symlink(adapters / "base", adapters / "link")
    more = ()
    if where == "named base":  # another one is read, and this one is what the adapter was made for
        shutil.copytree(adapters / "base", adapters / "copy")
        more, where = ("--base", adapters / "copy"), "base"
    before = {name: bytes_of(adapters / name) for name in ("base", "adapter")}
    arguments = ("export", adapters / "adapter", "--to", to, "--output", f"{adapters}/{where}", *more)
    error = run(capsys, *arguments, code=2).err
    assert "would be lost" in error and "Name another folder" in error
    assert {name: bytes_of(adapters / name) for name in ("base", "adapter")} == before


@pytest.mark.parametrize("link", [os.symlink, os.link])
def test_export_refuses_links_to_files_of_the_base(adapters, capsys, link):
    (adapters / "out").mkdir()
    link(adapters / "base" / "model.safetensors", adapters / "out" / "model.safetensors")
    before = bytes_of(adapters / "base")
    error = run(capsys, "export", adapters / "adapter", "--output", adapters / "out", code=2).err
    assert "a link to" in error and bytes_of(adapters / "base") == before


def test_export_refuses_files_and_folders_of_other_adapters(adapters, capsys, monkeypatch):
    final_adapter(adapters / "other")
    monkeypatch.setattr("peft_prune.report.export.load_with_base", lambda *a: pytest.fail("work was done"))
    (adapters / "file").write_text("mine")
    for name, message in (("other", "holds an adapter"), ("file", "is a file")):
        assert message in run(capsys, "export", adapters / "adapter", "--output", adapters / name, code=2).err
    assert (adapters / "file").read_text() == "mine"


def test_export_twice_into_one_folder(adapters, capsys, batch):
    for _ in range(2):
        run(capsys, "export", adapters / "adapter", "--output", adapters / "out")
    exported = AutoModelForSequenceClassification.from_pretrained(adapters / "out")
    loaded = PeftModel.from_pretrained(
        AutoModelForSequenceClassification.from_pretrained(adapters / "base"), adapters / "adapter"
    )
    assert torch.equal(logits(exported, batch), logits(loaded, batch))


# ------------------------------------------------------------ what names may hold


class Odd(nn.Module):
    """Modules whose names mean something to rich, to Markdown or to matplotlib."""

    NAMES = ("[red]a", "[/foo]", "b[0]", "<b>c", "d|e", "$f$g_", "`h`")

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.inner = nn.ModuleDict({name: nn.Linear(8, 8) for name in self.NAMES})

    def forward(self, x):
        for layer in self.inner.values():
            x = layer(x)
        return x


def odd_adapter(folder, base="/data/[exp1]/bert[/foo]"):
    model = get_peft_model(Odd(), SMPConfig(target_modules=list(Odd.NAMES), sparsity=0.5))
    update_schedule(model, 1, 1)
    finalize(model)
    model.peft_config["default"].base_model_name_or_path = base
    model.save_pretrained(folder)
    return model


def test_inspect_prints_markup_in_names_as_it_is(tmp_path, capsys):
    odd_adapter(tmp_path / "[exp]")
    text = run(capsys, "inspect", tmp_path / "[exp]").out
    assert all(name in text for name in Odd.NAMES) and "base_model     /data/[exp1]/bert[/foo]\n" in text


def test_names_move_no_cursor(tmp_path, capsys):
    odd_adapter(tmp_path / "a", base="bert\x1b[2J\rpwned\nmasks          0 bytes")
    text = run(capsys, "inspect", tmp_path / "a").out
    assert "\x1b" not in text and "\r" not in text and text.count("\nmasks ") == 1


def test_what_fails_while_printing_is_an_error_without_traceback(adapters, capsys, monkeypatch):
    monkeypatch.setattr("peft_prune.report.summary.density_table", lambda rows: 1 / 0)
    assert "division by zero" in run(capsys, "inspect", adapters / "adapter", code=2).err


def test_tables_and_pictures_of_odd_names(tmp_path):
    model = odd_adapter(tmp_path / "a")
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(summary_table(model))
    text = console.export_text()
    assert all(name in text for name in Odd.NAMES)
    figure = plot_density(model)
    figure.savefig(tmp_path / "a.png")  # "$f$g_" is no formula
    assert {label.get_text() for label in figure.axes[0].get_yticklabels()} == set(Odd.NAMES)
    history = [{"sparsity": 0.5, "loss": 1.0, "step": 1} | {f"density/{name}": 0.5 for name in Odd.NAMES}]
    plot_training(history).savefig(tmp_path / "b.png")


HOSTILE = [
    "<script>alert(1)</script>",
    f"bert\n{END}\n\n# Not the author's words\n",
    f"bert\n{BEGIN}\nbert",
    f"bert\r{END}\rbert",
    f"bert\u2028{BEGIN}\u2028{END}",
    "bert\n---\nlicense: mit\n---\n",
    "a`b <i>c</i> ``d``",
    "[click](javascript:alert)",
    "![x](http://example.com/x.png)",
]


def outside_code(text):
    """A text without what stands in code spans: of each run of backticks up to the next one of that length."""
    return re.sub(r"(?<!`)(`+)(?!`).+?(?<!`)\1(?!`)", "", text)


@pytest.mark.parametrize("where", ["base", "dataset", "metric", "module"])
@pytest.mark.parametrize("text", HOSTILE)
def test_card_shows_names_as_code_and_does_not_grow(tmp_path, text, where):
    base = text if where == "base" else "bert"
    odd_adapter(tmp_path, base=base)
    if where == "module":
        stored = json.loads((tmp_path / "adapter_config.json").read_text())
        name = text.replace(".", "")
        stored["check_tensors"] = False  # changed on purpose
        stored["mask_info"] = {k.replace("b[0]", name): v for k, v in stored["mask_info"].items()}
        (tmp_path / "adapter_config.json").write_text(json.dumps(stored))
        adapter_file = read_adapter_by_record(tmp_path)
    else:
        adapter_file = None
    arguments = {
        "evaluation": {text if where == "metric" else "accuracy": 0.5},
        "dataset": text if where == "dataset" else None,
    }
    cards = []
    with pytest.MonkeyPatch.context() as patch:
        if adapter_file is not None:
            patch.setattr("peft_prune.report.card.read_adapter", lambda folder: adapter_file)
        for _ in range(3):
            write_model_card(str(tmp_path), **arguments)
            cards.append((tmp_path / "README.md").read_text())
    assert cards[1] == cards[0] and cards[2] == cards[0]
    body = ModelCard.load(tmp_path / "README.md").text
    lines = body.splitlines()
    assert lines.count(BEGIN) == lines.count(END) == 1 and body.count("import peft_prune") == 1
    seen = outside_code(body)
    for part in ("<script", "<i>", "](javascript", "](http", "# Not the author"):
        assert part not in seen
    assert re.findall(r"<[^>]*>", seen) == [BEGIN, END]


def read_adapter_by_record(folder):
    """What `read_adapter` would give if a tensor could have that name."""
    from peft import PeftConfig

    from peft_prune.report import AdapterFile

    return AdapterFile(str(folder), PeftConfig.from_pretrained(folder), {}, {}, {})


def test_saving_again_does_not_make_the_card_grow(tmp_path):
    model = odd_adapter(tmp_path, base=f"bert\n{END}\n<b>")
    first = (tmp_path / "README.md").read_text()
    for _ in range(3):
        model.save_pretrained(tmp_path)
    text = (tmp_path / "README.md").read_text()
    assert len(text.splitlines()) == len(first.splitlines())
    assert text.count(f"\n{BEGIN}\n") == text.count(f"\n{END}\n") == 1


# ---------------------------------------------------------------- numbers of inspect


def test_a_dense_mask_is_not_compared_with_an_entropy_of_nothing(tmp_path, capsys):
    model = prune(make_bert(), 0.0)
    finalize(model)
    model.save_pretrained(tmp_path)
    text = run(capsys, "inspect", tmp_path).out
    stored = read_adapter(str(tmp_path))
    assert stored.entropy_bytes == 0 and f"masks          {stored.mask_bytes:,} bytes\n" in text
    write_model_card(str(tmp_path))
    assert "entropy" not in text + (tmp_path / "README.md").read_text()


def test_a_mask_is_compared_with_its_entropy(adapters, capsys):
    answer = run(capsys, "inspect", adapters / "adapter", "--json")
    share = answer["mask_bytes"] / answer["entropy_bytes"]
    found = re.search(
        r"masks +([\d,]+) bytes, ([\d.]+) times the entropy", run(capsys, "inspect", adapters / "adapter").out
    )
    assert int(found[1].replace(",", "")) == answer["mask_bytes"] and float(found[2]) == pytest.approx(share, abs=2e-3)


@pytest.mark.parametrize("columns", ["40", "80"])
def test_inspect_cuts_no_number_and_no_name(tmp_path, capsys, monkeypatch, columns):
    long = "a_name_that_is_longer_than_half_of_a_terminal_is_wide_and_goes_on_for_a_while"
    base = nn.ModuleDict({"first": nn.Linear(1024, 1024), long: nn.Linear(1024, 1024)})
    base.forward = lambda x: base[long](base["first"](x))
    model = get_peft_model(base, SMPConfig(target_modules=["first", long], sparsity=0.25, score_init="magnitude"))
    update_schedule(model, 1, 1)
    finalize(model)
    model.peft_config["default"].base_model_name_or_path = "/a/rather/long/path/" * 8
    model.save_pretrained(tmp_path)
    monkeypatch.setenv("COLUMNS", columns)
    text = run(capsys, "inspect", tmp_path).out
    assert "…" not in text and long in text and "/a/rather/long/path/" * 8 in text
    assert "1,048,576" in text and "786,432" in text and "2,097,152" in text and "0.7500" in text


def test_a_narrow_terminal_folds_names_and_keeps_numbers():
    model = prune(make_bert(), 0.9)
    console = Console(width=64, record=True, file=io.StringIO(), force_terminal=True)
    console.print(summary_table(model))
    text = console.export_text()
    assert "…" not in text and f"{BERT_TARGET_WEIGHTS:,}" in text
    assert max(len(line) for line in text.splitlines()) <= 64


# ------------------------------------------------------------ reports of Transformers


class Heard(logging.Handler):
    def __init__(self):
        super().__init__()
        self.text = ""

    def emit(self, record):
        self.text += record.getMessage()


@pytest.fixture
def heard():
    handler, logger = Heard(), logging.getLogger("transformers")
    logger.addHandler(handler)
    yield handler
    logger.removeHandler(handler)


@pytest.mark.parametrize("command", ["verify", "export"])
def test_what_the_adapter_brings_is_not_called_missing(tmp_path, capsys, heard, command):
    make_masked_lm().save_pretrained(tmp_path / "base")
    base = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base")
    final_adapter(tmp_path / "adapter", make=lambda: base, modules_to_save=["classifier", "pooler"])
    assert "classifier" in heard.text, "Transformers does report it by itself"
    heard.text = ""
    run(capsys, command, tmp_path / "adapter", *(("--output", tmp_path / "out") if command == "export" else ()))
    assert heard.text == ""
    AutoModelForSequenceClassification.from_pretrained(tmp_path / "base")
    assert "classifier" in heard.text, "only while the command loads"


def test_what_nobody_brings_is_still_reported(tmp_path, capsys, heard):
    make_masked_lm().save_pretrained(tmp_path / "base")
    base = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base")
    final_adapter(tmp_path / "adapter", make=lambda: base)  # the classifier is stored nowhere
    heard.text = ""
    run(capsys, "verify", tmp_path / "adapter")
    assert "classifier" in heard.text and "MISSING" in heard.text


# -------------------------------------------------------------------------- pictures


def test_colours_of_densities_that_hardly_differ_are_alike():
    model = prune(make_bert(), 0.9)  # local: 10 % of 1024 and of 1536 weights differ by rounding
    image = plot_density(model).axes[0].images[0]
    values = image.get_array()
    assert 0 < values.max() - values.min() < 0.2
    colours = image.cmap(image.norm(values)).reshape(-1, 4)
    assert (colours.max(0) - colours.min(0)).max() < 0.05
    low, high = image.get_clim()
    assert 0 <= low <= values.min() and values.max() <= high <= 100


@pytest.mark.parametrize("sparsity", [0.0, 0.001, 0.98])
def test_colour_scales_stay_between_0_and_100(sparsity):
    model = prune(make_bert(), sparsity)
    for figure in (plot_density(model), plot_units(model)):
        low, high = figure.axes[0].images[0].get_clim()
        assert 0 <= low < high <= 100
        figure.draw_without_rendering()
        assert all(-1e-9 <= tick <= 100 + 1e-9 for tick in shown_ticks(figure.axes[1]))


def shown_ticks(axes):
    low, high = axes.get_ylim()
    assert 0 <= low < high <= 100
    return [tick for tick in axes.get_yticks() if low <= tick <= high]


def test_densities_that_differ_use_the_whole_scale():
    model = prune(make_bert(), 0.5, sparsity_pattern={"query": 0.1, "key": 0.9})
    image = plot_density(model).axes[0].images[0]
    assert image.get_clim() == (image.get_array().min(), image.get_array().max())


@pytest.mark.parametrize("blocks", [1, 2, 12])
@pytest.mark.parametrize("plot", [plot_density, plot_units])
def test_titles_stay_over_the_picture(plot, blocks):
    figure = plot(prune(make_bert(num_hidden_layers=blocks, intermediate_size=3072), 0.5))
    figure.draw_without_rendering()
    axes, bar = figure.axes
    title = axes.title.get_window_extent()
    assert title.x1 < bar.get_window_extent().x0 and title.x0 > 0 and title.y1 <= figure.bbox.y1


# ------------------------------------------------------------------------------ logs


class Seen(TrainerCallback):
    def __init__(self):
        self.logs = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.logs.append(dict(logs))


@pytest.mark.parametrize("disable_tqdm", [True, False])
@pytest.mark.parametrize("make", ["PruningTrainer", "Trainer"])
def test_printed_lines_are_short_and_the_history_is_whole(tmp_path, capsys, make, disable_tqdm):
    model = get_peft_model(make_bert(), SMPConfig(task_type="SEQ_CLS", sparsity=0.9, penalty=0.0))
    seen = Seen()
    fields = {"args": arguments(tmp_path, max_steps=4, logging_steps=2, disable_tqdm=disable_tqdm)}
    fields |= {"model": model, "train_dataset": data()}
    if make == "PruningTrainer":
        trainer = PruningTrainer(**fields, callbacks=[seen])
    else:
        optimizer = create_pruning_optimizer(model, lr=1e-3)
        trainer = Trainer(**fields, callbacks=[PruningCallback(), seen], optimizers=(optimizer, None))
    trainer.train()
    printed = capsys.readouterr().out
    lines = [line for line in printed.splitlines() if "'loss'" in line]
    assert len(lines) == 2 and all("sparsity" in line for line in lines)
    assert "density/" not in printed and "penalty" not in printed
    entries = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [sum(key.startswith("density/") for key in entry) for entry in entries] == [6, 6]
    assert all("penalty" not in entry and "penalty_lambda" not in entry for entry in entries)
    assert len(plot_training(trainer.state.log_history).axes[2].lines) == 6
    logged = [entry for entry in seen.logs if "loss" in entry]
    # reporters of `PruningTrainer` get everything, wherever they stand
    assert [sum(key.startswith("density/") for key in entry) for entry in logged] == [
        6 * (make == "PruningTrainer")
    ] * 2


def test_a_penalty_is_printed(tmp_path, capsys):
    model = get_peft_model(make_bert(), SMPConfig(task_type="SEQ_CLS", sparsity=0.9))
    trainer = PruningTrainer(model=model, args=arguments(tmp_path, max_steps=2, logging_steps=1), train_dataset=data())
    trainer.remove_callback(PrinterCallback)  # as any callback of Transformers
    trainer.add_callback(PrinterCallback)
    trainer.train()
    assert "'penalty'" in capsys.readouterr().out


CALIBRATE = """
import sys, torch
sys.path.insert(0, {tests!r})
from helpers.models import make_bert
from peft import get_peft_model
from peft_prune import PPruningConfig, calibrate
from transformers.utils import logging
{more}
model = get_peft_model(make_bert(), PPruningConfig(keep_ratio=0.5, criterion={criterion!r}))
calibrate(model, [{{"input_ids": torch.randint(0, 90, (4, 9))}}] * 3)
"""


@pytest.mark.parametrize(
    ("criterion", "more", "bars"),
    [("similarity", "", ["12/12", "4/4"]), ("similarity", "logging.disable_progress_bar()", []), ("random", "", [])],
)
def test_calibration_shows_both_of_its_stages(criterion, more, bars):
    """Where no terminal is, too; comparing is what takes the time, one layer after another."""
    script = CALIBRATE.format(tests=str(Path(__file__).parent), criterion=criterion, more=more)
    shown = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stderr
    assert all(f"{bar} [" in shown for bar in bars) and ("calibrate" in shown) == bool(bars)


# ------------------------------------------------------------------------------ docs

PAGES = Path(__file__).parents[1] / "docs"


class Payload:
    def __reduce__(self):
        return (os.mkdir, (os.environ["PAYLOAD"],))


@pytest.mark.parametrize("command", ["inspect", "verify"])
def test_a_file_of_pickles_is_read_as_tensors_only(adapters, capsys, monkeypatch, command):
    """docs/adapters.md says what becomes of an `adapter_model.bin`."""
    text = (PAGES / "adapters.md").read_text()
    assert "weights_only=True" in text and "ever unpickled" not in text
    monkeypatch.setenv("PAYLOAD", str(adapters / "ran"))
    from safetensors.torch import load_file

    tensors = load_file(adapters / "adapter" / "adapter_model.safetensors")
    os.remove(adapters / "adapter" / "adapter_model.safetensors")
    torch.save(tensors, adapters / "adapter" / "adapter_model.bin")
    run(capsys, command, adapters / "adapter")
    (adapters / "adapter" / "adapter_model.bin").write_bytes(pickle.dumps({"x": Payload()}))
    assert run(capsys, command, adapters / "adapter", code=2).err
    assert not (adapters / "ran").exists()


@pytest.mark.parametrize("value_dtype", ["float32", "int8"])
def test_what_finalize_says_of_outputs(value_dtype, batch):
    model = get_peft_model(make_bert(), MovementPruningConfig(sparsity=0.5, value_dtype=value_dtype))
    randomize_scores(model)
    update_schedule(model, 1, 1)
    before = logits(model, batch)
    finalize(model)
    moved = float((logits(model, batch) - before).abs().max())
    assert (moved == 0) == (value_dtype == "float32")
    assert "stay the same" in finalize.__doc__ and "rounding of kept values" in " ".join(finalize.__doc__.split())


@pytest.mark.parametrize("method", METHODS)
def test_an_old_peft_stops_the_methods_of_transformers_only(method, monkeypatch, tmp_path, batch):
    """As with Transformers 5.24 and PEFT 0.21; docs/support.md says which pairs work."""
    monkeypatch.setattr(transformers_peft, "MIN_PEFT_VERSION", "99.0")
    model = make_bert()
    with pytest.raises(ValueError, match="use a version >= 99.0"):
        model.add_adapter(config(method), "a")
    inject_adapter_in_model(config(method), make_bert())
    model = adapter(make_bert(), method)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(make_bert(), tmp_path), batch), logits(model, batch))
    again = make_bert()
    again.load_adapter(str(tmp_path))
    assert torch.equal(logits(again, batch), logits(model, batch))
    text = (PAGES / "support.md").read_text()
    assert "Transformers 5.24" in text and "0.22" in text
