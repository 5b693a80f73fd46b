"""A bad input is blamed on itself: told of in a sentence that names it, by every loss, at the first call and later."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from models import IGNORED, UNet, batch, ignoring, ready, task_loss
from torch import Tensor, nn

from reseg_loss import CutMixConsistency, DeepSupervision, ReSegError, ReSegWrapper
from reseg_loss.common.inputs import readable

Step = Callable[[Tensor, Tensor], Tensor]


def alignment(model: UNet) -> Step:
    reseg = ReSegWrapper(model, example_input=batch()[0])
    reseg.freeze_teacher()

    def step(image: Tensor, label: Tensor) -> Tensor:
        model(image)
        return reseg.alignment_loss(label)

    return step


def heads(model: UNet, loss: Callable[[Tensor, Tensor], Tensor] = task_loss, **options: Any) -> Step:
    ds = DeepSupervision(model, batch()[0], **options)

    def step(image: Tensor, label: Tensor) -> Tensor:
        model(image)
        return ds.loss(label, loss)

    return step


def unlabelled(model: UNet, deep: bool = False) -> Step:
    ds = DeepSupervision(model, batch()[0], ignore_index=IGNORED) if deep else None
    mixed = CutMixConsistency(model, deep=ds, rampup_steps=None, ignore_index=IGNORED, perturb=None)
    return lambda image, label: mixed.loss(image, ignoring)


def unlabelled_with_heads(model: UNet) -> Step:
    return unlabelled(model, deep=True)


of_all = pytest.mark.parametrize(
    "make", [alignment, heads, unlabelled, unlabelled_with_heads], ids=lambda make: make.__name__
)


def spoilt(x: Tensor, value: float) -> Tensor:
    x = x.clone()
    x.view(-1)[3] = value
    return x


@of_all
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("good", [0, 2])
def test_images_that_are_not_finite_are_named_at_any_call_and_leave_nothing_behind(make, value, good):
    step = make(UNet())
    image, label = batch()
    for _ in range(good):
        assert step(image, label).isfinite()
    with pytest.raises(ReSegError, match="images of this step hold NaN or infinite values") as error:
        step(spoilt(image, value), label)
    assert str(error.value).startswith("unlabelled") == make.__name__.startswith("unlabelled")
    model = UNet()
    step = make(model)
    with pytest.raises(ReSegError, match="images of this step"):
        step(spoilt(image, value), label)
    for buffer in model.buffers():  # batch statistics have seen it
        buffer.nan_to_num_(1.0)
    if not make.__name__.startswith("unlabelled"):  # whose mean teacher has statistics of its own
        assert step(image, label).isfinite()


@of_all
def test_a_model_whose_weights_are_not_finite_is_named(make):
    model = UNet()
    step = make(model)
    with torch.no_grad():
        next(model.encoder.parameters())[0] = float("nan")
    with pytest.raises(ReSegError, match="the model returns NaN or infinite values for finite images"):
        step(*batch())


def test_a_teacher_and_heads_whose_weights_are_not_finite_are_named():
    model, reseg = ready()
    next(reseg.teacher.parameters()).data.fill_(float("nan"))
    model(batch()[0])
    with pytest.raises(ReSegError, match="the teacher's features hold NaN"):
        reseg.alignment_loss(batch()[1])
    ds = DeepSupervision(model, batch()[0])
    next(ds.parameters()).data.fill_(float("nan"))
    model(batch()[0])
    with pytest.raises(ReSegError, match="the head decoder_1 is not finite"):
        ds.loss(batch()[1], task_loss)


def test_label_values_are_looked_at_at_every_call_on_the_cpu():
    image, label = batch()
    step = alignment(UNet())
    step(image, label)
    with pytest.raises(ReSegError, match=r"label has values \[255.0\]"):
        step(image, label.masked_fill(label == 2, 255))


def test_a_label_that_is_all_ignored_is_named_where_the_loss_is_nan_there():
    image, label = batch()
    step = heads(UNet(), ignoring)  # without ignore_index of its own
    step(image, label)
    with pytest.raises(ReSegError, match=r"NaN or infinite for the head decoder_1.*ignore_index= to DeepSupervision"):
        step(image, torch.full_like(label, IGNORED))
    assert heads(UNet(), ignoring, ignore_index=IGNORED)(image, torch.full_like(label, IGNORED)) == 0


def test_a_model_that_is_moved_to_another_dtype_is_named_and_what_is_beside_it_can_follow():
    image, label = (x.double() if x.is_floating_point() else x for x in batch())
    model = UNet()
    ds = DeepSupervision(model, batch()[0], ignore_index=IGNORED)
    mixed = CutMixConsistency(model, rampup_steps=None, ignore_index=IGNORED)
    model.double()
    model(image)
    with pytest.raises(ReSegError, match=r"features are torch.float64, but the heads .*: ds.to\(torch.float64\)"):
        ds.loss(label, task_loss)
    with pytest.raises(ReSegError, match=r"mean teacher's are torch.float32.*: call to\(torch.float64\) of this loss"):
        mixed.loss(image, ignoring)
    for each in (ds, mixed):
        each.to(torch.float64)
    model(image)
    assert ds.loss(label, task_loss) > 0
    assert mixed.loss(image, ignoring) >= 0
    model.bfloat16()
    mixed.to(torch.bfloat16)
    with pytest.raises(ReSegError, match=r"bfloat16 parameters, and the small steps"):
        mixed.update()


@pytest.mark.parametrize("make", [alignment, heads])
def test_an_empty_batch_is_named(make):
    image, label = batch()
    with pytest.raises(ReSegError, match="the batch is empty"):
        make(UNet())(image[:0], label[:0])


def test_empty_batches_of_unlabelled_images_and_examples_are_named():
    image, _ = batch()
    with pytest.raises(ReSegError, match="an empty batch has no unlabelled images"):
        unlabelled(UNet())(image[:0], image)
    for build in (
        lambda: ReSegWrapper(UNet(), example_input=image[:0]),
        lambda: DeepSupervision(UNet(), image[:0]),
    ):
        with pytest.raises(ReSegError, match="the example is empty"):
            build()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_an_example_of_another_dtype_is_told_apart_from_a_model_that_fails(dtype):
    image, _ = batch()
    message = rf"{dtype}, on cpu; its parameters are torch.float32"
    with pytest.raises(ReSegError, match=message):
        ReSegWrapper(UNet(), example_input=image.to(dtype))
    with pytest.raises(ReSegError, match=message):
        DeepSupervision(UNet(), image.to(dtype))
    with pytest.raises(ReSegError, match=rf"{dtype}"):
        unlabelled(UNet())(image.to(dtype), image)

    class Casts(UNet):
        def forward(self, x: Tensor) -> Any:
            return super().forward(x.float())

    ReSegWrapper(Casts(), example_input=image.to(dtype), teacher_init="copy")


def test_a_model_that_fails_on_the_example_is_blamed_with_its_own_error():
    class Fails(UNet):
        def forward(self, x: Tensor) -> Any:
            raise RuntimeError("mine")

    with pytest.raises(ReSegError, match=r"the model fails on the example.*RuntimeError: mine") as caught:
        ReSegWrapper(Fails(), example_input=batch()[0])
    assert str(caught.value.__cause__) == "mine"


@pytest.mark.parametrize("label", [batch()[1].float(), batch()[1] + 7], ids=["float", "no class"])
def test_a_label_that_the_task_loss_fails_on_is_shown_with_the_logits(label):
    with pytest.raises(
        ReSegError, match=r"task_loss failed on the head decoder_1: logits of shape \(2, 3, 8, 8\).*label of shape"
    ):
        heads(UNet())(batch()[0], label)


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (None, "task_loss must be a function of logits and label, got NoneType"),
        (lambda x, y: None, "task_loss returned NoneType; it must return a scalar"),
        (lambda x, y: F.cross_entropy(x, y, ignore_index=IGNORED, reduction="none"), "returned a tensor of shape"),
    ],
)
def test_what_is_no_task_loss_is_named_by_both_at_any_call(loss, message):
    image, label = batch()
    with pytest.raises(ReSegError, match=message):
        heads(UNet(), loss)(image, label)
    for good in (0, 1):
        mixed = CutMixConsistency(UNet(), rampup_steps=None, ignore_index=IGNORED)
        for _ in range(good):
            mixed.loss(image, ignoring)
        with pytest.raises(ReSegError, match=message):
            mixed.loss(image, loss)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_losses_without_gradients_are_refused(context):
    image, label = batch()
    for make in (alignment, heads, unlabelled):
        step = make(UNet())
        with context(), pytest.raises(ReSegError, match="gradients"):
            step(image, label)
        assert step(image, label).requires_grad


def test_a_perturbation_that_is_not_finite_is_named_and_a_weight_that_is_no_number():
    image, _ = batch()
    mixed = CutMixConsistency(UNet(), rampup_steps=None, ignore_index=IGNORED, perturb=lambda x: x / 0)
    with pytest.raises(ReSegError, match="perturb= returned NaN or infinite values"):
        mixed.loss(image, ignoring)
    for weight in (float("nan"), -1.0, "1"):
        with pytest.raises(ReSegError, match="it must be a finite number"):
            mixed.loss(image, ignoring, weight=weight)  # pyright: ignore[reportArgumentType]


def test_a_loss_that_cannot_leave_a_value_out_is_told_that_another_may_be_given():
    def dice(logits: Tensor, label: Tensor) -> Tensor:
        return 1 - (logits.softmax(1) * F.one_hot(label.clamp_max(2), 3).movedim(-1, 1)).mean()

    mixed = CutMixConsistency(UNet(), rampup_steps=None, ignore_index=IGNORED)
    with pytest.raises(ReSegError, match="pass another loss here: it need not be the same"):
        mixed.loss(batch()[0], dice)


def test_values_are_read_on_the_cpu_and_elsewhere_at_the_first_call_alone():
    assert readable(torch.device("cpu"))
    assert not readable(torch.device("meta"))
    assert readable(torch.device("meta"), first=True)


def test_a_model_with_images_that_are_not_finite_is_still_copied_and_tapped():
    """What an example holds does not matter, only its shapes."""
    image, _ = batch()
    assert isinstance(ReSegWrapper(UNet(), example_input=spoilt(image, float("nan"))).teacher, nn.Module)


NAN = float("nan")
WRONG_KINDS: list[tuple[str, Callable[[UNet], Any]]] = [
    ("rampup_steps=nan; it must be a whole number >= 1", lambda m: unlabelled_with(m, rampup_steps=NAN)),
    ("threshold='0.9'; it must be a finite number >= 0 and <= 1", lambda m: unlabelled_with(m, threshold="0.9")),
    ("ema_decay=None; it must be a finite number >= 0 and < 1", lambda m: unlabelled_with(m, ema_decay=None)),
    ("ignore_index=1.5; it must be a whole number", lambda m: unlabelled_with(m, ignore_index=1.5)),
    ("deep= must be the model's DeepSupervision, got UNet", lambda m: unlabelled_with(m, deep=m)),
    ("num_classes='3'; it must be a whole number >= 1", lambda m: DeepSupervision(m, num_classes="3")),  # pyright: ignore
    ("ignore_index=inf; it must be a whole number", lambda m: DeepSupervision(m, ignore_index=float("inf"))),  # pyright: ignore
    ("level_weights=0.5; pass one weight for each", lambda m: DeepSupervision(m, level_weights=0.5)),  # pyright: ignore
    ("there is no head 'decoder_0'", lambda m: DeepSupervision(m, batch()[0]).weight_of("decoder_0")),
    ("epochs=1.5; it must be a whole number >= 1", lambda m: ReSegWrapper(m).fit_recon([batch()], epochs=1.5)),  # pyright: ignore
    ("steps=nan; it must be a whole number", lambda m: ReSegWrapper(m).fit_recon([batch()], steps=NAN)),  # pyright: ignore
    ("a loader that yields batches, got int", lambda m: ReSegWrapper(m).fit_recon(3, epochs=1)),  # pyright: ignore
    ("got 'adam'", lambda m: ReSegWrapper(m).fit_recon([batch()], epochs=1, optimizer="adam")),  # pyright: ignore
    ("it returned None", lambda m: ReSegWrapper(m).fit_recon([batch()], epochs=1, optimizer=lambda p: None)),  # pyright: ignore
    ("zero byte", lambda m: ReSegWrapper(m).fit_recon([batch()], epochs=1, checkpoint="a\0b")),
    ("got int", lambda m: ReSegWrapper(3)),  # pyright: ignore
]


def unlabelled_with(model: UNet, **settings: Any) -> CutMixConsistency:
    return CutMixConsistency(model, **{"rampup_steps": None, "ignore_index": IGNORED, **settings})


@pytest.mark.parametrize(("message", "use"), WRONG_KINDS, ids=[message for message, _ in WRONG_KINDS])
def test_what_is_of_the_wrong_kind_is_named(message, use):
    with pytest.raises(ReSegError, match=re.escape(message)):
        use(UNet())


def test_a_weight_tensor_with_axes_is_refused():
    with pytest.raises(ReSegError, match=r"weight= has shape \(2,\)"):
        unlabelled_with(UNet()).loss(batch()[0], ignoring, weight=torch.ones(2))


def test_nothing_is_built_in_inference_mode():
    for make in (alignment, heads, unlabelled):
        with torch.inference_mode(), pytest.raises(ReSegError, match="build this outside inference mode"):
            make(UNet())


def test_a_label_that_is_none_leaves_no_forward_behind():
    model, (image, label) = UNet(), batch()
    step = alignment(model)
    with pytest.raises(ReSegError, match="a label must be a dense tensor"):
        step(image, None)  # pyright: ignore[reportArgumentType]
    assert step(image, label) > 0


def test_a_state_whose_teacher_holds_nan_is_refused():
    _, reseg = ready()
    state, before = reseg.state_dict(), [p.clone() for p in reseg.teacher.parameters()]
    name = next(iter(dict(reseg.teacher.named_parameters())))
    state["parts"]["teacher"] = {**state["parts"]["teacher"], name: torch.full_like(before[0], NAN)}
    with pytest.raises(ReSegError, match="NaN or infinite values in this state"):
        reseg.load_state_dict(state)
    assert all(map(torch.equal, before, reseg.teacher.parameters()))
