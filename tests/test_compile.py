"""torch.compile and torch.export around hooked models."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from models import UNet, batch, inplace, recording_of, saved, task_loss, tensors_in
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.testing import CompileCounterWithBackend
from torch._functorch.aot_autograd import make_boxed_func

from reseg_loss import DeepSupervision, FeatureExtractor, ReSegError, ReSegWrapper, TapError

# torch's tracer asks every tensor that enters a compiled submodule for its gradient
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf Tensor")

BACKENDS = ["eager", "aot_eager", pytest.param("inductor", marks=pytest.mark.slow)]
LATE = r"compiled and run before the hooks were set|its first call must come after the hooks are set"


@pytest.fixture(autouse=True)
def _nothing_compiled_before() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def made(**kwargs: Any) -> tuple[Any, ReSegWrapper]:
    """A model and a wrapper with an untrained, frozen teacher, always the same."""
    torch.manual_seed(0)
    model = UNet()
    reseg = ReSegWrapper(model, example_input=batch()[0], **{"weight": 1.0, **kwargs})
    reseg.freeze_teacher()
    return model, reseg


def steps(
    run: Callable[[Tensor], Tensor], model: nn.Module, reseg: ReSegWrapper, sizes: tuple[int, ...] = (16, 16)
) -> list[Tensor]:
    """Losses, gradients and statistics of some training steps."""
    values = []
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for size in sizes:
        image, label = batch(size=size)
        loss = task_loss(run(image), label) + reseg.alignment_loss(label)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        values += [loss.detach(), *(p.grad.clone() for p in model.parameters())]
    return [*values, *model.buffers()]


def close(a: list[Tensor], b: list[Tensor], tolerance: float) -> bool:
    return len(a) == len(b) and all(torch.allclose(x, y, rtol=tolerance, atol=tolerance) for x, y in zip(a, b))


def in_place(model: nn.Module, **kwargs: Any) -> nn.Module:
    model.compile(**kwargs)
    return model


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("compiled", [torch.compile, in_place])
def test_hooks_set_before_the_first_call_are_part_of_one_unbroken_graph(compiled, backend):
    plain, reseg = made()
    expected = steps(plain, plain, reseg, (16, 16, 16))
    model, reseg = made()
    counter = CompileCounterWithBackend(backend)
    run = compiled(model, backend=counter, fullgraph=True)
    actual = steps(run, model, reseg, (16, 16, 16))
    assert counter.frame_count == 1
    assert close(actual, expected, 0 if backend == "eager" else 1e-5)


def test_deep_supervision_adds_one_gradient_per_head_to_a_compiled_graph():
    (image, label), model = batch(), UNet()
    ds = DeepSupervision(model, image)
    shapes: list[tuple[int, ...]] = []

    def backward(graph: Any, inputs: Any) -> Any:
        tangents = [n for n in graph.graph.nodes if n.op == "placeholder" and n.name.startswith("tangents")]
        shapes.extend(tuple(n.meta["val"].shape) for n in tangents)
        return make_boxed_func(graph)

    backend = aot_autograd(fw_compiler=lambda graph, _: make_boxed_func(graph), bw_compiler=backward)
    logits = torch.compile(model, backend=backend)(image)
    (task_loss(logits, label) + ds.loss(label, task_loss)).backward()
    decoder = [(len(image), level.decoder.channels, *level.decoder.spatial) for level in ds.extractor.plan.selected]
    assert sorted(shapes) == sorted([tuple(logits.shape), *decoder])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("compiled", ["student", "teacher"])
def test_taps_that_an_activation_in_place_completes_are_the_same_compiled(compiled, backend, monkeypatch):
    losses = []
    for run_compiled in (False, True):
        torch.manual_seed(0)
        model = UNet()
        inplace(model)
        image, label = batch()
        compile_teacher = run_compiled and compiled == "teacher"
        reseg = ReSegWrapper(model, example_input=image, weight=1.0, compile_teacher=compile_teacher)
        reseg.freeze_teacher()
        original = torch.compile
        with monkeypatch.context() as patch:
            patch.setattr(torch, "compile", lambda f, o=original: o(f, backend=backend, fullgraph=True))
            run = torch.compile(model) if run_compiled and compiled == "student" else model
            for _ in range(2):
                run(image)
                losses.append(reseg.alignment_loss(label).detach())
    assert all(torch.allclose(loss, losses[0], rtol=1e-5) for loss in losses)


def test_the_compiled_teacher_ends_after_its_last_tap_within_two_graphs(monkeypatch):
    model, reseg = made(compile_teacher=True)
    convolutions: list[int] = []

    def forward(graph: Any, inputs: Any) -> Any:
        convolutions.append(sum("convolution" in str(node.target) for node in graph.graph.nodes))
        return make_boxed_func(graph.forward)

    original = torch.compile
    backend = aot_autograd(fw_compiler=forward)
    monkeypatch.setattr(torch, "compile", lambda f: original(f, backend=backend, fullgraph=True))
    plain, expected = made()
    for size in (16, 16, 24, 32, 16):
        image, label = batch(size=size)
        model(image)
        plain(image)
        assert torch.allclose(reseg.alignment_loss(label), expected.alignment_loss(label), rtol=1e-5)
    total = sum(isinstance(m, (nn.Conv2d, nn.ConvTranspose2d)) for m in model.modules())
    assert convolutions == [total - 3] * 2  # none of the finest level's two, and not the head


def test_calls_that_are_skipped_cost_a_second_graph_and_no_more():
    model, reseg = made(every=3)
    counter = CompileCounterWithBackend("aot_eager")
    run = torch.compile(model, backend=counter, fullgraph=True)
    image, label = batch()
    for step in range(7):
        loss = task_loss(run(image), label) + reseg.alignment_loss(label)
        loss.backward()
        assert not reseg.extractor.waiting
        assert reseg.extractor.enabled is (step % 3 == 2)
    assert counter.frame_count == 2


def test_a_relu_in_place_after_a_tap_is_compiled_with_the_values_before_it():
    taps = {"encoder": ["encoder.1.1"], "decoder": ["decoder.1.1"], "bottleneck": "bottleneck.1"}
    results = []
    for run_compiled in (False, True):
        model, reseg = made()
        reseg.remove()
        inplace(model)
        extractor = FeatureExtractor(model, batch()[0], taps=taps).attach()
        run = torch.compile(model, backend="aot_eager", fullgraph=True) if run_compiled else model
        run(batch()[0])
        features = extractor.pop()
        assert features.bottleneck.min() < 0
        (features.bottleneck.square().mean() + features.encoder[0].square().mean()).backward()
        results.append([p.grad for p in (*model.encoder.parameters(), *model.bottleneck.parameters())])
    assert close(*results, 1e-6)


def test_a_tap_that_ends_in_a_relu_in_place_is_compiled():
    results = []
    for run_compiled in (False, True):
        torch.manual_seed(0)
        model = UNet()
        inplace(model)
        reseg = ReSegWrapper(model, example_input=batch()[0], weight=1.0)
        reseg.freeze_teacher()
        run = torch.compile(model, backend="aot_eager", fullgraph=True) if run_compiled else model
        results.append(steps(run, model, reseg))
    assert close(*results, 1e-5)


def test_code_compiled_for_another_model_of_the_class_is_told_of():
    image, label = batch()
    torch.compile(UNet(), backend="eager")(image)
    model, reseg = made()
    run = torch.compile(model, backend="eager")
    run(image)
    with pytest.raises(TapError, match=r"another model of this class .* call torch._dynamo.reset\(\)"):
        reseg.alignment_loss(label)
    torch._dynamo.reset()
    run(image)
    assert reseg.alignment_loss(label) > 0


def test_another_image_size_is_one_more_graph_and_further_sizes_are_none():
    plain, reseg = made()
    sizes = (16, 24, 32, 40, 16)
    expected = steps(plain, plain, reseg, sizes)
    model, reseg = made()
    counter = CompileCounterWithBackend("aot_eager")
    run = torch.compile(model, backend=counter, fullgraph=True)
    assert close(steps(run, model, reseg, sizes), expected, 1e-5)
    assert counter.frame_count == 2


def test_the_compiled_module_itself_may_be_wrapped():
    plain, reseg = made()
    expected = steps(plain, plain, reseg)
    torch.manual_seed(0)
    model = UNet()
    counter = CompileCounterWithBackend("aot_eager")
    run = torch.compile(model, backend=counter, fullgraph=True)
    reseg = ReSegWrapper(run, example_input=batch()[0], weight=1.0)
    reseg.freeze_teacher()
    assert counter.frame_count == 0, "taps are found without compiling"
    assert type(reseg.teacher.body) is UNet
    assert close(steps(run, model, reseg), expected, 1e-5)
    assert counter.frame_count == 1
    assert not any("_orig_mod" in str(level) for level in reseg.extractor.levels)


@pytest.mark.parametrize("compiled", [torch.compile, in_place])
@pytest.mark.parametrize("calls", [1, 2])
def test_hooks_set_after_the_first_call_are_an_error_that_says_so_until_reset(compiled, calls):
    image, label = batch()
    model = UNet()
    run = compiled(model, backend="eager")
    for _ in range(calls):
        run(image)
    reseg = ReSegWrapper(model, example_input=image)
    reseg.freeze_teacher()
    for _ in range(2):
        run(image)
        with pytest.raises(ReSegError, match=LATE):
            reseg.alignment_loss(label)
    torch._dynamo.reset()
    run(image)
    assert reseg.alignment_loss(label) > 0


@pytest.mark.parametrize("bare_call", [False, True])
def test_a_second_wrapper_on_a_compiled_model_is_right_or_an_error_and_the_first_records_no_more(bare_call):
    image, label = batch()
    model, first = made()
    run = torch.compile(model, backend="eager")
    run(image)
    expected = first.alignment_loss(label)
    recording = recording_of(model)
    first.remove()
    if bare_call:
        run(image)
    second = ReSegWrapper(model)
    second.load_state_dict(first.state_dict())
    run(image)
    if bare_call:
        with pytest.raises(TapError, match=LATE):
            second.alignment_loss(label)
        torch._dynamo.reset()
        run(image)
    assert torch.equal(second.alignment_loss(label), expected)
    assert not tensors_in(recording)


def test_evaluation_and_training_alternate_with_one_graph_each():
    image, label = batch()
    model, reseg = made()
    counter = CompileCounterWithBackend("aot_eager")
    run = torch.compile(model, backend=counter, fullgraph=True)
    for _ in range(3):
        model.train()
        run(image)
        assert reseg.alignment_loss(label) > 0
        model.eval()
        with torch.no_grad():
            run(image)
        assert not reseg.extractor.waiting
    assert counter.frame_count == 2


def test_weights_of_0_and_above_alternate_with_one_graph_each_and_other_weights_need_none():
    image, label = batch()
    model, reseg = made()
    counter = CompileCounterWithBackend("aot_eager")
    run = torch.compile(model, backend=counter, fullgraph=True)
    for weight in (0.1, 0, 0.1, 0.2, 0, 0.3):
        reseg.weight = weight
        run(image)
        assert (reseg.alignment_loss(label).item() > 0) == (weight > 0)
    assert counter.frame_count == 2


def test_no_and_several_forwards_and_record_are_as_without_compilation():
    image, label = batch()
    model, reseg = made()
    run = torch.compile(model, backend="eager", fullgraph=True)
    with pytest.raises(ReSegError, match="no training forward"):
        reseg.alignment_loss(label)
    run(image)
    run(image)
    with pytest.raises(ReSegError, match=r"with reseg\.record\(\):"):
        reseg.alignment_loss(label)
    with reseg.record():
        run(image)
    expected = reseg.alignment_loss(label)
    run(image + 1)
    with reseg.record():
        run(image)
    run(image + 2)
    assert torch.equal(reseg.alignment_loss(label), expected)


def test_the_autocast_of_a_compiled_forward_is_that_of_the_teacher():
    image, label = batch()
    results = []
    for run_compiled in (False, True):
        model, reseg = made()
        found = []
        reseg.teacher.body.bottleneck[0].register_forward_hook(lambda m, a, output, f=found: f.append(output.dtype))
        run = torch.compile(model, backend="eager", fullgraph=True) if run_compiled else model
        with torch.autocast("cpu", dtype=torch.bfloat16):
            run(image)
        loss = reseg.alignment_loss(label)
        assert found == [torch.bfloat16]
        assert loss.dtype == torch.float32
        results.append(loss)
    assert torch.equal(*results)


class Block(nn.Sequential):
    """A class of the user's: torch 2.11 does not compile one of its own in place, it compiles the hooks instead."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


