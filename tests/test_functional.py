"""The equations against slow references, their gradients, precision, masks and refusals."""

from __future__ import annotations

import numpy as np
import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from reseg_loss import CrossAlignmentLoss, Features, ReSegError
from reseg_loss import functional as RF

shapes = st.one_of(
    st.tuples(*[st.integers(1, 3)] * 2, *[st.integers(1, 5)] * 2),
    st.tuples(*[st.integers(1, 2)] * 2, *[st.integers(1, 4)] * 3),
)


def pair(shape: tuple[int, ...], dtype: torch.dtype = torch.float64, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    a, b = torch.randn(2, *shape, generator=generator, dtype=torch.float64).to(dtype)
    return a, b


def mask_of(shape: tuple[int, ...], seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.rand(shape[0], 1, *shape[2:], generator=generator) > 0.4).double()


def layouts(x: Tensor) -> list[Tensor]:
    """The same values in other memory orders."""
    last = torch.channels_last if x.ndim == 4 else torch.channels_last_3d
    strided = torch.stack([x, x], -1)[..., 0]
    return [x, x.contiguous(memory_format=last), strided]


@settings(deadline=None, max_examples=40)
@given(shapes, st.integers(0, 99), st.booleans())
def test_recon_loss_agrees_with_the_reference(shape, seed, masked):
    x, y = pair(shape, seed=seed)
    valid = mask_of(shape, seed) if masked else None
    expected = reference.recon(x.numpy(), y.numpy(), None if valid is None else valid.numpy())
    for a in layouts(x):
        assert float(RF.recon_loss(a, y, valid)) == pytest.approx(expected, abs=1e-12)


@settings(deadline=None, max_examples=60)
@given(shapes, st.integers(0, 99), st.booleans(), st.booleans())
def test_alignment_term_agrees_with_the_reference(shape, seed, masked, normalize):
    s, t = pair(shape, seed=seed)
    valid = mask_of(shape, seed) if masked else None
    expected = reference.term(s.numpy(), t.numpy(), None if valid is None else valid.numpy(), normalize)
    for a in layouts(s):
        actual = RF.alignment_term(a, t, valid, normalize="batch" if normalize else None)
        assert float(actual) == pytest.approx(expected, abs=1e-10)


@settings(deadline=None, max_examples=30)
@given(
    st.sampled_from([((7, 9), (3, 4)), ((8, 8), (2, 4)), ((8, 8), (8, 8)), ((5, 6, 7), (2, 3, 3))]),
    st.integers(0, 9),
)
def test_valid_fraction_agrees_with_the_reference(sizes, seed):
    full, coarse = sizes
    valid = mask_of((2, 1, *full), seed)
    assert np.allclose(RF.valid_fraction(valid, coarse).numpy(), reference.area_fraction(valid.numpy(), coarse))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("function", ["recon", "raw", "batch"])
def test_gradcheck(function, masked):
    shape = (2, 3, 4, 3)
    s, t = pair(shape)
    valid = mask_of(shape, 3) if masked else None
    s.requires_grad_()

    def value(x: Tensor) -> Tensor:
        if function == "recon":
            return RF.recon_loss(x, t, valid)
        return RF.alignment_term(x, t, valid, normalize="batch" if function == "batch" else None)

    assert torch.autograd.gradcheck(value, s)
    # an upstream gradient other than 1, and none into the teacher
    (3 * value(s)).backward()
    assert s.grad is not None
    assert torch.allclose(s.grad, 3 * torch.autograd.grad(value(s), s)[0])
    assert t.grad is None


@pytest.mark.parametrize("normalize", [None, "batch"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_is_within_twice_the_naive_error(dtype, normalize):
    s, t = pair((3, 5, 31, 17), seed=4)
    s, t = 3 * s + 1, 3 * t - 1

    def naive(a: Tensor, b: Tensor) -> Tensor:
        if normalize:
            a, b = ((x - x.mean((0, 2, 3), True)) / (x.var((0, 2, 3), False, True) + 1e-5).sqrt() for x in (a, b))
        return (a - b).square().mean()

    results = {}
    for name, function in {
        "exact": lambda a: naive(a.double(), t),
        "naive": lambda a: naive(a.to(dtype), t.to(dtype)),
        "ours": lambda a: RF.alignment_term(a.to(dtype), t.to(dtype), normalize=normalize),
    }.items():
        leaf = s.clone().requires_grad_()
        value = function(leaf)
        value.backward()
        results[name] = (value.detach().double(), leaf.grad)
    for i in (0, 1):
        error = (results["ours"][i] - results["exact"][i]).abs().max()
        assert error <= 2 * (results["naive"][i] - results["exact"][i]).abs().max()


def test_half_precision_features_of_300_do_not_overflow():
    s = torch.full((1, 2, 4, 4), 300.0, dtype=torch.float16)
    assert float(RF.alignment_term(s, torch.zeros_like(s))) == 90000
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert RF.alignment_term(s, torch.zeros_like(s)).dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_results_have_at_least_single_precision(dtype):
    s, t = pair((2, 2, 3, 3), dtype)
    expected = torch.float64 if dtype == torch.float64 else torch.float32
    assert RF.recon_loss(s, t).dtype == RF.alignment_term(s, t, normalize="batch").dtype == expected
    assert RF.alignment_term(s, t.double()).dtype == torch.float64


@pytest.mark.parametrize("normalize", [None, "batch"])
def test_all_ignored_is_a_zero_with_a_graph_and_a_finite_gradient(normalize):
    s, t = pair((2, 3, 4, 4))
    s.requires_grad_()
    valid = torch.zeros(2, 1, 4, 4)
    for value in (RF.alignment_term(s, t, valid, normalize=normalize), RF.recon_loss(s, t, valid)):
        (gradient,) = torch.autograd.grad(value, s)
        assert value.item() == 0
        assert not gradient.any()


def test_ignored_pixels_do_not_matter():
    s, t = pair((2, 3, 4, 4))
    valid = mask_of(s.shape, 1)
    changed = torch.where(valid > 0, s, 1e3)
    for normalize in (None, "batch"):
        value = RF.alignment_term(s, t, valid, normalize=normalize)
        assert torch.allclose(RF.alignment_term(changed, t, valid, normalize=normalize), value)


@settings(deadline=None, max_examples=20)
@given(st.floats(0.1, 10), st.integers(0, 99))
def test_laws(scale, seed):
    s, t = pair((3, 2, 4, 5), seed=seed)
    raw, standard = RF.alignment_term(s, t), RF.alignment_term(s, t, normalize="batch")
    assert torch.allclose(RF.alignment_term(scale * s, scale * t), scale**2 * raw)
    assert torch.allclose(RF.alignment_term(t, s), raw)
    assert float(RF.alignment_term(s, s, normalize="batch")) == 0
    assert torch.allclose(RF.alignment_term(torch.cat([s, s]), torch.cat([t, t])), raw)
    # standardized features do not see an affine change of a channel (beyond the 1e-5)
    shift = torch.tensor([5.0, -3.0]).view(1, 2, 1, 1)
    assert torch.allclose(RF.alignment_term(scale * s + shift, t, normalize="batch"), standard, rtol=1e-2)


def test_an_unknown_normalization_is_refused():
    x = torch.randn(2, 3, 4, 4)
    with pytest.raises(ReSegError, match="normalize='standardized'"):
        RF.alignment_term(x, x, normalize="standardized")


def test_shapes_never_broadcast():
    for a, b in [((2, 3, 4, 4), (2, 1, 4, 4)), ((2, 3, 4, 4), (1, 3, 4, 4)), ((2, 3, 4, 4), (2, 3, 4, 1))]:
        for function in (RF.recon_loss, RF.alignment_term):
            with pytest.raises(ReSegError, match="never broadcast"):
                function(torch.zeros(a), torch.zeros(b))
    with pytest.raises(ReSegError, match="valid has shape"):
        RF.alignment_term(torch.zeros(2, 3, 4, 4), torch.zeros(2, 3, 4, 4), torch.ones(2, 3, 4, 4))
    with pytest.raises(ReSegError, match=r"torch\.int64"):
        RF.recon_loss(torch.zeros(2, 3, dtype=torch.long), torch.zeros(2, 3))


X = torch.ones(2, 4, 3, 3)
NO_FEATURES = [
    None,
    1.0,
    [1.0],
    "x",
    X.numpy(),
    X.long(),
    X > 0,
    X.to(torch.complex64),
    X.to_sparse(),
    X.to("meta"),
    torch.ones(3),
]


@pytest.mark.parametrize("bad", NO_FEATURES)
@pytest.mark.parametrize(
    ("name", "function"),
    [
        ("prediction", lambda bad: RF.recon_loss(bad, X)),
        ("image", lambda bad: RF.recon_loss(X, bad)),
        ("valid", lambda bad: RF.recon_loss(X, X, bad)),
        ("student", lambda bad: RF.alignment_term(bad, X)),
        ("teacher", lambda bad: RF.alignment_term(X, bad)),
        ("valid", lambda bad: RF.alignment_term(X, X, bad)),
        ("x", lambda bad: RF.standardize(bad)),
        ("valid", lambda bad: RF.standardize(X, bad)),
        ("valid", lambda bad: RF.valid_fraction(bad, (2, 2))),
        ("x", lambda bad: RF.project(bad, torch.eye(4))),
        ("matrix", lambda bad: RF.project(X, bad)),
    ],
)
def test_what_is_no_feature_is_refused_by_name(name, function, bad):
    if name == "valid" and bad is None:
        return  # without a mask
    with pytest.raises(ReSegError, match=rf"^{name} is a.* must be a dense floating point tensor"):
        function(bad)


@pytest.mark.parametrize("eps", [float("nan"), float("inf"), -1e-9, 0, 1j, None, "1", [1.0], torch.ones(2)])
def test_an_eps_that_cannot_be_is_refused(eps):
    with pytest.raises(ReSegError, match="eps="):
        RF.standardize(X, eps=eps)


@pytest.mark.parametrize("matrix", [torch.ones(4), torch.ones(1, 4, 4), torch.ones(3, 5)])
def test_a_matrix_of_another_shape_is_refused(matrix):
    with pytest.raises(ReSegError, match=r"^matrix "):
        RF.project(X, matrix)


@pytest.mark.parametrize(
    "arguments",
    [(0, 4), (4, 0), (-1, 4), ("4", 4), (4, None), (4.5, 4), (True, 4), (4, 4, "0"), (4, 4, None), (4, 4, -(2**70))],
)
def test_a_map_of_no_size_or_seed_is_refused(arguments):
    with pytest.raises(ReSegError, match="it must be a whole number >="):
        RF.semi_orthogonal(*arguments)


@pytest.mark.parametrize("spatial", [None, 3, "42", (-1, 2), (0, 2), (2,), (2, 2, 2), (2.5, 2), (float("nan"), 2)])
def test_a_size_that_is_none_is_refused(spatial):
    with pytest.raises(ReSegError, match="spatial"):
        RF.valid_fraction(X[:, :1], spatial)


@pytest.mark.parametrize("loss", [None, 1.0, torch.ones(2)])
def test_gradient_norms_are_of_scalars(loss):
    with pytest.raises(ReSegError, match=r"losses\['task'\] is .* must be a scalar"):
        RF.gradient_norms([torch.nn.Parameter(torch.ones(2))], {"task": loss})


@pytest.mark.parametrize(("out", "into"), [(3, 7), (7, 3), (5, 5)])
def test_semi_orthogonal_maps_are_orthonormal_seeded_and_leave_the_random_state_alone(out, into):
    state = torch.get_rng_state()
    m = RF.semi_orthogonal(out, into, seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    gram = m @ m.T if out <= into else m.T @ m
    assert torch.allclose(gram, torch.eye(min(out, into), dtype=torch.float64))
    assert torch.equal(m, RF.semi_orthogonal(out, into, seed=1))
    assert not torch.allclose(m, RF.semi_orthogonal(out, into, seed=2))


@pytest.mark.parametrize("shape", [(2, 3, 4, 5), (2, 3, 4, 5, 2)])
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_project_is_a_1x1_convolution_that_keeps_the_order_of_memory(shape, last, trained, dtype):
    x, matrix = torch.randn(shape, dtype=dtype), torch.randn(6, 3, requires_grad=trained)
    if dtype == torch.bfloat16 and not trained:
        matrix = matrix.bfloat16()
    if last:
        x = x.movedim(1, -1).contiguous().movedim(-1, 1)
    expected = torch.from_numpy(reference.project(x.double().numpy(), matrix.detach().double().numpy())).to(x.dtype)
    with torch.autocast("cpu", torch.float16):  # a step's own autocast does not matter
        found = RF.project(x, matrix)
    assert found.dtype == (dtype if matrix.dtype == dtype else torch.promote_types(dtype, torch.float32))
    tolerance = 0.1 if dtype == torch.bfloat16 else 0.01 if dtype == torch.float16 else 1e-6
    assert torch.allclose(found, expected.to(found.dtype), atol=tolerance)
    assert (found.movedim(1, -1) if last else found).is_contiguous()


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_project_computes_in_at_least_fp32_where_the_feature_is_not_bf16(dtype, last):
    x = torch.randn(2, 3, 4, 5).to(dtype)
    x = x.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
    matrix = RF.semi_orthogonal(6, 3)
    wide = torch.promote_types(dtype, torch.float32)
    product = torch.matmul if not last else lambda m, cells: (cells.mT @ m.T).mT
    expected = product(matrix.to(wide), x.to(wide).flatten(2)).view_as(RF.project(x, matrix))
    assert torch.equal(RF.project(x, matrix), expected)
    large = torch.full((1, 2, 3, 3), 60000.0, dtype=torch.float16)
    assert RF.project(large, torch.ones(3, 2)).isfinite().all()


class Operations(TorchDispatchMode):
    """The names of what runs, without views."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not func.is_view and "view" not in func.name() and func.name() != "aten::promote_types":
            self.names.append(func.name())
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("last", "product"), [(False, "aten::bmm"), (True, "aten::mm")])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_fixed_map_costs_one_product_forward_and_one_backward_and_no_copy(dtype, last, product):
    x = torch.randn(2, 3, 4, 5).to(dtype)
    x = x.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format).requires_grad_()
    features, teacher = Features((x,), (x,), x), Features(*[(torch.zeros(2, 6, 4, 5),)] * 2, torch.zeros(2, 6, 4, 5))
    loss, made = CrossAlignmentLoss(), "aten::linalg_qr"
    for calls in range(2):  # the first makes the map
        with Operations() as whole:
            loss(features, teacher)
        assert (made in whole.names, whole.names.count(product)) == (calls == 0, 3)
    matrix = RF.semi_orthogonal(6, 3).to(dtype)
    with Operations() as forward:
        y = RF.project(x, matrix)
    gradient = torch.ones_like(y)
    with Operations() as backward:
        (found,) = torch.autograd.grad(y, x, gradient)
    assert forward.names == [product]
    assert [name for name in backward.names if name != "aten::detach"] == [product]
    assert found.stride() == x.stride()


@pytest.mark.parametrize("normalize", [None, "batch"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_ignored_may_be_nan_or_infinite(bad, normalize):
    s, t = pair((2, 3, 4, 4))
    valid = mask_of(s.shape, 1)
    expected = RF.alignment_term(s, t, valid, normalize=normalize), RF.recon_loss(s, t, valid)
    spoiled = torch.where(valid > 0, s, bad).requires_grad_()
    actual = RF.alignment_term(spoiled, t, valid, normalize=normalize), RF.recon_loss(spoiled, t, valid)
    for a, b in zip(actual, expected):
        assert torch.equal(a, b)
        assert torch.autograd.grad(a, spoiled)[0].isfinite().all()
