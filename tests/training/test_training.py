"""Training, predicting and evaluating through the command line, on tiny models and files written by hand."""

import json
import shlex
import shutil

import pytest
from safetensors.torch import load_file

from lorma.yaml_text import load_yaml

METHOD_NAMES = ["full", "lora", "lorma-plus", "lorma-plus-post", "lorma-permutation", "lorma-none"]

PAIRS = """
"The plot, alas, is très dull",A fine film,mixed
Great cast,"Good, slow and bright",praise
Poor plot,Very dull,blame
"""


@pytest.fixture
def pairs_csv(tmp_path):
    """Sixty rows as a spreadsheet writes them: a byte-order mark, quoted commas, an accent."""
    path = tmp_path / "pairs.csv"
    path.write_text("\ufefffirst,second,verdict" + 20 * PAIRS.rstrip("\n") + "\n", encoding="utf-8")
    return path


@pytest.mark.parametrize("method", METHOD_NAMES)
def test_every_method_trains_predicts_and_evaluates(method, recipe_file, tmp_path, cli, read_json):
    trained = cli("train", recipe_file(method=method))
    assert trained.code == 0, trained.err
    run = tmp_path / "run"
    weights = run / ("model" if method == "full" else "adapter")
    assert {path.name for path in run.iterdir()} == {
        "recipe.yaml",
        "metrics.jsonl",
        "checkpoints",
        "summary.json",
        weights.name,
    }
    summary = read_json(run / "summary.json")
    assert summary["schema_version"] == 1
    assert (summary["method"], summary["task"], summary["seed"]) == (method, "classification", 0)
    assert set(summary["versions"]) == {"python", "torch", "transformers", "peft", "lorma"}
    assert summary["trainable_parameters"] >= summary["adapter_parameters"] > 0
    assert summary["peak_memory_bytes"] > 1e6
    if method.startswith("lorma"):
        assert summary["adapter_parameters"] == 2 * 2 * (2 * 2 * 32)
        assert summary["head_parameters"] == 2 * 32 + 2
    assert cli("evaluate", run).out.split("\n")[0].startswith("loss\t")
    measured = dict(line.split("\t") for line in cli("evaluate", run).out.strip().splitlines())
    for name, value in summary["final_metrics"].items():
        assert float(measured[name]) == pytest.approx(value, abs=1e-4)
    predicted = cli("predict", run, "--text", "the film was great", "--text", "the plot was dull")
    assert predicted.code == 0, predicted.err
    assert all(line.split("\t")[0] in {"good", "bad"} for line in predicted.out.strip().splitlines())
    if method != "full":
        assert cli("predict", run / "adapter", "--text", "the film was great").code == 0


def test_metrics_and_recipe_of_a_run(recipe_file, tmp_path, cli):
    cli("train", recipe_file(), "train.epochs=2", "adapter.dropout=0.1")
    entries = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [entry for entry in entries if "loss" in entry]
    assert [entry["step"] for entry in losses] == list(range(1, 13))
    for entry in losses:
        assert {"step", "loss", "learning_rate", "grad_norm", "tokens_per_second"} <= set(entry)
        assert entry["tokens_per_second"] > 0
    assert [entry["step"] for entry in entries if "eval_accuracy" in entry] == [6, 12]
    resolved = load_yaml((tmp_path / "run" / "recipe.yaml").read_text())
    assert resolved["train"]["schedule"] == "linear"
    assert resolved["adapter"] == {
        "r": 2,
        "alpha": None,
        "dropout": 0.1,
        "target_modules": None,
        "modules_to_save": None,
    }


def test_what_is_written_can_be_read_by_others_too(recipe_file, tmp_path, cli):
    """As the umask says; safetensors by itself leaves weights to their owner."""
    assert cli("train", recipe_file()).code == 0
    mode = (tmp_path / "run" / "recipe.yaml").stat().st_mode
    weights = list((tmp_path / "run").rglob("*.safetensors"))
    assert len(weights) == 2
    assert {path.stat().st_mode for path in weights} == {mode}
    assert not list((tmp_path / "run").rglob("*.tmp"))


