"""Step 1: one forward as a data-flow graph of operators and a tree of module calls."""

from __future__ import annotations

from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from ..common.dryrun import call, check_module, dry_run, image_of, private_copy, tensors
from ..common.outputs import PASSING, all_sum_to_one, of_all

Keys = tuple[int | str, ...]

# operators by name, of evaluation, in which they are not fused with a loss
ACTIVATION_OPERATORS = {
    "sigmoid": "sigmoid",
    "log_sigmoid_forward": "log-sigmoid",
    "_softmax": "softmax",
    "_log_softmax": "log-softmax",
}


class Ref(NamedTuple):
    """A tensor among an operator's arguments; its node is None if it does not depend on the model's input."""

    node: int | None
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Node:
    """The content of a tensor at one moment: the result of an operator, and the nodes that it was computed from."""

    index: int
    sources: tuple[int, ...]
    shape: tuple[int, ...]
    operator: str
    storage: int
    dynamic: bool  # depends on the model's input
    arguments: dict[str, Any]  # of the operator, by name: plain values, tensors as Ref
    output: int = 0  # which of the operator's results


@dataclass
class Call:
    """One call of a module; nodes `start <= index < end` were made inside it."""

    index: int
    name: str
    module: nn.Module
    parent: int
    count: int
    parameters: int
    start: int
    inputs: list[tuple[Keys, int]]
    end: int = 0
    outputs: list[tuple[Keys, int]] = field(default_factory=list)


@dataclass
class Trace:
    """A forward pass. `calls[0]` is the model itself; calls and nodes are in chronological order."""

    image: tuple[int, ...]  # shape of the input image, batch and channels included
    nodes: list[Node]
    calls: list[Call]
    writes: dict[int, list[int]]  # storage -> nodes written into it in place
    output: Any  # what the model returned

    def activation(self, output: Tensor) -> str | None:
        """The activation to probabilities that an output (or a view of one) ends in; None if there is none."""
        held = output.untyped_storage().data_ptr()
        returned = dict(self.calls[0].outputs)
        node = next(returned[k] for k, t in tensors(self.output) if t.untyped_storage().data_ptr() == held)
        while (operator := self._operator(node)) in PASSING and self.nodes[node].sources:
            node = self.nodes[node].sources[0]
        return ACTIVATION_OPERATORS.get(operator)

    def _operator(self, node: int) -> str:
        """An operator's name, of `sigmoid_` as of `sigmoid`."""
        return self.nodes[node].operator.removeprefix("aten::").rstrip("_")

    def common_activation(self) -> str | None:
        """The `activation` of the model's full-size outputs; "softmax" if they sum to 1; None if any ends in none."""
        size = self.image[2:]
        found = of_all(self.activation(t) for _, t in tensors(self.output) if tuple(t.shape[2:]) == size)
        return "softmax" if found is None and all_sum_to_one(self.output, size) else found

    def mutated(self, node: int, since: int) -> bool:
        """Whether a later node, from node `since` on, writes to the storage of `node`."""
        return any(write > node and write >= since for write in self.writes.get(self.nodes[node].storage, ()))


def named_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Every submodule by the name that taps use: without a leading `module.` and the `_orig_mod` of compiled modules.

    A compiled module and the module inside it share a name; the compiled one is listed. A module with several names is
    listed under each.
    """
    found: dict[str, nn.Module] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        found.setdefault(bare(path), module)
    return {
        name if (short := name.removeprefix("module.")) in found else short: module for name, module in found.items()
    }


def bare(path: str) -> str:
    """A module's path without the `_orig_mod` of compiled modules."""
    return ".".join(part for part in path.split(".") if part != "_orig_mod")


def trace_forward(model: nn.Module, example_input: Any) -> Trace:
    """Run `model` once, without leaving a trace on it, and record what it did.

    Raises:
        ReSegError: there is no image among the inputs, the model fails on them, is not a module that takes hooks, or
            has lazy parameters.
    """
    check_module(model)
    image = image_of(example_input)
    names: dict[int, tuple[str, nn.Module]] = {}
    for name, module in named_modules(model).items():
        names.setdefault(id(module), (name, module))
    tracer = _Tracer()
    with ExitStack() as stack:
        stack.enter_context(dry_run(model))
        for name, module in names.values():
            if not isinstance(module, torch.jit.ScriptModule):  # takes no hooks: seen as its parent's operators
                enter = partial(tracer.enter, name, sum(p.numel() for p in module.parameters()))
                stack.callback(module.register_forward_pre_hook(enter, with_kwargs=True).remove)
                stack.callback(module.register_forward_hook(tracer.leave, with_kwargs=True).remove)
        inputs = private_copy(example_input)
        for _, tensor in tensors(inputs):
            tracer.add((), tensor, "input")
        with tracer:
            output = call(model, inputs)
    return Trace(tuple(image.shape), tracer.nodes, tracer.calls, tracer.writes, output)


