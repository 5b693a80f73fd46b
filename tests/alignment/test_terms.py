"""The fused alignment terms against plain autograd and fp64: torch and Triton, every memory order, low precision."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from torch import Tensor

import reseg_loss
from reseg_loss import ReSegError
from reseg_loss import functional as RF
from reseg_loss.alignment import terms

CUDA = torch.cuda.is_available()
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cuda" if CUDA else "cpu")
SHAPES = [(2, 3, 8, 8), (2, 5, 3, 4, 6), (1, 1, 2, 1), (2, 66, 2, 3), (2, 2, 80, 70)]


@pytest.fixture(params=["torch", "triton"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """One implementation, forced."""
    if request.param == "triton" and not (CUDA or INTERPRETED):
        pytest.skip("needs CUDA, or TRITON_INTERPRET=1 as below")
    monkeypatch.setattr(terms, "BACKEND", request.param)
    return request.param


@pytest.mark.skipif(CUDA or INTERPRETED, reason="the kernels themselves are tested")
def test_the_kernels_in_tritons_interpreter(tmp_path):
    pytest.importorskip("triton", minversion="3.8", reason="the interpreter of older ones fails with newer numpy")
    # in a process of its own: triton must not have been imported without the interpreter
    report = tmp_path / "report.xml"
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider", f"--junitxml={report}"]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command += [__file__, "-k", "triton"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stdout[-3000:]
    cases = [
        case for case in ElementTree.parse(report).iter("testcase") if "triton" in case.get("name").partition("[")[2]
    ]
    assert cases
    skipped = [case.get("name") for case in cases if case.find("skipped") is not None]
    assert not skipped


def pair(shape: tuple[int, ...], seed: int = 0, offset: float = 1.0) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    s, t = torch.randn(2, *shape, generator=g, dtype=torch.float64).unbind()
    return 2 * s + offset, 0.5 * s + t - offset


def tokens(x: Tensor) -> Tensor:
    """The same values, as to_channels_first gives them of (B, L, C)."""
    return x.flatten(2).transpose(1, 2).contiguous().transpose(1, 2).unflatten(2, x.shape[2:])


def orders(x: Tensor) -> list[Tensor]:
    """The same values in several memory orders, the last one with gaps."""
    last = torch.channels_last if x.ndim == 4 else torch.channels_last_3d
    return [x, x.contiguous(memory_format=last), tokens(x), torch.stack([x, x], -1)[..., 0]]


def run(function: Any, s: Tensor, t: Tensor, upstream: float = 1.0) -> tuple[Tensor, Tensor]:
    leaf = s.detach().requires_grad_()
    value = function(leaf, t)
    (gradient,) = torch.autograd.grad(upstream * value, leaf)
    return value.detach().double(), gradient.double()


def fused(normalize: str | None) -> Any:
    return lambda s, t: terms.alignment_terms([(s, t)], normalize=normalize)[0]


def plain(normalize: str | None) -> Any:
    return lambda s, t: RF.alignment_term(s, t, normalize=normalize)


@pytest.mark.parametrize("normalize", [None, "batch"])
@pytest.mark.parametrize("shape", SHAPES)
def test_value_and_gradient_are_those_of_autograd_in_every_memory_order(backend, shape, normalize):
    s, t = (x.to(DEVICE, torch.float32) for x in pair(shape))
    value, gradient = run(plain(normalize), s.double(), t.double(), 3.0)
    forms, others = orders(s), orders(t)
    for a, b in [*zip(forms, others), *zip(forms, others[1:] + others[:1])]:
        v, g = run(fused(normalize), a, b, 3.0)
        torch.testing.assert_close(v, value, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(g, gradient, rtol=1e-4, atol=1e-5 * 6 / s.numel())


@pytest.mark.parametrize("trained", [(0, 1, 2, 3, 4, 5), (1, 4)])
@pytest.mark.parametrize("normalize", [None, "batch"])
def test_pairs_of_other_shapes_orders_and_dtypes_do_not_mix(backend, normalize, trained):
    """Together they give what each gives alone, also where only some features want a gradient (a frozen encoder)."""
    dtypes = [torch.float32, torch.bfloat16, torch.float32, torch.float16, torch.float32, torch.bfloat16]
    shapes = [*SHAPES[:2], (2, 6, 2, 3), SHAPES[4], (3, 18, 9, 9), (2, 7)]
    pairs = [[x.to(DEVICE, dtype) for x in pair(shape, i)] for i, (shape, dtype) in enumerate(zip(shapes, dtypes))]
    for i in (1, 4):
        pairs[i][0] = orders(pairs[i][0])[1]
    leaves = [s.detach().requires_grad_(i in trained) for i, (s, _) in enumerate(pairs)]
    values = terms.alignment_terms([(s, t) for s, (_, t) in zip(leaves, pairs)], normalize=normalize)
    weights = torch.arange(1.0, 7.0, device=DEVICE)
    found = torch.autograd.grad((weights * torch.stack(values)).sum(), [leaves[i] for i in trained])
    for i, (s, t) in enumerate(pairs):
        value, gradient = run(fused(normalize), s, t, i + 1.0)
        torch.testing.assert_close(values[i].double(), value, rtol=1e-6, atol=1e-7)
        if i in trained:
            g = found[trained.index(i)]
            assert g.dtype == s.dtype
            torch.testing.assert_close(g.double(), gradient, rtol=1e-2 if s.dtype != torch.float32 else 1e-6, atol=1e-7)


@pytest.mark.parametrize("normalize", [None, "batch"])
def test_gradcheck(normalize):
    s, t = pair((2, 3, 4, 3))
    assert torch.autograd.gradcheck(lambda x: fused(normalize)(x, t), s.requires_grad_())


def error(found: Tensor, exact: Tensor) -> float:
    return float((found - exact).norm() / exact.norm())


@pytest.mark.parametrize("offset", [0.0, 30.0])
@pytest.mark.parametrize("normalize", [None, "batch"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_is_within_twice_the_naive_error(backend, dtype, normalize, offset):
    s, t = (x.to(DEVICE) for x in pair((3, 6, 31, 17), 4, offset))
    value, gradient = run(plain(normalize), s, t)

    def naive(a: Tensor, b: Tensor) -> Tensor:
        if normalize:
            a, b = ((x - x.mean((0, 2, 3), True)) / (x.var((0, 2, 3), False, True) + 1e-5).sqrt() for x in (a, b))
        return (a - b).square().mean()

    ours, theirs = (run(f, s.to(dtype), t.to(dtype)) for f in (fused(normalize), naive))
    for mine, other, exact in zip(ours, theirs, (value, gradient)):
        assert error(mine, exact) <= 2 * error(other, exact) + 1e-6


@pytest.mark.parametrize("low", [0, 1])
def test_the_sides_may_differ_in_dtype_and_order(backend, low):
    """A student in bf16, as a map makes it, against a teacher in fp32, and the other way round."""
    sides = [x.to(DEVICE, torch.float32) for x in pair((2, 5, 7, 6))]
    sides[low] = sides[low].bfloat16()
    s, t = sides
    for normalize in (None, "batch"):
        value, gradient = run(plain(normalize), s.double(), t.double())
        for a, b in zip(orders(s), reversed(orders(t))):
            v, g = run(fused(normalize), a, b)
            torch.testing.assert_close(v, value, rtol=1e-5, atol=1e-6)
            # the gradient has the student's dtype; Triton's interpreter truncates to bf16
            assert error(g, gradient) < (2**-8 if low == 0 else 1e-5)


def test_a_mean_far_from_zero_does_not_cancel(backend):
    s, t = pair((4, 3, 40, 40))
    s, t = (s + 3000).to(DEVICE, torch.float32), (t - 3000).to(DEVICE, torch.float32)
    for _ in range(2):
        exact = run(plain("batch"), s.double(), t.double())
        # plain sums of squares would be wrong by as much as the variance itself; the mean's own rounding is left
        assert all(error(mine, e) < 1e-4 for mine, e in zip(run(fused("batch"), s, t), exact))
        s[0, :, :2] = 0  # where the first cells tell nothing of the rest


def test_in_fp16_the_difference_stays_unscaled_until_the_loss_scale_is_known(backend):
    s, t = (x.to(DEVICE, torch.float16) for x in pair((2, 64, 64, 64)))
    value, gradient = run(fused(None), s, t, 2.0**14)
    exact = run(plain(None), s.double(), t.double(), 2.0**14)[1]
    assert error(gradient, exact) < 1e-3
    assert value.isfinite()


@pytest.mark.parametrize("normalize", [None, "batch"])
def test_every_term_has_its_own_upstream_gradient_and_unneeded_ones_are_left_out(backend, normalize):
    pairs = [tuple(x.to(DEVICE, torch.float32) for x in pair(shape, i)) for i, shape in enumerate(SHAPES)]
    pairs = [(s.requires_grad_(i != 2), t) for i, (s, t) in enumerate(pairs)]
    weights = [float(i) for i in range(len(pairs))]
    sum(w * v for w, v in zip(weights, terms.alignment_terms(pairs, normalize=normalize))).backward()
    for i, (s, t) in enumerate(pairs):
        if i == 2:
            assert s.grad is None
            continue
        expected = run(plain(normalize), s, t, weights[i])[1]
        torch.testing.assert_close(s.grad.double(), expected, rtol=1e-4, atol=1e-6)
        assert s.grad.stride() == s.stride()


@pytest.mark.parametrize("normalize", [None, "batch"])
def test_backward_may_be_repeated_and_differentiated(backend, normalize):
    s, t = (x.to(DEVICE, torch.float32) for x in pair((2, 3, 4, 5)))
    s.requires_grad_()
    value = fused(normalize)(s, t)
    first, second = (torch.autograd.grad(value, s, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)
    twice = []
    for function in (fused(normalize), plain(normalize)):
        (once,) = torch.autograd.grad(function(s, t), s, create_graph=True)
        twice.append(torch.autograd.grad(once.square().sum(), s)[0])
    torch.testing.assert_close(*twice)


def test_the_kernels_are_the_choice_on_cuda_only_and_deterministic(backend):
    s, t = (x.to(DEVICE, torch.float32) for x in pair((4, 16, 33, 29)))
    assert terms.triton_serves([s], [t]) is (backend == "triton")
    assert not terms.triton_serves([s.double()], [t.double()])
    runs = [run(fused("batch"), s, t) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs))


def test_an_unknown_backend_is_refused(monkeypatch):
    monkeypatch.setattr(terms, "BACKEND", "cuda")
    with pytest.raises(ReSegError, match="RESEG_KERNELS='cuda'"):
        fused(None)(*pair((2, 3, 4, 5)))


@pytest.mark.parametrize("channels_last", [False, True])
def test_other_batches_and_sizes_do_not_compile_the_kernels_anew(channels_last):
    """Triton does that where an integer comes to be 1 or a multiple of 16; these vary with every batch and size."""
    kernels = pytest.importorskip("reseg_loss.alignment.kernels", exc_type=ImportError)
    for batch, size in [*((b, 3136) for b in range(1, 33)), (1, 100), (3, 7 * 11), (2, 13 * 5 * 3)]:
        levels = [(batch, c, size * 4 // k, not channels_last) for c, k in ((5, 1), (64, 4), (130, 16))]
        x = kernels.launches(tuple(levels))
        assert not any(n % 16 for n in (*x.programs, *x.starts, *x.for_moments, *x.for_finish, *x.for_gradients))


@pytest.mark.skipif(not CUDA, reason="needs CUDA")
def test_on_cuda_the_probe_finds_the_kernels_right():
    pytest.importorskip("triton")
    terms.kernels_work.cache_clear()
    assert terms.kernels_work(DEVICE)


@pytest.mark.parametrize("wrong", ["none", "channels_last", "bf16"])
def test_the_probe_sees_kernels_that_are_wrong_in_one_memory_order_or_dtype(backend, monkeypatch, wrong):
    if backend == "torch":
        pytest.skip("of the kernels")
    from reseg_loss.alignment import kernels

    gradients, shape = kernels.gradients, kernels.shape_of

    def unfit(pairs: Any, *args: Any) -> Any:
        if any(s.dtype == torch.bfloat16 for s, _ in pairs):
            raise RuntimeError("no bf16 here")
        return gradients(pairs, *args)

    if wrong == "bf16":
        monkeypatch.setattr(kernels, "gradients", unfit)
    elif wrong == "channels_last":
        monkeypatch.setattr(kernels, "shape_of", lambda x: (*shape(x)[:3], True))
    terms.kernels_work.cache_clear()
    assert terms.kernels_work(DEVICE) is (wrong == "none")
    terms.kernels_work.cache_clear()


def test_kernels_that_fail_are_replaced_by_torch_with_a_warning(monkeypatch, caplog):
    monkeypatch.delattr(reseg_loss.alignment, "kernels", raising=False)
    monkeypatch.setitem(sys.modules, "reseg_loss.alignment.kernels", None)
    terms.kernels_work.cache_clear()
    assert not terms.kernels_work(DEVICE)
    assert "so torch is used instead" in caplog.text
    terms.kernels_work.cache_clear()
