"""Every form against the plain matrix definition, with gradients, and in every mode that PyTorch runs code in."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from lorma import functional, kernels
from lorma.kernels import circular, low_rank, rotation
from lorma.kernels.form import FORMS, Operands, run

LINEAR = ("low_rank_linear", "fold_pre", "fold_post")
WAYS = [*FORMS, "low_rank by its formula", "low_rank_linear by its formula"]
"""LoRMA₊ is also computed by its formula, where it is quicker than the hand-written passes."""
SHAPES = [(5, 4, 3, 2), (7, 9, 1, 3), (6, 6, 4, 1), (1, 1, 2, 1), (2, 3, 5, 2), (4, 96, 3, 2)]
BIASES = ("none", "frozen", "trained")
exact = {"atol": 1e-10, "rtol": 1e-10}


class Problem:
    """Operands of one form, and what the definition says: form I(BA), multiply W0."""

    def __init__(self, name, d=6, k=5, b=4, r=2, bias="frozen", dtype=torch.float64, scaling=0.7, lead=(2,)):
        generator = torch.Generator().manual_seed(d * 1000 + k * 100 + b * 10 + r)

        def draw(*shape):
            return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

        name = name.removesuffix(" by its formula")
        self.form, self.scaling, self.dtype = FORMS[name], scaling, dtype
        self.linear, self.post = name in LINEAR, name == "fold_post"
        self.inflation = "plus" if name.startswith("low_rank") else "permutation"
        n = k if self.post else d
        self.weight = draw(d, k) if self.linear else None
        self.x = draw(*lead, b, k if self.linear else n).requires_grad_()
        self.bias = None if bias == "none" else draw(d if self.linear else n).requires_grad_(bias == "trained")
        self.A, self.B = draw(r, n).requires_grad_(), draw(n, r).requires_grad_()

    @property
    def inputs(self):
        return self.x, self.bias, self.A, self.B

    def __call__(self, x, bias, A, B):
        return run(self.form, Operands(x, self.weight, bias, A, B, self.scaling, self.dtype))

    def definition(self, x, bias, A, B):
        M = functional.multiplier(A, B, self.scaling, self.inflation)
        if not self.linear:
            return x @ M.T if bias is None else (x - bias) @ M.T + bias
        return F.linear(x, self.weight @ M if self.post else M @ self.weight, bias)

    def gradients(self, function):
        """The output of ``function`` and gradients of its sum with weights."""
        wanted = [t for t in self.inputs if t is not None and t.requires_grad]
        out = function(*self.inputs)
        weights = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).to(out.dtype).view_as(out)
        return out, torch.autograd.grad(out, wanted, weights)


@pytest.fixture(autouse=True)
def way(request, monkeypatch):
    """Small problems are computed by the hand-written passes unless a test names the formula."""
    callspec = getattr(request.node, "callspec", None)
    if callspec is None or not str(callspec.params.get("name")).endswith("by its formula"):
        monkeypatch.setattr(low_rank, "_SMALL", -1)
        monkeypatch.setattr(low_rank, "_FEW", 2**40)


@pytest.fixture(params=[512, 3, 1], ids="rows{}".format)
def blocks(request, monkeypatch):
    """Work is divided into blocks of rows and chunks of tokens: all at once, a few, one by one."""
    monkeypatch.setattr(rotation, "_ROWS", request.param)
    monkeypatch.setitem(circular._CHUNK, "cpu", request.param * 12)


@pytest.mark.parametrize("bias", BIASES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", WAYS)
@pytest.mark.usefixtures("blocks")
def test_output_and_gradients_are_those_of_the_definition(name, shape, bias):
    problem = Problem(name, *shape, bias=bias)
    assert_close(problem.gradients(problem), problem.gradients(problem.definition), **exact)


@pytest.mark.parametrize("name", WAYS)
def test_first_and_second_derivatives(name):
    problem = Problem(name, bias="trained")
    assert torch.autograd.gradcheck(problem, problem.inputs)
    assert torch.autograd.gradgradcheck(problem, problem.inputs)


@pytest.mark.parametrize("frozen", ["x", "A", "B", "xA", "xB", "AB", "xAB"])
@pytest.mark.parametrize("name", WAYS)
def test_only_what_is_trained_gets_a_gradient(name, frozen):
    problem = Problem(name, bias="none")
    for letter in frozen:
        getattr(problem, letter).requires_grad_(False)
    if frozen == "xAB":
        assert not problem(*problem.inputs).requires_grad
        assert_close(problem(*problem.inputs), problem.definition(*problem.inputs), **exact)
    else:
        assert_close(problem.gradients(problem), problem.gradients(problem.definition), **exact)


@pytest.mark.parametrize("lead", [(), (2, 3), (0,), (2, 0)], ids=str)
@pytest.mark.parametrize("name", WAYS)
def test_any_leading_dimensions_also_empty(name, lead):
    problem = Problem(name, lead=lead)
    assert_close(problem.gradients(problem), problem.gradients(problem.definition), **exact)


@pytest.mark.parametrize("name", WAYS)
def test_inputs_that_are_not_contiguous(name):
    problem = Problem(name)
    problem.x = problem.x.detach().transpose(0, 1).requires_grad_()
    problem.A = problem.A.detach().T.contiguous().T.requires_grad_()
    assert not problem.x.is_contiguous()
    assert_close(problem.gradients(problem), problem.gradients(problem.definition), **exact)


@pytest.mark.parametrize("name", WAYS)
def test_a_gradient_that_is_not_contiguous_or_expanded(name):
    problem = Problem(name, bias="none")
    found = torch.autograd.grad(problem(*problem.inputs).sum(), (problem.x, problem.A, problem.B))
    expected = torch.autograd.grad(problem.definition(*problem.inputs).sum(), (problem.x, problem.A, problem.B))
    assert_close(found, expected, **exact)


@pytest.mark.parametrize("lead", [(), (2,)], ids=str)
@pytest.mark.parametrize("name", WAYS)
def test_the_output_may_be_changed_in_place(name, lead):
    problem = Problem(name, lead=lead)
    found = torch.autograd.grad(problem(*problem.inputs).mul_(2).relu_().sum(), (problem.x, problem.A, problem.B))
    expected = problem.definition(*problem.inputs).mul(2).relu().sum()
    assert_close(found, torch.autograd.grad(expected, (problem.x, problem.A, problem.B)), **exact)


@pytest.mark.parametrize("name", WAYS)
def test_a_graph_of_gradients_where_a_factor_is_in_the_history_of_the_input(name):
    problem = Problem(name, d=5, k=5, bias="trained")
    wanted = (problem.A, problem.B, problem.bias)

    def loss(function):
        return function(function(*problem.inputs), *problem.inputs[1:]).square().sum()

    found = torch.autograd.grad(loss(problem), wanted, create_graph=True)
    assert_close(found, torch.autograd.grad(loss(problem.definition), wanted), **exact)


@pytest.mark.parametrize("name", WAYS)
def test_an_input_from_inference_mode_can_be_trained_on(name):
    problem = Problem(name)
    with torch.inference_mode():
        x = problem.x.detach().clone()
    found = torch.autograd.grad(problem(x, *problem.inputs[1:]).sum(), (problem.A, problem.B))
    expected = problem.definition(*problem.inputs).sum()
    assert_close(found, torch.autograd.grad(expected, (problem.A, problem.B)), **exact)


@pytest.mark.parametrize("name", FORMS)
def test_the_operators_say_what_they_make(name):
    p = Problem(name, bias="trained")
    tensors = (p.x, p.weight, p.bias, p.A, p.B)
    with torch.no_grad():
        out, kept = torch.ops.lorma.multiplied(*tensors, p.scaling, name, p.dtype)
        for needs in ([True] * 4, [True, False, False, True], [False, True, True, False]):
            arguments = (out, *tensors, kept, p.scaling, name, p.dtype, needs)
            found = torch.library.opcheck(torch.ops.lorma.multiplied_backward, arguments, rtol=1e-9, atol=1e-9)
            assert set(found.values()) == {"SUCCESS"}


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("name", WAYS)
def test_without_gradients(name, mode):
    problem = Problem(name)
    with mode():
        out = problem(*problem.inputs)
    assert not out.requires_grad
    assert_close(out, problem.definition(*problem.inputs).detach(), **exact)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", WAYS)
def test_low_precision(name, dtype):
    narrow = Problem(name, d=64, k=64, b=16, dtype=torch.float32)
    for t in (narrow.A, narrow.B):
        t.data.mul_(0.1)
    narrow.dtype = dtype
    out, gradients = narrow.gradients(narrow)
    expected, expected_gradients = narrow.gradients(narrow.definition)
    assert out.dtype == dtype
    assert [g.dtype for g in gradients] == [torch.float32] * len(gradients)
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    pairs = zip((out, *gradients), (expected, *expected_gradients), strict=True)
    assert max(((a.float() - e).norm() / e.norm()).item() for a, e in pairs) < tolerance


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("name", WAYS)
def test_gradient_checkpointing(name, reentrant):
    problem = Problem(name)
    out, expected = problem.gradients(problem)
    again = checkpoint(problem, *problem.inputs, use_reentrant=reentrant)
    again.backward(torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out))
    found = tuple(t.grad for t in problem.inputs if t is not None and t.requires_grad)
    assert_close((again, found), (out, expected), **exact)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")  # PyTorch's own, in jvp
@pytest.mark.parametrize("name", WAYS)
def test_function_transforms(name):
    problem = Problem(name, bias="none")
    x, _, A, B = (None if t is None else t.detach() for t in problem.inputs)

    def loss(function):
        return lambda A, B, x: function(x, None, A, B).square().sum()

    found = torch.func.grad(loss(problem), argnums=(0, 1))(A, B, x)
    assert_close(found, torch.func.grad(loss(problem.definition), argnums=(0, 1))(A, B, x), **exact)
    each = torch.func.vmap(torch.func.grad(loss(problem)), in_dims=(None, None, 0))(A, B, x)
    assert_close(each, torch.stack([torch.func.grad(loss(problem.definition))(A, B, row) for row in x]), **exact)
    tangent = torch.func.jvp(lambda A: problem(x, None, A, B), (A,), (A,))[1]
    assert_close(tangent, torch.func.jvp(lambda A: problem.definition(x, None, A, B), (A,), (A,))[1], **exact)


@pytest.mark.parametrize("name", FORMS)
def test_the_custom_operator_keeps_pytorchs_rules(name):
    p = Problem(name, bias="trained")
    arguments = (p.x, p.weight, p.bias, p.A, p.B, p.scaling, name, p.dtype)
    found = torch.library.opcheck(torch.ops.lorma.multiplied, arguments, rtol=1e-9, atol=1e-9)
    assert set(found.values()) == {"SUCCESS"}


@pytest.mark.parametrize("name", WAYS)
def test_compiled_it_is_one_graph_with_one_operator_or_none(name):
    torch._dynamo.reset()
    problem = Problem(name, bias="trained")
    operators = 0 if name.endswith("by its formula") else 1
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    compiled = torch.compile(problem, backend=backend, fullgraph=True)
    assert_close(compiled(*problem.inputs), problem(*problem.inputs), **exact)
    assert [str(n.target) for n in graphs[0].graph.nodes].count("lorma.multiplied.default") == operators
    check_compiled = torch.compile(problem, backend="aot_eager", fullgraph=True)
    assert_close(problem.gradients(check_compiled), problem.gradients(problem), **exact)


@pytest.mark.parametrize("name", WAYS)
def test_autocast(name):
    problem = Problem(name, d=64, k=64, b=16, dtype=torch.float32)
    problem.dtype = torch.bfloat16
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = problem.gradients(problem)
    assert inside[0].dtype == torch.bfloat16
    assert_close(inside, problem.gradients(problem), atol=0, rtol=0)


def kept_for_backward(function):
    """Storages that autograd keeps, and the sizes of what lies in them."""
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = function()
    return out, kept


@pytest.mark.parametrize(("name", "tokens"), [("by hand", 10), ("by its formula", 10), ("by its formula", 2)])
def test_plus_keeps_the_input_and_r_numbers_a_token(name, tokens):
    n, b, r = 32, tokens, 3
    x = torch.randn(b, n, requires_grad=True)
    factors = [(torch.randn(r, n, requires_grad=True), torch.randn(n, r, requires_grad=True)) for _ in range(3)]
    weights = [torch.randn(n, n) for _ in range(3)]

    def projections():
        pairs = zip(weights, factors, strict=True)
        return sum(kernels.multiplied_linear(x, W, None, A, B, 1.0, "plus", "pre") for W, (A, B) in pairs)

    _, kept = kept_for_backward(projections)
    parameters = {t.untyped_storage().data_ptr() for t in (*weights, *[t for pair in factors for t in pair])}
    sizes = sorted(t.numel() for pointer, t in kept.items() if pointer not in parameters)
    if name == "by hand":
        assert sizes == [r * b] * 3 + [n * b]
    elif tokens * 16 > n:  # the formula keeps A·W0 as well
        assert sizes == sorted([r * b] * 3 + [r * n] * 3 + [n * b])
    else:  # so few tokens that y is small beside the weight
        assert sizes == [r * b] * 3 + [n * b] * 3


class Sizes(TorchDispatchMode):
    """Notes every tensor that an operation makes."""

    def __init__(self):
        super().__init__()
        self.made = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.made += [t for t in (out if isinstance(out, (tuple, list)) else (out,)) if isinstance(t, torch.Tensor)]
        return out


@pytest.mark.parametrize("name", ["rotate", "fold_pre", "fold_post", "correlate"])
def test_permutation_makes_nothing_larger_than_the_multiplier_and_no_index(name):
    n = 1200
    problem = Problem(name, d=n, k=n, b=2, bias="none", dtype=torch.float32, lead=())
    with Sizes() as sizes:
        problem(*problem.inputs).sum().backward()
    assert all(t.is_floating_point() or t.is_complex() for t in sizes.made)
    assert max(t.untyped_storage().nbytes() for t in sizes.made) <= 4 * n * n
    assert problem.A.grad is not None


@pytest.mark.parametrize("name", ["rotate", "fold_pre", "fold_post"])
def test_work_space_serves_threads_side_by_side_and_training_after_inference(name):
    problems = [Problem(name, d=size, k=size, r=r) for size, r in ((40, 2), (33, 3), (7, 1), (40, 5))]
    rotation.drop_work_space()
    with torch.inference_mode():
        problems[0](*problems[0].inputs)
    expected = [problem.gradients(problem.definition) for problem in problems]
    assert_close([problem.gradients(problem) for problem in problems], expected, **exact)
    with ThreadPoolExecutor(4) as pool:
        done = [pool.submit(problem.gradients, problem) for problem in problems * 5]
        assert_close([future.result() for future in done], expected * 5, **exact)


def test_a_trained_base_weight_gets_its_gradient():
    problem = Problem("low_rank_linear", bias="trained")
    problem.weight.requires_grad_()
    found = torch.autograd.grad(problem(*problem.inputs).square().sum(), (problem.weight, problem.A))
    expected = torch.autograd.grad(problem.definition(*problem.inputs).square().sum(), (problem.weight, problem.A))
    assert_close(found, expected, **exact)


def test_a_scaling_that_is_a_tensor():
    problem = Problem("low_rank_linear")
    layer = nn.Linear(5, 6, dtype=torch.float64).requires_grad_(False)
    options = (layer.weight, layer.bias, problem.A, problem.B)
    for inflation in ("plus", "permutation"):
        given = kernels.multiplied_linear(problem.x, *options, torch.tensor(0.7, dtype=torch.float64), inflation, "pre")
        assert_close(given, kernels.multiplied_linear(problem.x, *options, 0.7, inflation, "pre"), **exact)
