"""The selective scan: against a sequential reference in float64, its choice of backend, and on a GPU mamba-ssm's."""

from __future__ import annotations

import logging
import sys
import types

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from examples.backbones import selective_scan as module
from examples.backbones.selective_scan import kernel_error, selective_scan, torch_scan, uses_kernel

CPU = torch.device("cpu")


def sequential(x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor, dt_bias: Tensor) -> Tensor:
    """The recurrence of the paper, one step after the other."""
    channels, states = a.shape
    per_group = channels // b.shape[1]
    h = x.new_zeros(len(x), channels, states)
    steps = []
    for t in range(x.shape[-1]):
        delta = F.softplus(dt[:, :, t] + dt_bias)
        b_t, c_t = (m[:, :, :, t].repeat_interleave(per_group, 1) for m in (b, c))
        h = (delta[..., None] * a).exp() * h + (delta * x[:, :, t])[..., None] * b_t
        steps.append((h * c_t).sum(-1) + d * x[:, :, t])
    return torch.stack(steps, -1)


def arguments(
    length: int, batch: int = 2, groups: int = 2, per_group: int = 3, states: int = 4, device: str = "cpu"
) -> list[Tensor]:
    generator = torch.Generator().manual_seed(length)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(device).requires_grad_()

    channels = groups * per_group
    rates = (-normal(channels, states).exp()).detach().requires_grad_()
    weights = normal(batch, groups, states, length), normal(batch, groups, states, length)
    return [
        normal(batch, channels, length),
        normal(batch, channels, length),
        rates,
        *weights,
        normal(channels),
        normal(channels),
    ]


def with_gradients(scan, tensors: list[Tensor], dtype: torch.dtype = torch.float64) -> list[Tensor]:
    tensors = [t.detach().to(dtype).requires_grad_() for t in tensors]
    y = scan(*tensors)
    weight = torch.linspace(-1, 1, y.numel(), dtype=y.dtype, device=y.device).view_as(y)  # a gradient that is not 1
    return [y.detach(), *torch.autograd.grad((y * weight).sum(), tensors)]


def worst(found: list[Tensor], expected: list[Tensor]) -> float:
    """The largest error, relative to the largest value of its tensor."""
    return max(float((f.double() - e).abs().max() / e.abs().max()) for f, e in zip(found, expected))


@pytest.fixture(autouse=True)
def _fresh(monkeypatch):
    monkeypatch.delenv("RESEG_SCAN", raising=False)
    monkeypatch.setattr(module, "_probed", {})
    monkeypatch.setattr(module, "_chosen", {})


@pytest.mark.parametrize("length", [1, 2, 5, 16, 17, 49, 100])
def test_the_torch_scan_and_its_gradients_are_the_sequential_ones(length):
    tensors = arguments(length)
    expected = with_gradients(sequential, tensors)
    assert worst(with_gradients(torch_scan, tensors), expected) < 1e-12
    assert worst(with_gradients(torch_scan, tensors, torch.float32), expected) < 1e-5


def test_gradcheck():
    assert torch.autograd.gradcheck(torch_scan, arguments(7, batch=1, per_group=2, states=3))


@pytest.mark.parametrize("at_once", [1, 300, 700])
def test_states_taken_in_groups_give_the_same(at_once, monkeypatch):
    tensors = arguments(20, states=5)
    expected = with_gradients(sequential, tensors)
    monkeypatch.setattr(module, "_AT_ONCE", at_once)
    assert worst(with_gradients(torch_scan, tensors), expected) < 1e-12


@pytest.mark.parametrize("scale", [1e-4, 30.0, 1e4])
def test_decays_that_vanish_or_hardly_decay_stay_finite_and_right(scale):
    x, dt, a, b, c, d, dt_bias = arguments(200)
    tensors = [x, dt, a * scale, b, c, d, dt_bias]
    found = with_gradients(torch_scan, tensors, torch.float32)
    assert all(t.isfinite().all() for t in found)
    # each tensor against the error of the same fp32 arithmetic done one step after the other
    expected = with_gradients(sequential, tensors)
    assert worst(found, expected) <= max(2 * worst(with_gradients(sequential, tensors, torch.float32), expected), 1e-5)


def test_at_vm_unets_length_the_error_is_that_of_fp32():
    tensors = arguments(56 * 56, batch=1, groups=4, per_group=2, states=16)
    expected = with_gradients(sequential, tensors)
    assert worst(with_gradients(torch_scan, tensors, torch.float32), expected) < 1e-5


def test_inputs_are_left_alone_and_some_need_no_gradient():
    tensors = [t.detach() for t in arguments(9)]
    before = [t.clone() for t in tensors]
    tensors[3].requires_grad_()
    torch_scan(*tensors).sum().backward()
    assert all(torch.equal(a, b) for a, b in zip(tensors, before))
    assert tensors[3].grad is not None
    assert tensors[0].grad is None


def test_under_autocast_the_scan_is_done_in_fp32():
    tensors = [t.detach().float() for t in arguments(30)]
    expected = torch_scan(*tensors)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(selective_scan(*tensors), expected)
        assert selective_scan(*[t.bfloat16() for t in tensors]).dtype == torch.float32


def test_what_the_backward_keeps_does_not_grow_with_the_states():
    kept = {}
    for states in (4, 16):
        sizes: dict[int, int] = {}
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, sizes=sizes: sizes.update({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()}) or t,
            lambda t: t,
        ):
            torch_scan(*arguments(64, groups=1, per_group=32, states=states))
        kept[states] = sum(sizes.values())
    assert kept[16] < 2 * kept[4]


