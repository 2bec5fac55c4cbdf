from __future__ import annotations

import json
import math

import pytest

from lorma import formatting as show
from lorma.analysis import Table, build_table, load_run
from lorma.errors import InputError


@pytest.fixture(name="table")
def table_fixture(write_run):
    """``table((method, seed, options), …)``: runs written, loaded and put into a table."""

    def build(*specs) -> Table:
        return build_table(
            [load_run(write_run(f"{i}-{m}", m, seed, **options)) for i, (m, seed, options) in enumerate(specs)]
        )

    return build


def halves(count=40, top=1.0, bottom=0.2, fall=20):
    return [top] * fall + [bottom] * (count - fall)


def column(table, name):
    header, rows = table.cells()
    return [row[header.index(name)] for row in rows]


def test_methods_in_order_of_appearance_with_means_over_seeds(table):
    built = table(
        ("lorma-plus", 0, {"accuracy": 0.9, "seconds": 10.0, "peak_memory_bytes": 5}),
        ("lora", 0, {"accuracy": 0.8}),
        ("lorma-plus", 1, {"accuracy": 0.92, "seconds": 20, "peak_memory_bytes": 7}),
        ("lora", 1, {"accuracy": 0.8}),
    )
    plus, lora = built.rows
    assert (plus.method, lora.method) == ("lorma-plus", "lora")
    assert plus.seeds == (0, 1)
    assert plus.metric_mean == pytest.approx(0.91)
    assert plus.metric_sd == pytest.approx(0.02 / math.sqrt(2))
    assert (plus.seconds, plus.peak_memory_bytes) == (15.0, 7)
    assert column(built, "accuracy ↑") == ["0.910 ± 0.014", "0.800 ± 0.000"]
    assert any("0.110 above LoRA in accuracy: more than the larger" in note for note in built.notes)


def test_one_seed_gives_no_deviation_and_says_so(table):
    built = table(("lora", 0, {}), ("lorma-plus", 0, {}))
    assert [row.metric_sd for row in built.rows] == [None, None]
    assert any(note.startswith("One seed per method: differences of this size can be chance") for note in built.notes)
    assert not any("larger of the two" in note or "over seeds" in note for note in built.notes)


def test_a_gap_within_the_deviations_is_called_so(table):
    built = table(
        ("lora", 0, {"accuracy": 0.8}),
        ("lora", 1, {"accuracy": 0.9}),
        ("lorma-plus", 0, {"accuracy": 0.84}),
        ("lorma-plus", 1, {"accuracy": 0.9}),
    )
    note = next(note for note in built.notes if "larger of the two" in note)
    assert "not more than" in note
    assert note.endswith("so these seeds do not separate the two.")


def test_best_is_the_lowest_when_lower_is_better(table):
    lower = {"primary_metric": "loss", "greater_is_better": False}
    specs = [
        (method, seed, lower | {"final_metrics": {"loss": loss + seed / 100}})
        for method, loss in (("lora", 0.5), ("lorma-plus", 0.4), ("lorma-permutation", 0.6))
        for seed in (0, 1)
    ]
    built = table(*specs)
    assert built.cells()[0][1] == "loss ↓"
    assert built.notes[0].startswith("Lower loss is better")
    assert any("lorma-plus, is 0.100 below LoRA in loss: more than" in note for note in built.notes)


def test_area_and_steps_against_lora(table):
    built = table(("lora", 0, {"losses": halves()}), ("lorma-plus", 0, {"losses": halves(fall=10)}))
    lora, plus = built.rows
    assert lora.loss_auc == pytest.approx(19 * 1.0 + 0.6 + 19 * 0.2)
    assert plus.loss_auc == pytest.approx(9 * 1.0 + 0.6 + 29 * 0.2)
    assert lora.auc_change_percent == 0.0
    assert plus.auc_change_percent == pytest.approx(100 * (plus.loss_auc / lora.loss_auc - 1))
    assert (lora.steps_to_lora_loss, plus.steps_to_lora_loss) == (22, 12)
    assert column(built, "AUC vs LoRA") == ["baseline", "−34.2 %"]
    assert column(built, "Steps to LoRA's loss") == ["22", "12"]