def test_learning_happens(recipe_file, tmp_path, cli, read_json):
    assert cli("train", recipe_file(), "train.epochs=20", "train.learning_rate=0.03").code == 0
    assert read_json(tmp_path / "run" / "summary.json")["final_metrics"]["accuracy"] == 1.0
    answer = cli("predict", tmp_path / "run", "--text", "the film was dull").out
    assert answer.split("\t")[0] == "bad"


def test_a_finished_run_is_not_overwritten_by_accident(recipe_file, tmp_path, cli):
    recipe = recipe_file()
    assert cli("train", recipe).code == 0
    adapter = tmp_path / "run" / "adapter" / "adapter_model.safetensors"
    before = adapter.read_bytes()
    refused = cli("train", recipe)
    assert refused.code == 2
    assert "holds a finished run; give --overwrite" in refused.err
    assert adapter.read_bytes() == before
    assert cli("train", recipe, "seed=3", "--overwrite").code == 0
    assert adapter.read_bytes() != before


@pytest.mark.parametrize("gone", [["summary.json"], ["summary.json", "metrics.jsonl"]])
def test_overwriting_cut_short_starts_anew(gone, recipe_file, tmp_path, cli, read_json):
    """--overwrite moves the checkpoints away before anything else, so what is left is never an old run's result."""
    recipe, run = recipe_file(), tmp_path / "run"
    assert cli("train", recipe).code == 0
    (run / "checkpoints").rename(run / ".checkpoints.1.tmp")
    for name in gone:
        (run / name).unlink()
    done = cli("train", recipe)
    assert done.code == 0, done.err
    assert "going on" not in done.out
    assert read_json(run / "summary.json")["steps"] == 6
    assert not (run / ".checkpoints.1.tmp").exists()


@pytest.mark.parametrize("left", ["checkpoints", ".recipe.yaml.7.tmp", ".lock"])
def test_a_run_that_ended_before_its_recipe_was_written(left, recipe_file, tmp_path, cli):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / left).mkdir() if left == "checkpoints" else (tmp_path / "run" / left).touch()
    assert cli("train", recipe_file()).code == 0


def test_overwrite_goes_on_with_an_unfinished_run(recipe_file, tmp_path, cli):
    recipe = recipe_file(train={"max_steps": 12, "batch_size": 8, "save_steps": 6})
    assert cli("train", recipe).code == 0
    (tmp_path / "run" / "summary.json").unlink()
    assert "going on from step 12" in cli("train", recipe, "--overwrite").out


