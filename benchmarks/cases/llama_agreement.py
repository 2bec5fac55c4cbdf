"""Whether llama.cpp with an exported adapter writes what transformers writes with the adapter itself.

    lorma train gsm8k_smollm2 data.train=gsm8k/train.jsonl data.eval=gsm8k/test.jsonl data.max_eval_rows=4 \\
        data.max_length=160 train.max_steps=40 output=runs/gsm
    CMAKE_ARGS="-DGGML_BLAS=ON -DGGML_BLAS_VENDOR=OpenBLAS" make llamacpp   (with OpenBLAS's headers installed)
    python -m benchmarks.cases.llama_agreement runs/gsm --prompts gsm8k/test.jsonl -o docs/results/llama_agreement.json

For a run on a GGUF base (SmolLM2): greedy continuations of 20 prompts, token by token, by transformers on the unpacked
weights and by llama.cpp in three ways:

* ``packed``: the packed file as it is. llama.cpp's kernels for single tokens round activations to 8 bits.
* ``packed, float products``: the same file, the sequence evaluated whole for every token. llama.cpp hands products of
  32 tokens and more to the BLAS library it was built with, which unpacks the weights and rounds no activations.
* ``float32``: the same weights unpacked to a file in float32, as users of transformers have them.

``agree`` counts continuations that are transformers' in every token, with the adapter and (``agree_base``) without;
``changed`` those that differ from llama.cpp's own of the base alone.
"""

from __future__ import annotations

import json
import operator
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import llama_cpp
import numpy as np
import torch

from benchmarks.harness import parse, parser, write
from lorma.export import Base, export_gguf
from lorma.runs.locate import base_arguments, finished_adapter
from lorma.training.inference import load_predictor


def unpack(source: Path, target: Path) -> None:
    """The same model with every tensor in float32."""
    packed = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(target, packed.fields["general.architecture"].contents())
    for name, field in packed.fields.items():
        if name.startswith("GGUF.") or name in ("general.architecture", "general.file_type"):
            continue
        kind = field.types[0]
        inner = field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(name, field.contents(), kind, sub_type=inner)
    for tensor in packed.tensors:
        writer.add_tensor(tensor.name, gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def model_parameters() -> Any:
    """llama.cpp's defaults without weights in layouts of the processor's own, which no BLAS library reads.

    One of these is for AMX, which some virtual machines announce and do not have.
    """
    parameters = defaults()
    parameters.use_extra_bufts = False
    return parameters


GREEDY: dict[str, Any] = {"top_k": 1, "temp": 0.0, "repeat_penalty": 1.0}
defaults = llama_cpp.llama_cpp.llama_model_default_params
llama_cpp.llama_cpp.llama_model_default_params = model_parameters


def by_llama_cpp(
    base: Path, adapter: Path | None, prompts: list[list[int]], tokens: int, end: int, whole: bool
) -> list[list[int]]:
    """Greedy continuations; with ``whole`` the sequence is evaluated anew for every token."""
    lora = None if adapter is None else str(adapter)
    options: dict[str, Any] = {"n_ctx": 1024, "n_batch": 1024, "n_ubatch": 1024, "logits_all": whole, "verbose": False}
    model = llama_cpp.Llama(str(base), lora_path=lora, n_threads=1, n_threads_batch=1, **options)
    found = []
    for prompt in prompts:
        model.reset()
        new: list[int] = []
        for token in evaluated_whole(model, prompt) if whole else model.generate(prompt, **GREEDY):
            new.append(token)
            if len(new) == tokens or token == end:
                break
        found.append(new)
    return found


def evaluated_whole(model: llama_cpp.Llama, prompt: list[int]) -> Iterator[int]:
    """Greedy tokens, each from an evaluation of the whole sequence."""
    sequence = list(prompt)
    while True:
        model.reset()
        model.eval(sequence)
        sequence.append(int(model.scores[len(sequence) - 1].argmax()))
        yield sequence[-1]


def blas_built() -> bool:
    """Whether this build of llama.cpp has a BLAS backend."""
    return any(Path(str(llama_cpp.__file__)).parent.glob("lib/*ggml-blas*"))


def by_transformers(model: Any, prompts: list[list[int]], tokens: int, end: int) -> list[list[int]]:
    """Greedy continuations."""
    found = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        options = {"max_new_tokens": tokens, "do_sample": False, "eos_token_id": end, "pad_token_id": end}
        found.append(model.generate(ids, attention_mask=torch.ones_like(ids), **options)[0, len(prompt) :].tolist())
    return found


def common(first: list[int], second: list[int]) -> int:
    """Tokens until two continuations differ."""
    return next((i for i, pair in enumerate(zip(first, second, strict=False)) if pair[0] != pair[1]), len(first))


def main() -> None:
    made = parser(__doc__, rounds=1)
    made.add_argument("run", type=Path, help="a finished run on a GGUF base")
    made.add_argument("--prompts", type=Path, required=True, help="JSON lines with the columns of the training data")
    made.add_argument("--count", type=int, default=20, help="prompts, from the middle of the file on")
    made.add_argument("--tokens", type=int, default=24, help="longest continuation")
    arguments = parse(made)
    predictor = load_predictor(arguments.run)
    model, tokenizer = predictor.model, predictor.tokenizer
    end = tokenizer.eos_token_id
    lines = arguments.prompts.read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines[len(lines) // 2 :][: arguments.count]]
    encode = predictor.task.encode
    prompts = [encode([row], predictor.meta, tokenizer)["input_ids"][0].tolist() for row in rows]
    expected = by_transformers(model, prompts, arguments.tokens, end)
    with model.disable_adapter():
        expected_base = by_transformers(model, prompts, arguments.tokens, end)
    folder = finished_adapter(arguments.run)
    base = Base(**base_arguments(folder))
    packed = Path(base.path, str(base.gguf_file))
    results = {}
    with tempfile.TemporaryDirectory() as temporary:
        adapter, unpacked = Path(temporary, "adapter.gguf"), Path(temporary, "float32.gguf")
        export_gguf(folder, adapter, base=base)
        unpack(packed, unpacked)
        ways = {"packed": (packed, False), "packed, float products": (packed, True), "float32": (unpacked, False)}
        if not blas_built():
            del ways["packed, float products"]
            print("llama.cpp was built without a BLAS library: products in float on the packed file are left out")
        for name, (file, whole) in ways.items():
            adapted = by_llama_cpp(file, adapter, prompts, arguments.tokens, end, whole)
            plain = by_llama_cpp(file, None, prompts, arguments.tokens, end, whole)
            results[name] = {
                "agree": sum(map(operator.eq, adapted, expected)),
                "agree_base": sum(map(operator.eq, plain, expected_base)),
                "of": len(prompts),
                "same_tokens": list(map(common, adapted, expected)),
                "changed": sum(map(operator.ne, adapted, plain)),
            }
            print(name, results[name])
    size = {"prompt_tokens": [len(prompt) for prompt in prompts], "tokens": arguments.tokens}
    write(arguments, {"base": packed.name, **size, "results": results})


if __name__ == "__main__":
    main()
