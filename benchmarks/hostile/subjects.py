"""The small nets that are tried, their data, and a legal step of each loss that is checked against the oracle."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import oracle
from .api import CutMixConsistency, DeepSupervision, ReSegWrapper, SemiSupervised, teacher_parts
from .oracle import Truth

CLASSES, SIZE, WIDTH, IGNORED = 3, 32, 4, 255


def block(cin: int, cout: int, dims: int, norm: str) -> nn.Sequential:
    conv = nn.Conv2d if dims == 2 else nn.Conv3d
    batch_norm = nn.BatchNorm2d if dims == 2 else nn.BatchNorm3d
    return nn.Sequential(
        conv(cin, cout, 3, padding=1), nn.GroupNorm(2, cout) if norm == "group" else batch_norm(cout), nn.ReLU()
    )


class Net(nn.Module):
    """A U-Net with strides 1, 2, 4, 8 and a bottleneck; the features are what the blocks return."""

    def __init__(
        self, channels: int = 1, classes: int = CLASSES, dims: int = 2, norm: str = "group", dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.dims = dims
        widths = [WIDTH, 2 * WIDTH, 2 * WIDTH, 4 * WIDTH]
        self.e = nn.ModuleList([block(a, b, dims, norm) for a, b in zip([channels, *widths], widths)])
        self.b = block(widths[-1], widths[-1], dims, norm)
        self.d = nn.ModuleList([block(a + b, b, dims, norm) for a, b in zip([*widths[1:], widths[-1]], widths)])
        self.dropout = nn.Dropout(dropout)
        self.head = (nn.Conv2d if dims == 2 else nn.Conv3d)(widths[0], classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        pool = F.max_pool2d if self.dims == 2 else F.max_pool3d
        skips = []
        for e in self.e:
            x = e(x)
            skips.append(x)
            x = pool(x, 2)
        x = self.dropout(self.b(x))
        for d, skip in zip(reversed(self.d), reversed(skips)):
            x = d(torch.cat([F.interpolate(x, skip.shape[2:]), skip], 1))
        return self.head(x)


TRUTH = Truth(("e.1", "e.2", "e.3"), ("d.1", "d.2", "d.3"), "b")


class TokenNet(Net):
    """The same, its decoder's features of stride 2 and 4 normalised as tokens (B, N, C), or with channels last."""

    def __init__(self, last: bool = False) -> None:
        super().__init__()
        self.last = last
        self.norms = nn.ModuleList([nn.LayerNorm(2 * WIDTH), nn.LayerNorm(2 * WIDTH)])

    def forward(self, x: Tensor) -> Tensor:
        skips = []
        for e in self.e:
            x = e(x)
            skips.append(x)
            x = F.max_pool2d(x, 2)
        x = self.b(x)
        for level in (3, 2, 1, 0):
            x = self.d[level](torch.cat([F.interpolate(x, scale_factor=2), skips[level]], 1))
            if level in (1, 2) and self.last:
                x = self.norms[level - 1](x.movedim(1, -1)).movedim(-1, 1)
            elif level in (1, 2):
                n, c, h, w = x.shape
                x = self.norms[level - 1](x.flatten(2).transpose(1, 2)).transpose(1, 2).reshape(n, c, h, w)
        return self.head(x)


def net(seed: int = 0, kind: Callable[..., nn.Module] = Net, **options: Any) -> Any:
    torch.manual_seed(seed)
    return kind(**options)


