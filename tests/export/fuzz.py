"""Adapter folders spoiled at random, and what the library makes of them.

``python tests/export/fuzz.py 10000`` (``make fuzz``) spoils a good adapter of a tiny BERT that many times;
``--seed N --case M`` does one case again. Each folder
must be loaded or refused in one line: by the loader and by ``lorma doctor`` always, by ``lorma predict``, ``compose``,
``export`` and ``merge`` in turn, and by a real process now and then. Anything else is printed and counted: another
exception, an exit code for failed work, more than a line, a case that takes long. The peak of memory is bounded too.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import random
import resource
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

CONFIG, WEIGHTS, TASK = "adapter_config.json", "adapter_model.safetensors", "lorma_task.json"
SECONDS = 10
"""Processor time that one folder may take, with all that is done to it in this process."""
MEMORY = 300 << 20
"""What the peak of the process's memory may rise by after the first good folder."""
NUMBERS = [0, -1, 1, 2, 3, 7, 2**31, 2**63, 10**9, 10**40, 10**400, 0.5, -0.5, 1e-300, 1e300, True, False]
PATTERNS = [
    "(a+)+$",
    "(.*)*",
    "(" * 5000,
    "[",
    "(?P<a>x)(?P=a)*",
    "(a?)" * 40,
    ".*" * 30,
    "a{1,9999}{1,9}",
    "\\",
    "(?i)q",
]
TEXTS = [
    "",
    "../../../etc/passwd",
    "/dev/zero",
    "x" * 100_000,
    "\x00",
    "\ud800",
    "\x1b[2J",
    "a\nb",
    "os",
    "__import__('os')",
]
FIELDS = """r lorma_alpha lorma_dropout inflation side use_rslora use_dora target_modules exclude_modules bias
    modules_to_save init_weights layers_to_transform layers_pattern rank_pattern alpha_pattern target_parameters
    fused_projections undo peft_type task_type base_model_name_or_path revision inference_mode auto_mapping peft_version
    trainable_token_indices ensure_weight_tying
    megatron_config megatron_core runtime_config loftq_config fan_in_fan_out unknown __class__ self""".split()
METHODS = ["LORA", "TLORA", "ADALORA", "VERA", "OFT", "XLORA", "PROMPT_TUNING", "POLY", "IA3", "lorma", "LORMA "]


def any_value(rng: random.Random, depth: int = 0) -> Any:
    """A JSON value, hostile more often than not."""
    kind = rng.randrange(9 if depth < 3 else 5)
    if kind == 0:
        return rng.choice(NUMBERS)
    if kind == 1:
        return rng.choice(TEXTS)
    if kind == 2:
        return rng.choice(PATTERNS)
    if kind == 3:
        return None
    if kind == 4:
        return rng.choice(
            ["query", "value", "encoder", "classifier", "all-linear", "post", "auto", "none", "all", *METHODS]
        )
    if kind == 5:
        return [any_value(rng, depth + 1) for _ in range(rng.randrange(4))]
    if kind == 6:
        return {str(any_value(rng, 3)): any_value(rng, depth + 1) for _ in range(rng.randrange(4))}
    if kind == 7:
        return [rng.choice(["query", 1, {}])] * rng.choice([1000, 100_000])
    return {f"layer.{i}": rng.choice([1, 2, "x"]) for i in range(rng.choice([10, 5000]))}


def spoil_fields(path: Path, rng: random.Random) -> str:
    content = json.loads(path.read_text(encoding="utf-8"))
    part = content
    if path.name == TASK and rng.random() < 0.9:
        part = content[rng.choice(["model", "data"])]
    names = FIELDS if path.name == CONFIG else [*part, "gguf_file", "extra"]
    done = []
    for _ in range(rng.choice([1, 1, 1, 2, 4])):
        name = rng.choice(names)
        if rng.random() < 0.1:
            part.pop(name, None)
        elif name == "peft_type" and rng.random() < 0.8:
            part[name] = rng.choice(METHODS)
        else:
            part[name] = any_value(rng)
        done.append(name)
    path.write_text(json.dumps(content), encoding="utf-8", errors="surrogatepass")
    return f"{path.name}: {','.join(done)}"


def spoil_text(path: Path, rng: random.Random) -> str:
    text = path.read_text(encoding="utf-8")
    depth = rng.choice([100, 2000, 200_000])
    new = rng.choice(
        [
            "",
            "[" * depth,
            '{"a":' * depth + "1" + "}" * depth,
            text[: rng.randrange(len(text))],
            text.replace("8", rng.choice(["NaN", "Infinity", "1e999", "9" * 6000, "08", "0x8"])),
            text.replace("}", ',"r":3,"r":4}'),
            "[1, 2]",
            '"text"',
            " " * (1 << 21),
            text.replace("{", '{"\\u0000": ' + '"x' * 3, 1),
        ]
    )
    path.write_text(new, encoding="utf-8")
    return f"{path.name}: other text"


