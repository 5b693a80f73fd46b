"""A model that is changed once the hooks are set: features are those it goes on with, or there is an error."""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from models import IGNORED, UNet, batch, ignoring, ready, task_loss
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from reseg_loss import CutMixConsistency, DeepSupervision, FeatureExtractor, ReSegError, ReSegWrapper, TapError
from reseg_loss.alignment import capture

# torch's tracer asks every tensor that enters a compiled submodule for its gradient
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf Tensor")


@pytest.fixture(autouse=True)
def _nothing_compiled_before() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Wrapped(nn.Module):
    """An adapter around a layer, as LoRA puts it there."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base

    def forward(self, x: Tensor) -> Tensor:
        return 3 * self.base(x)


def double(*args: Any) -> Any:
    """A hook that gives back twice the last argument."""
    return 2 * args[-1]


def in_place(module: nn.Module, args: Any, output: Tensor) -> None:
    output.data.mul_(2)  # which no version counter shows


@contextmanager
def consumed(model: UNet) -> Iterator[list[Tensor]]:
    """What the next modules of a `UNet` take in of its features: encoder, bottleneck, decoder from coarse to fine."""
    found: list[Tensor] = []

    def spy(module: nn.Module, args: tuple[Tensor]) -> None:
        found.append(args[0])

    spied = [model.pool, model.dropout, model.up[1], model.up[2], model.head]
    handles = [module.register_forward_pre_hook(spy) for module in spied]
    yield found
    for handle in handles:
        handle.remove()


def gradients(values: list[Tensor], model: nn.Module) -> list[Tensor]:
    total = sum((value.square().mean() for value in values), torch.zeros(()))
    found = torch.autograd.grad(total, [*model.parameters()], retain_graph=True, allow_unused=True)
    return [g for g in found if g is not None]


def check_features(model: UNet, extractor: FeatureExtractor, run: Callable[[Tensor], Any] | None = None) -> None:
    """Features and their gradients are those of what the model goes on with."""
    for seed in range(2):
        with consumed(model) as expected:
            (run or model)(batch(seed=seed)[0])
        features = extractor.pop()
        ours = [*features.encoder, features.bottleneck, *reversed(features.decoder)]
        assert len(ours) == len(expected) == 7
        assert all(torch.equal(a, b) for a, b in zip(ours, expected))
        assert all(torch.equal(a, b) for a, b in zip(gradients(ours, model), gradients(expected, model)))


# --- recorded right


def later_global(model: UNet) -> Any:
    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        return 2 * output if module is model.encoder[1] else None

    return nn.modules.module.register_module_forward_hook(hook)


def old_norm(norm: Callable[[nn.Module], nn.Module]) -> Callable[[UNet], None]:
    def change(model: UNet) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch deprecates it
            norm(model.encoder[1][0])
            norm(model.decoder[0][0])

    return change


def adapt(model: UNet) -> None:
    for block in (*model.encoder, model.bottleneck, *model.decoder):
        block[0] = Wrapped(block[0])


RIGHT: dict[str, Callable[[UNet], Any]] = {
    "hook": lambda m: m.encoder[1].register_forward_hook(double),
    "hook of the bottleneck": lambda m: m.bottleneck.register_forward_hook(double),
    "hook with kwargs": lambda m: m.decoder[1].register_forward_hook(double, with_kwargs=True),
    "hook that is always called": lambda m: m.decoder[0].register_forward_hook(double, always_call=True),
    "hook before ours": lambda m: m.encoder[1].register_forward_hook(double, prepend=True),
    "hook in place": lambda m: m.encoder[2].register_forward_hook(in_place),
    "hook that detaches": lambda m: m.encoder[2].register_forward_hook(lambda module, args, output: output.detach()),
    "hook of all modules": later_global,
    "pre-hook": lambda m: m.encoder[1].register_forward_pre_hook(lambda module, args: (args[0] + 1,)),
    "hooks inside": lambda m: m.encoder[1][0].register_forward_hook(double),
    "hooks of the model": lambda m: m.register_forward_hook(double),
    "parametrization": lambda m: parametrizations.spectral_norm(m.encoder[1][0]),
    "weight norm": lambda m: parametrizations.weight_norm(m.bottleneck[0]),
    "old spectral norm": old_norm(nn.utils.spectral_norm),
    "old weight norm": old_norm(nn.utils.weight_norm),
    "adapters inside": adapt,
    "other statistics inside": lambda m: setattr(m.encoder[1], "1", nn.GroupNorm(1, 8)),
    "compiled inside": lambda m: m.encoder[1][0].compile(backend="eager"),
    "compiled": lambda m: m.encoder[1].compile(backend="eager"),
    "compiled around": lambda m: m.encoder.__setitem__(1, torch.compile(m.encoder[1], backend="eager")),
    "another head": lambda m: setattr(m, "head", nn.Conv2d(4, 7, 1)),
}


@pytest.mark.parametrize("how", RIGHT)
def test_what_is_changed_later_is_recorded_right(how):
    model = UNet()
    extractor = FeatureExtractor(model, batch()[0], taps=UNet.taps).attach()
    model(batch()[0])
    extractor.forget()
    handle = RIGHT[how](model)
    try:
        check_features(model, extractor)
    finally:
        if hasattr(handle, "remove"):
            handle.remove()


def test_hooks_keep_the_order_the_user_gave_them():
    image, _ = batch()
    model = UNet()
    extractor = FeatureExtractor(model, image, taps=UNet.taps).attach()
    second = FeatureExtractor(model, image, taps=UNet.taps).attach()
    model.encoder[1].register_forward_hook(lambda m, a, output: output + 1)
    model.encoder[1].register_forward_hook(double)
    plain = copy.deepcopy(model)
    expected, output = plain(image), model(image)
    assert torch.equal(output, expected)
    assert torch.equal(extractor.pop().encoder[1], second.pop().encoder[1])
    check_features(model, extractor)


def test_an_input_is_recorded_as_a_later_pre_hook_leaves_it():
    image, _ = batch()
    model = UNet()
    taps = {**UNet.taps, "bottleneck": "in:up.0"}
    extractor = FeatureExtractor(model, image, taps=taps).attach()
    seen: list[Tensor] = []
    model.up[0].register_forward_pre_hook(lambda module, args: (2 * args[0],))
    model.up[0].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    model(image)
    assert torch.equal(extractor.pop().bottleneck, seen[0])


def test_the_image_is_the_one_that_a_later_pre_hook_leaves():
    image, label = batch(size=12)
    padded = nn.functional.pad(label, (0, 4, 0, 4))
    model = UNet()
    reseg = ReSegWrapper(model, example_input=batch()[0])
    reseg.freeze_teacher()
    model.register_forward_pre_hook(lambda module, args: (nn.functional.pad(args[0], (0, 4, 0, 4)),))
    model(image)
    with pytest.raises(
        ReSegError, match=r"label of shape \(2, 12, 12\) does not fit an image of shape \(2, 1, 16, 16\)"
    ):
        reseg.alignment_loss(label)
    model(image)
    assert reseg.alignment_loss(padded) > 0


# --- refused


def swap(model: UNet) -> None:
    model.encoder[1], model.encoder[2] = model.encoder[2], model.encoder[1]


def insert(model: UNet) -> None:
    model.encoder.insert(1, nn.Identity())


def move(model: UNet) -> None:
    model.middle = model.bottleneck
    model.bottleneck = nn.Identity()


WRONG: dict[str, Callable[[UNet], Any]] = {
    "wrapped": lambda m: m.encoder.__setitem__(1, Wrapped(m.encoder[1])),
    "the bottleneck wrapped": lambda m: setattr(m, "bottleneck", Wrapped(m.bottleneck)),
    "a decoder block wrapped": lambda m: m.decoder.__setitem__(0, Wrapped(m.decoder[0])),
    "replaced": lambda m: m.encoder.__setitem__(1, nn.Conv2d(4, 8, 3, padding=1)),
    "replaced by its copy": lambda m: m.encoder.__setitem__(1, copy.deepcopy(m.encoder[1])),
    "the list replaced by its copy": lambda m: setattr(m, "encoder", copy.deepcopy(m.encoder)),
    "its parent replaced": lambda m: setattr(m, "decoder", nn.ModuleList([Wrapped(d) for d in m.decoder])),
    "swapped": swap,
    "inserted": insert,
    "moved": move,
    "hooks taken off": lambda m: m.encoder[1]._forward_hooks.clear(),
    "compiled and hooked outside": lambda m: (
        m.encoder.__setitem__(1, torch.compile(m.encoder[1], backend="eager")),
        m.encoder[1].register_forward_hook(double),
    ),
}


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("how", WRONG)
def test_a_layer_that_is_wrapped_replaced_or_moved_is_refused(how, compiled):
    image, _ = batch()
    model = UNet()
    extractor = FeatureExtractor(model, image, taps=UNet.taps).attach()
    run = torch.compile(model, backend="eager") if compiled else model
    run(image)
    extractor.pop()
    WRONG[how](model)
    try:
        run(image)
    except RuntimeError:  # a layer that does not fit: its own error
        assert how in ("swapped", "moved")
    with pytest.raises(TapError, match="is no longer the module that was hooked"):
        extractor.pop()


def test_every_loss_refuses_it():
    image, label = batch()
    model = UNet()
    reseg = ReSegWrapper(model, example_input=image)
    reseg.freeze_teacher()
    ds = DeepSupervision(model, image, ignore_index=IGNORED)
    mixed = CutMixConsistency(model, deep=ds, rampup_steps=None, ignore_index=IGNORED, threshold=0.0)
    model(image)
    assert reseg.alignment_loss(label) > 0
    assert ds.loss(label, ignoring) > 0
    assert mixed.loss(image, ignoring) > 0
    model.decoder[1] = Wrapped(model.decoder[1])
    reseg.extractor.forget()
    model(image)
    for loss in (lambda: reseg.alignment_loss(label), lambda: ds.loss(label, ignoring)):
        with pytest.raises(TapError, match=r"'decoder\.1' of the model is no longer the module that was hooked"):
            loss()
    with pytest.raises(ReSegError, match="modules have changed since its mean teacher was made"):
        mixed.loss(image, ignoring)


def test_losses_that_are_built_after_the_change_see_it():
    image, label = batch()
    model = UNet()
    first = FeatureExtractor(model, image, taps=UNet.taps)  # its hooks are set later
    model.encoder[1] = Wrapped(model.encoder[1])
    check_features(model, first.attach())
    reseg = ReSegWrapper(model, example_input=image)
    reseg.freeze_teacher()
    model(image)
    first.forget()
    assert reseg.alignment_loss(label) > 0


def test_a_module_under_two_names_is_refused_once_one_of_them_is_another():
    class Twice(UNet):
        def __init__(self) -> None:
            super().__init__()
            self.second = self.encoder[0][2]  # a ReLU, which is used again

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(self.second(x))

    image, _ = batch()
    model = Twice()
    extractor = FeatureExtractor(
        model, image, taps={**UNet.taps, "encoder": ["encoder.0.2@1", *UNet.taps["encoder"][1:]]}
    )
    extractor.attach()
    model(image)
    extractor.pop()
    model.second = nn.Identity()
    model(image)
    with pytest.raises(TapError, match="'second' of the model is no longer"):
        extractor.pop()


@pytest.mark.parametrize("first_call", ["before", "after"])
def test_a_hook_that_is_set_later_on_a_compiled_model_is_refused(first_call):
    image, _ = batch()
    model = UNet()
    extractor = FeatureExtractor(model, image, taps=UNet.taps).attach()
    run = torch.compile(model, backend="eager", fullgraph=True)
    if first_call == "before":
        run(image)
        extractor.pop()
    model.encoder[1].register_forward_hook(double)
    for _ in range(2):
        run(image)
        with pytest.raises(TapError, match=r"a hook was set on 'encoder\.1' after ours"):
            extractor.pop()
    model(image)  # not compiled
    extractor.pop()
    torch._dynamo.reset()
    again = FeatureExtractor(model, image, taps=UNet.taps).attach()
    extractor.remove()
    check_features(model, again)


def test_changes_cost_no_graph_of_a_compiled_model():
    image, label = batch()
    model = UNet()
    reseg = ReSegWrapper(model, example_input=image)
    reseg.freeze_teacher()
    counter = torch._dynamo.testing.CompileCounterWithBackend("eager")
    run = torch.compile(model, backend=counter, fullgraph=True)
    for _ in range(5):
        (task_loss(run(image), label) + reseg.alignment_loss(label)).backward()
    assert counter.frame_count == 1


@pytest.mark.parametrize("everywhere", [False, True])
@pytest.mark.parametrize("when", ["before", "after"])
def test_full_backward_hooks_are_refused_which_would_not_see_the_losss_gradient(when, everywhere):
    image, label = batch()
    model = UNet()
    seen: list[Any] = []

    def hook(module: nn.Module, grad_input: Any, grad_output: Any) -> None:
        seen.append(grad_output)

    def set_hook() -> Any:
        if everywhere:
            return nn.modules.module.register_module_full_backward_hook(hook)
        return model.decoder[1].register_full_backward_hook(hook)

    handle = set_hook() if when == "before" else None
    try:
        if handle is not None:
            with pytest.raises(TapError, match="has a full backward hook"):
                ReSegWrapper(model, example_input=image)
            return
        reseg = ReSegWrapper(model, example_input=image)
        reseg.freeze_teacher()
        handle = set_hook()
        model(image)
        with pytest.raises(TapError, match="has a full backward hook"):
            reseg.alignment_loss(label)
    finally:
        handle.remove()
    if when == "after":
        model(image)
        assert reseg.alignment_loss(label) > 0


def test_backward_hooks_of_other_modules_and_of_inputs_that_are_tapped_are_none_of_our_affair():
    image, _ = batch()
    model = UNet()
    taps = {**UNet.taps, "decoder": ["in:head", "in:up.2", "in:up.1"]}
    extractor = FeatureExtractor(model, image, taps=taps).attach()
    seen: list[Tensor] = []
    model.decoder[1].register_full_backward_hook(lambda module, grads, output: seen.append(output[0]))
    model(image)
    feature = extractor.pop().decoder[1]
    feature.square().sum().backward()
    assert torch.equal(seen[0], 2 * feature.detach())


# --- the teacher


class Graphs:
    """In the place of CUDA graphs: what is run stays what it was."""

    recorded = 0

    def __call__(self, forward: Callable[[Tensor], Any], encoded: Tensor) -> Callable[[Tensor], Any]:
        self.recorded += 1
        kept: list[Any] = []

        def replay(encoded: Tensor) -> Any:
            kept.append(kept[0] if kept else forward(encoded))
            return kept[0]

        return replay


def loss_of(model: nn.Module, reseg: ReSegWrapper) -> Tensor:
    image, label = batch()
    model(image)
    return reseg.alignment_loss(label).detach()


HOW = {"eager": {}, "compiled": {"compile_teacher": True}, "captured": {"capture_teacher": True}}


@pytest.fixture(params=HOW)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    original = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **kwargs: original(f, **{"backend": "eager", **kwargs}))
    monkeypatch.setattr(capture, "capture_forward", Graphs())
    monkeypatch.setattr(capture, "serves", lambda device: True)
    return HOW[request.param]


@pytest.mark.filterwarnings("ignore")  # the compiler's own
def test_a_layer_of_the_teacher_that_is_replaced_later_counts_however_the_teacher_runs(way):
    def soften(reseg: ReSegWrapper) -> None:
        for block in (*reseg.teacher.body.encoder, *reseg.teacher.body.decoder):
            block[2] = nn.Softplus(beta=0.2)

    model, reseg = ready(**way)
    before = loss_of(model, reseg)
    soften(reseg)
    after = loss_of(model, reseg)
    model, reseg = ready(**way)
    soften(reseg)
    expected = loss_of(model, reseg)
    assert not torch.allclose(before, expected, rtol=0.01)
    assert torch.allclose(after, expected, rtol=1e-6)


@pytest.mark.filterwarnings("ignore")  # the compiler's own
@pytest.mark.parametrize("change", ["tap", "body"])
def test_a_tapped_layer_of_the_teacher_that_is_wrapped_later_is_refused(way, change):
    model, reseg = ready(**way)
    loss_of(model, reseg)
    body = reseg.teacher.body
    if change == "tap":
        body.encoder[1] = Wrapped(body.encoder[1])
    else:
        reseg.teacher.body = Wrapped(body)
    with pytest.raises(TapError, match=r"no longer the module that was hooked|body is not the module"):
        loss_of(model, reseg)


# --- a frozen teacher stays as it is


class Counting(nn.Module):
    """Scales by a buffer that every call changes, in evaluation too; in place or by another tensor."""

    def __init__(self, replaces: bool) -> None:
        super().__init__()
        self.replaces = replaces
        self.register_buffer("scale", torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        if self.replaces:
            self.scale = self.scale * 1.5
        else:
            self.scale.mul_(1.5)
        return x * self.scale


class Remembering(nn.Module):
    """Makes a mask of the image's size when that changes."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mask", torch.ones(0), persistent=False)
        self.made = 0

    def forward(self, x: Tensor) -> Tensor:
        if self.mask.shape != x.shape[2:]:
            self.mask = torch.ones(x.shape[2:])
            self.made += 1
        return x * self.mask