def batch(n: int = 2, seed: int = 0, dims: int = 2, channels: int = 1, size: int = SIZE) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1000 + seed)
    label = torch.randint(0, CLASSES, (n, *[size // 4] * dims), generator=generator)
    for axis in range(1, dims + 1):  # patches, so that coarser levels have something to see
        label = label.repeat_interleave(4, axis)
    return label.unsqueeze(1) * 0.5 + 0.2 * torch.randn(n, channels, *[size] * dims, generator=generator), label


def task_loss(logits: Tensor, label: Tensor) -> Tensor:
    return F.cross_entropy(logits, label.long())


def ignoring(logits: Tensor, label: Tensor) -> Tensor:
    return F.cross_entropy(logits, label.long(), ignore_index=IGNORED)


def aligned(model: Any = None, ready: bool = True, **options: Any) -> tuple[Any, ReSegWrapper]:
    """A net and a wrapper with an untrained teacher, which is frozen if `ready`."""
    model = net() if model is None else model
    dims = getattr(model, "dims", 2)
    torch.manual_seed(1)
    options = {"weight": 1.0, "preset": "standardized", "example_input": batch(dims=dims)[0], **options}
    reseg = ReSegWrapper(model, **options)
    if ready:
        reseg.freeze_teacher()
    return model, reseg


def supervised(model: Any = None, **options: Any) -> tuple[Any, DeepSupervision]:
    model = net() if model is None else model
    torch.manual_seed(2)
    return model, DeepSupervision(model, **{"example_input": batch()[0], **options})


def mixing(model: Any = None, **options: Any) -> tuple[Any, CutMixConsistency]:
    model = net() if model is None else model
    settings = {"rampup_steps": None, "ignore_index": IGNORED, "threshold": 0.4, "perturb": None, **options}
    return model, CutMixConsistency(model, **settings)


def semi_supervised(model: Any = None, **options: Any) -> tuple[Any, SemiSupervised]:
    model = net() if model is None else model
    settings = {"rampup_steps": None, "threshold": 0.4, "perturb": None, "task_loss": ignoring, **options}
    settings = {"example_input": batch()[0], **settings}
    torch.manual_seed(2)
    return model, SemiSupervised(model, **settings)


# --- legal steps against the oracle; each raises WrongError


def check_alignment(
    model: Any,
    reseg: ReSegWrapper,
    *,
    truth: Truth = TRUTH,
    standardized: bool = True,
    ignored: float | None = None,
    forward: Callable[[Tensor], Any] | None = None,
    image: Tensor | None = None,
    label: Tensor | None = None,
    form: Callable[[Tensor], Any] = lambda label: label,
    factor: float = 1.0,
    tolerance: float = 1e-4,
    **eq7: Any,
) -> Tensor:
    """One forward and `alignment_loss`; value and gradients of every parameter. `form`: the label as it is passed."""
    if image is None or label is None:
        image, label = batch(dims=model.dims, seed=7)
        if ignored is not None:
            label[0, : SIZE // 2] = int(ignored)
            label[1, 5:9] = int(ignored)
    kept = [t.clone() for t in (*reseg.teacher.parameters(), *reseg.teacher.buffers())]
    with oracle.watching(model, truth) as seen:
        (model if forward is None else forward)(image)
        student = seen()
    ours = reseg.alignment_loss(form(label))
    before, body, _ = teacher_parts(reseg.teacher, type(model))
    encoded, valid = oracle.index_map(label, ignored)
    trial, first = copy.deepcopy(body).eval(), copy.deepcopy(before)
    with oracle.watching(trial, truth) as seen, torch.no_grad():
        trial(first(encoded.to(next(trial.parameters()).dtype)))
        teacher = seen()
    reference = factor * oracle.alignment(student, teacher, standardized=standardized, valid=valid, **eq7)
    oracle.near(ours, reference, "the alignment loss", tolerance)
    parameters = [p for p in model.parameters() if p.requires_grad]
    # of a compiled model its gradients come from the one backward that it has
    oracle.near(
        oracle.gradients(ours, parameters), oracle.gradients(reference, parameters), "the gradient", 10 * tolerance
    )
    oracle.same(kept, [*reseg.teacher.parameters(), *reseg.teacher.buffers()], "the teacher")
    if any(p.grad is not None or p.requires_grad for p in reseg.teacher.parameters()):
        raise oracle.WrongError("the teacher has gradients")
    return ours


def check_supervision(
    model: Any,
    ds: DeepSupervision,
    *,
    ignored: int | None = None,
    weights: tuple[float, ...] = (1.0, 1.0, 1.0),
    forward: Callable[[Tensor], Any] | None = None,
    form: Callable[[Tensor], Any] = lambda label: label,
    loss: Callable[[Tensor, Tensor], Tensor] | None = None,
    size: int = SIZE,
) -> Tensor:
    image, label = (x[..., :size, :size] for x in batch(seed=8, size=-(-size // 4) * 4))
    if ignored is not None:
        label[:, :20] = ignored
    with oracle.watching(model, TRUTH) as seen:
        (model if forward is None else forward)(image)
        student = seen()
    loss = loss or (task_loss if ignored is None else ignoring)
    ours = ds.loss(form(label), loss)
    reference = oracle.deep_supervision(dict(ds.heads.items()), student.decoder, label, weights, ignored)
    oracle.near(ours, reference, "deep supervision")
    of = [p for p in (*model.parameters(), *ds.parameters()) if p.requires_grad]
    oracle.near(oracle.gradients(ours, of), oracle.gradients(reference, of), "its gradient", 1e-3)
    return ours


def check_mixing(
    model: Any,
    mixed: CutMixConsistency,
    *,
    average: nn.Module | None = None,
    threshold: float = 0.4,
    factor: float = 1.0,
    ignored: int = IGNORED,
    images: Tensor | None = None,
) -> Tensor:
    """`average`: the mean teacher as it must be; None is the model, as before the first `update`."""
    images = batch(4, seed=9)[0] if images is None else images
    pseudo = _pseudo_label(model if average is None else average, images, threshold, ignored, model.training)
    seen: dict[str, Tensor] = {}

    def forward(x: Tensor) -> Tensor:
        seen["mixed"], seen["logits"] = x, model(x)
        return seen["logits"]

    def loss(logits: Tensor, label: Tensor) -> Tensor:
        seen["label"] = label
        return F.cross_entropy(logits, label, ignore_index=ignored)

    ours = mixed.loss(images, loss, forward=forward)
    expected = _exchanged(images, seen["mixed"], pseudo)
    if bool((expected != ignored).any()):
        oracle.same(seen["label"], expected, "the pseudo-label")
    reference = factor * oracle.cross_entropy(seen["logits"], expected, ignored)
    oracle.near(ours, reference, "the loss on unlabelled images")
    of = [p for p in model.parameters() if p.requires_grad]
    oracle.near(oracle.gradients(ours, of), oracle.gradients(reference, of), "its gradient", 1e-3)
    if any(p.requires_grad or p.grad is not None for p in mixed.average.parameters()):
        raise oracle.WrongError("the mean teacher has gradients")
    return ours


def check_semi(
    model: Any,
    semi: SemiSupervised,
    *,
    average: nn.Module | None = None,
    factor: float = 1.0,
    weights: tuple[float, ...] = (1.0, 1.0, 1.0),
    halves: bool = False,
) -> Tensor:
    """As `check_mixing`, of both kinds of images and their coarser levels; `halves`: by mix and loss_of."""
    (image, label), images = batch(seed=8), batch(4, seed=9)[0]
    label[:, :5] = IGNORED
    pseudo = _pseudo_label(model if average is None else average, images, 0.4, IGNORED, model.training)
    ran: list[tuple[Tensor, Tensor, list[Tensor]]] = []

    def forward(x: Tensor) -> Tensor:
        with oracle.watching(model, TRUTH) as seen:
            y = model(x)
            ran.append((x, y, seen().decoder))
        return y

    if halves:
        x, y = semi.mix(image, label, images)
        ours = semi.loss_of(forward(x), y)
    else:
        ours = semi.loss(image, label, images, forward=forward)
    heads = {} if semi.deep is None else dict(semi.deep.heads.items())

    def reference(logits: Tensor, features: list[Tensor], target: Tensor) -> Tensor:
        deep = oracle.deep_supervision(heads, features, target, weights, IGNORED) if heads else 0.0
        return oracle.cross_entropy(logits, target, IGNORED) + deep

    n = len(image)
    x, logits, features = ran[0]
    oracle.same(x[:n], image, "labelled images")
    expected = reference(logits[:n], [f[:n] for f in features], label)
    if semi.weight:
        if not semi.joint:
            n, (x, logits, features) = 0, ran[1]
        target = _exchanged(images, x[n:], pseudo)
        expected = expected + factor * reference(logits[n:], [f[n:] for f in features], target)
    oracle.near(ours, expected, "the semi-supervised loss")
    of = [p for p in (*model.parameters(), *semi.parameters()) if p.requires_grad]
    oracle.near(oracle.gradients(ours, of), oracle.gradients(expected, of), "its gradient", 1e-3)
    if any(p.requires_grad or p.grad is not None for p in semi.average.parameters()):
        raise oracle.WrongError("the mean teacher has gradients")
    return ours


def _pseudo_label(average: nn.Module, images: Tensor, threshold: float, ignored: int, training: bool) -> Tensor:
    teacher: Any = copy.deepcopy(average).train(training)
    with torch.no_grad():
        p = teacher(images).double().softmax(1)
    confidence, pseudo = p.max(1)
    return torch.where(confidence >= threshold, pseudo, torch.full_like(pseudo, ignored))


def _exchanged(images: Tensor, mixed: Tensor, pseudo: Tensor) -> Tensor:
    """The label of mixed images; a WrongError unless a box of each is the one before's."""
    other = images.roll(1, 0)
    moved = (mixed != images).any(1)
    for i, area in enumerate(moved):
        rows, columns = area.any(1), area.any(0)
        if not torch.equal(area, rows[:, None] & columns[None]):
            raise oracle.WrongError("what is exchanged is no box")
        for side, n in ((rows, area.shape[0]), (columns, area.shape[1])):
            if not n / 4 - 1 <= int(side.sum()) <= n / 2 + 1:
                raise oracle.WrongError(f"the box has {int(side.sum())} of {n} pixels, not a quarter to a half")
        oracle.same(mixed[i][:, area], other[i][:, area], "what is in the box")
    return torch.where(moved, pseudo.roll(1, 0), pseudo)


def followed(average: dict[str, Tensor], model: nn.Module, decay: float) -> dict[str, Tensor]:
    """The mean teacher's parameters after one more update, in fp64."""
    return {n: decay * average[n] + (1 - decay) * p.detach().double() for n, p in model.named_parameters()}