def spoil_bytes(path: Path, rng: random.Random) -> str:
    raw = bytearray(path.read_bytes())
    how = rng.choice(["flip", "flip the start", "truncate", "append", "zero", "pickle", "insert"])
    if how.startswith("flip"):
        for _ in range(rng.choice([1, 1, 3, 50])):
            raw[rng.randrange(min(len(raw), 400) if how == "flip the start" else len(raw))] = rng.randrange(256)
    elif how == "truncate":
        raw = raw[: rng.randrange(len(raw))]
    elif how == "append":
        raw += rng.randbytes(rng.choice([1, 8, 4096]))
    elif how == "zero":
        raw = bytearray(rng.choice([0, 1, 8, 100_000]))
    elif how == "pickle":
        raw = bytearray(b"\x80\x04\x95\x1d\x00\x00\x00\x00\x00\x00\x00\x8c\x05posix\x94\x8c\x06system\x94\x93\x94.")
    else:
        raw[rng.randrange(len(raw)) : 0] = rng.randbytes(rng.choice([1, 16]))
    path.write_bytes(bytes(raw))
    return f"{path.name}: {how}"


def spoil_header(path: Path, rng: random.Random) -> str:
    """Rewrite the header of a safetensors file so that it lies."""
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header, data = json.loads(raw[8 : 8 + length]), raw[8 + length :]
    names = [name for name in header if name != "__metadata__"]
    name, how = rng.choice(names), rng.randrange(12)
    entry = header[name]
    if how == 0:
        entry["shape"] = rng.choice([[2**31, 2**31], [2**62], [0, 2**62], [-1, 4], [], [1] * 50, [10**20], ["a"], None])
    elif how == 1:
        entry["dtype"] = rng.choice(
            ["F64", "F16", "BF16", "I8", "I64", "BOOL", "F8_E4M3", "U64", "C64", "X", "", None, 3]
        )
    elif how == 2:
        entry["data_offsets"] = rng.choice([[0, 2**63], [-4, 4], [10, 0], [0, 0], [0], "ab", None, [0, len(data) + 8]])
    elif how == 3:
        header[rng.choice(["extra", "base_model.model.x.lorma_A", "../a", "\n", "a" * 5000, "é\x00"])] = dict(entry)
    elif how == 4:
        header[rng.choice(["renamed", name.replace("lorma", "lora"), name + ".weight", name.upper()])] = header.pop(
            name
        )
    elif how == 5:
        del header[name]
    elif how == 6:
        header["__metadata__"] = rng.choice([{"a": 1}, ["x"], "text", {"format": "tf"}, {"a": "x" * 100_000}, None])
    elif how == 7:
        entry["shape"] = entry["shape"][::-1]
    elif how == 8:
        start = max(entry["data_offsets"][1], len(data))
        huge = rng.choice([2**20, 2**28])
        header["base_model.model.bert.encoder.layer.0.attention.self.key.lorma_A"] = {
            "dtype": "F32",
            "shape": [2, huge // 8],
            "data_offsets": [start, start + huge],
        }
        if rng.random() < 0.5:
            with path.open("r+b") as file:  # a hole: the file is as large as it says, and takes no room
                new = json.dumps(header).encode()
                file.write(len(new).to_bytes(8, "little") + new + data)
                file.truncate(8 + len(new) + len(data) + huge)
            return f"{path.name}: a hole"
    elif how == 9:
        header |= {f"t{i}": dict(entry) for i in range(5000)}
    elif how == 10:
        header[name] = rng.choice([None, [], "x", 3, {}, {"dtype": "F32"}])
    new = json.dumps(header).encode()
    if how == 11:
        new = b'{"a":' * 10_000 + b"1" + b"}" * 10_000
    stated = rng.choice([len(new)] * 6 + [0, len(new) - 1, len(new) + 8, 2**40, 2**63])
    path.write_bytes(stated.to_bytes(8, "little") + new + data)
    return f"{path.name}: header {how}"


def spoil_values(path: Path, rng: random.Random) -> str:
    """Numbers that are not finite, and factors of other shapes."""
    import torch
    from safetensors.torch import load_file, save_file

    tensors = load_file(path)
    name = rng.choice(list(tensors))
    how = rng.choice(["nan", "shape", "huge", "dtype", "zero"])
    old = tensors[name]
    if how == "shape":
        tensors[name] = torch.zeros(rng.choice([(1,), (3, 3), (2, 31), (32, 3), (0, 32), (2, 32, 1), (64, 64)]))
    elif how == "dtype":
        tensors[name] = old.to(rng.choice([torch.float64, torch.bfloat16, torch.int32, torch.bool, torch.float8_e5m2]))
    else:
        tensors[name] = torch.full_like(old, {"nan": float("nan"), "huge": 3e38, "zero": 0.0}[how])
    save_file(tensors, path)
    return f"{path.name}: {how}"


def spoil_kind(path: Path, rng: random.Random) -> str:
    """Something else than a file."""
    path.unlink()
    how = rng.choice(["missing", "link", "device", "pipe", "folder", "loop"])
    if how == "link":
        path.symlink_to(rng.choice(["/etc/passwd", "../../../etc/passwd", "nowhere"]))
    elif how == "device":
        path.symlink_to("/dev/zero")
    elif how == "pipe":
        os.mkfifo(path)
    elif how == "folder":
        path.mkdir()
    elif how == "loop":
        path.symlink_to(path.name)
    return f"{path.name}: {how}"


def spoil(folder: Path, rng: random.Random) -> str:
    """Change a good adapter folder; returns what was done."""
    ways: list[tuple[Callable[[Path, random.Random], str], tuple[str, ...], int]] = [
        (spoil_fields, (CONFIG, CONFIG, TASK), 9),
        (spoil_text, (CONFIG, TASK), 3),
        (spoil_bytes, (CONFIG, WEIGHTS, WEIGHTS, TASK), 4),
        (spoil_header, (WEIGHTS,), 7),
        (spoil_values, (WEIGHTS,), 2),
        (spoil_kind, (CONFIG, WEIGHTS, TASK), 1),
    ]
    done = []
    for _ in range(rng.choice([1, 1, 1, 1, 2])):
        way, files, _ = rng.choices(ways, weights=[weight for *_, weight in ways])[0]
        path = folder / rng.choice(files)
        if path.is_symlink() or not path.is_file() or path.stat().st_size > 4 << 20:
            continue
        with contextlib.suppress(Exception):  # what is spoiled already may not be readable for a second time
            done.append(way(path, rng))
    return " + ".join(done) or "nothing"


def command(*arguments: object) -> tuple[int, str, str]:
    """``lorma ARGUMENTS`` in this process: exit code, output, errors."""
    from lorma.cli import main

    out, err, before = io.StringIO(), io.StringIO(), sys.argv
    sys.argv = ["lorma", *map(str, arguments)]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            main()
        code = 0
    except SystemExit as stop:
        code = int(stop.code or 0)
    finally:
        sys.argv = before
    return code, out.getvalue(), err.getvalue()


def fault_of(result: tuple[int, str, str], allowed: tuple[int, ...]) -> str | None:
    """What is wrong with how a command ended, if anything."""
    code, _, err = result
    lines = err.strip().splitlines()
    if code not in allowed:
        return f"exit code {code}: {err[-300:]}"
    if len(lines) > 1 or "Traceback" in err or bool(lines) > (code > 0) or (code == 2 and not lines):
        return f"exit code {code} with {len(lines)} lines of errors: {err[:300]}"
    return None


class Fuzz:
    """One good adapter, and everything that is tried on its spoiled copies."""

    def __init__(self, room: Path, base: Path) -> None:
        import torch
        from peft import get_peft_model
        from transformers import AutoModelForSequenceClassification

        from lorma import LormaConfig

        self.room, self.good = room, room / "good"
        torch.manual_seed(0)
        with contextlib.redirect_stderr(io.StringIO()):
            self.model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=2)
        config = LormaConfig(r=2, rank_pattern={"value": 3}, task_type="SEQ_CLS", target_modules=["query", "value"])
        import copy

        adapted = get_peft_model(copy.deepcopy(self.model), config)
        for name, parameter in adapted.named_parameters():
            if "lorma_" in name:
                parameter.data.normal_(std=0.1)
        adapted.peft_config["default"].base_model_name_or_path = str(base)
        adapted.save_pretrained(self.good, save_embedding_layers=False)
        data = {"task": "classification", "format": "text", "text": "text", "text_pair": None, "label": "label"}
        data |= {"labels": ["bad", "good"], "max_length": 32}
        (self.good / TASK).write_text(json.dumps({"model": {"name": str(base)}, "data": data}))
        self.counts: Counter[str] = Counter()
        self.faults: list[str] = []
        self.slowest = 0.0

    def check(self, number: int, seed: int) -> None:
        """Spoil the good adapter with the random numbers of ``seed`` and ``number``, and try it."""
        rng = random.Random(seed * 1_000_003 + number)
        folder = self.room / "spoiled"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(self.good, folder)
        label = spoil(folder, rng)
        start = time.process_time()
        for fault in self._try(folder, number):
            self.faults.append(f"{number}: {label}: {fault}")
            print(self.faults[-1], flush=True)
        seconds = time.process_time() - start
        self.slowest = max(self.slowest, seconds)
        if seconds > SECONDS:
            self.faults.append(f"{number}: {label}: took {seconds:.0f} seconds")
            print(self.faults[-1], flush=True)

    def _try(self, folder: Path, number: int) -> list[str]:
        import copy

        from lorma import InputError
        from lorma.training.inference import load_adapter

        found = []
        try:
            load_adapter(copy.deepcopy(self.model), folder)
            self.counts["loaded"] += 1
        except InputError as error:
            self.counts["refused"] += 1
            if str(error) != " ".join(str(error).split()) or len(str(error)) > 2000 or not str(error).isprintable():
                found.append(f"a refusal of more than a line: {str(error)[:200]!r}")
        except BaseException as error:
            found.append(f"{type(error).__name__}: {str(error)[:300]}")
        found.append(fault_of(command("doctor", folder), (0, 1, 2)))
        turn = number % 16
        output = self.room / "output"
        if turn in (0, 5, 10):
            found.append(fault_of(command("predict", folder, "--text", "the film was great"), (0, 2)))
        elif turn == 1:
            found.append(fault_of(command("compose", folder, self.good, "-o", output), (0, 2)))
        elif turn == 2:
            found.append(fault_of(command("export", folder, "-o", output), (0, 2)))
        elif turn == 3:
            result = command("merge", folder, "-o", output)
            found.append(fault_of(result, (0, 1, 2) if "NaN" in result[2] else (0, 2)))
        if number % 500 == 7:
            found.append(fault_of(self._process("predict", folder, "--text", "good"), (0, 2)))
            self.counts["processes"] += 1
        shutil.rmtree(output, ignore_errors=True)
        return [fault for fault in found if fault]

    def _process(self, *arguments: object) -> tuple[int, str, str]:
        import subprocess

        done = subprocess.run(
            [sys.executable, "-m", "lorma", *map(str, arguments)],
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        return done.returncode, done.stdout, done.stderr


def peak() -> int:
    """Peak resident memory of this process in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def bound_memory() -> None:
    """Let allocations fail that go far beyond what the process has now."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
    limit = pages * resource.getpagesize() + (8 << 30)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def run(count: int, seed: int, base: Path, room: Path, cases: Iterable[int] | None = None) -> tuple[Fuzz, int]:
    """Spoil and try ``count`` folders, or only ``cases``; the second result is what the peak of memory rose by."""
    fuzz = Fuzz(room, base)
    fuzz._try(fuzz.good, 0)
    for turn in (1, 2, 3):
        fuzz._try(fuzz.good, turn)
    assert not fuzz.faults
    fuzz.counts.clear()
    fuzz.slowest = 0.0
    before = peak()
    for number in range(count) if cases is None else cases:
        fuzz.check(number, seed)
        if count > 1000 and number % 500 == 499:
            print(
                f"{number + 1}: {dict(fuzz.counts)}, {len(fuzz.faults)} faults, +{(peak() - before) >> 20} MiB",
                flush=True,
            )
    return fuzz, peak() - before


def main() -> None:
    parser = argparse.ArgumentParser(description="Spoil adapter folders and see that each is loaded or refused.")
    parser.add_argument("count", type=int, nargs="?", default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--case", type=int, action="append", help="only the case of this number, again")
    asked = parser.parse_args()
    sys.path.insert(0, str(Path(__file__).parents[1]))
    os.environ["HF_HUB_OFFLINE"] = "1"
    from conftest import save_tiny_bert

    with tempfile.TemporaryDirectory() as name:
        base = Path(name, "base")
        base.mkdir()
        save_tiny_bert(base)
        start = time.monotonic()
        bound_memory()
        fuzz, rise = run(asked.count, asked.seed, base, Path(name), asked.case)
    print(
        f"{len(asked.case or []) or asked.count} folders in {time.monotonic() - start:.0f} s: {dict(fuzz.counts)}; "
        f"{len(fuzz.faults)} faults; slowest {fuzz.slowest:.1f} s; peak memory rose by {rise >> 20} MiB"
    )
    sys.exit(1 if fuzz.faults or rise > MEMORY else 0)


if __name__ == "__main__":
    main()