@pytest.mark.parametrize("compiled", [torch.compile, in_place])
def test_a_compiled_submodule_can_be_a_tap(compiled):
    plain, reseg = made()
    expected = steps(plain, plain, reseg)
    torch.manual_seed(0)
    model = UNet()
    counter = CompileCounterWithBackend("aot_eager")
    model.bottleneck = compiled(Block(*model.bottleneck), backend=counter, fullgraph=True)
    reseg = ReSegWrapper(model, example_input=batch()[0], weight=1.0)
    reseg.freeze_teacher()
    assert str(reseg.extractor.bottleneck) == "bottleneck"
    assert close(steps(model, model, reseg), expected, 1e-5)
    assert counter.frame_count >= 1


def test_a_tap_inside_a_compiled_submodule_fires():
    image, _ = batch()
    model = UNet()
    model.bottleneck = torch.compile(model.bottleneck, backend="aot_eager", fullgraph=True)
    taps = {"encoder": ["encoder.1"], "decoder": ["decoder.1"], "bottleneck": "bottleneck.0"}
    extractor = FeatureExtractor(model, image, taps=taps).attach()
    for _ in range(2):
        model(image)
        bottleneck = extractor.pop().bottleneck
        assert bottleneck.min() < 0, "the convolution's output, before normalization and ReLU"


