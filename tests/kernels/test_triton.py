"""The Triton kernel in Triton's interpreter, on a CPU, against the formula in float64; and compiled for GPUs.

Whether Triton interprets is settled when it is imported, so this file runs itself as a script, in processes of its own.
"""

import itertools
import os
import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch
from torch.testing import assert_close

from lorma.functional import multiplier_update
from lorma.kernels import triton_low_rank
from lorma.kernels.triton_low_rank import available, low_rank_update

# Relative errors. The interpreter cuts bfloat16 off, a GPU rounds it: an error of 2⁻⁸ there.
DTYPES = {torch.float32: 1e-5, torch.bfloat16: 2**-7, torch.float16: 2**-11}
RANKS, WIDTHS, TOKENS, BIASES = (1, 3, 8, 20), (8, 100, 768), (1, 3, 16), (True, False)

needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")


def draw(width=100, rank=3, tokens=(3,), bias=True, dtype=torch.float32, factors=torch.float32):
    """Operands whose product keeps the size of ``out``."""
    generator = torch.Generator().manual_seed(width * rank)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    A, B = normal(rank, width) / width**0.5, normal(width, rank) / rank**0.5
    out, shift = normal(*tokens, width), normal(width) if bias else None
    return out.to(dtype), None if shift is None else shift.to(dtype), A.to(factors), B.to(factors)


def compare(out, bias, A, B, scaling=0.7, keep=True):
    before = out.clone()
    inner = out.double() if bias is None else out.double() - bias.double()
    expected = out.double() + multiplier_update(inner, A.double(), B.double(), scaling, "plus")
    u = torch.full((out.shape[:-1].numel(), len(A)), torch.nan, device=out.device) if keep else None
    found = low_rank_update(out, bias, A, B, scaling, u)
    assert (found.dtype, found.shape, found.is_contiguous()) == (out.dtype, out.shape, True)
    assert_close(found.double(), expected, rtol=DTYPES[out.dtype], atol=1e-5)
    if keep:
        assert_close(u.double(), (inner @ A.double().mT).view_as(u), rtol=1e-5, atol=1e-5)
    assert_close(out, before, rtol=0, atol=0)


def values():
    cases = list(itertools.product(WIDTHS, RANKS, TOKENS, BIASES, DTYPES))
    for width, rank, tokens, bias, dtype in cases:
        compare(*draw(width, rank, (tokens,), bias, dtype))
    for tokens, keep in itertools.product(((), (2, 3), (0,), (2, 0)), (True, False)):
        compare(*draw(tokens=tokens), keep=keep)
    for dtype, factors in itertools.product(DTYPES, DTYPES):
        compare(*draw(dtype=dtype, factors=factors))
    compare(*draw(40, 256))
    out, bias, A, B = draw(tokens=(4, 3))
    compare(out.transpose(0, 1), bias.repeat_interleave(2)[::2], A.T.contiguous().T, B.T.contiguous().T)
    compare(out[:, 1], bias, torch.cat((A, A))[::2], B)
    print("values OK,", len(cases), "cases")


def errors():
    out, bias, A, B = draw()
    wrong = {
        r"A has r = 257; allowed: 1 to 256": (out, bias, torch.zeros(257, 100), B),
        r"A has r = 0; allowed: 1 to 256": (out, bias, A[:0], B[:, :0]),
        r"A has shape \(3, 99\); allowed here: \(3, 100\)": (out, bias, A[:, 1:], B),
        r"B has shape \(3, 100\); allowed here: \(100, 3\)": (out, bias, A, A),
        r"bias has shape \(1,\); allowed here: \(100,\)": (out, bias[:1], A, B),
        r"u has shape \(1, 3\); allowed here: \(3, 3\)": (out, bias, A, B, torch.zeros(1, 3)),
        r"u has strides \(1, 3\); allowed: contiguous": (out, bias, A, B, torch.zeros(3, 3).T),
        r"out has dtype torch.float64; allowed: torch.float32, torch.bfloat16": (out.double(), bias, A, B),
        r"A has dtype torch.int64; allowed: torch.float32": (out, bias, A.long(), B),
        r"B is on meta; allowed: cpu, where out is": (out, bias, A, B.to("meta")),
        r"A requires a gradient, .*; allowed: calls under": (out, bias, A.clone().requires_grad_(), B),
    }
    for message, arguments in wrong.items():
        with pytest.raises(ValueError, match=message):
            low_rank_update(*arguments[:4], 1.0, *arguments[4:])
    with torch.no_grad():
        low_rank_update(out, bias, A.requires_grad_(), B, 1.0)
    print("errors OK,", len(wrong), "cases")


def binaries():
    """What the interpreter takes a compiler may refuse; compiling needs no GPU."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = ("result", "kept", "out", "bias", "A", "B")
    sizes = {"scaling": "fp32", "width": "i32", "rank": "i32"}
    kernel = triton_low_rank._kernel()[0]
    for dtype, (ranks, depth, columns) in itertools.product(("fp32", "bf16", "fp16"), ((1, 2048, 128), (16, 512, 128))):
        for absent in ((), ("kept", "bias")):
            constants = {"RANKS": ranks, "DEPTH": depth, "COLUMNS": columns, **dict.fromkeys(absent)}
            signature = dict.fromkeys(names, f"*{dtype}") | sizes | dict.fromkeys(constants, "constexpr")
            source = ASTSource(kernel, signature, constants)
            assert "cubin" in triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm
    print("binaries OK")


def in_a_process(code, *arguments, **variables):
    environment = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "LORMA_TRITON")}
    command = [sys.executable, *code, *arguments]
    done = subprocess.run(command, env=environment | variables, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@needs_triton
@pytest.mark.slow
def test_in_the_interpreter():
    said = in_a_process([__file__], "values", "errors", TRITON_INTERPRET="1")
    assert "values OK, 216 cases" in said
    assert "errors OK, 11 cases" in said


@needs_triton
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_on_a_gpu():
    for width, rank, tokens, bias, dtype in itertools.product((100, 1024), (8, 16), (1, 8), BIASES, DTYPES):
        operands = draw(width, rank, (tokens,), bias, dtype, factors=torch.float32)
        compare(*(None if each is None else each.cuda() for each in operands))


@needs_triton
@pytest.mark.slow
def test_it_compiles_for_a_gpu(tmp_path):
    assert "binaries OK" in in_a_process([__file__], "binaries", TRITON_CACHE_DIR=str(tmp_path))


@needs_triton
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="Triton's interpreter is on")
def test_a_tensor_on_a_cpu_is_refused():
    with pytest.raises(ValueError, match="out is on cpu; allowed: a GPU, or TRITON_INTERPRET=1"):
        low_rank_update(*draw(), 1.0)


@pytest.mark.slow
def test_nothing_needs_triton():
    """PEFT may import Triton by way of others, so here nobody can."""
    code = """
import sys
sys.modules["triton"] = None
import lorma, lorma.kernels
from lorma.kernels import triton_low_rank
assert not triton_low_rank._installed() and triton_low_rank.tl is None
print("OK")
"""
    assert "OK" in in_a_process(["-c"], code)


def test_it_serves_only_gpus(monkeypatch):
    monkeypatch.setenv("LORMA_TRITON", "1")
    assert not available(torch.zeros(1, 8), 2)


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        {"values": values, "errors": errors, "binaries": binaries}[argument]()
