"""The `peft-prune` command: look at saved mask adapters, compare, check, export and import them.

Exit codes: 0, all is well; 1, the adapter is damaged or does not fit; 2, the command could not be carried out.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Sequence
from typing import Any, Optional

from . import __version__
from .names import one_line
from .storage.codec import MaskFormatError


_EXPORT_HELP = (
    "Transformers model with zeros; one without the removed heads and neurons, for load_compact, or as an ordinary "
    "checkpoint (shapes='uniform'); model.gguf; or model.onnx, of a causal language model with a cache"
)
_EXPORTED_HELP = (
    ". Also a whole model that was saved, such as a compact one after fine-tuning, or one of save_sparse, in another "
    "form."
)
_DIFF_HELP = (
    ". The overlap is intersection over union: the share of the weights kept by either mask that both keep. "
    "both_if_unrelated is what chance would give."
)
_CARD_HELP = (
    ". Only the block between <!-- peft_prune:begin --> and <!-- peft_prune:end --> is replaced; it is added to a "
    "README.md without one, and your own text is kept."
)
_IMPORT_HELP = (
    ". Weights that are zero are removed; kept values are stored where they differ from the base's. Each merged "
    "matrix is compared with the sparse model. Without --out nothing is written."
)
Answer = tuple[dict[str, Any], Callable[[], None]]


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Run the command and return its exit code."""
    args = _parser().parse_args(argv)
    try:
        answer, show = args.function(args)
        if args.json:
            print(json.dumps(answer, indent=2))
        else:
            show()
    except MaskFormatError as error:
        return _fail(args, 1, error)
    except Exception as error:  # a command line prints an error, not a traceback
        return _fail(args, 2, error)
    return 0


def _fail(args: argparse.Namespace, code: int, error: Exception) -> int:
    if args.json:
        print(json.dumps({"error": str(error), "type": type(error).__name__}))
    print(f"peft-prune: {error}", file=sys.stderr)
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="peft-prune", description=__doc__)
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(
        name: str, function: Callable[[argparse.Namespace], Answer], text: str, more: str = ""
    ) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=f"{text}{more}")
        sub.add_argument("--json", action="store_true", help="print JSON")
        sub.set_defaults(function=function)
        return sub

    sub = command("inspect", _inspect, "density by kind, bytes against entropy, base model")
    sub.add_argument("adapter", metavar="DIR", help="folder or Hub id of a final adapter")
    sub = command("diff", _diff, "overlap of two masks", _DIFF_HELP)
    sub.add_argument("adapter", metavar="A")
    sub.add_argument("other", metavar="B")
    sub = command("verify", _verify, "check every mask, and that it was made for this base model")
    sub.add_argument("adapter", metavar="DIR")
    sub.add_argument("--base", help="folder or Hub id; by default what the adapter names")
    sub = command("export", _export, "a model without adapter, with the mask applied", _EXPORTED_HELP)
    sub.add_argument("adapter", metavar="DIR", help="folder or Hub id of a final adapter, or of a whole model")
    sub.add_argument("--base", help="folder or Hub id; by default what the adapter names")
    sub.add_argument(
        "--to", choices=["dense", "compact", "transformers", "gguf", "onnx"], default="dense", help=_EXPORT_HELP
    )
    sub.add_argument("--output", required=True, help="folder to write")
    sub = command("card", _card, "write density table, plot and results into README.md", _CARD_HELP)
    sub.add_argument("adapter", metavar="DIR")
    sub.add_argument("--evaluation", nargs="*", default=[], metavar="NAME=VALUE", help="such as accuracy=0.847")
    sub.add_argument("--dataset", help="Hub id of the data set of the evaluation")
    sub = command("import", _import, "make a mask adapter from a sparse model or mask file", _IMPORT_HELP)
    sub.add_argument("sparse", metavar="SPARSE", help="folder, file or Hub id: weights with zeros, or masks (.npz)")
    sub.add_argument("--base", required=True, help="folder or Hub id of the dense model it was pruned from")
    sub.add_argument("--out", "--output", help="folder to write")
    sub.add_argument("--target-modules", nargs="+", metavar="NAME", help="by default linear layers inside the blocks")
    sub.add_argument("--modules-to-save", nargs="+", metavar="NAME", help="modules that differ, to be stored in full")
    sub.add_argument(
        "--value-dtype", choices=["float32", "float16", "bfloat16", "int8"], help="by default SPARSE's own"
    )
    return parser


def _inspect(args: argparse.Namespace) -> Answer:
    from .report.adapter_file import read_adapter, size_of_masks
    from .report.summary import by_kind, density_table

    adapter = read_adapter(args.adapter)
    config = adapter.config
    kinds = [
        {"kind": kind, "weights": size, "kept": kept, "density": kept / size, "lowest": low, "highest": high}
        for kind, size, kept, low, high in by_kind(adapter.rows)
    ]
    answer = {
        "method": str(config.peft_type.value),  # type: ignore[union-attr]
        "base_model": config.base_model_name_or_path,
        "granularity": config.granularity,
        "allocation": getattr(config, "allocation", None),
        "sparsity": 1 - kinds[-1]["density"],  # type: ignore[operator]
        "mask_bytes": adapter.mask_bytes,
        "entropy_bytes": round(adapter.entropy_bytes),
        "value_bytes": adapter.value_bytes,
        "other_bytes": adapter.other_bytes,
        "format": config.mask_format,
        "kinds": kinds,
        "layers": [{"name": r.name, "shape": list(r.shape), "density": r.density} for r in adapter.rows],
    }

    def show() -> None:
        _print_table(density_table(adapter.rows))
        for key in ("method", "base_model", "granularity", "allocation", "format"):
            print(f"{key:14} {one_line(answer[key])}")
        print(f"masks          {size_of_masks(adapter)}")
        if adapter.value_bytes:
            print(f"kept values    {adapter.value_bytes:,} bytes, {getattr(config, 'value_dtype', '')}")
        print(f"other modules  {adapter.other_bytes:,} bytes")

    return answer, show


