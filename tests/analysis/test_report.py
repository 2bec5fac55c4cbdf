from __future__ import annotations

import ast
import json
import math
import re
import struct
import subprocess
import sys
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from pathlib import Path

import pytest

import lorma.analysis
from lorma.analysis import build_table, evaluation_curves, load_run, loss_curves, report, write_report
from lorma.errors import InputError

FIGURES = {
    f"{name}{theme}.{kind}" for name in ("loss", "evaluation") for theme in ("", "-dark") for kind in ("png", "svg")
}
FILES = {"index.html", "table.json", "table.md", *FIGURES}
PACKAGE = Path(lorma.analysis.__file__).parent


@pytest.fixture(name="runs")
def runs_fixture(write_run):
    methods = ("lora", "lorma-plus", "lorma-permutation")
    return [load_run(write_run(f"runs/{m}-{s}", m, s)) for m in methods for s in (0, 1)]


class Page(HTMLParser):
    """The tags, attributes and text of a page."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self.media: list[str] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [value for name, value in attrs if name in ("src", "srcset", "href") and value]
        self.media += [value for name, value in attrs if name == "media" and value]

    def handle_data(self, data):
        self.text += data


def assert_valid_images(png: Path, svg: Path) -> None:
    content = png.read_bytes()
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    density = struct.unpack(">II", content[content.index(b"pHYs") + 4 :][:8])
    assert min(density) * 0.0254 >= 150
    assert ET.parse(svg).getroot().tag == "{http://www.w3.org/2000/svg}svg"


def test_a_report_is_complete(runs, tmp_path):
    index = write_report(runs, tmp_path / "new" / "report", "LoRA and LoRMA")
    assert index == tmp_path / "new" / "report" / "index.html"
    assert {file.name for file in index.parent.iterdir()} == FILES
    assert [file.name for file in index.parent.parent.iterdir()] == ["report"]
    assert_valid_images(index.with_name("loss.png"), index.with_name("loss.svg"))
    table = build_table(runs)
    assert index.with_name("table.md").read_text() == table.to_markdown()
    assert json.loads(index.with_name("table.json").read_text()) == json.loads(json.dumps(table.to_json()))

    page = Page(index.read_text())
    for text in ("LoRA and LoRMA", "minilm", "cpu, 2 threads", "torch 2.9.0", "../../runs/lorma-plus-1", *table.notes):
        assert text in page.text
    assert "script" not in page.tags
    assert all(link.startswith("data:image/svg+xml;base64,") for link in page.links)
    assert len(set(page.links)) == len(page.links) == 2 * 4
    narrow, dark = "(max-width: 34rem)", "(prefers-color-scheme: dark)"
    assert page.media == 2 * [f"{narrow} and {dark}", narrow, dark]


def test_recipes_of_one_method_are_called_by_what_differs(write_run, tmp_path):
    runs = [load_run(write_run(f"run{rate}", "lora", 0, learning_rate=rate)) for rate in (0.1, 0.2)]
    index = write_report(runs, tmp_path / "report", "Rates")
    page = Page(index.read_text())
    for rate in (0.1, 0.2):
        assert page.text.count(f"lora (train.learning_rate={rate})") == 4  # a row, a run, and twice with its rate
        assert f"lora (train.learning_rate={rate})" in index.with_name("loss.svg").read_text()


def test_names_are_escaped(write_run, tmp_path):
    evil = "<script>alert(1)</script>$x_"
    run = load_run(write_run("run", "<b>m</b>", model=evil, device="<i>", final_metrics={"accuracy": 0.5, "<u>": 1.0}))
    html = write_report([run], tmp_path / "report", "<h1>&").read_text()
    page = Page(html)
    assert not {"script", "b", "i", "u"} & set(page.tags)
    assert evil in page.text
    assert page.tags.count("h1") == 1


def test_an_existing_report_is_replaced_and_other_files_stay(runs, tmp_path):
    out = tmp_path / "report"
    write_report(runs, out, "first")
    (out / "mine.txt").write_text("keep")
    write_report(runs, out, "second")
    assert "second" in (out / "index.html").read_text()
    assert {file.name for file in out.iterdir()} == FILES | {"mine.txt"}


def test_the_same_runs_give_the_same_report(runs, tmp_path):
    first, second = (write_report(runs, tmp_path / name, "t").parent for name in ("one", "two"))
    for name in FILES:
        assert (first / name).read_bytes() == (second / name).read_bytes()


def test_a_failing_figure_leaves_the_old_report(runs, tmp_path, monkeypatch):
    out = tmp_path / "report"
    write_report(runs, out, "first")
    before = {file.name: file.read_bytes() for file in out.iterdir()}

    def fail(runs, out_dir, *arguments, **options):
        (out_dir / "loss.png").write_bytes(b"half")
        raise RuntimeError("no space left")

    monkeypatch.setattr(report, "loss_curves", fail)
    with pytest.raises(RuntimeError, match="no space left"):
        write_report(runs, out, "second")
    assert {file.name: file.read_bytes() for file in out.iterdir()} == before
    with pytest.raises(RuntimeError, match="no space left"):
        write_report(runs, tmp_path / "never", "second")
    assert {file.name for file in tmp_path.iterdir()} == {"report", "runs"}


def test_only_the_directory_itself_must_be_writable(runs, tmp_path, monkeypatch):
    """It may be a disk of its own, in a directory that is somebody else's."""
    out, made = tmp_path / "report", []
    out.mkdir()
    mkdtemp = report.tempfile.mkdtemp
    monkeypatch.setattr(report.tempfile, "mkdtemp", lambda **options: made.append(options["dir"]) or mkdtemp(**options))
    write_report(runs, out, "t")
    assert made == [out]
    assert {file.name for file in out.iterdir()} == FILES


