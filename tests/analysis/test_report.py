from __future__ import annotations

import ast
import json
import math
import struct
import subprocess
import sys
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from pathlib import Path

import pytest

import lorma.analysis
from lorma.analysis import build_table, load_run, loss_curves, report, write_report
from lorma.errors import InputError

FILES = {"index.html", "loss.png", "loss.svg", "table.json", "table.md"}
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
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [value for name, value in attrs if name in ("src", "href") and value]

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
    assert len(page.links) == 1


def test_recipes_of_one_method_are_called_by_what_differs(write_run, tmp_path):
    runs = [load_run(write_run(f"run{rate}", "lora", 0, learning_rate=rate)) for rate in (0.1, 0.2)]
    index = write_report(runs, tmp_path / "report", "Rates")
    page = Page(index.read_text())
    for rate in (0.1, 0.2):
        assert page.text.count(f"lora (train.learning_rate={rate})") == 2
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

    def fail(runs, out_dir):
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
    light = ("lorma.analysis", "lorma.errors", "lorma.files", "lorma.yaml_text")
    assert all(n.startswith(light) for n in everywhere if n.split(".")[0] == "lorma")
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