def test_a_model_whose_submodule_was_compiled_and_run_before_gives_a_loss_or_says_so():
    image, label = batch()
    model = UNet()
    model.bottleneck = torch.compile(model.bottleneck, backend="eager")
    model(image)
    taps = {"encoder": ["encoder.1"], "decoder": ["decoder.1"], "bottleneck": "bottleneck.0"}
    reseg = ReSegWrapper(model, image, taps=taps)
    reseg.freeze_teacher()
    model(image)
    with pytest.raises(TapError, match=r"did not fire.*bottleneck\.0.*compiled and run before"):
        reseg.alignment_loss(label)


def test_states_load_between_compiled_and_plain_models():
    image, label = batch()
    model, reseg = made()
    state = saved(reseg)
    model(image)
    expected = reseg.alignment_loss(label)
    reseg.remove()
    run = torch.compile(model, backend="eager", fullgraph=True)
    fresh = ReSegWrapper(run)
    fresh.load_state_dict(state)
    run(image)
    assert torch.equal(fresh.alignment_loss(label), expected)


@pytest.mark.parametrize("strict", [False, True])
def test_after_remove_the_model_exports_like_one_that_was_never_hooked(strict):
    image, label = batch()
    model, reseg = made()
    model(image)
    reseg.alignment_loss(label).backward()
    reseg.remove()
    never = UNet()
    never.load_state_dict(model.state_dict())
    exported = [torch.export.export(each.eval(), (image,), strict=strict) for each in (model, never)]
    assert exported[0].graph_module.code == exported[1].graph_module.code
    assert torch.equal(exported[0].module()(image), never(image))