def test_the_change_is_paired_when_the_seeds_match(table):
    low, high = {"losses": [1.0] * 10}, {"losses": [4.0] * 10}
    paired = table(("lora", 0, low), ("lora", 1, high), ("x", 1, low), ("x", 0, low))
    assert paired.rows[1].auc_change_percent == pytest.approx((0 - 75) / 2)


def test_the_change_of_means_when_the_seeds_do_not_match(table):
    low, high = {"losses": [1.0] * 10}, {"losses": [4.0] * 10}
    built = table(("lora", 0, low), ("lora", 1, high), ("x", 5, low))
    assert built.rows[1].auc_change_percent == pytest.approx(-60)
    assert built.rows[1].seeds_compared == 0
    assert column(built, "Steps to LoRA's loss")[1] == "—"
    assert "Only one seed for x: no standard deviation is given there." in built.notes


def test_seeds_that_never_reach_loras_loss_are_counted(table):
    never = {"losses": [1.0] * 40}
    base = {"losses": halves()}
    built = table(
        *(("lora", seed, base) for seed in range(3)),
        ("some", 0, base),
        ("some", 1, never),
        ("some", 2, base),
        *(("none", seed, never) for seed in range(3)),
    )
    assert column(built, "Steps to LoRA's loss") == ["22", "22 (2 of 3)", "not reached"]
    assert built.rows[2].steps_to_lora_loss is None


def test_without_lora_there_are_no_columns_against_it(table):
    built = table(("lorma-plus", 0, {}))
    assert not built.has_baseline
    assert built.rows[0].auc_change_percent is None
    assert "AUC vs LoRA" not in built.cells()[0]
    assert not any("LoRA" in note for note in built.notes)


def test_different_numbers_of_steps_are_allowed_but_not_compared(table):
    built = table(("lora", 0, {"losses": halves(40)}), ("x", 0, {"losses": halves(60)}))
    assert built.rows[1].auc_change_percent is None
    assert any("do not span the same steps" in note for note in built.notes)


def test_a_diverged_run_has_no_area(table):
    built = table(("lora", 0, {"losses": halves()}), ("x", 0, {"losses": [1.0, math.nan, 1.0] + [1.0] * 37}))
    row = built.rows[1]
    assert (row.loss_auc, row.auc_change_percent, row.seeds_reached) == (None, None, 0)
    assert any("stopped being a finite number in x (seed 0)" in note for note in built.notes)
    json.dumps(built.to_json(), allow_nan=False)


def test_a_diverged_baseline_compares_nothing(table):
    built = table(("lora", 0, {"losses": [1.0, math.inf]}), ("x", 0, {"losses": [1.0, 0.5]}))
    assert [row.auc_change_percent for row in built.rows] == [None, None]
    assert [row.seeds_compared for row in built.rows] == [0, 0]


def test_different_devices_are_pointed_out(table):
    built = table(("lora", 0, {}), ("x", 0, {"device": "cuda, one GPU"}))
    assert any("different devices (cpu, 2 threads; cuda, one GPU)" in note for note in built.notes)


@pytest.mark.parametrize(
    ("key", "value"),
    [("task", "regression"), ("model", "other"), ("primary_metric", "f1"), ("greater_is_better", False)],
)
def test_unlike_runs_are_refused_by_name(table, key, value):
    with pytest.raises(InputError, match=rf"0-lora has {key}=.* but .*1-x has {key}={value!r}; compare like with like"):
        table(("lora", 0, {}), ("x", 0, {key: value}))