def state(module: nn.Module) -> list[Tensor]:
    return [tensor.clone() for tensor in (*module.parameters(), *module.buffers())]


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b))


@pytest.mark.parametrize("replaces", [False, True])
def test_buffers_that_evaluation_changes_are_put_back_which_is_said_once(replaces, caplog):
    image, label = batch()
    torch.manual_seed(0)
    model = UNet(norm=lambda c: nn.Sequential(nn.GroupNorm(1, c), Counting(replaces)))
    reseg = ReSegWrapper(model, example_input=image)
    reseg.freeze_teacher()
    before = state(reseg.teacher)
    with caplog.at_level(logging.WARNING, logger="reseg_loss"):
        losses = []
        for _ in range(3):
            frozen = copy.deepcopy(model)
            model(image)
            losses.append(reseg.alignment_loss(label).detach())
            model.load_state_dict(frozen.state_dict())
            reseg.reconstruct(label)
            assert same(state(reseg.teacher), before)
    assert same(losses, [losses[0]] * 3)
    said = [r.getMessage() for r in caplog.records if "change even in evaluation" in r.getMessage()]
    assert len(said) == 1
    assert "body.encoder.0.1.1.scale" in said[0]


def test_a_state_that_is_loaded_is_not_put_back():
    model = UNet(norm=lambda c: nn.Sequential(nn.GroupNorm(1, c), Counting(False)))
    reseg = ReSegWrapper(model, example_input=batch()[0])
    reseg.freeze_teacher()
    loss_of(model, reseg)
    given = {**reseg.state_dict()}
    given["parts"]["teacher"] = {k: v + 1 if "scale" in k else v for k, v in given["parts"]["teacher"].items()}
    reseg.load_state_dict(given)
    loss_of(model, reseg)
    assert same([*reseg.teacher.state_dict().values()], [*given["parts"]["teacher"].values()])


