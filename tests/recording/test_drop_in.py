"""What a library that hooks into someone else's model and loop must not disturb, and what it must refuse."""

from __future__ import annotations

import copy
import gc
import pickle
import random
import warnings
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import pytest
import torch
from models import UNet, batch, inplace, loader, ready, recording_of, task_loss, tensors_in, through_file
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from reseg_loss import FeatureExtractor, ReSegError, ReSegWrapper, TapError

SEEN = {"encoder": ["encoder.1", "encoder.2"], "decoder": ["decoder.1", "decoder.0"], "bottleneck": "bottleneck"}


def group_norm(channels: int) -> nn.Module:
    return nn.GroupNorm(1, channels)


def without_batch_norm() -> UNet:
    """A model whose outputs do not depend on the rest of the batch, nor on earlier batches."""
    return UNet(norm=group_norm)


def hooks(model: nn.Module) -> int:
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks", "_state_dict_hooks")
    extra = ("_forward_hooks_with_kwargs", "_forward_pre_hooks_with_kwargs", "_forward_hooks_always_called")
    return sum(len(getattr(module, kind)) for module in model.modules() for kind in (*kinds, *extra))


def gradients(model: nn.Module) -> list[Tensor]:
    return [torch.zeros(0) if p.grad is None else p.grad.clone() for p in model.parameters()]


def same(a: Any, b: Any) -> bool:
    """Equal bit for bit, in any nesting."""
    first, second = tree_leaves(a), tree_leaves(b)
    return len(first) == len(second) and all(
        torch.equal(x, y) if isinstance(x, Tensor) else x == y for x, y in zip(first, second)
    )


def held(extractor: FeatureExtractor) -> list[StorageWeakRef]:
    """Weak references to the memory of features that wait to be read, or that a running forward has recorded."""
    return [StorageWeakRef(tensor.untyped_storage()) for tensor in tensors_in(extractor) if tensor.grad_fn is not None]