def test_a_file_in_the_way_is_refused(runs, tmp_path):
    (tmp_path / "report").write_text("")
    with pytest.raises(InputError, match="out_dir='.*report' is a file; name a directory"):
        write_report(runs, tmp_path / "report", "t")


@pytest.mark.parametrize(
    "specs",
    [
        [("lora", 0, {"losses": [0.5]})],
        [("lora", 0, {"losses": [0.7, math.nan, 0.6]}), ("x", 0, {"losses": [0.7, 0.6, 0.5]})],
        [("x", 0, {"losses": [0.7, 0.6]}), ("x", 1, {"losses": [0.7, 0.6, 0.5, 0.4], "every": 2})],
        [(f"_m{i}", 0, {}) for i in range(9)],
        [("$a_b", 0, {"model": "org/" + "long-name-" * 12})],
    ],
    ids=["one point", "diverged", "seeds of unequal length", "nine methods", "odd names"],
)
def test_figures_of_unusual_runs(write_run, tmp_path, specs):
    runs = [load_run(write_run(f"run{i}", m, seed, **options)) for i, (m, seed, options) in enumerate(specs)]
    assert_valid_images(*loss_curves(runs, tmp_path / "figures", name="curve"))
    assert {file.name for file in (tmp_path / "figures").iterdir()} == {"curve.png", "curve.svg"}


def test_figures_have_no_background_and_the_colours_of_their_page(runs, tmp_path):
    seen = {}
    for draw in (loss_curves, evaluation_curves):
        for theme in ("light", "dark"):
            _, svg = draw(runs, tmp_path / theme, theme=theme)
            page = ET.parse(svg).getroot()
            backgrounds = [e for e in page.iter() if e.get("id") in ("patch_1", "patch_2")]
            styles = [path.get("style") for e in backgrounds for path in e.iter() if path.get("style")]
            assert styles
            assert all("fill: none" in style for style in styles)
            seen[draw, theme] = set(re.findall(r"#[0-9a-f]{6}", svg.read_text()))
    for draw in (loss_curves, evaluation_curves):
        assert {"#222222", "#0072b2"} <= seen[draw, "light"]
        assert {"#e7eaec", "#4fa8e8"} <= seen[draw, "dark"]
        assert seen[draw, "light"].isdisjoint(seen[draw, "dark"])
    with pytest.raises(InputError, match="theme='sepia' is unknown; allowed: light, dark"):
        loss_curves(runs, tmp_path, theme="sepia")