def test_a_cache_that_is_made_anew_for_another_size_stays():
    model = UNet(norm=lambda c: nn.Sequential(nn.GroupNorm(1, c), Remembering()))
    reseg = ReSegWrapper(model, example_input=batch()[0])
    reseg.freeze_teacher()
    for _ in range(3):
        with reseg.teacher.unmoved() as moved:
            loss_of(model, reseg)
        assert moved == []
    assert reseg.teacher.body.encoder[0][1][1].made == 1


@pytest.mark.filterwarnings("ignore:torch.ao.quantization")
@pytest.mark.filterwarnings("ignore:Please use quant_min")
@pytest.mark.filterwarnings("ignore:_aminmax")
def test_observers_of_quantization_stop_when_the_teacher_is_frozen_and_go_on_in_the_model():
    quantization = pytest.importorskip("torch.ao.quantization")
    image, label = batch()
    model = UNet()
    model.qconfig = quantization.get_default_qat_qconfig("fbgemm")
    quantization.prepare_qat(model, inplace=True)
    model(image)
    reseg = ReSegWrapper(model, example_input=image)
    reseg.freeze_teacher()
    teacher, student = state(reseg.teacher), state(model)
    losses = []
    for factor in (1, 5, 1):
        model(factor * image)
        value = label if factor == 1 else label.flip(0)
        losses.append(reseg.alignment_loss(value).detach())
        assert same(state(reseg.teacher), teacher)
    reseg.reconstruct(label)
    assert same(state(reseg.teacher), teacher)
    assert not same(state(model), student)
    with reseg.teacher.unmoved() as moved:
        loss_of(model, reseg)
    assert moved == []
    fakes = [m for m in reseg.teacher.modules() if hasattr(m, "fake_quant_enabled")]
    assert fakes
    assert all(m.fake_quant_enabled.item() == 1 and m.observer_enabled.item() == 0 for m in fakes)
    assert all(m.observer_enabled.item() == 1 for m in model.modules() if hasattr(m, "observer_enabled"))
    again = ReSegWrapper(model, example_input=image)
    again.load_state_dict(reseg.state_dict())
    assert all(m.observer_enabled.item() == 0 for m in again.teacher.modules() if hasattr(m, "observer_enabled"))