class LiveMemory(TorchDispatchMode):
    """Every storage that an operator, forward or backward, has returned and that still exists."""

    def __init__(self) -> None:
        super().__init__()
        self.storages: dict[StorageWeakRef, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self.storages[StorageWeakRef(leaf.untyped_storage())] = leaf.untyped_storage().nbytes()
        return result

    def count(self) -> tuple[int, int]:
        """(storages, bytes)"""
        self.storages = {reference: size for reference, size in self.storages.items() if not reference.expired()}
        return len(self.storages), sum(self.storages.values())


# --- the run without the alignment is the run without the library


def full_run(wrap: Callable[[nn.Module, Any], ReSegWrapper | None]) -> list[Any]:
    """Two epochs with shuffling, dropout, augmentation and momentum: all that is left of them, random states too."""
    torch.manual_seed(0)
    random.seed(0)
    model, data = UNet(dropout=0.5), loader(4)
    reseg = wrap(model, data)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    left: list[Any] = []
    for _ in range(2):
        model.train()
        for image, label in data:
            image = image + random.random() * torch.randn_like(image)
            loss = task_loss(model(image), label)
            if reseg is not None:
                loss = loss + reseg.alignment_loss(label)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            left.append(loss.detach())
        model.eval()
        with torch.no_grad():
            left.append(model(batch(seed=5)[0]))
    buffers = [optimizer.state[p]["momentum_buffer"] for p in model.parameters()]
    return [*left, dict(model.state_dict()), gradients(model), buffers, torch.get_rng_state(), random.getstate()]


def without_stage_1(model: nn.Module, data: Any) -> ReSegWrapper:
    return ReSegWrapper(model, example_input=batch()[0], weight=0)


def without_example(model: nn.Module, data: Any) -> ReSegWrapper:
    return ReSegWrapper(model, weight=0)


def after_stage_1(model: nn.Module, data: Any) -> ReSegWrapper:
    reseg = ReSegWrapper(model, weight=0)
    reseg.fit_recon(data, epochs=2, progress=False)
    return reseg


@pytest.mark.filterwarnings("ignore:the teacher's reconstruction loss")
@pytest.mark.parametrize("wrap", [without_stage_1, without_example, after_stage_1])
def test_weight_0_is_the_run_without_the_library_bit_for_bit(wrap):
    expected = full_run(lambda model, data: None)
    assert same(full_run(wrap), expected)
    moved = full_run(lambda model, data: torch.rand(1) and None)
    assert not same(moved, expected), "the comparison sees a single random number more"


@pytest.mark.parametrize("weight", [0, 0.035])
def test_the_hooks_return_nothing_so_outputs_and_task_gradients_are_bit_equal(weight):
    torch.manual_seed(1)
    model = UNet(dropout=0.5)
    bare = copy.deepcopy(model)
    _, reseg = ready(model, weight=weight)
    results = []
    for net in (bare, model):
        torch.manual_seed(2)
        outputs = []
        for seed in range(3):
            image, label = batch(seed=seed)
            outputs.append(net(image))
            if net is model:
                reseg.alignment_loss(label)
            task_loss(outputs[-1], label).backward()
        results.append([outputs, gradients(net), dict(net.state_dict()), torch.get_rng_state()])
    assert same(*results)


def test_the_alignment_alone_trains_everything_before_its_last_tap():
    model, reseg = ready()
    image, label = batch()
    model(image)
    reseg.alignment_loss(label).backward()
    last = reseg.extractor.plan.selected[0].decoder.module
    after = {"decoder.1": ("up.2", "decoder.2", "head"), "decoder.2": ("head",)}[last]
    assert all((p.grad is None) == name.startswith(after) for name, p in model.named_parameters())


def test_state_dict_keys_values_parameters_and_modes_of_the_model_stay():
    torch.manual_seed(1)
    model = UNet()
    model.encoder[0].eval()
    state, modes = copy.deepcopy(model.state_dict()), [m.training for m in model.modules()]
    names = [name for name, _ in model.named_modules()]
    _, reseg = ready(model)
    assert list(model.state_dict()) == list(state)
    assert same(dict(model.state_dict()), dict(state))
    assert [name for name, _ in model.named_modules()] == names
    assert [m.training for m in model.modules()] == modes
    theirs = {id(p) for p in model.parameters()}
    assert not any(id(p) in theirs for p in reseg.teacher.parameters())
    storages = {t.data_ptr() for t in model.state_dict().values()}
    assert not any(t.data_ptr() in storages for t in reseg.teacher.state_dict().values())
    assert list(reseg.parameters()) == []


# --- memory


def test_memory_is_flat_over_200_steps():
    torch.manual_seed(0)
    model = UNet(width=2)
    data = [batch(seed=seed) for seed in range(4)]
    _, reseg = ready(model, data[0][0])
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    counts, objects = set(), set()
    gc.disable()
    try:
        with LiveMemory() as live:
            for step in range(200):
                image, label = data[step % 4]
                loss = task_loss(model(image), label) + reseg.alignment_loss(label)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                del loss
                if step >= 3:
                    counts.add(live.count())
                if step % 40 == 20:
                    objects.add(sum(issubclass(type(o), Tensor) for o in gc.get_objects()))
    finally:
        gc.enable()
    assert len(counts) == 1, counts
    assert len(objects) == 1, objects


def test_a_step_leaves_nothing_but_the_scalars_of_its_statistics():
    image, label = batch()
    model, reseg = ready()
    with LiveMemory() as live:
        loss = task_loss(model(image), label) + reseg.alignment_loss(label)
        loss.backward()
        del loss
        model.zero_grad()
    there_before = [image, label, *model.state_dict().values(), *reseg.teacher.state_dict().values()]
    for tensor in there_before:
        live.storages.pop(StorageWeakRef(tensor.untyped_storage()), None)
    count, size = live.count()
    assert count <= len(reseg.stats())
    assert size <= 4 * len(reseg.stats())


def test_nothing_is_held_at_weight_0_in_evaluation_or_without_gradients():
    image, _ = batch()
    model, reseg = ready()
    model.eval()
    model(image)
    assert not held(reseg.extractor)
    model.train()
    with torch.no_grad():
        model(image)
    assert not held(reseg.extractor)
    reseg.weight = 0
    model(image)
    assert not held(reseg.extractor)
    reseg.weight = 1
    model(image)
    assert held(reseg.extractor)
    reseg.weight = 0
    assert not held(reseg.extractor)


def test_features_are_freed_once_they_are_read_and_their_graph_is_gone():
    image, label = batch()
    model, reseg = ready()
    output = model(image)
    references = held(reseg.extractor)
    assert len(references) >= 5
    loss = reseg.alignment_loss(label)
    assert not held(reseg.extractor)
    loss.backward()
    del loss, output
    assert all(reference.expired() for reference in references)


# --- exceptions


class Failing(UNet):
    """A model whose head raises when told to."""

    error: BaseException | None = None
    references: list[StorageWeakRef]

    def forward(self, x):
        if self.error is not None:
            handle = self.head.register_forward_pre_hook(self.fail)
            try:
                return super().forward(x)
            finally:
                handle.remove()
        return super().forward(x)

    def fail(self, module, args):
        Failing.references = held(self.extractor[0])
        raise self.error


def failing() -> tuple[Failing, ReSegWrapper]:
    model, reseg = ready(Failing())
    model.extractor = [reseg.extractor]
    return model, reseg


@pytest.mark.parametrize("error", [RuntimeError("out of memory"), KeyboardInterrupt()])
def test_an_exception_inside_forward_leaves_no_feature_and_the_next_step_works(error):
    image, label = batch()
    model, reseg = failing()
    count = hooks(model)
    loss = task_loss(model(image), label) + reseg.alignment_loss(label)
    model.error = error
    with pytest.raises(type(error)):
        model(image)
    model.error = None
    assert len(Failing.references) >= 5
    with pytest.raises(ReSegError, match="no training forward"):
        reseg.alignment_loss(label)
    error.__traceback__ = None
    gc.collect()
    assert all(reference.expired() for reference in Failing.references)
    assert hooks(model) == count
    assert torch.isfinite(loss)
    model(image)
    assert reseg.alignment_loss(label) > 0


def test_a_failed_forward_frees_its_features_without_any_further_call():
    model, _ = failing()
    model.error = RuntimeError("out of memory")
    try:
        model(batch()[0])
    except RuntimeError as error:
        error.__traceback__ = None
    model.error.__traceback__ = None
    gc.collect()
    assert Failing.references
    assert all(reference.expired() for reference in Failing.references)


def test_a_failed_forward_after_an_unread_one_forgets_both():
    image, label = batch()
    model, reseg = failing()
    model(image)
    model.error = RuntimeError("out of memory")
    with pytest.raises(RuntimeError, match="out of memory"):
        model(image)
    model.error = None
    assert not held(reseg.extractor)
    model(image)
    assert reseg.alignment_loss(label) > 0


def test_a_refused_label_leaves_no_feature():
    image, label = batch()
    model, reseg = ready()
    output = model(image)
    references = held(reseg.extractor)
    with pytest.raises(ReSegError, match="does not fit an image"):
        reseg.alignment_loss(label[:, ::2])
    del output
    gc.collect()
    assert all(reference.expired() for reference in references)


def test_a_refused_call_forgets_the_forward_that_waited_for_it():
    image, label = batch()
    model, reseg = ready()
    model(image)
    model.eval()
    with pytest.raises(ReSegError, match="evaluation"):
        reseg.alignment_loss(label)
    assert not held(reseg.extractor)
    model.train()(image)
    with pytest.raises(ReSegError, match="a label must be a dense tensor"):
        reseg.alignment_loss(None)
    assert not held(reseg.extractor)
    model(image)
    assert reseg.alignment_loss(label) > 0


def test_a_teacher_that_fails_leaves_no_feature_and_the_next_step_works():
    image, label = batch()
    model, reseg = ready()

    def fail(module, args):
        raise RuntimeError("teacher is out of memory")

    model(image)
    handle = reseg.teacher.body.bottleneck.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="teacher is out of memory"):
        reseg.alignment_loss(label)
    handle.remove()
    assert not held(reseg.extractor)
    assert not tensors_in(recording_of(reseg.teacher.body))
    model(image)
    assert reseg.alignment_loss(label) > 0


