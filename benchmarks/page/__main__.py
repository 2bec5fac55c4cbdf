"""The page of measured speeds: ``page.md`` with its ``{{places}}`` filled from result files.

    python -m benchmarks.page --results docs/results/speed -o docs/speed.md

Text is changed in ``page.md``; every number comes from a file. What has not been measured is said to be so.
"""

from __future__ import annotations

import argparse
import json
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.page import figures
from benchmarks.page.verdicts import Results, lines, place

TEMPLATE = Path(__file__).with_name("page.md")
MISSING = "*Not measured yet.*"
MIB = 2**20


def table(head: Sequence[str], rows: Sequence[Sequence[str]], mark: str = "--:") -> str:
    """A Markdown table; ``mark`` aligns all columns but the first."""
    marks = ["---", *[mark] * (len(head) - 1)]
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, marks, *rows))


def by_contender(columns: dict[str, dict[str, Any]], cell: Callable[[dict[str, Any]], str]) -> str:
    """A table with a row for each contender and a column for each case."""
    names = list(dict.fromkeys(name for results in columns.values() for name in results))
    rows = [[name, *[cell(results[name]) if name in results else "" for results in columns.values()]] for name in names]
    return table(["", *columns], rows)


def ratio(reference: str) -> Callable[[dict[str, Any]], str]:
    """The median ratio to a contender, as a table shows it."""
    return lambda result: f"{result['ratio'][reference]['p50']:.2f}" if reference in result["ratio"] else ""


def milliseconds(result: dict[str, Any]) -> str:
    """Median and, in brackets, tenth to ninetieth percentile."""
    p10, p50, p90 = (_three(1e3 * result["seconds"][name]) for name in ("p10", "p50", "p90"))
    return f"{p50} ({p10} to {p90})"


def _three(x: float) -> str:
    """Three significant digits without an exponent."""
    return f"{x:.0f}" if x >= 100 else f"{x:.3g}"


def mebibytes(key: str) -> Callable[[dict[str, Any]], str]:
    return lambda result: f"{result[key] / MIB:.2f}"


def acceptance(results: Results) -> str:
    rows = []
    for line in lines(results):
        if line.holds is None:
            rows.append([line.text, "not measured", "", ""])
        else:
            near, over = line.nearest, sum(value.value > value.bound for value in line.values)
            verdict = "yes" if line.holds else f"**no**: {over} of {len(line.values)} over"
            rows.append([line.text, verdict, f"{near.value:.3f} (at most {near.bound:.2f})", near.where])
    return table(["", "holds", "the number nearest to its limit or furthest past it", "of"], rows, "---")


def layer(content: dict[str, Any], cell: Callable[[dict[str, Any]], str]) -> str:
    """A cell of every contender on every shape, all contenders' shapes and the others apart."""
    parts: dict[tuple[str, ...], dict[str, Any]] = {}
    for case in content["cases"]:
        head = place(case).replace(", ", "<br>")
        parts.setdefault(tuple(case["results"]), {})[head] = case["results"]
    return "\n\n".join(by_contender(columns, cell) for columns in parts.values())


def shared_input(content: dict[str, Any]) -> str:
    columns = {place(case).replace(", ", "<br>"): case["results"] for case in content["shared_input"]}
    return by_contender(columns, lambda r: f"{r['saved_bytes_1'] / MIB:.2f} → {r['saved_bytes_3'] / MIB:.2f}")


def model(content: dict[str, Any]) -> str:
    head = ["", "ms a step (p10 to p90)", "frozen = 1", "LoRA = 1", "kept, MiB", "peak, MiB", "trained"]
    cells = [milliseconds, ratio("frozen"), ratio("lora"), mebibytes("saved_bytes"), mebibytes("peak_bytes")]
    rows = [[name, *[c(r) for c in cells], f"{r['parameters']:,}"] for name, r in content["results"].items()]
    size = f"{content['rows']} rows of up to {content['length']} tokens"
    size += f", {content['layers']} layers" if "layers" in content else ""
    return f"{size}; {', '.join(content['targets'])} adapted.\n\n{table(head, rows)}"


