"""What only a GPU can show: agreement with the CPU, no synchronization, CUDA graphs, low precision, memory."""

from __future__ import annotations

import copy
import itertools
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from models import UNet, batch, ready, task_loss
from torch import Tensor, nn

from benchmarks.evidence.graphs import warm_up
from reseg_loss import (
    CrossAlignmentLoss,
    CutMixConsistency,
    DeepSupervision,
    FeatureExtractor,
    Features,
    ReSegError,
    ReSegWrapper,
)
from reseg_loss.alignment import capture, terms

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA"),
    pytest.mark.filterwarnings("ignore:the teacher's reconstruction loss"),
    pytest.mark.filterwarnings("ignore:Synchronization debug mode"),
]
DEVICE = torch.device("cuda", 0)
SETTINGS = [
    {},
    {"preset": "standardized"},
    {"label_input": "onehot", "ignore_index": 255},
    {"preset": "standardized", "ignore_index": 255},
]


class Wide(UNet):
    """A U-Net whose decoder has other widths than its encoder, so that fixed maps are needed."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        blocks = (nn.Sequential(nn.Conv2d(2 * c, c + 3, 3, padding=1), nn.ReLU()) for c in (16, 8, 4))
        self.decoder = nn.ModuleList(blocks)
        self.up = nn.ModuleList(nn.ConvTranspose2d(a, c, 2, 2) for a, c in ((32, 16), (19, 8), (11, 4)))
        self.head = nn.Conv2d(7, 3, 1)


def moved(made: Any = UNet, dtype: torch.dtype = torch.float32, **kwargs: Any) -> tuple[Any, ReSegWrapper]:
    """What is `ready`, made on the CPU and moved to the GPU."""
    model, reseg = ready(lambda: made().to(dtype), batch()[0].to(dtype), **kwargs)
    model.to(DEVICE)
    reseg.to(DEVICE)
    return model, reseg


def on_device(seed: int = 0, dtype: torch.dtype = torch.float32, ignored: bool = False) -> tuple[Tensor, Tensor]:
    image, label = batch(seed=seed)
    if ignored:
        label[:, :5, 3:9] = 255
    return image.to(DEVICE, dtype), label.to(DEVICE)


def forget_statistics(reseg: ReSegWrapper) -> None:
    """Those of the last call, which take memory."""
    weight, reseg.weight = reseg.weight, 0
    reseg.alignment_loss(torch.zeros(1, 1, 1, dtype=torch.int64))
    reseg.weight = weight
    assert len(reseg.stats()) == 1


def loss_of(logits: Tensor, label: Tensor) -> Tensor:
    return F.cross_entropy(logits.float(), label, ignore_index=255)


@contextmanager
def no_synchronization() -> Iterator[None]:
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def vector(tensors: Any) -> Tensor:
    return torch.cat([t.detach().flatten().double().cpu() for t in tensors])


# --- agreement with the CPU


def whole_protocol(device: torch.device, kwargs: dict[str, Any]) -> list[Tensor]:
    """Both stages in double precision from the same weights."""
    torch.manual_seed(0)
    model = UNet().double()
    data = [(image.double(), label) for image, label in (batch(seed=seed) for seed in range(4))]
    torch.manual_seed(1)
    reseg = ReSegWrapper(model, example_input=data[0][0], **{"preset": "paper", "weight": 1.0, **kwargs})
    model.to(device)
    reseg.to(device)
    history = reseg.fit_recon(data, epochs=2, progress=False)
    optimizer = torch.optim.SGD([*model.parameters(), *reseg.parameters()], 0.1, momentum=0.9)
    losses = []
    for image, label in data:
        image, label = image.to(device), label.to(device)
        loss = F.cross_entropy(model(image), label) + reseg.alignment_loss(label)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss)
    return [torch.tensor(history), torch.stack(losses), *reseg.teacher.parameters(), *model.parameters()]


@pytest.mark.parametrize("kwargs", SETTINGS)
def test_both_stages_agree_with_the_cpu(kwargs):
    expected = vector(whole_protocol(torch.device("cpu"), kwargs))
    actual = vector(whole_protocol(DEVICE, kwargs))
    assert torch.allclose(actual, expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("made", [UNet, Wide])
def test_teacher_and_maps_follow_the_features_of_a_model_that_moved_later(made):
    torch.manual_seed(0)
    image, label = batch()
    model = made()
    reseg = ReSegWrapper(model, example_input=image, preset="paper", weight=1.0)
    reseg.freeze_teacher()
    model(image)
    expected = reseg.alignment_loss(label)
    model.cuda()
    for where in ("cpu", DEVICE):  # labels come from either
        model(image.to(DEVICE))
        loss = reseg.alignment_loss(label.to(where))
        assert loss.device == DEVICE
        assert torch.allclose(loss.cpu(), expected, rtol=2e-2)
    loss.backward()
    assert {p.device for p in reseg.teacher.parameters()} == {DEVICE}


def test_a_wrapper_without_an_example_is_built_where_the_model_is():
    model = UNet().to(DEVICE)
    reseg = ReSegWrapper(model)
    reseg.fit_recon([batch()], epochs=1, progress=False)
    assert {t.device for t in reseg.teacher.state_dict().values()} == {DEVICE}
    image, label = on_device()
    model(image)
    assert reseg.alignment_loss(label) > 0
    assert reseg.reconstruct(label).device == DEVICE


# --- speed


@pytest.mark.parametrize("amp", [None, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kwargs", [*SETTINGS, {"every": 2}])
@pytest.mark.parametrize("made", [UNet, Wide])
def test_no_step_after_the_first_waits_for_the_device(made, kwargs, amp):
    model, reseg = moved(made, **kwargs)
    image, label = on_device(ignored="ignore_index" in kwargs)
    optimizer = torch.optim.SGD([*model.parameters(), *reseg.parameters()], 0.01)

    def step() -> None:
        with torch.autocast("cuda", dtype=amp or torch.float16, enabled=amp is not None):
            logits = model(image)
        loss = loss_of(logits, label) + reseg.alignment_loss(label)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    step()
    with no_synchronization():
        for _ in range(3):
            step()


def test_the_check_for_synchronization_sees_one():
    value = torch.ones((), device=DEVICE)
    with no_synchronization(), pytest.raises(RuntimeError, match="synchroniz"):
        value.item()


def aligned_step(
    model: nn.Module, reseg: ReSegWrapper, optimizer: torch.optim.Optimizer, image: Tensor, label: Tensor
) -> Tensor:
    loss = loss_of(model(image), label) + reseg.alignment_loss(label)
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    optimizer.step()
    return loss.detach()


def warmed_up(step: Callable[[], Tensor], optimizer: torch.optim.Optimizer, graphed: bool) -> Callable[[], Tensor]:
    """What runs a step after three of them: the step itself, or a CUDA graph of it, whose result stays in place."""
    warm_up(step)
    if not graphed:
        return step
    graph = torch.cuda.CUDAGraph()
    optimizer.zero_grad(set_to_none=True)
    with torch.cuda.graph(graph):
        static = step()

    def replay() -> Tensor:
        graph.replay()
        return static

    return replay


@pytest.mark.parametrize("kwargs", SETTINGS)
def test_a_step_in_a_cuda_graph_replays_as_eager(kwargs):
    ignored = "ignore_index" in kwargs
    data = [on_device(seed, torch.float64, ignored) for seed in range(4)]
    results = []
    for graphed in (False, True):
        model, reseg = moved(dtype=torch.float64, **kwargs)
        optimizer = torch.optim.SGD([*model.parameters(), *reseg.parameters()], 0.05, momentum=0.9)
        image, label = (x.clone() for x in data[0])
        run = warmed_up(partial(aligned_step, model, reseg, optimizer, image, label), optimizer, graphed)
        losses = []
        for new_image, new_label in data[1:]:
            image.copy_(new_image)
            label.copy_(new_label)
            losses.append(run().clone())
        results.append(vector([*losses, *model.parameters(), *model.buffers(), *reseg.parameters()]))
    assert torch.allclose(*results, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("graphed", [False, True])
def test_steps_with_unlabelled_images_do_not_wait_and_can_be_captured(graphed):
    """The same random numbers, weights of the loss and values, eager without synchronization and in a CUDA graph."""
    data = [on_device(seed, torch.float64) for seed in range(4)]
    results = []
    for captured in (False, graphed):
        torch.manual_seed(0)
        model = UNet().to(DEVICE, torch.float64)
        deep = DeepSupervision(model, data[0][0], ignore_index=255)
        mixed = CutMixConsistency(model, deep=deep, rampup_steps=None, ignore_index=255, threshold=0.4)
        optimizer = torch.optim.SGD([*model.parameters(), *deep.parameters()], 0.05, momentum=0.9)
        (image, label), weight = (x.clone() for x in data[0]), torch.zeros((), device=DEVICE)

        def step(
            model=model, deep=deep, mixed=mixed, optimizer=optimizer, image=image, label=label, weight=weight
        ) -> Tensor:
            with deep.record():
                logits = model(image)
            loss = loss_of(logits, label) + deep.loss(label, loss_of)
            loss = loss + mixed.loss(image.flip(2), loss_of, weight=weight)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            mixed.update()
            return loss.detach()

        run = warmed_up(step, optimizer, captured)
        torch.cuda.manual_seed(5)
        losses = []
        for i, (new_image, new_label) in enumerate(data[1:]):
            image.copy_(new_image)
            label.copy_(new_label)
            weight.fill_(0.5 * i)
            with no_synchronization():
                value = run()
            losses.append(value.clone())
        results.append(vector([*losses, *model.parameters(), *mixed.average.parameters(), *mixed.average.buffers()]))
    assert torch.allclose(*results, rtol=1e-7, atol=1e-9)


def test_memory_is_flat():
    model, reseg = moved()
    image, label = on_device()
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    held, peaks = set(), set()
    for i in range(100):
        torch.cuda.reset_peak_memory_stats()
        loss = task_loss(model(image), label) + reseg.alignment_loss(label)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        del loss
        if i >= 5:
            held.add(torch.cuda.memory_allocated())
            peaks.add(torch.cuda.max_memory_allocated())
    assert len(held) == 1, held
    assert len(peaks) == 1, peaks


def test_features_are_freed_after_the_step_and_after_a_failed_forward():
    model, reseg = moved()
    image, label = on_device()
    for _ in range(2):
        (task_loss(model(image), label) + reseg.alignment_loss(label)).backward()
    forget_statistics(reseg)
    before = torch.cuda.memory_allocated()

    def fail(module: nn.Module, args: Any) -> None:
        raise RuntimeError("out of memory")

    handle = model.head.register_forward_pre_hook(fail)
    try:
        model(image)
    except RuntimeError as error:
        error.__traceback__ = None
    handle.remove()
    assert torch.cuda.memory_allocated() == before
    model(image)
    assert torch.cuda.memory_allocated() > before
    reseg.extractor.forget()
    assert torch.cuda.memory_allocated() == before


# --- precision


@pytest.mark.parametrize("lower", [torch.float16, torch.bfloat16])
def test_the_teacher_runs_in_the_students_autocast_and_the_loss_in_fp32(lower):
    model, reseg = moved()
    image, label = on_device()
    found: list[torch.dtype] = []
    reseg.teacher.body.bottleneck[0].register_forward_hook(lambda module, args, output: found.append(output.dtype))
    with torch.autocast("cuda", dtype=lower):
        logits = model(image)
    loss = task_loss(logits, label) + reseg.alignment_loss(label)
    assert found == [lower]
    assert loss.dtype == torch.float32


def test_fp16_autocast_with_a_grad_scaler_trains():
    model, reseg = moved(preset="standardized")
    optimizer = torch.optim.Adam([*model.parameters(), *reseg.parameters()], 1e-2)
    scaler = torch.amp.GradScaler("cuda")
    image, label = on_device()
    values = []
    for _ in range(30):
        with torch.autocast("cuda", dtype=torch.float16):
            loss = task_loss(model(image), label) + reseg.alignment_loss(label)
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        values.append(loss.item())
    assert values[-1] < 0.8 * values[0]
    assert all(p.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("amp", [torch.float16, torch.bfloat16])
def test_stage_1_in_low_precision(amp):
    model = UNet().to(DEVICE)
    reseg = ReSegWrapper(model)
    history = reseg.fit_recon([batch(seed=seed) for seed in range(4)], epochs=6, amp=amp, progress=False)
    assert history[-1] < history[0]
    assert all(p.isfinite().all() and p.dtype == torch.float32 for p in reseg.teacher.parameters())


def features(model: nn.Module, taps: Any, x: Tensor) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """Encoder, decoder and bottleneck features by hooks of the test's own."""
    found: dict[str, Tensor] = {}
    names = [[level.encoder.module for level in taps], [level.decoder.module for level in taps], ["bottleneck"]]
    handles = [
        model.get_submodule(name).register_forward_hook(lambda m, a, output, name=name: found.__setitem__(name, output))
        for name in itertools.chain(*names)
    ]
    model(x)
    for handle in handles:
        handle.remove()
    return [found[name] for name in names[0]], [found[name] for name in names[1]], found["bottleneck"]