def test_one_process_at_a_time(recipe_file, tmp_path, cli):
    import fcntl

    (tmp_path / "run").mkdir()
    with (tmp_path / "run" / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        refused = cli("train", recipe_file())
        assert refused.code == 2
        assert "is being trained by another process" in refused.err
    assert cli("train", recipe_file()).code == 0


def test_names_that_look_like_markup(recipe_file, tmp_path, cli):
    run = tmp_path / "o[red]x [/b] #1"
    done = cli("train", recipe_file(), f"output={json.dumps(str(run))}")
    assert done.code == 0, done.err
    command = done.out.splitlines()[-1].removeprefix("or from here: ")
    assert shlex.split(command)[:4] == ["lorma", "predict", str(run), "--text"]


def test_the_printed_lines_use_the_adapter(recipe_file, tmp_path, cli):
    out = cli("train", recipe_file()).out
    lines = [line.strip() for line in out.splitlines() if line.startswith("    ")]
    assert len(lines) == 3
    scope: dict = {}
    exec("\n".join(lines), scope)
    saved = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    name = next(name for name in saved if name.endswith("query.lorma_A"))
    assert scope["model"].state_dict()[f"{name}.default.weight"].equal(saved[name])
    assert f"lorma predict {tmp_path / 'run'} --text" in out


def test_a_csv_of_pairs_with_commas_and_accents(recipe_file, pairs_csv, tmp_path, cli):
    data = {"train": str(pairs_csv), "text": "first", "text_pair": "second", "label": "verdict", "max_length": 32}
    trained = cli("train", recipe_file(data=data))
    assert trained.code == 0, trained.err
    run = tmp_path / "run"
    meta = json.loads((run / "adapter" / "lorma_task.json").read_text())
    assert meta["data"]["labels"] == ["blame", "mixed", "praise"]
    answer = cli("predict", run, "--text", "Très dull, alas", "--text-pair", "A fine film")
    assert answer.out.split("\t")[0] in {"blame", "mixed", "praise"}
    assert "Très dull, alas | A fine film" in answer.out
    out = tmp_path / "answers.jsonl"
    assert cli("predict", run, "--file", pairs_csv, "-o", out).code == 0
    answers = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    assert answers[0]["first"] == "The plot, alas, is très dull"
    assert list(answers[0]) == ["first", "second", "verdict", "predicted_label", "score"]
    assert cli("predict", run, "--file", pairs_csv, "-o", out, "--overwrite", "--columns", "verdict").code == 0
    assert set(json.loads(out.read_text().splitlines()[0])) == {"verdict", "predicted_label", "score"}
    needs_two = cli("predict", run, "--text", "alone")
    assert needs_two.code == 2
    assert "takes two texts, one is given" in needs_two.err


def test_a_run_that_learns_nothing_says_so(recipe_file, tmp_path, cli, read_json):
    """Texts that are all the same leave nothing to learn, whatever the weights."""
    table = tmp_path / "same.csv"
    table.write_text("text,label\n" + "the film was good,good\nthe film was good,bad\nthe film was good,good\n" * 10)
    trained = cli("train", recipe_file(data={"train": str(table), "eval": str(table), "max_length": 16}))
    assert trained.code == 0, trained.err
    summary = read_json(tmp_path / "run" / "summary.json")
    trivial = summary["trivial_baseline"]
    assert (trivial["name"], trivial["prediction"]) == ("majority class", "good")
    assert trivial["metrics"] == pytest.approx({"accuracy": 2 / 3, "f1": 0.8, "matthews": 0.0})
    assert (summary["predicted_classes"], summary["positive_class"]) == (1, "good")
    assert (summary["train_rows"], summary["eval_rows"]) == (30, 30)
    assert summary["target_modules"] == ["query", "value"]
    assert set(summary["final_metrics"]) == {"loss", "accuracy", "f1", "matthews"}
    assert "majority class ('good' for every row): accuracy 0.667, f1 of 'good' 0.800" in trained.out
    (warning,) = [line for line in trained.out.splitlines() if line.startswith("Warning: ")]
    assert "lorma-plus predicts one and the same class for every evaluation row and does not beat" in warning
    assert cli("evaluate", tmp_path / "run").code == 0


def test_regression(recipe_file, tmp_path, cli, read_json):
    table = tmp_path / "scores.tsv"
    table.write_text(
        "text\tscore\n" + "".join(f"the {w} was {i}\t{i / 4}\n" for w in ("film", "plot") for i in range(1, 10))
    )
    trained = cli(
        "train", recipe_file(task="regression", data={"train": str(table), "label": "score", "max_length": 16})
    )
    assert trained.code == 0, trained.err
    summary = read_json(tmp_path / "run" / "summary.json")
    assert {"pearson", "spearman", "mse"} <= set(summary["final_metrics"])
    assert summary["trivial_baseline"]["name"] == "mean label"
    assert summary["trivial_baseline"]["metrics"].keys() == {"pearson", "spearman", "mse"}
    float(cli("predict", tmp_path / "run", "--text", "the film was 4").out.split("\t")[0])


@pytest.mark.parametrize("form", ["prompt", "messages", "text"])
def test_language_models(form, recipe_file, tiny_llama, tmp_path, cli, read_json):
    rows = []
    for a in range(1, 5):
        for b in range(1, 5):
            question, answer = f"what is {a} plus {b} ?", f" {a + b}"
            rows.append(
                {
                    "prompt": {"question": question, "answer": answer},
                    "messages": {
                        "chat": [
                            {"role": "user", "content": question},
                            {"role": "assistant", "content": answer.strip()},
                        ]
                    },
                    "text": {"text": question + answer},
                }[form]
            )
    table = tmp_path / "sums.jsonl"
    table.write_text("\n".join(json.dumps(row) for row in rows))
    columns = {"prompt": {"prompt": "question", "completion": "answer"}, "messages": {"messages": "chat"}, "text": {}}
    trained = cli(
        "train",
        recipe_file(
            task="causal-lm",
            model={"name": str(tiny_llama)},
            data={"train": str(table), "max_length": 32, **columns[form]},
        ),
    )
    assert trained.code == 0, trained.err
    summary = read_json(tmp_path / "run" / "summary.json")
    assert summary["primary_metric"] == "loss"
    assert summary["greater_is_better"] is False
    answer = cli("predict", tmp_path / "run", "--text", "what is 2 plus 2 ?", "--max-new-tokens", 4)
    assert answer.code == 0, answer.err
    assert len(answer.out.split()) <= 4


def test_mixed_precision_and_accumulation(recipe_file, tmp_path, cli, read_json):
    train = {
        "max_steps": 3,
        "batch_size": 4,
        "gradient_accumulation_steps": 2,
        "precision": "bfloat16",
        "gradient_checkpointing": True,
    }
    trained = cli("train", recipe_file(train=train), "model.dtype=bfloat16")
    assert trained.code == 0, trained.err
    assert read_json(tmp_path / "run" / "summary.json")["steps"] == 3
    saved = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    assert {str(t.dtype) for name, t in saved.items() if "lorma_" in name} == {"torch.float32"}


@pytest.mark.parametrize("task", ["classification", "causal-lm"])
def test_accumulated_batches_are_one_batch(task, recipe_file, tiny_bert, tiny_llama, tmp_path, cli):
    """Losses and gradients are means over all rows, also where several batches make one step."""
    changes = {}
    if task == "causal-lm":
        (tmp_path / "text.jsonl").write_text('{"text": "the film was very good"}\n' * 40)
        data = {"train": str(tmp_path / "text.jsonl"), "max_length": 16}
        changes = {"task": task, "model": {"name": str(tiny_llama)}, "data": data}
    else:
        config = json.loads((tiny_bert / "config.json").read_text())
        still = tmp_path / "still"
        shutil.copytree(tiny_bert, still)
        off = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        (still / "config.json").write_text(json.dumps(config | off))
        changes = {"model": {"name": str(still)}}
    found = []
    for size, parts in ((8, 1), (2, 4)):
        run = tmp_path / f"run-{parts}"
        train = {"max_steps": 3, "batch_size": size, "gradient_accumulation_steps": parts, "learning_rate": 0.01}
        done = cli("train", recipe_file(train=train, output=str(run), **changes))
        assert done.code == 0, done.err
        entries = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        found.append([(e["loss"], e["grad_norm"]) for e in entries if "loss" in e])
    for one, several in zip(*found, strict=True):
        assert several == pytest.approx(one, rel=1e-4)


def test_a_diverging_run_fails_and_says_so(recipe_file, tmp_path, cli):
    failed = cli("train", recipe_file(), "train.learning_rate=1e30", "train.max_grad_norm=1e30", "method=full")
    assert failed.code == 1
    assert "the training loss is nan at step" in failed.err
    assert "lower train.learning_rate" in failed.err
    assert not (tmp_path / "run" / "summary.json").exists()
    assert not (tmp_path / "run" / "model").exists()


def test_a_base_that_has_moved_is_named(recipe_file, tiny_bert, tmp_path, cli):
    base, moved = tmp_path / "base", tmp_path / "moved"
    shutil.copytree(tiny_bert, base)
    assert cli("train", recipe_file(model={"name": str(base)})).code == 0
    run, text = tmp_path / "run", ["--text", "the film was great"]
    expected = [cli("predict", run, *text).out, cli("evaluate", run).out]
    base.rename(moved)
    for command in (["predict", run, *text], ["predict", run / "adapter", *text], ["evaluate", run]):
        refused = cli(*command)
        assert refused.code == 2
        assert f"model.name={str(base)!r} is neither" in refused.err
        assert refused.err.rstrip().endswith("; name the base model with --base")
        wrong = cli(*command, "--base", tmp_path / "nowhere")
        assert wrong.code == 2
        assert f"--base={str(tmp_path / 'nowhere')!r} is neither" in wrong.err
        done = cli(*command, "--base", moved)
        assert done.code == 0, done.err
        assert done.out in expected


def test_what_was_trained_whole_has_no_base(recipe_file, tiny_bert, tmp_path, cli):
    assert cli("train", recipe_file(method="full")).code == 0
    for command in (["predict", tmp_path / "run", "--text", "a film"], ["evaluate", tmp_path / "run"]):
        done = cli(*command, "--base", tiny_bert)
        assert done.code == 2
        assert "was trained whole; it has no base model" in done.err