def refs(value: Any) -> list[Ref]:
    """The tensors among plain arguments."""
    if isinstance(value, Ref):
        return [value]
    return [ref for item in value for ref in refs(item)] if isinstance(value, list) else []


class _Tracer(TorchDispatchMode):
    """Identifies tensors by storage (weakly), offset, shape, stride and dtype, to follow views and in-place writes."""

    def __init__(self) -> None:
        super().__init__()
        self.nodes: list[Node] = []
        self.calls: list[Call] = []
        self.writes: dict[int, list[int]] = {}
        self._stack: list[int] = []
        self._known: dict[tuple, int] = {}
        # The weak reference keeps the address, not the memory: it cannot be handed to another storage meanwhile.
        self._storages: dict[StorageWeakRef, int] = {}
        self._counts: Counter[int] = Counter()  # calls of each module so far

    def _identity(self, tensor: Tensor) -> tuple | None:
        try:
            storage = StorageWeakRef(tensor.untyped_storage())
        except (NotImplementedError, RuntimeError):  # sparse and the like have no storage, and are no feature maps
            return None
        number = self._storages.setdefault(storage, len(self._storages))
        return number, tensor.storage_offset(), tuple(tensor.shape), tensor.stride(), tensor.dtype

    def add(
        self, sources: Any, tensor: Tensor, operator: str, write: bool = False, arguments: Any = None, output: int = 0
    ) -> int:
        identity = self._identity(tensor)
        sources = tuple(dict.fromkeys(s for s in sources if s is not None and self.nodes[s].dynamic))
        storage, shape = identity[0] if identity else -1, tuple(tensor.shape)
        dynamic = bool(sources) or (operator == "input" and tensor.numel() > 1)
        node = Node(len(self.nodes), sources, shape, operator, storage, dynamic, arguments or {}, output)
        self.nodes.append(node)
        if identity:
            self._known[identity] = node.index
            if write:
                self.writes.setdefault(storage, []).append(node.index)
        return node.index

    def _find(self, tensor: Tensor) -> int | None:
        identity = self._identity(tensor)
        if identity is None:
            return None
        node = self._known.get(identity)
        later = [write for write in self.writes.get(identity[0], ()) if node is None or write > node]
        return self.add([node, *later], tensor, "alias") if later else node

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if torch.is_inference_mode_enabled():  # there operators arrive that are made of others, a linear layer whole
            with self:
                result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        named = {
            argument.name: args[i] if i < len(args) else kwargs.get(argument.name, argument.default_value)
            for i, argument in enumerate(func._schema.arguments)
        }
        arguments = {name: self._plain(value) for name, value in named.items()}
        sources = [ref.node for ref in refs(list(arguments.values()))]
        result = func(*args, **kwargs)
        written = set()
        for argument in func._schema.arguments:
            if argument.alias_info is not None and argument.alias_info.is_write:
                for _, tensor in tensors(named[argument.name]):
                    self.add(sources, tensor, func._schema.name, write=True, arguments=arguments)
                    written.add(self._identity(tensor))
        for i, (_, tensor) in enumerate(tensors(result)):
            if self._identity(tensor) not in written:
                self.add(sources, tensor, func._schema.name, arguments=arguments, output=i)
        return result

    def _plain(self, value: Any) -> Any:
        """An argument as a plain value that keeps no tensor alive."""
        if isinstance(value, Tensor):
            node = self._find(value)
            return Ref(node if node is not None and self.nodes[node].dynamic else None, tuple(value.shape))
        if isinstance(value, (list, tuple)):
            return [self._plain(item) for item in value]
        return value if isinstance(value, (int, float, str)) else None

    def enter(self, name: str, parameters: int, module: nn.Module, args: tuple, kwargs: dict) -> None:
        """The forward pre-hook that opens a call of a module with this name and number of parameters."""
        given = tensors({**dict(enumerate(args)), **kwargs})
        inputs = [(keys, node) for keys, tensor in given if (node := self._find(tensor)) is not None]
        index, parent, count = len(self.calls), self._stack[-1] if self._stack else -1, self._counts[id(module)]
        self.calls.append(Call(index, name, module, parent, count, parameters, len(self.nodes), inputs))
        self._stack.append(index)
        self._counts[id(module)] += 1

    def leave(self, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        """The forward hook that closes the call."""
        while self.calls[self._stack[-1]].module is not module:  # calls that an exception, caught since, ended
            self._stack.pop()
        closed = self.calls[self._stack.pop()]
        inputs = [node for _, node in closed.inputs if self.nodes[node].dynamic]
        for keys, tensor in tensors(output):
            node = self._find(tensor)
            if node is None or (inputs and not self.nodes[node].dynamic):  # computed by a kernel that torch cannot see
                node = self.add(inputs, tensor, "opaque")
            elif getattr(module, "inplace", False) is True and node in inputs:  # does nothing now, writes in training
                node = self.add(inputs, tensor, "inplace", write=True)
            closed.outputs.append((keys, node))
        closed.end = len(self.nodes)