# --- hooks go away


def test_remove_and_context_manager_leave_the_hooks_that_were_there_before():
    model, image = UNet(), batch()[0]
    model.bottleneck.register_forward_hook(lambda module, args, output: None)
    count = hooks(model)
    _, reseg = ready(model)
    assert hooks(model) > count
    reseg.remove()
    assert hooks(model) == count
    with (
        pytest.raises(ReSegError, match="no training forward"),
        FeatureExtractor(model, image, taps=SEEN) as extractor,
    ):
        extractor.pop()
    assert hooks(model) == count
    with FeatureExtractor(model, image, taps=SEEN) as extractor:
        model(image)
        assert len(extractor.pop().encoder) == 2
    assert hooks(model) == count


def test_a_wrapper_that_is_forgotten_takes_its_hooks_and_features_along():
    image, _ = batch()
    model, reseg = ready()
    output = model(image)
    references, alive = held(reseg.extractor), weakref.ref(reseg.teacher)
    gc.disable()
    try:
        del reseg
        assert hooks(model) == 0
        assert alive() is None
        del output
        assert all(reference.expired() for reference in references)
    finally:
        gc.enable()
    model(image)


def test_a_model_that_is_forgotten_is_freed_with_its_wrapper():
    model, reseg = ready()
    model(batch()[0])
    alive = weakref.ref(model)
    gc.disable()
    try:
        del model, reseg
        assert alive() is None
    finally:
        gc.enable()


# --- copies


def through_pickle(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(model))


def through_torch_save(model: nn.Module) -> nn.Module:
    return through_file(model, weights_only=False)