def test_one_method_with_two_sizes_is_refused(table):
    with pytest.raises(InputError, match=r"0-lora has adapter_parameters=73728 but .*1-lora has adapter_parameters=9;"):
        table(("lora", 0, {}), ("lora", 1, {"adapter_parameters": 9}))


def test_one_method_and_seed_twice_is_refused(table):
    with pytest.raises(
        InputError, match="both method 'lora' with seed 0 and the same settings; a table takes such a run once"
    ):
        table(("lora", 0, {}), ("lora", 0, {}))


def test_recipes_of_one_method_are_rows_called_by_what_differs(write_run):
    recipe = (
        "method: lorma-plus\nseed: {}\noutput: {}\ntrain: {{learning_rate: {}, eval_steps: {}}}\nadapter: {{r: {}}}\n"
    )
    runs = []
    for rate, r in ((0.001, 8), (0.0005, 8)):
        for seed in (0, 1):
            name = f"{rate}-{seed}"
            path = write_run(name, "lorma-plus", seed, r=r, learning_rate=rate)
            (path / "recipe.yaml").write_text(recipe.format(seed, name, rate, seed + 5, r))
            runs.append(load_run(path))
    built = build_table([*runs, load_run(write_run("lora", "lora", 0, learning_rate=0.001, r=8))])
    names = ["lorma-plus (train.learning_rate=0.001)", "lorma-plus (train.learning_rate=0.0005)", "lora"]
    assert [(row.method, len(row.seeds)) for row in built.rows] == [*((name, 2) for name in names[:2]), ("lora", 1)]
    assert column(built, "Learning rate") == ["0.001", "0.0005", "0.001"]
    assert column(built, "AUC vs LoRA")[2] == "baseline"
    with pytest.raises(InputError, match="0.001-0 and .*0.001-0 are both method 'lorma-plus'"):
        build_table([runs[0], runs[0]])
    (runs[0].path / "recipe.yaml").write_text("- no recipe")
    with pytest.raises(InputError, match="recipe.yaml: must hold keys and values"):
        load_run(runs[0].path)


def test_lora_with_several_settings_is_no_baseline(table):
    built = table(("lora", 0, {"r": 4}), ("lora", 0, {"r": 8}), ("x", 0, {"r": 8}))
    assert [row.method for row in built.rows] == ["lora (adapter.r=4)", "lora (adapter.r=8)", "x"]
    assert not built.has_baseline
    assert "LoRA is there with several settings, so nothing is compared with it." in built.notes


def test_no_runs_are_refused():
    with pytest.raises(InputError, match="runs is empty"):
        build_table([])


def test_markdown_is_a_table_and_its_notes(table):
    built = table(("lora", 0, {}), ("a|b", 0, {"peak_memory_bytes": None}))
    lines = built.to_markdown().splitlines()
    assert len({len(line) for line in lines[:4]}) == 1
    assert set(lines[1]) == set("|-: ")
    assert lines[3].startswith("| a\\|b")
    assert lines[5:] == [f"- {note}" for note in built.notes]


def test_json_holds_raw_numbers(table):
    built = table(("lora", 0, {}), ("x", 0, {"peak_memory_bytes": None}))
    data = json.loads(json.dumps(built.to_json(), allow_nan=False))
    assert (data["schema_version"], data["model"], data["primary_metric"]) == (1, "minilm", "accuracy")
    assert data["rows"][1]["adapter_parameters"] == 73_728
    assert data["rows"][1]["metric_mean"] == 0.87
    assert data["rows"][1]["peak_memory_bytes"] is None
    assert data["notes"] == list(built.notes)


def test_numbers_for_people():
    assert show.count(73_728) == "73,728"
    assert show.metric(0.8734, 0.0041) == "0.873 ± 0.004"
    assert show.metric(68.234) == "68.23"
    assert show.metric(math.nan) == show.metric(None) == show.memory(None) == show.area(None) == "—"
    assert [show.percent(v) for v in (-10.44, 3.0, 0.01, -0.01, None)] == ["−10.4 %", "+3.0 %", "0.0 %", "0.0 %", "—"]
    assert show.seconds(41.24) == "41.2 s"
    assert (show.memory(700 * 2**20), show.memory(3 * 2**29)) == ("700 MiB", "1.50 GiB")
    assert [show.listing("abc"[:n]) for n in (1, 2, 3)] == ["a", "a and b", "a, b and c"]