def _print_table(table: Any) -> None:
    """Print a table, as wide as it is where it goes to a file or to another program."""
    from rich.console import Console

    console = Console()
    if not console.is_terminal:
        console.width = 10_000
    console.print(table)


def _diff(args: argparse.Namespace) -> Answer:
    from .report.adapter_file import read_adapter

    one, two = read_adapter(args.adapter), read_adapter(args.other)
    shared = [name for name in one.tensors if name in two.tensors]
    rows: list[dict[str, Any]] = []
    for name in shared:
        sizes = [tuple((file.config.mask_info or {}).get(name, {}).get("shape", ())) for file in (one, two)]
        if sizes[0] != sizes[1]:
            raise MaskFormatError(f"{name!r} is {sizes[0]} in {args.adapter} but {sizes[1]} in {args.other}.")
        a, b = one.bounded_mask(name), two.bounded_mask(name)
        both = int((a & b).sum())
        counts = {"both": both, "only_a": int(a.sum()) - both, "only_b": int(b.sum()) - both, "weights": a.numel()}
        rows.append({"name": name} | counts)
    total = {key: sum(row[key] for row in rows) for key in ("both", "only_a", "only_b", "weights")}
    union = total["both"] + total["only_a"] + total["only_b"]
    # of two unrelated masks of these densities so much would be kept by both
    kept_a, kept_b = total["both"] + total["only_a"], total["both"] + total["only_b"]
    answer = {
        "identical": bool(rows)
        and total["only_a"] == total["only_b"] == 0
        and one.tensors.keys() == two.tensors.keys(),
        "overlap": total["both"] / union if union else float(bool(rows)),
        "both": total["both"],
        "both_if_unrelated": round(kept_a * kept_b / total["weights"]) if rows else 0,
        "only_a": total["only_a"],
        "only_b": total["only_b"],
        "not_in_b": sorted(set(one.tensors) - set(two.tensors)),
        "not_in_a": sorted(set(two.tensors) - set(one.tensors)),
        "layers": rows,
    }

    def show() -> None:
        for key in ("identical", "overlap", "both", "both_if_unrelated", "only_a", "only_b", "not_in_b", "not_in_a"):
            value = answer[key]
            if key == "overlap":
                value = f"{value:.4f} (intersection over union: both / (both + only_a + only_b))"
            print(f"{key:18} {_shortened(value) if isinstance(value, list) else value}")

    return answer, show


def _shortened(names: list[str], most: int = 3) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(map(one_line, names[:most])) + more if names else "none"


def _verify(args: argparse.Namespace) -> Answer:
    from .report.adapter_file import read_adapter
    from .report.export import load_with_base

    adapter = read_adapter(args.adapter)
    load_with_base(adapter, args.base)  # compares shapes: a record may lie about the size of what is unpacked next
    for name in adapter.tensors:
        adapter.mask(name)
    answer = {"ok": True, "masks": len(adapter.tensors), "base": args.base or adapter.config.base_model_name_or_path}
    return answer, lambda: print(f"{len(adapter.tensors)} masks are whole and fit {one_line(answer['base'])}")


def _export(args: argparse.Namespace) -> Answer:
    from .report.adapter_file import read_adapter
    from .report.export import export
    from .report.saved_model import export_saved, holds_model

    if holds_model(args.adapter):
        path = export_saved(args.adapter, args.base, args.to, args.output)
    else:
        path = export(read_adapter(args.adapter), args.base, args.to, args.output)
    return {"output": path}, lambda: print(path)


def _import(args: argparse.Namespace) -> Answer:
    from .importing import import_sparse
    from .importing.save import check_out, save_imported

    check_out(args.out, [args.base, args.sparse])
    report = import_sparse(args.base, args.sparse, args.target_modules, args.modules_to_save, args.value_dtype)
    size = save_imported(report, args.sparse, args.out) if args.out else report.adapter_bytes
    answer = report.to_dict() | {"output": args.out, "adapter_bytes": size}

    def show() -> None:
        _print_table(report.table())
        share = size / report.checkpoint_bytes
        print(
            f"adapter        {size:,} bytes, {share:.1%} of the {report.checkpoint_bytes:,} of {one_line(args.sparse)}"
        )
        equal = "equal" if not report.difference else f"differ by {report.difference:.3g} at most"
        print(f"merged weights {equal}, in {len(report.matrices)} matrices")
        for text in report.notes:
            print(f"note           {one_line(text)}")
        for text in report.warnings:
            print(f"warning        {one_line(text)}")
        print(f"written to     {args.out}" if args.out else "nothing is written without --out DIR")

    return answer, show


def _card(args: argparse.Namespace) -> Answer:
    from .report.card import write_model_card

    results = {}
    for item in args.evaluation:
        name, _, text = item.partition("=")
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not name or not math.isfinite(value):
            raise ValueError(f"--evaluation {item!r} must be NAME=VALUE with a number, such as accuracy=0.847.")
        results[name] = value
    path = write_model_card(args.adapter, results, args.dataset)
    return {"output": path}, lambda: print(path)


if __name__ == "__main__":
    sys.exit(main())