def by_hand(model: nn.Module, teacher: nn.Module, taps: Any, image: Tensor, label: Tensor) -> Tensor:
    """The paper's loss, written with mse_loss and nothing else."""
    encoder, decoder, bottleneck = features(model, taps, image)
    with torch.no_grad():
        targets = features(teacher, taps, label.unsqueeze(1).to(image.dtype))
    terms = [F.mse_loss(s, t) for s, t in zip([*decoder, *encoder, bottleneck], [*targets[0], *targets[1], targets[2]])]
    return torch.stack([term.to(torch.promote_types(term.dtype, torch.float32)) for term in terms]).sum() / 3


@pytest.mark.parametrize("lower", [torch.float16, torch.bfloat16])
def test_the_error_of_low_precision_is_that_of_a_hand_written_loss(lower):
    model, reseg = moved()
    image, label = on_device()
    taps = reseg.extractor.plan.selected
    exact_model, exact_teacher = (copy.deepcopy(m).double() for m in (model, reseg.teacher.body))
    by_hand(exact_model, exact_teacher, taps, image.double(), label).backward()
    parameters = [(p, q) for p, q in zip(model.parameters(), exact_model.parameters()) if q.grad is not None]
    exact = vector(q.grad for _, q in parameters)

    def error() -> float:
        found = vector(p.grad for p, _ in parameters)
        model.zero_grad()
        return float((found - exact).norm() / exact.norm())

    with torch.autocast("cuda", dtype=lower):
        model(image)
    reseg.alignment_loss(label).backward()
    ours = error()
    reseg.weight = 0
    with torch.autocast("cuda", dtype=lower):
        naive_loss = by_hand(model, reseg.teacher.body, taps, image, label)
    naive_loss.backward()
    naive = error()
    assert 0 < ours <= 2 * naive, (ours, naive)


