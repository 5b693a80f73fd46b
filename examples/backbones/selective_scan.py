"""Selective scan (Gu and Dao, "Mamba", 2023): mamba-ssm's CUDA kernel where it runs, otherwise vectorised torch.

`RESEG_SCAN=auto|cuda|torch` in the environment chooses; the `backend` argument overrides it. The first scan on a
device logs which one is used, and why.
"""
# ruff: noqa: N803, N806 (A, B, C and D are the names of every paper on state space models)

from __future__ import annotations

import logging
import math
import os
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

Backend = Literal["auto", "cuda", "torch"]

_BACKENDS = ("auto", "cuda", "torch")
_AT_ONCE = 2**26  # elements of one temporary in the torch scan: 256 MiB in fp32, and about six live at once
_GPU = "cuda"
_log = logging.getLogger(__name__)
_probed: dict[torch.device, Exception | None] = {}
_chosen: dict[tuple[str, str, torch.device], bool] = {}


# opaque to torch.compile, which would unroll the loops of the torch scan (minutes for every length) and trace the probe
@torch.compiler.disable
def selective_scan(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, dt_bias: Tensor, backend: Backend | None = None
) -> Tensor:
    """h_t = exp(delta_t A) h_(t-1) + delta_t B_t x_t and y_t = C_t h_t + D x_t, with delta = softplus(dt + dt_bias).

    Args:
        x: input (batch, channels, L).
        dt: step sizes before bias and softplus, like x.
        A: decay rates (channels, states), negative.
        B: input weights (batch, groups, states, L); consecutive channels form the groups.
        C: output weights, like B.
        D: weight of the direct path (channels).
        dt_bias: (channels).
        backend: "cuda" for mamba-ssm's kernel, "torch", or "auto" for the kernel if it runs. Default: RESEG_SCAN, or
            "auto" where that is not set.

    Returns:
        y (batch, channels, L), in fp32 under autocast too. In fp64 if x is, but the kernel computes in fp32.

    Raises:
        ValueError: there is no such backend.
        RuntimeError: the kernel was asked for and does not run.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    tensors = [t.to(dtype) for t in (x, dt, A, B, C, D, dt_bias)]
    # autocast changes nothing from here on: elementwise operators on fp32 and the kernel are all there is
    return _kernel_scan(*tensors) if uses_kernel(x.device, backend) else torch_scan(*tensors)


def uses_kernel(device: torch.device, backend: Backend | None = None) -> bool:
    """Whether scans on `device` use mamba-ssm's kernel; see `selective_scan`."""
    asked = os.environ.get("RESEG_SCAN", "auto") if backend is None else backend
    source = "RESEG_SCAN" if backend is None else "backend"
    key = (asked, source, device)
    if key not in _chosen:
        _chosen[key] = _choose(asked, source, device)
    return _chosen[key]


def _choose(asked: str, source: str, device: torch.device) -> bool:
    if asked not in _BACKENDS:
        raise ValueError(f"{source}={asked!r} is no selective scan: use one of {', '.join(_BACKENDS)}")
    if asked == "torch":
        _log.info("selective scan on %s: torch, because %s asks for it", device, source)
        return False
    error = kernel_error(device)
    if error is None:
        _log.info("selective scan on %s: mamba-ssm's CUDA kernel, because a tiny scan ran and was right", device)
        return True
    reason = " ".join(f"{type(error).__name__}: {error}".split())  # in one line
    why = f"mamba-ssm's CUDA kernel does not run on {device} ({reason})"
    if asked == "cuda":
        raise RuntimeError(
            f"{source}='cuda', but {why}; install a mamba-ssm built for this torch and GPU, "
            "or use 'torch', which is slower and gives the same numbers"
        ) from error
    # on a GPU the kernel was to be expected, and training is several times slower without it
    level = logging.WARNING if device.type == _GPU else logging.INFO
    _log.log(level, "selective scan on %s: torch, because %s", device, why)
    return False


def kernel_error(device: torch.device) -> Exception | None:
    """Why mamba-ssm's kernel does not run on `device`, or None if a tiny scan and its gradient were right.

    An import proves nothing: builds for another torch or another GPU import and then fail, or return zeros.
    """
    if device not in _probed:
        _probed[device] = _probe(device)
    return _probed[device]


def _probe(device: torch.device) -> Exception | None:
    try:
        if device.type != _GPU:
            raise RuntimeError(f"the tensors are on {device.type}, the kernel needs an NVIDIA GPU")
        with torch.inference_mode(False), torch.enable_grad():
            ours, theirs = (_tiny(scan, device) for scan in (torch_scan, _kernel_scan))
        for mine, its in zip(ours, theirs):
            torch.testing.assert_close(its, mine, rtol=1e-3, atol=1e-4)
    except Exception as error:  # whatever a broken build raises
        return error
    return None


def _tiny(scan: Any, device: torch.device) -> list[Tensor]:
    """Output and gradients of a scan of 4 channels, 2 groups, 16 states and 5 steps; no random numbers are drawn."""

    def wave(*shape: int) -> Tensor:
        return torch.arange(math.prod(shape), device=device, dtype=torch.float32).sin().reshape(shape).requires_grad_()

    shapes = [(1, 4, 5), (1, 4, 5), (4, 16), (1, 2, 16, 5), (1, 2, 16, 5), (4,), (4,)]
    x, dt, rates, *rest = [wave(*shape) for shape in shapes]
    y = scan(x, dt, -rates.exp(), *rest)
    return [y, *torch.autograd.grad(y.square().sum(), [x, dt, rates, *rest])]