def test_auto_on_a_cpu_says_once_that_torch_is_used_and_why(caplog):
    caplog.set_level(logging.INFO)
    for _ in range(2):
        selective_scan(*arguments(3))
    assert [r.getMessage() for r in caplog.records] == [
        "selective scan on cpu: torch, because mamba-ssm's CUDA kernel does not run on cpu "
        "(RuntimeError: the tensors are on cpu, the kernel needs an NVIDIA GPU)"
    ]


def test_a_kernel_that_was_asked_for_and_does_not_run_is_an_error(monkeypatch):
    with pytest.raises(RuntimeError, match="backend='cuda', but mamba-ssm's CUDA kernel does not run on cpu") as caught:
        selective_scan(*arguments(3), backend="cuda")
    assert isinstance(caught.value.__cause__, RuntimeError)
    monkeypatch.setenv("RESEG_SCAN", "cuda")
    with pytest.raises(RuntimeError, match="RESEG_SCAN='cuda'"):
        selective_scan(*arguments(3))


def test_the_argument_comes_before_the_environment(monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    monkeypatch.setenv("RESEG_SCAN", "cuda")
    assert not uses_kernel(CPU, "torch")
    assert "because backend asks for it" in caplog.text
    monkeypatch.setenv("RESEG_SCAN", "torch")
    assert not uses_kernel(CPU)
    assert "because RESEG_SCAN asks for it" in caplog.text


def test_an_unknown_backend_is_refused(monkeypatch):
    monkeypatch.setenv("RESEG_SCAN", "triton")
    with pytest.raises(ValueError, match="RESEG_SCAN='triton' is no selective scan: use one of auto, cuda, torch"):
        uses_kernel(CPU)


def fake_gpu(monkeypatch, kernel) -> None:
    """A mamba-ssm whose kernel is `kernel`, and a CPU that passes for a GPU."""
    package = types.ModuleType("mamba_ssm.ops.selective_scan_interface")
    package.selective_scan_fn = kernel
    monkeypatch.setitem(sys.modules, "mamba_ssm", types.ModuleType("mamba_ssm"))
    monkeypatch.setitem(sys.modules, "mamba_ssm.ops", types.ModuleType("mamba_ssm.ops"))
    monkeypatch.setitem(sys.modules, "mamba_ssm.ops.selective_scan_interface", package)
    monkeypatch.setattr(module, "_GPU", "cpu")


def working_kernel(u, delta, a, b, c, d=None, z=None, delta_bias=None, delta_softplus=False):  # mamba-ssm's signature
    assert z is None
    assert delta_softplus
    assert all(t.dtype == torch.float32 and t.is_contiguous() for t in (u, delta, a, b, c, d))
    return sequential(u, delta, a, b, c, d, delta_bias)


def test_a_kernel_that_runs_and_is_right_is_used(monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    calls = []

    def kernel(*args, **kwargs):
        calls.append(args[0].shape)
        return working_kernel(*args, **kwargs)

    fake_gpu(monkeypatch, kernel)
    tensors = arguments(6)
    state = torch.get_rng_state()
    with torch.no_grad():  # the trial needs gradients all the same
        found = selective_scan(*tensors)
    assert torch.equal(state, torch.get_rng_state())
    assert calls[-1] == tensors[0].shape
    assert worst([found], [sequential(*tensors).detach()]) < 1e-5
    assert "mamba-ssm's CUDA kernel, because a tiny scan ran and was right" in caplog.text
    assert (
        worst(
            with_gradients(lambda *t: selective_scan(*t, backend="cuda"), tensors), with_gradients(sequential, tensors)
        )
        < 1e-5
    )


def test_a_compiled_model_neither_traces_the_scan_nor_the_trial_of_the_kernel(monkeypatch):
    compiling = []

    def kernel(*args, **kwargs):
        compiling.append(torch.compiler.is_compiling())
        return working_kernel(*args, **kwargs)

    fake_gpu(monkeypatch, kernel)
    tensors = [t.detach() for t in arguments(6)]
    found = torch.compile(lambda *t: selective_scan(*t) * 2, backend="eager")(*tensors)
    assert compiling == [False, False]  # the trial's scan and ours
    assert worst([found], [2 * sequential(*tensors)]) < 1e-5


def no_kernel_image(*args, **kwargs):
    raise RuntimeError("CUDA error: no kernel image is available for execution on the device")


def zeros(u, *args, **kwargs):
    return working_kernel(u, *args, **kwargs) * 0


@pytest.mark.parametrize(("kernel", "words"), [(no_kernel_image, "no kernel image"), (zeros, "AssertionError")])
def test_a_kernel_that_imports_but_fails_or_is_wrong_is_not_used(kernel, words, monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    fake_gpu(monkeypatch, kernel)
    assert not uses_kernel(CPU)
    assert words in caplog.text
    assert len(caplog.text.splitlines()) == 1
    with pytest.raises(RuntimeError, match=words):
        uses_kernel(CPU, "cuda")


def test_without_mamba_ssm_the_log_holds_the_original_exception(monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    monkeypatch.setitem(sys.modules, "mamba_ssm", None)
    monkeypatch.setattr(module, "_GPU", "cpu")
    assert not uses_kernel(CPU)
    assert "ModuleNotFoundError" in caplog.text


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("backend", ["torch", "cuda"])
@pytest.mark.parametrize("length", [49, 3136])
def test_on_a_gpu_both_scans_are_the_sequential_one(backend, length):
    device = torch.device("cuda", torch.cuda.current_device())
    if backend == "cuda" and (error := kernel_error(device)):
        pytest.skip(f"mamba-ssm's kernel does not run: {type(error).__name__}: {error}")
    tensors = arguments(length, groups=4, per_group=8, states=16, device="cuda")
    found = with_gradients(lambda *t: selective_scan(*t, backend=backend), tensors, torch.float32)
    assert worst(found, with_gradients(sequential, tensors)) < 1e-4