@pytest.mark.parametrize("mid_step", [False, True])
@pytest.mark.parametrize("copied", [copy.deepcopy, through_pickle, through_torch_save])
def test_copies_of_a_hooked_model_have_inert_hooks(copied, mid_step):
    image, label = batch()
    model, reseg = ready()
    if mid_step:
        model(image)
    other = copied(model)
    assert same(dict(other.state_dict()), dict(model.state_dict()))
    other.train()(image + 1)  # a hook that were alive would record a second forward
    if not mid_step:
        with pytest.raises(ReSegError, match="no training forward"):
            reseg.alignment_loss(label)
        model(image)
    reseg.alignment_loss(label).backward()
    assert all(p.grad is None for p in other.parameters())
    theirs = ReSegWrapper(other, example_input=image)
    theirs.freeze_teacher()
    other(image)
    assert theirs.alignment_loss(label) > 0
    with pytest.raises(ReSegError, match="no training forward"):
        reseg.alignment_loss(label)


@pytest.mark.parametrize("mid_step", [False, True])
def test_an_ema_copy_averages_the_same_and_does_not_write_into_the_original(mid_step):
    from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

    image, label = batch()
    results = []
    for weight in (0, 0.035):
        model, reseg = ready(weight=weight)
        if not mid_step:
            ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5))
        loss = task_loss(model(image), label)
        if mid_step:
            ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5))
        (loss + 0 * reseg.alignment_loss(label)).backward()
        torch.optim.SGD(model.parameters(), 0.1).step()
        ema.update_parameters(model)
        ema.train()
        results.append([ema(image), dict(ema.state_dict())])
        with pytest.raises(ReSegError, match="no training forward") if weight else nullcontext():
            reseg.alignment_loss(label)
    assert same(*results)