@pytest.mark.parametrize("lower", [torch.float16, torch.bfloat16])
def test_a_model_in_low_precision_itself_has_a_teacher_in_it_and_a_loss_in_fp32(lower):
    model, reseg = moved(dtype=lower)
    image, label = on_device(dtype=lower)
    model(image)
    loss = reseg.alignment_loss(label)
    assert loss.dtype == torch.float32
    assert {p.dtype for p in reseg.teacher.parameters()} == {lower}
    loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("dims", [2, 3])
def test_channels_last_stays_and_gives_the_same_loss(dims):
    image, label = (x.to(DEVICE) for x in batch(dims=dims, channels=2))
    torch.manual_seed(0)
    model = UNet(in_channels=2, dims=dims).to(DEVICE)
    reseg = ReSegWrapper(model, example_input=image, preset="paper", weight=1.0)
    reseg.freeze_teacher()
    model(image)
    expected = reseg.alignment_loss(label)
    layout = torch.channels_last if dims == 2 else torch.channels_last_3d
    model.to(memory_format=layout)
    seen: list[tuple[int, ...]] = []
    handle = model.bottleneck.register_forward_hook(lambda module, args, output: seen.append(output.stride()))
    with FeatureExtractor(model, taps=reseg.extractor.plan) as features:
        output = model(image.to(memory_format=layout))
        kept = features.pop().bottleneck
    handle.remove()
    assert kept.stride() == seen[0]
    bare = copy.deepcopy(model)
    assert output.stride() == bare(image.to(memory_format=layout)).stride()
    loss = reseg.alignment_loss(label)
    assert torch.allclose(loss, expected, rtol=2e-2)
    loss.backward()


