"""Convolution, batch normalisation and ReLU (if any) of a frozen network as one, where the data flow allows it."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .features import Features
from .hooks import Recorder
from .taps import Tap
from .taps.record import Call, record

# the names of a convolution, its normalisation and its ReLU, or None without one
Chain = tuple[str, str, str | None]


def folded(body: nn.Module, chains: Iterable[Chain], dtype: torch.dtype) -> nn.Module:
    """A copy of `body` in which every chain is one operation in `dtype`.

    What is not folded shares its parameters and buffers with `body`.

    Args:
        body: a network in evaluation; it stays as it is.
        chains: those that `find_chains` found in it.
        dtype: float16 or bfloat16, to save time; another to see whether folding changes anything.
    """
    body = copy.deepcopy(body, {id(held): held for held in (*body.parameters(), *body.buffers())})
    modules = dict(body.named_modules())
    for conv, norm, relu in chains:
        instead = {conv: FoldedConv(modules[conv], modules[norm], relu is not None, dtype), norm: nn.Identity()}
        if relu is not None:
            instead[relu] = nn.Identity()
        for name, module in instead.items():
            parent, _, last = name.rpartition(".")
            modules[parent]._modules[last] = module
    return body


def same_features(ours: Features, theirs: Features) -> bool:
    """Whether a folded network's features are those of the network in the same precision, up to rounding.

    The data flow does not show code that reads a folded module's weights, as tied ones are read.
    """
    near = 0.01 if theirs.bottleneck.dtype.itemsize >= 4 else 0.1  # TF32, or a network in low precision
    a, b = ([x.double() for x in (*f.encoder, *f.decoder, f.bottleneck)] for f in (theirs, ours))
    return all(bool((x - y).norm() <= near * x.norm()) for x, y in zip(a, b))


def find_chains(body: nn.Module, example: Tensor, taps: Iterable[Tap]) -> list[Chain]:
    """The chains between whose parts nothing else sees.

    Args:
        body: a network in evaluation; it stays as it is.
        example: an input of it, for one dry forward.
        taps: what is read out of it; a chain with a tap inside stays.
    """
    flow = record(body, example)
    asked = {(tap.module, tap.is_input) for tap in taps}
    # by what is read, not by the module asked: a block returns what its last module does
    tapped = {
        node
        for call in flow.calls
        for is_input, ends in ((True, call.inputs), (False, call.outputs))
        if (call.name, is_input) in asked
        for _, node in ends
    }
    times = Counter(id(call.module) for call in flow.calls)
    shared = Counter(id(module) for _, module in body.named_modules(remove_duplicate=False))
    users = flow.users()
    needed = tapped | {node for _, node in flow.calls[0].outputs}
    modules = dict(body.named_modules())

    def alone(call: Call) -> bool:
        once = times[id(call.module)] == shared[id(call.module)] == 1 and modules.get(call.name) is call.module
        return once and not _hooked(call)

    def only_next(call: Call, kind: type) -> Call | None:
        """The call that takes this one's output, if it is of a kind and nobody else does."""
        if len(call.outputs) != 1 or call.outputs[0][1] in needed:
            return None
        node = call.outputs[0][1]
        after = [other for other in flow.calls if type(other.module) is kind and [n for _, n in other.inputs] == [node]]
        if len(after) != 1 or not alone(after[0]):
            return None
        inside = all(after[0].start <= user < after[0].end for user in users.get(node, ()))
        return after[0] if inside else None

    found = []
    for call in flow.calls[1:]:
        conv: Any = call.module
        if type(conv) is not nn.Conv2d or conv.padding_mode != "zeros" or isinstance(conv.padding, str):
            continue
        norm = only_next(call, nn.BatchNorm2d) if alone(call) else None
        if norm is not None and norm.module.running_var is not None:
            relu = only_next(norm, nn.ReLU)
            found.append((call.name, norm.name, relu.name if relu is not None else None))
    return found


class FoldedConv(nn.Module):
    """norm(conv(x)), or its ReLU, of a convolution and a batch normalisation in evaluation, in low precision."""

    def __init__(self, conv: Any, norm: Any, relu: bool, dtype: torch.dtype) -> None:
        super().__init__()
        scale = (norm.running_var.double() + norm.eps).rsqrt()
        shift = -norm.running_mean.double() * scale
        if norm.affine:
            shift = shift * norm.weight.double() + norm.bias.double()
            scale = scale * norm.weight.double()
        if conv.bias is not None:
            shift = shift + conv.bias.double() * scale
        weight = (conv.weight.double() * scale.view(-1, 1, 1, 1)).to(dtype)
        self.register_buffer("weight", weight.contiguous(memory_format=torch.channels_last).detach())
        self.register_buffer("bias", shift.to(dtype).detach())
        self.relu, self.how = relu, (conv.stride, conv.padding, conv.dilation, conv.groups)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) in any dtype, to the folded one; where the network switches autocast off, to the input's."""
        weight, bias = self.get_buffer("weight"), self.get_buffer("bias")
        dtype = weight.dtype if torch.is_autocast_enabled(x.device.type) else x.dtype
        x, weight, bias = x.to(dtype), weight.to(dtype), bias.to(dtype)
        if self.relu and x.is_cuda:
            return torch.cudnn_convolution_relu(x, weight, bias, *self.how)
        y = F.conv2d(x, weight, bias, *self.how)
        return y.relu_() if self.relu else y


def _hooked(call: Call) -> bool:
    """Whether the module runs more than its forward; what an extractor records is known from the taps."""
    module = call.module
    hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
    return "forward" in vars(module) or not all(isinstance(hook, Recorder) for hook in hooks)