class Task(nn.Module):
    """What a LightningModule is to us: a module that holds the model, and the wrapper as a plain attribute."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__()
        self.net, self.reseg = ready(**kwargs)

    def step(self, image: Tensor, label: Tensor) -> Tensor:
        return task_loss(self.net(image), label) + self.reseg.alignment_loss(label)


def test_as_an_attribute_of_a_module_the_wrapper_adds_no_key_and_no_parameter():
    task = Task()
    assert list(task.state_dict()) == [f"net.{key}" for key in UNet().state_dict()]
    assert [name for name, _ in task.named_parameters()] == [f"net.{name}" for name, _ in UNet().named_parameters()]
    assert not any(module is task.reseg.teacher for module in task.modules())
    task.load_state_dict(Task().state_dict(), strict=True)
    task.step(*batch()).backward()


def test_a_loop_that_calls_train_eval_and_zero_grad_on_everything_does_not_reach_the_teacher():
    task, (image, label) = Task(), batch()
    expected = {name: value.clone() for name, value in task.reseg.teacher.state_dict().items()}
    task.eval()
    task.train()
    task.requires_grad_(True)
    task.step(image, label).backward()
    teacher = task.reseg.teacher
    assert not any(module.training for module in teacher.modules())
    assert not any(p.requires_grad for p in teacher.parameters())
    assert same(dict(teacher.state_dict()), expected)


@pytest.mark.parametrize("mid_step", [False, True])
@pytest.mark.parametrize("copied", [copy.deepcopy, through_pickle, through_torch_save])
def test_a_copy_of_model_and_wrapper_together_trains_on_its_own(copied, mid_step):
    # as torch.multiprocessing.spawn and an EMA of a whole LightningModule make it
    image, label = batch()
    task = Task()
    if mid_step:
        task.net(image)
    other = copied(task)
    if mid_step:
        task.reseg.extractor.forget()
    results = []
    for each in (task, other):
        each.zero_grad()
        each.step(image, label).backward()
        results.append(gradients(each))
    assert same(*results)
    assert not held(task.reseg.extractor)
    other.reseg.remove()
    task.step(image, label)


# --- activation checkpointing


class Checkpointed(UNet):
    """A U-Net whose blocks are recomputed in the backward pass."""

    reentrant = False

    def run(self, block: nn.Module, x: Tensor) -> Tensor:
        return checkpoint(block, x, use_reentrant=self.reentrant)

    def forward(self, x):
        skips = []
        for encode in self.encoder:
            x = self.run(encode, x)
            skips.append(x)
            x = self.pool(x)
        x = self.run(self.bottleneck, x)
        for up, decode, skip in zip(self.up, self.decoder, reversed(skips)):
            x = self.run(decode, torch.cat([up(x), skip], 1))
        return self.head(x)


def two_steps(model: nn.Module, reseg: ReSegWrapper, run: Callable[[Tensor], Tensor]) -> list[Any]:
    values: list[Any] = []
    for seed in range(2):
        image, label = batch(seed=seed)
        loss = task_loss(run(image), label) + reseg.alignment_loss(label)
        loss.backward()
        values.append(loss.detach())
    assert not held(reseg.extractor)
    return [*values, gradients(model)]


@pytest.mark.parametrize("whole", [False, True])
def test_non_reentrant_checkpointing_gives_the_gradients_of_the_plain_model(whole):
    plain, reseg = ready(without_batch_norm, weight=1.0)
    expected = two_steps(plain, reseg, plain)
    model, reseg = ready(without_batch_norm if whole else partial(Checkpointed, norm=group_norm), weight=1.0)
    actual = two_steps(model, reseg, (lambda x: checkpoint(model, x, use_reentrant=False)) if whole else model)
    assert same(actual, expected)


@pytest.mark.parametrize("early_stop", [False, True])
def test_a_recomputation_of_the_whole_model_is_no_forward_and_forgets_none(early_stop):
    model, reseg = ready()
    (image, label), (other, other_label) = batch(), batch(seed=1)
    with set_checkpoint_early_stop(early_stop):
        first = checkpoint(model, image, use_reentrant=False)
        loss = task_loss(first, label) + reseg.alignment_loss(label)
        checkpoint(model, other, use_reentrant=False)
        loss.backward()  # recomputes the first forward while the second waits to be read
        assert reseg.alignment_loss(other_label) > 0


@pytest.mark.parametrize("named", [False, True])
def test_reentrant_checkpointing_raises_and_names_the_remedy(named):
    image, label = batch()
    model = Checkpointed()
    reseg = ReSegWrapper(model, taps=SEEN if named else None, example_input=image)
    reseg.freeze_teacher()
    model.reentrant = True
    model(image.requires_grad_())
    with pytest.raises(TapError, match=r"encoder\.1.*use_reentrant=False"):
        reseg.alignment_loss(label)


def test_a_frozen_encoder_is_legal():
    image, label = batch()
    model, reseg = ready()
    model.encoder.requires_grad_(False)
    loss = task_loss(model(image), label) + reseg.alignment_loss(label)
    loss.backward()
    assert all(p.grad is None for p in model.encoder.parameters())
    assert all(p.grad is not None for p in model.decoder.parameters())


# --- what is wrong is said, never counted as zero


class Skipping(UNet):
    """A U-Net that calls its bottleneck past every hook when told to."""

    skip = False

    def forward(self, x):
        x1 = self.encoder[0](x)
        x2 = self.encoder[1](self.pool(x1))
        x4 = self.encoder[2](self.pool(x2))
        x = (self.bottleneck.forward if self.skip else self.bottleneck)(self.pool(x4))
        for up, decode, skip in zip(self.up, self.decoder, (x4, x2, x1)):
            x = decode(torch.cat([up(x), skip], 1))
        return self.head(x)


def test_a_tap_that_did_not_fire_is_named_and_never_a_loss_of_0():
    image, label = batch()
    model, reseg = ready(Skipping())
    model.skip = True
    model(image)
    with pytest.raises(TapError, match=r"did not fire.*: bottleneck\."):
        reseg.alignment_loss(label)
    model.skip = False
    model(image)
    assert reseg.alignment_loss(label) > 0


def test_an_unknown_tap_has_close_matches():
    for taps in ({"bottleneck": "botleneck"}, {**SEEN, "bottleneck": "botleneck"}):
        with pytest.raises(TapError, match="Did you mean 'bottleneck'"):
            ReSegWrapper(UNet(), batch()[0], taps=taps)
    with pytest.raises(TapError, match=r"no module 'decoder\.7'"):
        FeatureExtractor(UNet(), batch()[0], taps={**SEEN, "decoder": ["decoder.1", "decoder.7"]})
    with pytest.raises(ReSegError, match="pass example_input="):
        FeatureExtractor(UNet(), taps=SEEN)


def test_prefixes_of_wrappers_in_the_names_of_taps_are_accepted():
    image, _ = batch()
    prefixed = {
        "encoder": ["module.encoder.1", "_orig_mod.encoder.2"],
        "decoder": ["module._orig_mod.decoder.1", "_orig_mod.module.decoder.0"],
        "bottleneck": "_orig_mod.bottleneck",
    }
    assert str(FeatureExtractor(UNet(), image, taps=prefixed).plan) == str(
        FeatureExtractor(UNet(), image, taps=SEEN).plan
    )


def test_no_and_several_forwards_raise_and_name_record():
    image, label = batch()
    model, reseg = ready()
    with pytest.raises(ReSegError, match="no training forward was recorded"):
        reseg.alignment_loss(label)
    model(image)
    model(image)
    with pytest.raises(ReSegError, match=r"with reseg\.record\(\):"):
        reseg.alignment_loss(label)
    model(image)
    assert reseg.alignment_loss(label) > 0
    with pytest.raises(ReSegError, match="no training forward was recorded"):
        reseg.alignment_loss(label)


def test_several_forwards_hold_no_features():
    image, _ = batch()
    model, reseg = ready()
    outputs = [model(image), model(image)]
    assert not held(reseg.extractor)
    del outputs


def test_record_marks_the_forward_that_belongs_to_the_label():
    image, label = batch()
    model, reseg = ready(without_batch_norm)
    model(image)
    expected = reseg.alignment_loss(label)
    model(image + 1)  # before the block
    with reseg.record():
        model(image)
    model(image + 2)  # after it
    assert torch.equal(reseg.alignment_loss(label), expected)
    with reseg.record():  # never read
        model(image + 3)
    with reseg.record():
        model(image)
    assert torch.equal(reseg.alignment_loss(label), expected)
    model(image)  # without a block, after one
    assert torch.equal(reseg.alignment_loss(label), expected)
    with reseg.record():
        model(image)
        model(image)
    with pytest.raises(ReSegError, match="several training forwards"):
        reseg.alignment_loss(label)
    with reseg.record():
        pass
    with pytest.raises(ReSegError, match="no training forward"):
        reseg.alignment_loss(label)


def test_an_error_inside_record_forgets_what_was_recorded():
    image, label = batch()
    model, reseg = ready()

    def broken_step() -> None:
        with reseg.record():
            model(image)
            raise RuntimeError("task loss failed")

    with pytest.raises(RuntimeError, match="task loss failed"):
        broken_step()
    assert not held(reseg.extractor)
    with reseg.record():
        model(image)
    assert reseg.alignment_loss(label) > 0


@pytest.mark.parametrize("weight", [0, 0.035])
def test_evaluation_raises(weight):
    image, label = batch()
    model, reseg = ready(weight=weight)
    model.eval()
    model(image)
    with pytest.raises(ReSegError, match=r"evaluation.*model\.train\(\).*only `if model\.training:`"):
        reseg.alignment_loss(label)


def test_validation_between_forward_and_loss_is_ignored():
    image, label = batch()
    model, reseg = ready(without_batch_norm)
    model(image)
    expected = reseg.alignment_loss(label)
    model(image)
    model.eval()
    model(image + 1)
    with torch.no_grad():
        model.train()(image + 2)
    assert torch.equal(reseg.alignment_loss(label), expected)


def test_data_parallel_is_refused_before_and_after():
    image, _ = batch()
    with pytest.raises(
        ReSegError, match=r"(?s)DistributedDataParallel.*device_ids=\[device\].*DistributedSampler.*torchrun"
    ):
        ReSegWrapper(nn.DataParallel(UNet()), example_input=image)
    model, _ = ready()
    replica = model._replicate_for_data_parallel()  # noqa: SLF001 - what nn.DataParallel calls on every device
    with pytest.raises(ReSegError, match="DistributedDataParallel"):
        replica(image)


@pytest.mark.parametrize(
    "choice", [{"when": "nonsense"}, {"when": None}, {"when": []}, {"decoder_only": "yes"}, {"decoder_only": 1}]
)
def test_other_ways_of_recording_are_refused(choice):
    with pytest.raises(ReSegError, match=f"{next(iter(choice))}="):
        FeatureExtractor(UNet(), batch()[0], **choice)


def test_a_scripted_module_is_refused():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scripted = torch.jit.script(nn.Conv2d(1, 1, 1))
    with pytest.raises(ReSegError, match="scripted"):
        ReSegWrapper(scripted)


# --- the teacher stays as it is


def test_the_teachers_weights_and_statistics_are_bit_identical_after_10_steps_and_train():
    model, reseg = ready()
    teacher = reseg.teacher
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    assert any("running_mean" in name for name in before)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, weight_decay=0.1)
    for seed in range(10):
        teacher.train()
        image, label = batch(seed=seed)
        (task_loss(model(image), label) + reseg.alignment_loss(label)).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert not any(module.training for module in teacher.modules())
    assert same(dict(teacher.state_dict()), before)
    assert all(p.grad is None for p in teacher.parameters())


def test_evaluation_of_one_batch_does_not_depend_on_the_others():
    image, label = batch(4)
    model, reseg = ready(without_batch_norm, batch(4)[0], preset="paper")
    model(image)
    whole = reseg.alignment_loss(label).item()
    halves = []
    for part in (slice(0, 2), slice(2, 4)):
        model(image[part])
        halves.append(reseg.alignment_loss(label[part]).item())
    assert whole == pytest.approx(sum(halves) / 2, rel=1e-5)


# --- precision


def dtypes_inside(module: nn.Module) -> list[torch.dtype]:
    found: list[torch.dtype] = []
    module.register_forward_hook(lambda module, args, output: found.append(output.dtype))
    return found


@pytest.mark.parametrize("lower", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("inside", [True, False])
def test_the_teacher_runs_in_the_autocast_of_the_students_forward_and_the_loss_in_fp32(lower, inside):
    image, label = batch()
    model, reseg = ready(weight=1.0)
    found, expected = (dtypes_inside(m.bottleneck[0]) for m in (reseg.teacher.body, model))
    with torch.autocast("cpu", dtype=lower):
        logits = model(image)
        if inside:
            loss = task_loss(logits, label) + reseg.alignment_loss(label)
    if not inside:
        loss = task_loss(logits, label) + reseg.alignment_loss(label)
    assert found == expected == [lower]
    assert loss.dtype == torch.float32
    loss.backward()
    assert all(g.isfinite().all() for g in gradients(model))


def test_a_student_in_full_precision_has_a_teacher_in_full_precision_wherever_the_loss_is_called():
    image, label = batch()
    model, reseg = ready(without_batch_norm, weight=1.0)
    found = dtypes_inside(reseg.teacher.body.bottleneck[0])
    model(image)
    expected = reseg.alignment_loss(label)
    model(image)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = reseg.alignment_loss(label)
    assert found == [torch.float32, torch.float32]
    assert torch.equal(actual, expected)


def test_features_of_300_in_half_precision_do_not_overflow():
    image, label = batch()
    model, reseg = ready(UNet(norm=lambda channels: nn.Identity()), preset="paper", weight=1.0)
    with torch.no_grad():
        model.bottleneck[0].bias += 300
    with torch.autocast("cpu", dtype=torch.float16):
        model(image)
    loss = reseg.alignment_loss(label)
    assert 90000 / 3 * 0.5 < loss < float("inf")
    loss.backward()
    assert all(g.isfinite().all() for g in gradients(model))


def test_a_model_in_double_precision_has_a_loss_in_double_precision():
    image, label = batch()
    model, reseg = ready(UNet().double(), image.double())
    model(image.double())
    assert reseg.alignment_loss(label).dtype == torch.float64


# --- inputs


def monai_meta_tensor() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip("monai.data").MetaTensor


@pytest.mark.filterwarnings("ignore:the teacher's reconstruction loss")
def test_meta_tensors_of_monai_become_plain_tensors():
    meta = monai_meta_tensor()
    image, label = batch()
    results = []
    for wrap in (lambda x: x.clone(), meta):
        torch.manual_seed(0)
        model = UNet()
        reseg = ReSegWrapper(model, weight=1.0)
        reseg.fit_recon([{"image": wrap(image), "label": wrap(label.unsqueeze(1))}], steps=2, progress=False)
        seen = []
        reseg.teacher.register_forward_pre_hook(lambda module, args, seen=seen: seen.append(type(args[0])))
        model(wrap(image))
        features = reseg.extractor.pop()
        output = model(wrap(image))
        assert {type(f) for f in (*features.encoder, *features.decoder, features.bottleneck)} == {Tensor}
        loss = reseg.alignment_loss(wrap(label))
        assert type(loss) is Tensor
        assert type(reseg.reconstruct(wrap(label))) is Tensor
        loss.backward()
        assert isinstance(output, meta) == (wrap is meta), "the model's own output is not touched"
        results.append([loss.detach(), gradients(model), dict(reseg.teacher.state_dict())])
    assert same(*results)


@pytest.mark.parametrize("dims", [2, 3])
def test_channels_last_stays_and_gives_the_same_loss(dims):
    image, label = batch(dims=dims, channels=2)
    model, reseg = ready(UNet(in_channels=2, dims=dims), image, weight=1.0)
    model(image)
    expected = reseg.alignment_loss(label)
    layout = torch.channels_last if dims == 2 else torch.channels_last_3d
    model.to(memory_format=layout)
    bare = copy.deepcopy(model)
    with FeatureExtractor(model, taps=reseg.extractor.plan) as features:
        output = model(image.to(memory_format=layout))
        kept = features.pop().bottleneck
    assert kept.is_contiguous(memory_format=layout)
    assert output.stride() == bare(image.to(memory_format=layout)).stride()
    loss = reseg.alignment_loss(label)
    assert torch.allclose(loss, expected, rtol=1e-4)
    loss.backward()


def test_image_and_batch_sizes_may_change_between_steps():
    model, reseg = ready()
    for size, n in ((16, 2), (24, 1), (40, 3), (16, 2)):
        image, label = batch(n, size)
        model(image)
        loss = reseg.alignment_loss(label)
        assert loss > 0
        fresh = ReSegWrapper(copy.deepcopy(model), example_input=image)
        fresh.load_state_dict(reseg.state_dict())
        fresh.model(image)
        assert torch.allclose(fresh.alignment_loss(label), loss, rtol=1e-5)


def test_gradient_accumulation_adds_up():
    model, reseg = ready(without_batch_norm, preset="paper")
    parts = [batch(seed=seed) for seed in range(3)]
    for image, label in parts:
        ((task_loss(model(image), label) + reseg.alignment_loss(label)) / 3).backward()
    accumulated = gradients(model)
    model.zero_grad()
    image, label = (torch.cat(x) for x in zip(*parts))
    (task_loss(model(image), label) + reseg.alignment_loss(label)).backward()
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-6) for a, b in zip(accumulated, gradients(model)))


@pytest.mark.parametrize("order", ["backward after both", "loss after the next forward's backward"])
def test_the_loss_may_be_computed_and_backpropagated_in_any_order(order):
    image, label = batch()
    model, reseg = ready(without_batch_norm)
    (task_loss(model(image), label) + reseg.alignment_loss(label)).backward()
    expected = gradients(model)
    model.zero_grad()
    logits = model(image)
    if order == "backward after both":
        task_loss(logits, label).backward(retain_graph=True)
        reseg.alignment_loss(label).backward()
    else:
        aligned = reseg.alignment_loss(label)
        aligned.backward(retain_graph=True)
        task_loss(logits, label).backward()
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(gradients(model), expected))


# --- in-place activations after a tapped module


NORMS = {
    "encoder": ["encoder.1.1", "encoder.2.1"],
    "decoder": ["decoder.1.1", "decoder.0.1"],
    "bottleneck": "bottleneck.1",
}


def test_a_tap_that_a_relu_overwrites_keeps_the_values_before_it():
    image, _ = batch()
    torch.manual_seed(0)
    plain = UNet()
    both = []
    for model in (plain, inplace(copy.deepcopy(plain))):
        extractor = FeatureExtractor(model, image, taps=NORMS).attach()
        for _ in range(2):
            model.zero_grad()
            model(image)
            features = extractor.pop()
            leaves = [*features.encoder, *features.decoder, features.bottleneck]
            sum(f.square().mean() for f in leaves).backward()
        assert all(f.min() < 0 for f in leaves)
        both.append([[f.detach() for f in leaves], gradients(model)])
    assert same(*both)


def test_only_overwritten_taps_are_cloned():
    image, _ = batch()
    for taps, flag in ((NORMS, True), (NORMS, False), (SEEN, True)):
        model = inplace(UNet(), flag)
        extractor = FeatureExtractor(model, image, taps=taps).attach()
        outputs: list[int] = []
        for tap in extractor.taps:
            tapped = model.get_submodule(tap.module)
            tapped.register_forward_hook(lambda m, a, out, seen=outputs: seen.append(out.data_ptr()))
        model(image)
        kept = {feature.data_ptr() for feature in extractor.pop().all()}
        assert len(kept) == 5
        assert kept.isdisjoint(outputs) if taps is NORMS and flag else kept == {*outputs}


def test_an_activation_made_in_place_after_the_taps_were_found_is_refused():
    image, _ = batch()
    model = UNet()
    extractor = FeatureExtractor(model, image, taps=NORMS).attach()
    inplace(model)(image)
    with pytest.raises(TapError, match="overwritten in place"):
        extractor.pop()


# --- outputs


class DeepSupervised(UNet):
    def forward(self, x):
        y = super().forward(x)
        return [y, y[..., ::2, ::2]] if self.training else y


def test_outputs_are_the_models_own_objects():
    image, label = batch()
    model, reseg = ready(DeepSupervised())
    outputs = model(image)
    assert type(outputs) is list
    assert [tuple(o.shape[2:]) for o in outputs] == [(16, 16), (8, 8)]
    assert reseg.alignment_loss([label, label[:, ::2, ::2]]) > 0


def test_the_model_may_run_several_times_with_labels_of_its_own_through_record() -> None:
    # as adversarial and consistency losses do
    image, label = batch()
    model, reseg = ready()
    with reseg.record():
        logits = model(image)
    consistency = (model(image.flip(-1)).flip(-1) - logits).square().mean()
    loss = task_loss(logits, label) + consistency + reseg.alignment_loss(label)
    loss.backward()
    assert loss.isfinite()