@pytest.mark.skipif(torch.__version__ < "2.7", reason="nothing tells a hook that it is being exported")
@pytest.mark.parametrize("training", [False, True])
def test_an_export_of_a_hooked_model_leaves_nothing_behind(training):
    image, label = batch()
    model, reseg = made()
    exported = torch.export.export(model.train(training), (image,), strict=False)
    assert not reseg.extractor.waiting
    assert "clone" not in exported.graph_module.code
    model.train()(image)
    assert reseg.alignment_loss(label) > 0


def test_a_compiled_function_around_the_model_is_one_graph_with_all_hooks():
    plain, reseg = made()
    expected = steps(plain, plain, reseg)
    model, reseg = made()
    counter = CompileCounterWithBackend("aot_eager")

    @torch.compile(backend=counter, fullgraph=True)
    def run(image: Tensor) -> Tensor:
        return 1.0 * model(image)

    assert close(steps(run, model, reseg), expected, 1e-5)
    assert counter.frame_count == 1


@pytest.mark.skipif(torch.__version__ < "2.7", reason="every hooked model counts towards the recompile limit")
def test_many_models_in_one_process_do_not_reach_the_recompile_limit():
    image, label = batch()
    counter = CompileCounterWithBackend("eager")
    for _ in range(10):  # folds of a cross-validation; the limit is 8
        model, reseg = made()
        run = torch.compile(model, backend=counter, fullgraph=True)
        for training in (True, False, True):
            model.train(training)
            run(image)
            if training:
                assert reseg.alignment_loss(label) > 0
    assert counter.frame_count == 2