def _kernel_scan(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, dt_bias: Tensor) -> Tensor:
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn  # pyright: ignore[reportMissingImports]

    single = [t.float().contiguous() for t in (x, dt, A, B, C, D)]
    return selective_scan_fn(*single, delta_bias=dt_bias.float(), delta_softplus=True).to(x.dtype)


def torch_scan(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, dt_bias: Tensor) -> Tensor:
    """`selective_scan` in plain torch; about 2 sqrt(L) steps, each over all channels and a group of states."""
    groups, length = B.shape[1], x.shape[-1]
    chunk = math.isqrt(length - 1) + 1  # makes the steps within and across chunks equally many
    delta = F.softplus(dt + dt_bias[:, None])
    xs, deltas = (_fold(t.unflatten(1, (groups, -1)), chunk) for t in (x, delta))
    bs, cs = (_fold(t.permute(2, 0, 1, 3), chunk).movedim(2, 1).unsqueeze(-1) for t in (B, C))
    rates = A.t().reshape(A.shape[1], 1, 1, groups, -1)
    y = _Scan.apply(xs, deltas, rates, bs, cs).permute(2, 3, 4, 1, 0).reshape(*x.shape[:2], -1)
    return y[..., :length] + D[:, None] * x


def _fold(x: Tensor, chunk: int) -> Tensor:
    """(..., L) to (chunk, chunks, ...): one step of all chunks is one contiguous block. The end is padded by zeros.

    A padded step has delta 0: it leaves the state as it is and adds nothing.
    """
    x = F.pad(x, (0, -x.shape[-1] % chunk)).unflatten(-1, (-1, chunk))
    return x.movedim((-1, -2), (0, 1)).contiguous()


class _Scan(torch.autograd.Function):
    """The recurrence alone, with states computed again in the backward: keeping them takes `states` times the input.

    Shapes: x and delta (T, K, batch, G, d); A (N, 1, 1, G, d); B and C (T, N, K, batch, G, 1), where step t of chunk k
    is time kT + t, G groups of d channels, and N states.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
        ctx.save_for_backward(x, delta, A, B, C)
        y = torch.zeros_like(x)
        for part in _parts(x, len(A)):
            _, h = _states(x, delta, A[part], B[:, part])
            y += h.mul_(C[:, part]).sum(1)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, delta, A, B, C = ctx.saved_tensors
        dx, ddelta, dA, dB, dC = (torch.zeros_like(t) for t in (x, delta, A, B, C))
        dy = dy.unsqueeze(1)
        for part in _parts(x, len(A)):
            decay, h = _states(x, delta, A[part], B[:, part])
            dC[:, part] = (h * dy).sum(-1, keepdim=True)
            # the adjoint runs backwards in time: dh_t = C_t dy_t + decay_(t+1) dh_(t+1)
            dh = _scan_(_previous(_reverse(decay)), _reverse(C[:, part] * dy))
            dh = _reverse(dh)
            dexp = decay.mul_(_previous(h)).mul_(dh)  # of the exponent delta A
            dA[part] = (dexp * delta.unsqueeze(1)).sum((0, 2, 3)).view_as(A[part])
            ddelta += dexp.mul_(A[part]).sum(1)
            dB[:, part] = (dh * (delta * x).unsqueeze(1)).sum(-1, keepdim=True)
            dinput = dh.mul_(B[:, part]).sum(1)
            ddelta += dinput * x
            dx += dinput * delta
        return dx, ddelta, dA, dB, dC


def _parts(x: Tensor, states: int) -> list[slice]:
    """Groups of states: they are independent, so few at a time bounds the memory."""
    size = max(1, min(states, _AT_ONCE // max(1, x.numel())))
    return [slice(start, start + size) for start in range(0, states, size)]


def _states(x: Tensor, delta: Tensor, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """exp(delta A) and the states h, both (T, n, K, batch, G, d)."""
    decay = (delta.unsqueeze(1) * A).exp_()
    return decay, _scan_(decay, (delta * x).unsqueeze(1) * B)


def _scan_(decay: Tensor, h: Tensor) -> Tensor:
    """h_t += decay_t h_(t-1), in place. Only products of decays in [0, 1] occur, so nothing overflows.

    First every chunk from a zero state, all chunks together; then the chunks' last states, one after the other; then
    every other state gets what is left of the state before its chunk.
    """
    for t in range(1, h.shape[0]):
        h[t].addcmul_(decay[t], h[t - 1])
    left = decay.cumprod(0)
    for k in range(1, h.shape[2]):
        h[-1, :, k].addcmul_(left[-1, :, k], h[-1, :, k - 1])
    h[:-1, :, 1:].addcmul_(left[:-1, :, 1:], h[-1:, :, :-1])
    return h


def _previous(h: Tensor) -> Tensor:
    """h_(t-1) at t, zero at the start."""
    before = torch.cat([torch.zeros_like(h[-1:, :, :1]), h[-1:, :, :-1]], 2)  # the last state of the chunk before
    return torch.cat([before, h[:-1]])


def _reverse(h: Tensor) -> Tensor:
    return h.flip(0, 2)