def test_without_evaluations_there_is_no_curve_of_them(write_run, tmp_path):
    run = load_run(write_run("run", accuracy=math.nan, final_metrics={"accuracy": None}))
    assert evaluation_curves([run], tmp_path) is None
    index = write_report([run], tmp_path / "report", "t")
    assert {file.name for file in index.parent.iterdir()} == FILES - {f for f in FIGURES if f.startswith("evaluation")}
    assert "Evaluation accuracy" not in index.read_text()


def test_the_page_says_what_was_run_and_what_failed(write_run, tmp_path):
    recipe = (
        "model: {name: minilm, dtype: float32}\ndata: {train: /data/reviews.csv, eval: null, max_train_rows: 200}\n"
        "adapter: {r: 8, alpha: null}\n"
        "train: {epochs: 2.0, max_steps: null, batch_size: 16, gradient_accumulation_steps: 2, schedule: linear}\n"
    )
    told = {
        "target_modules": ["query", "value"],
        "train_rows": 200,
        "eval_rows": 50,
        "r": 8,
        "predicted_classes": 1,
        "positive_class": "good",
        "trivial_baseline": {"name": "majority class", "prediction": "good", "metrics": {"accuracy": 0.9, "f1": 0.94}},
    }
    runs = []
    for method, rate in (("lora", 0.002), ("full", 5e-5)):
        path = write_run(method, method, learning_rate=rate, **told)
        (path / "recipe.yaml").write_text(recipe)
        runs.append(load_run(path))
    page = Page(write_report(runs, tmp_path / "report", "t").read_text())
    for text in (
        "minilm, float32",
        "reviews.csv, 200 rows (max_train_rows)",
        "held out of the same source, 50 rows",
        "r = 8, alpha = 8",
        "query, value",
        "0.002, linear (lora); 5e-05, linear (full)",
        "16 rows × 2 accumulated a process",
        "100 steps, epochs: 2",
        "data.train",
        "/data/reviews.csv",
        "majority class",
        "f1 of 'good'",
        "lora predicts one and the same class for every evaluation row and does not beat the majority class",
    ):
        assert text in page.text


def test_nothing_to_draw_is_refused(write_run, tmp_path):
    run = load_run(write_run("run", losses=[math.nan]))
    with pytest.raises(InputError, match="no run has a finite training loss to draw"):
        loss_curves([run], tmp_path)


@pytest.mark.parametrize("file", sorted(PACKAGE.glob("*.py")), ids=lambda file: file.name)
def test_importing_the_package_is_light(file):
    """Only the standard library and this package at import time; from the rest of lorma only errors and files, ever."""
    tree = ast.parse(file.read_text())
    eager = [node for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom))]
    assert all(name.split(".")[0] in {*sys.stdlib_module_names, "lorma"} for node in eager for name in names(node))
    everywhere = [name for node in ast.walk(tree) for name in names(node)]
    light = ("lorma.analysis", "lorma.errors", "lorma.files", "lorma.formatting", "lorma.runs")
    assert all(n.startswith(light) for n in everywhere if n.split(".")[0] == "lorma" and n != "lorma")
    assert not {name.split(".")[0] for name in everywhere} & {"torch", "transformers", "peft"}


def names(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    return [node.module or ""] if isinstance(node, ast.ImportFrom) else []


@pytest.mark.slow
def test_drawing_leaves_pyplot_alone(runs, tmp_path):
    code = (
        "import sys; from pathlib import Path; from lorma.analysis import load_run, loss_curves;"
        "loss_curves([load_run(sys.argv[1])], sys.argv[2]); assert 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code, str(runs[0].path), str(tmp_path)], check=True)
