"""QLoRMA beside LoRMA: one recipe trained on bases of different precision, each run in a process of its own.

    python -m benchmarks.cases.quantized_training --data ../shared/data/gsm8k -o docs/results/quantized_training.json

``--data`` is a folder with GSM8K's ``train.jsonl`` and ``test.jsonl``. Finished runs under ``--runs`` are not repeated.

Memory is measured in three ways, because they answer different questions. ``weights_bytes`` is what the base model's
tensors hold. ``peak_memory_bytes`` is the process's peak resident size as the run itself reports it; it includes
loading, and the packaged model is unpacked to full precision before it is quantised. ``training_rss_bytes`` is the
resident size seen from outside, ten times a second from the end of the first step to the last: its minimum is what
stays between steps, its maximum what a step needs. glibc would keep most freed memory for itself, the unpacked weights
too, and hide the difference; ``ALLOCATOR`` makes it give large blocks back (it does nothing to other allocators).
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil

RECIPE = "gsm8k_smollm2_nf4"
PACKAGES = ("lorma", "torch", "transformers", "peft", "bitsandbytes")
SAMPLE_SECONDS = 0.1
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": "1000000", "MALLOC_TRIM_THRESHOLD_": "1000000"}
WEIGHTS = """
import sys
from lorma.models.load import load_model
from lorma.schema import ModelSpec
model = load_model(ModelSpec(name=sys.argv[1], quantization=sys.argv[2] or None), "AutoModelForCausalLM")
tensors = {id(p): p for p in model.parameters()}
for module in model.modules():
    states = [getattr(getattr(module, "weight", None), "quant_state", None)]
    states += [getattr(state, "state2", None) for state in states]
    held = [getattr(state, name, None) for state in states for name in ("absmax", "code", "offset")]
    held += [getattr(getattr(module, "weight", None), "SCB", None)]
    tensors |= {id(t): t for t in held if t is not None}
print(sum(t.numel() * t.element_size() for t in tensors.values()))
"""


def train(quantization: str | None, arguments: argparse.Namespace) -> dict[str, Any]:
    """One run, watched from outside."""
    name = quantization or "float32"
    folder = arguments.runs / name
    overrides = [
        f"model.quantization={quantization or 'null'}",
        f"data.train={arguments.data / 'train.jsonl'}",
        f"data.eval={arguments.data / 'test.jsonl'}",
        *arguments.overrides,
    ]
    command = ["lorma", "train", RECIPE, *overrides]
    environment = dict(os.environ) if arguments.default_allocator else ALLOCATOR | os.environ
    watched = arguments.runs / f"{name}-resident.json"
    if not (folder / "summary.json").is_file():
        arguments_of_run = [*command, f"output={folder}", "--no-usage"]
        process = subprocess.Popen([sys.executable, "-m", *arguments_of_run], env=environment)
        samples = watch(process, folder / "metrics.jsonl")
        if process.returncode != 0:
            raise SystemExit(f"{name} failed with exit code {process.returncode}")
        watched.write_text(json.dumps(samples), encoding="utf-8")
    rss = json.loads(watched.read_text(encoding="utf-8"))
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    steps = [line for line in lines if "loss" in line]
    seconds = [b["seconds"] - a["seconds"] for a, b in itertools.pairwise(steps)]
    losses = [line["loss"] for line in steps]
    return {
        "command": " ".join(command),
        "environment": {name: environment.get(name) for name in ("OMP_NUM_THREADS", *ALLOCATOR)},
        "loss": losses,
        "first_5_mean": statistics.fmean(losses[:5]),
        "last_5_mean": statistics.fmean(losses[-5:]),
        "eval_loss": summary["final_metrics"]["loss"],
        "adapter_parameters": summary["adapter_parameters"],
        "weights_bytes": weights_bytes(quantization),
        "peak_memory_bytes": summary["peak_memory_bytes"],
        "training_rss_bytes": {"min": min(rss), "median": statistics.median(rss), "max": max(rss)},
        "step_seconds": dict(zip(("p10", "p50", "p90"), percentiles(seconds), strict=True)),
        "device": summary["device"],
    }


def watch(process: subprocess.Popen[bytes], metrics: Path) -> list[int]:
    """Resident sizes of a process between its first and its last logged training step."""
    samples: list[int] = []
    resident = psutil.Process(process.pid)
    while process.poll() is None:
        try:
            text = metrics.read_text(encoding="utf-8") if metrics.is_file() else ""
            if '"loss"' in text and '"eval_loss"' not in text:
                samples.append(resident.memory_info().rss)
        except psutil.NoSuchProcess:
            break
        time.sleep(SAMPLE_SECONDS)
    process.wait()
    return samples


def weights_bytes(quantization: str | None) -> int:
    """Bytes of the base model's parameters and of what quantisation keeps beside them."""
    command = [sys.executable, "-W", "ignore", "-c", WEIGHTS, "smollm2-135m", quantization or ""]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1])


def percentiles(values: list[float]) -> tuple[float, float, float]:
    """Tenth, fiftieth and ninetieth percentile."""
    tenths = statistics.quantiles(values, n=10)
    return tenths[0], statistics.median(values), tenths[8]


def compare(run: dict[str, Any], full: dict[str, Any]) -> dict[str, float]:
    """How the loss curve of a run lies to that of the full-precision base."""
    differences = [a - b for a, b in zip(run["loss"], full["loss"], strict=True)]
    return {
        "loss_correlation": statistics.correlation(run["loss"], full["loss"]),
        "loss_fall": run["first_5_mean"] - run["last_5_mean"],
        "loss_fall_of_float32": full["first_5_mean"] - full["last_5_mean"],
        "loss_difference_first_5": statistics.fmean(differences[:5]),
        "loss_difference_last_5": statistics.fmean(differences[-5:]),
        "loss_difference_largest": max(map(abs, differences)),
        "weights_saved_bytes": full["weights_bytes"] - run["weights_bytes"],
        "peak_memory_saved_bytes": full["peak_memory_bytes"] - run["peak_memory_bytes"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with GSM8K's train.jsonl and test.jsonl")
    parser.add_argument("--runs", type=Path, default=Path("runs/quantized_training"), help="where the runs go")
    parser.add_argument("--quantizations", default="nf4,int8", help="besides the full-precision base")
    parser.add_argument("--default-allocator", action="store_true", help="do not make the allocator give memory back")
    parser.add_argument("-o", "--output", type=Path, required=True, help="the JSON file to write")
    parser.add_argument("overrides", nargs="*", help="further changes to the recipe, as for lorma train")
    arguments = parser.parse_args()
    full = train(None, arguments)
    runs = {name: train(name, arguments) for name in arguments.quantizations.split(",")}
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False)
    content = {
        "command": "python -m benchmarks.cases.quantized_training " + " ".join(sys.argv[1:]),
        "commit": commit.stdout.strip(),
        "versions": {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
        "processor": f"{platform.machine()}, {psutil.cpu_count()} cores, shared",
        "runs": {"float32": full, **runs},
        "compared_with_float32": {name: compare(run, full) for name, run in runs.items()},
    }
    arguments.output.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    print(f"Results: {arguments.output}")


if __name__ == "__main__":
    main()