def decode_layers(content: dict[str, Any]) -> str:
    return by_contender({f"{case['width']}, ms": case["results"] for case in content["layers"]}, milliseconds)


def generation(content: dict[str, Any]) -> str:
    results = content["generation"]["results"]
    rows = [[name, milliseconds(r), ratio("frozen")(r), ratio("lora")(r)] for name, r in results.items()]
    return table(["", "ms a token (p10 to p90)", "frozen = 1", "LoRA = 1"], rows)


def adapters(content: dict[str, Any], what: str) -> str:
    return by_contender({f"{case['base']}, ms": case[what] for case in content["cases"] if what in case}, milliseconds)


def mixed(content: dict[str, Any]) -> str:
    return by_contender({f"{case['value']}": case["results"] for case in content["axes"]["adapters"]}, milliseconds)


PLACES: dict[str, tuple[str, Callable[[dict[str, Any]], str]]] = {
    "layer_frozen": ("layer", lambda content: layer(content, ratio("frozen"))),
    "layer_lora": ("layer", lambda content: layer(content, ratio("lora"))),
    "layer_compiled": ("layer_compiled", lambda content: layer(content, ratio("lora"))),
    "layer_ms": ("layer", lambda content: layer(content, milliseconds)),
    "layer_saved": ("layer", lambda content: layer(content, mebibytes("saved_bytes"))),
    "layer_peak": ("layer", lambda content: layer(content, mebibytes("peak_bytes"))),
    "shared_input": ("layer", shared_input),
    "minilm": ("model_minilm", model),
    "smollm2": ("model_smollm2", model),
    "llama_stack": ("model_llama_stack", model),
    "decode_layers": ("decode", decode_layers),
    "generation": ("decode", generation),
    "merge": ("adapters", lambda content: adapters(content, "merge")),
    "unmerge": ("adapters", lambda content: adapters(content, "unmerge")),
    "load": ("adapters", lambda content: adapters(content, "load")),
    "mixed": ("scaling", mixed),
}
"""What fills each place: the result file it needs, and the text made of it."""


def fill(results: Results, folder: str, figure_folder: Path, page_folder: Path) -> str:
    """The page."""

    def replace(found: re.Match[str]) -> str:
        name = found[1]
        kind, _, key = name.partition(":")
        if kind == "acceptance":
            return acceptance(results)
        file = key or PLACES[kind][0]
        if file not in results:
            return MISSING
        if kind == "source":
            return source(file, results[file], folder)
        if kind == "figure":
            path = figure_folder / f"speed_{file}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            figures.scaling(results[file], path) if file == "scaling" else figures.layers(results[file]["cases"], path)
            return Path(os.path.relpath(path, page_folder)).as_posix()
        return PLACES[kind][1](results[file])

    return re.sub(r"\{\{([\w:]+)\}\}", replace, TEMPLATE.read_text(encoding="utf-8"))


def source(file: str, content: dict[str, Any], folder: str) -> str:
    """Command, device, versions and commit of a result file."""
    versions = ", ".join(f"{name} {number}" for name, number in content["versions"].items())
    quick = "**A quick run: these numbers mean nothing.** " if content["quick"] else ""
    return (
        f"{quick}`{content['command']}` ([{file}.json]({folder}/{file}.json)): {content['device']}, "
        f"threads: {content['threads']}; {versions}; commit {content['commit']}."
    )


def main() -> None:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--results", type=Path, default=Path("docs/results/speed"), help="folder of the result files")
    made.add_argument("--figures", type=Path, default=Path("docs/figures"), help="folder for the figures")
    made.add_argument("-o", "--output", type=Path, default=Path("docs/speed.md"), help="the page")
    arguments = made.parse_args()
    files = sorted(arguments.results.glob("*.json"))
    results = {file.stem: json.loads(file.read_text(encoding="utf-8")) for file in files}
    page_folder = arguments.output.parent
    folder = Path(os.path.relpath(arguments.results, page_folder)).as_posix()
    arguments.output.write_text(fill(results, folder, arguments.figures, page_folder), encoding="utf-8")
    print(f"Page: {arguments.output}")


if __name__ == "__main__":
    main()