@pytest.mark.parametrize("preset", ["paper", "standardized"])
@pytest.mark.parametrize("amp", [None, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_a_step_with_the_kernels_is_that_of_torch(preset, amp, layout, monkeypatch):
    pytest.importorskip("triton")
    results = []
    for backend in ("triton", "torch"):
        monkeypatch.setattr(terms, "BACKEND", backend)
        model, reseg = moved(preset=preset)
        model.to(memory_format=layout)
        image, label = on_device()
        with torch.autocast("cuda", dtype=amp or torch.float16, enabled=amp is not None):
            model(image.to(memory_format=layout))
        loss = reseg.alignment_loss(label)
        loss.backward()
        results.append(vector([loss, *(p.grad for p in model.parameters() if p.grad is not None)]))
    assert float((results[0] - results[1]).norm() / results[1].norm()) < (1e-4 if amp is None else 1e-2)


class Viewing(UNet):
    """A model that counts on channels first, after a convolution whose weights tell one order from the other."""

    class Bottleneck(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            x = super().forward(x)
            return x.view(len(x), -1).view(x.shape)

    def __init__(self) -> None:
        super().__init__()
        self.bottleneck = self.Bottleneck(*self.bottleneck)


@pytest.mark.parametrize("made", [UNet, Viewing])
def test_the_teacher_runs_with_channels_last_in_low_precision_where_it_can(made):
    model, reseg = moved(made)
    image, label = on_device()
    last = {"memory_format": torch.channels_last}
    weight = reseg.teacher.body.encoder[1][0].weight
    model(image)
    reseg.alignment_loss(label)
    assert not weight.is_contiguous(**last)  # in fp32 nothing changes
    with torch.autocast("cuda", dtype=torch.bfloat16):
        model(image)
    assert reseg.alignment_loss(label).isfinite()
    assert weight.is_contiguous(**last) is (made is UNet)
    model(image)
    assert reseg.alignment_loss(label).isfinite()


@pytest.mark.filterwarnings("ignore")  # the compiler's own
@pytest.mark.parametrize("preset", ["paper", "standardized"])
def test_a_compiled_teacher_gives_the_same_loss(preset):
    pytest.importorskip("triton")
    torch._dynamo.reset()
    losses = []
    for compile_teacher in (False, True):
        model, reseg = moved(dtype=torch.float64, compile_teacher=compile_teacher, preset=preset)
        for seed in range(3):
            image, label = on_device(seed, torch.float64)
            model(image)
            losses.append(reseg.alignment_loss(label).detach())
    assert torch.allclose(torch.stack(losses[:3]), torch.stack(losses[3:]), rtol=1e-8)


# --- the teacher as a CUDA graph


def aligned(model: nn.Module, reseg: ReSegWrapper, image: Tensor, label: Tensor, amp: torch.dtype | None) -> Tensor:
    with torch.autocast("cuda", dtype=amp or torch.float16, enabled=amp is not None):
        model(image)
    return reseg.alignment_loss(label)


class Graphs:
    """Weak references to the graphs that were recorded."""

    def __init__(self, record: Callable[..., Any]) -> None:
        self.record, self.replays = record, list[weakref.ref[Any]]()

    def __call__(self, *args: Any) -> Any:
        replay = self.record(*args)
        self.replays.append(weakref.ref(replay))
        return replay

    def alive(self) -> int:
        return sum(replay() is not None for replay in self.replays)


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> Graphs:
    graphs = Graphs(capture.capture_forward)
    monkeypatch.setattr(capture, "capture_forward", graphs)
    return graphs


@pytest.fixture
def deterministic() -> Iterator[None]:
    """So that two models' gradients may be compared bit for bit."""
    torch.backends.cudnn.deterministic = True
    yield
    torch.backends.cudnn.deterministic = False


CAPTURED = [*SETTINGS, {"every": 2}]


@pytest.mark.parametrize("amp", [None, torch.bfloat16])
@pytest.mark.parametrize("kwargs", CAPTURED)
def test_a_captured_teacher_gives_the_same_loss_and_gradients(kwargs, amp, deterministic, graphs):
    results = []
    for on in (False, True):
        model, reseg = moved(capture_teacher=on, **kwargs)
        found = []
        for seed, n in enumerate((4, 4, 4, 4, 2, 2, 2, 2, 4)):
            image, label = (x.to(DEVICE) for x in batch(n, seed=seed))
            if "ignore_index" in kwargs:
                label[:, :5, 3:9] = 255
            model.zero_grad()
            loss = aligned(model, reseg, image, label, amp)
            loss.backward()
            found += [loss, *(p.grad for p in model.parameters() if p.grad is not None)]
        results.append(vector(found))
    assert torch.equal(*results)
    assert graphs.alive() == 2


@pytest.mark.parametrize("amp", [None, torch.bfloat16])
def test_a_captured_teacher_follows_a_loaded_state_and_a_move(amp, deterministic, graphs):
    results = []
    image, label = on_device()
    for on in (False, True):
        model, reseg = moved(capture_teacher=on)
        state = reseg.state_dict()
        doubled = {k: v * 2 if v.is_floating_point() else v for k, v in state["parts"]["teacher"].items()}
        losses = [aligned(model, reseg, image, label, amp) for _ in range(3)]
        reseg.load_state_dict({**state, "parts": {**state["parts"], "teacher": doubled}})
        losses += [aligned(model, reseg, image, label, amp) for _ in range(2)]
        reseg.teacher.cpu()
        losses += [aligned(model, reseg, image, label, amp) for _ in range(2)]
        results.append(vector(losses))
    assert torch.equal(*results)
    assert results[0][2] != results[0][3]
    assert graphs.alive() == 1


def test_a_captured_teachers_features_serve_until_the_next_loss():
    model, reseg = moved(capture_teacher=True)
    image, label = on_device()
    aligned(model, reseg, image, label, None).backward()
    first = aligned(model, reseg, image, label, None)
    aligned(model, reseg, image, label, None).backward()
    with pytest.raises(ReSegError, match="call backward before it"):
        first.backward()


def test_gradients_accumulate_with_a_captured_teacher(deterministic):
    results = []
    for on in (False, True):
        model, reseg = moved(capture_teacher=on)
        for seed in range(4):
            aligned(model, reseg, *on_device(seed), None).backward()
        results.append(vector(p.grad for p in model.parameters() if p.grad is not None))
    assert torch.equal(*results)


def test_no_step_after_the_first_waits_for_the_device_with_a_captured_teacher():
    model, reseg = moved(capture_teacher=True)
    image, label = on_device()
    aligned(model, reseg, image, label, None).backward()
    with no_synchronization():
        for _ in range(3):
            aligned(model, reseg, image, label, None).backward()


def test_a_step_in_a_cuda_graph_contains_a_captured_teachers_forward(graphs):
    data = [on_device(seed, torch.float64) for seed in range(4)]
    results = []
    for graphed in (False, True):
        model, reseg = moved(dtype=torch.float64, capture_teacher=graphed)
        optimizer = torch.optim.SGD(model.parameters(), 0.05)
        image, label = (x.clone() for x in data[0])
        run = warmed_up(partial(aligned_step, model, reseg, optimizer, image, label), optimizer, graphed)
        assert graphs.alive() == graphed  # of the steps before
        if graphed:
            reseg.remove()  # and the teacher's graphs: the step's needs none of them
        losses = []
        for new_image, new_label in data[1:]:
            image.copy_(new_image)
            label.copy_(new_label)
            losses.append(run().clone())
        results.append(vector([*losses, *model.parameters()]))
    assert torch.allclose(*results, rtol=1e-7, atol=1e-9)


class Waiting(UNet):
    """A model whose forward waits for the device; as a user may write it, or hidden from torch."""

    hidden = False

    def __init__(self) -> None:
        super().__init__(dropout=0.5)

    def forward(self, x: Tensor) -> Tensor:
        if self.hidden:
            torch.cuda.synchronize()
        elif x.sum().item() < -1e9:
            raise ValueError
        return super().forward(x)


class Hidden(Waiting):
    hidden = True


@pytest.mark.parametrize("made", [Waiting, Hidden])
def test_a_teacher_that_waits_for_the_device_runs_as_it_is_with_one_warning(made, caplog, deterministic):
    results = []
    for on in (False, True):
        model, reseg = moved(made, capture_teacher=on)
        stream = torch.cuda.current_stream()
        torch.manual_seed(3)
        losses = []
        for seed in range(3):
            image, label = on_device(seed)
            loss = loss_of(model(image), label) + reseg.alignment_loss(label)
            loss.backward()
            losses.append(loss)
        results.append(vector([*losses, *(p.grad for p in model.parameters())]))
        assert torch.cuda.current_stream() == stream
    assert torch.equal(*results)
    assert [r.levelname for r in caplog.records if "cannot be captured" in r.getMessage()] == ["WARNING"]


def test_removing_the_wrapper_frees_a_captured_teachers_graphs():
    image, label = on_device()
    for _ in range(2):  # the first makes what torch keeps, too
        model, reseg = moved(capture_teacher=True)
        before = torch.cuda.memory_allocated()
        aligned(model, reseg, image, label, None).backward()
        model.zero_grad()
        forget_statistics(reseg)
        with_graph = torch.cuda.memory_allocated()
        reseg.remove()
        after = torch.cuda.memory_allocated()
    assert before == after < with_graph


@pytest.mark.filterwarnings("ignore")  # of workers and pinning, by version
def test_a_loader_that_pins_memory_runs_beside_a_captured_teacher(graphs):
    image, label = batch(64)
    data = torch.utils.data.TensorDataset(image, label)
    loader = torch.utils.data.DataLoader(data, batch_size=2, pin_memory=True, num_workers=2)
    model, reseg = moved(capture_teacher=True)
    seen = 0
    for _ in range(3):
        for x, y in loader:
            if seen % 8 == 0:
                reseg.teacher.body.register_forward_hook(lambda *_: None)  # a new capture, while the loader works
            aligned(model, reseg, x.to(DEVICE, non_blocking=True), y.to(DEVICE, non_blocking=True), None).backward()
            seen += 1
    assert seen == 96
    assert graphs.alive() == 1


@pytest.mark.filterwarnings("ignore")  # the compiler's own
def test_a_compiled_teacher_can_be_captured(graphs):
    pytest.importorskip("triton")
    torch._dynamo.reset()
    losses = []
    for on in (False, True):
        model, reseg = moved(dtype=torch.float64, compile_teacher=on, capture_teacher=on)
        losses += [aligned(model, reseg, *on_device(seed, torch.float64), None).detach() for seed in range(3)]
    assert torch.allclose(torch.stack(losses[:3]), torch.stack(losses[3:]), rtol=1e-8)
    assert graphs.alive() == 1


# --- random states and determinism


def test_stage_1_and_building_preserve_the_random_state_of_the_device():
    torch.manual_seed(0)
    model = UNet(dropout=0.5).to(DEVICE)
    state = torch.cuda.get_rng_state(), torch.get_rng_state()
    reseg = ReSegWrapper(model, example_input=on_device()[0])
    reseg.fit_recon([batch(seed=seed) for seed in range(3)], epochs=2, progress=False)
    assert torch.equal(torch.cuda.get_rng_state(), state[0])
    assert torch.equal(torch.get_rng_state(), state[1])
    model(on_device()[0])
    assert not torch.equal(torch.cuda.get_rng_state(), state[0]), "dropout draws on the device"


def test_alignment_draws_no_random_number_on_the_device():
    model, reseg = moved(lambda: UNet(dropout=0.5))
    image, label = on_device()
    model(image)
    state = torch.cuda.get_rng_state()
    reseg.alignment_loss(label).backward()
    assert torch.equal(torch.cuda.get_rng_state(), state)


@pytest.mark.parametrize("normalize", [None, "batch"])
def test_the_loss_has_no_nondeterministic_operator(normalize):
    generator = torch.Generator(DEVICE).manual_seed(0)

    def random_features(grad: bool) -> Features:
        sizes = [(4, 16), (8, 8), (4, 16), (8, 8), (16, 4)]
        f = [torch.randn(2, c, s, s, s, device=DEVICE, generator=generator, requires_grad=grad) for c, s in sizes]
        return Features((f[0], f[1]), (f[2], f[3]), f[4])

    student, teacher = random_features(True), random_features(False)
    valid = (torch.rand(2, 1, 32, 32, 32, device=DEVICE, generator=generator) > 0.3).float()
    loss = CrossAlignmentLoss(normalize=normalize)
    leaves = [*student.encoder, *student.decoder, student.bottleneck]
    runs = []
    torch.use_deterministic_algorithms(True)
    try:
        for _ in range(2):
            value = loss(student, teacher, valid)
            runs.append([value.detach(), *torch.autograd.grad(value, leaves)])
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip(*runs))


# --- compilation


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # the compiler's own
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_a_compiled_model_trains_as_the_plain_one(mode):
    pytest.importorskip("triton")
    torch._dynamo.reset()
    results = []
    for compiled in (False, True):
        model, reseg = moved(dtype=torch.float64)
        run = torch.compile(model, mode=mode) if compiled else model
        optimizer = torch.optim.SGD(model.parameters(), 0.05)
        losses = []
        for seed in range(6):
            image, label = on_device(seed, torch.float64)
            loss = F.cross_entropy(run(image), label) + reseg.alignment_loss(label)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach().clone())
        results.append(vector([*losses, *model.parameters()]))
    assert torch.allclose(*results, rtol=1e-6, atol=1e-8)