MAJORITY = {
    "name": "majority class",
    "prediction": "entailment",
    "metrics": {"accuracy": 0.527, "f1": 0.69, "matthews": 0.0},
}


def test_a_collapsed_run_is_seen_beside_the_trivial_baseline(table):
    told = {"trivial_baseline": MAJORITY, "positive_class": "entailment"}
    built = table(
        ("lora", 0, told | {"accuracy": 0.473, "predicted_classes": 1}),
        ("lora", 1, told | {"accuracy": 0.527, "predicted_classes": 2}),
        ("lorma-plus", 0, told | {"accuracy": 0.61, "predicted_classes": 2}),
    )
    assert built.cells()[1][-1] == ["majority class", "0.527"] + ["—"] * 8
    assert column(built, "accuracy ↑")[-1] == "0.527"
    assert built.warnings == (
        "lora (seed 0) predicts one and the same class for every evaluation row and does not beat the majority class "
        "in accuracy (0.473 against 0.527).",
        "lora (seed 1) does not beat the majority class in accuracy (0.527 against 0.527).",
    )
    assert "The majority class is what answering 'entailment' for every evaluation row gives." in built.notes
    assert "f1 is that of the class 'entailment'." in built.notes
    assert f"**Warning:** {built.warnings[0]}" in built.to_markdown()
    data = json.loads(json.dumps(built.to_json(), allow_nan=False))
    assert data["trivial"] == [{"name": "majority class", "prediction": "entailment", "metric": 0.527}]
    assert len(data["rows"]) == 2
    assert len(data["warnings"]) == 2


def test_a_regression_is_held_against_the_mean_in_its_error_too(table):
    mean = {"name": "mean label", "prediction": "2.5", "metrics": {"pearson": 0.0, "spearman": 0.0, "mse": 2.0}}
    told = {"task": "regression", "primary_metric": "pearson", "trivial_baseline": mean}
    built = table(
        ("lora", 0, told | {"final_metrics": {"pearson": 0.4, "mse": 2.1}}),
        ("x", 0, told | {"final_metrics": {"pearson": 0.4, "mse": 1.9}}),
        ("y", 0, told | {"final_metrics": {"pearson": None, "mse": None}}),
    )
    lora, y = built.warnings
    assert lora == "lora does not beat the mean label in mse (2.100 against 2.000)."
    assert y.startswith("y does not beat the mean label in pearson (— against 0.000)")


def test_runs_that_do_not_record_a_trivial_baseline_are_shown_without(table):
    built = table(("lora", 0, {"accuracy": 0.1}))
    assert (built.trivial, built.warnings, len(built.cells()[1])) == ((), (), 1)


def test_no_steps_to_a_loss_that_never_fell(table):
    flat = [0.693 + (0.02, -0.03, 0.01)[i % 3] for i in range(40)]
    built = table(("lora", 0, {"losses": flat}), ("x", 0, {"losses": halves()}))
    assert column(built, "Steps to LoRA's loss") == ["—", "—"]
    assert [(row.steps_to_lora_loss, row.seeds_compared) for row in built.rows] == [(None, 0), (None, 0)]
    assert any("LoRA's training loss did not fall" in note and "(seed 0)" in note for note in built.notes)


def test_runs_that_stopped_early_have_no_area(table):
    built = table(("lora", 0, {"losses": halves(60)}), ("x", 0, {"losses": halves(40), "stopped_early": True}))
    assert [row.loss_auc for row in built.rows] == [None, None]
    assert any("Stopped early: x (seed 0) at step 40" in note for note in built.notes)
