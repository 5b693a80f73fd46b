"""One of two processes: runs every check and writes what it found; test_distributed.py starts both and compares."""

from __future__ import annotations

import contextlib
import sys
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from models import UNet, batch, ignoring, task_loss
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from reseg_loss import CutMixConsistency, DeepSupervision, ReSegWrapper, SemiSupervised
from reseg_loss.consistency import BROADCASTS_TWICE

STEPS = 3


def model_of_the_test(seed: int = 0) -> UNet:
    """Without batch statistics, so that half a batch on each rank is the whole batch on one."""
    torch.manual_seed(seed)
    return UNet(norm=lambda channels: nn.GroupNorm(1, channels))


def part(step: int, rank: int, world: int) -> tuple[Tensor, Tensor]:
    image, label = batch(n=4, seed=step)
    size = 4 // world
    return image[rank * size : (rank + 1) * size], label[rank * size : (rank + 1) * size]


def wrapped(model: nn.Module, seed: int = 1, **kwargs: Any) -> ReSegWrapper:
    torch.manual_seed(seed)
    # raw features: standardized ones are those of each process's own batch, so two of them are not one
    reseg = ReSegWrapper(model, example_input=batch()[0], preset="paper", **{"weight": 1.0, **kwargs})
    reseg.freeze_teacher()
    return reseg


def full(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach().clone()


def train(
    run: nn.Module, model: nn.Module, reseg: ReSegWrapper, rank: int, world: int, weights: tuple[float, ...] = ()
) -> dict[str, Any]:
    """Some steps with momentum; what is left of them."""
    optimizer = torch.optim.SGD([*model.parameters(), *reseg.parameters()], 0.1, momentum=0.9)
    losses = []
    for step in range(STEPS):
        if weights:
            reseg.weight = weights[step]
        image, label = part(step, rank, world)
        loss = task_loss(run(image), label) + reseg.alignment_loss(label)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return {
        "losses": torch.stack(losses),
        "model": [full(p) for p in model.parameters()],
        "heads": [full(p) for p in reseg.parameters()],
        "keys": list(model.state_dict()),
        "steps": reseg.calls,
    }


def ddp(rank: int, world: int) -> Any:
    model = model_of_the_test()
    reseg = wrapped(model)
    run = DistributedDataParallel(model) if world > 1 else model
    return train(run, model, reseg, rank, world)


def ddp_given_to_the_wrapper(rank: int, world: int) -> Any:
    model = model_of_the_test()
    run = DistributedDataParallel(model) if world > 1 else model
    reseg = wrapped(run)
    assert not any(isinstance(m, DistributedDataParallel) for m in reseg.teacher.modules())
    return train(run, model, reseg, rank, world)


def compiled_ddp(rank: int, world: int) -> Any:
    model = model_of_the_test()
    reseg = wrapped(model)
    run = DistributedDataParallel(model) if world > 1 else model
    return train(torch.compile(run, backend="eager"), model, reseg, rank, world)


def ddp_over_compiled(rank: int, world: int) -> Any:
    model = model_of_the_test()
    compiled = torch.compile(model, backend="eager")
    run = DistributedDataParallel(compiled) if world > 1 else compiled
    reseg = wrapped(run)
    return train(run, model, reseg, rank, world)


class _HeadsAsWrapper:
    """DeepSupervision with the names that `train` uses."""

    def __init__(self, ds: DeepSupervision) -> None:
        self.ds, self.parameters = ds, ds.parameters

    def alignment_loss(self, label: Tensor) -> Tensor:
        return self.ds.loss(label, task_loss)

    @property
    def calls(self) -> int:
        return self.ds.calls

    @property
    def weight(self) -> float:
        return self.ds.weight

    @weight.setter
    def weight(self, value: float) -> None:
        self.ds.weight = value


def deep_supervision(rank: int, world: int, weights: tuple[float, ...] = ()) -> Any:
    model = model_of_the_test()
    run = DistributedDataParallel(model) if world > 1 else model
    torch.manual_seed(rank)  # their DDP gives all ranks rank 0's heads
    ds = DeepSupervision(run, batch()[0])
    return train(run, model, _HeadsAsWrapper(ds), rank, world, weights)  # pyright: ignore[reportArgumentType]


def deep_supervision_unused_in_a_step(rank: int, world: int) -> Any:
    return deep_supervision(rank, world, (1.0, 0.0, 1.0))


def unlabelled(rank: int, world: int, forward: Callable[[nn.Module], Any] = lambda run: run, **options: Any) -> Any:
    """Steps with two forwards of a model with batch statistics, whose ranks start with other weights."""
    torch.manual_seed(rank)
    model = UNet()
    # before DDP gives all ranks rank 0's weights, so that the mean teachers are other ones, too
    deep = DeepSupervision(model, batch()[0], ignore_index=255)
    mixed = CutMixConsistency(model, deep=deep, rampup_steps=None, ignore_index=255, threshold=0.4)
    run = DistributedDataParallel(model, **options)
    optimizer = torch.optim.SGD([*model.parameters(), *deep.parameters()], 0.1, momentum=0.9)

    def loss_of(logits: Tensor, label: Tensor) -> Tensor:
        return torch.nn.functional.cross_entropy(logits, label, ignore_index=255)

    losses = []
    for step in range(STEPS):
        (image, label), (other, _) = part(step, rank, world), part(10 + step, rank, world)
        loss = loss_of(run(image), label) + deep.loss(label, loss_of)
        loss = loss + mixed.loss(other, loss_of, forward=forward(run))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        mixed.update()
        losses.append(loss.detach())
    return {
        "losses": torch.stack(losses),
        "model": [full(p) for p in model.parameters()],
        "average": [full(p) for p in mixed.average.parameters()],
        "heads": [full(p) for p in deep.parameters()],
        "statistics": [full(b) for b in model.buffers()],
        "sure": mixed.stats()["sure"],
    }


def unlabelled_with_a_buffer_per_rank(rank: int, world: int) -> Any:
    return unlabelled(rank, world, broadcast_buffers=False)


def unlabelled_with_broadcast_buffers(rank: int, world: int) -> Any:
    return unlabelled(rank, world) if BROADCASTS_TWICE else None


def unlabelled_with_broadcast_buffers_on_an_older_torch(rank: int, world: int, **options: Any) -> Any:
    with patch("reseg_loss.consistency.BROADCASTS_TWICE", False):
        try:
            unlabelled(rank, world, **options)
        except ValueError as error:
            return f"{type(error).__name__}: {error}"
    return "it was not refused"


def unlabelled_in_a_function_on_an_older_torch(rank: int, world: int) -> Any:
    return unlabelled_with_broadcast_buffers_on_an_older_torch(rank, world, forward=lambda run: lambda x: run(x))


def stage_1(rank: int, world: int, make: Callable[..., nn.Module] = model_of_the_test, seed: int = 1) -> Any:
    model = make()
    run = DistributedDataParallel(model) if world > 1 else model
    torch.manual_seed(seed)
    reseg = ReSegWrapper(run, example_input=batch()[0])
    state = torch.get_rng_state()
    history = reseg.fit_recon(
        [part(step, rank, world) for step in range(STEPS)],
        epochs=2,
        optimizer=lambda p: torch.optim.SGD(p, 0.1),
        progress=False,
    )
    assert torch.equal(torch.get_rng_state(), state)
    image, label = part(0, 0, 1)
    model(image)
    assert reseg.alignment_loss(label) > 0
    return {
        "teacher": {name: full(value) for name, value in reseg.teacher.state_dict().items()},
        "history": torch.tensor(history),
        "loose": not any(isinstance(m, DistributedDataParallel) for m in reseg.teacher.modules()),
    }


def stage_1_with_other_seeds_and_batch_statistics(rank: int, world: int) -> Any:
    return stage_1(rank, world, UNet, seed=rank)


def sharded(model: nn.Module, world: int) -> nn.Module:
    if world > 1:
        mesh = init_device_mesh("cpu", (world,))
        for module in (*model.encoder, model.bottleneck, *model.decoder, model):
            fully_shard(module, mesh=mesh)
    return model


def fsdp_after_the_wrapper(rank: int, world: int) -> Any:
    model = model_of_the_test()
    reseg = wrapped(model)
    return train(sharded(model, world), model, reseg, rank, world)


def compiled_fsdp_after_the_wrapper(rank: int, world: int) -> Any:
    model = model_of_the_test()
    reseg = wrapped(model)
    return train(torch.compile(sharded(model, world), backend="eager"), model, reseg, rank, world)


def fsdp_before_the_wrapper(rank: int, world: int) -> Any:
    model = sharded(model_of_the_test(), world)
    try:
        wrapped(model)
    except ValueError as error:
        return f"{type(error).__name__}: {error}"
    return "it was not refused"


def fsdp_with_unlabelled_images(rank: int, world: int) -> Any:
    model, messages = model_of_the_test(), []
    mixed = CutMixConsistency(model, rampup_steps=None, ignore_index=255)
    sharded(model, world)
    for use in (mixed.update, lambda: CutMixConsistency(model, rampup_steps=None, ignore_index=255)):
        try:
            use()
            messages.append("it was not refused")
        except ValueError as error:
            messages.append(f"{type(error).__name__}: {error}")
    return messages


def fsdp_before_the_wrapper_with_a_teacher(rank: int, world: int) -> Any:
    model = sharded(model_of_the_test(), world)
    torch.manual_seed(2)
    own = UNet(classes=1, norm=lambda channels: nn.GroupNorm(1, channels))
    reseg = wrapped(model, teacher=own)
    return train(model, model, reseg, rank, world)


def stage_1_with_a_distributed_sampler(rank: int, world: int) -> Any:
    torch.manual_seed(0)
    data = torch.utils.data.TensorDataset(*batch(n=8))
    sampler = torch.utils.data.DistributedSampler(data, num_replicas=world, rank=rank, shuffle=True)
    reseg = ReSegWrapper(model_of_the_test())
    reseg.fit_recon(torch.utils.data.DataLoader(data, 2, sampler=sampler), epochs=2, progress=False)
    teacher = {name: full(value) for name, value in reseg.teacher.state_dict().items()}
    return {"teacher": teacher, "epoch": sampler.epoch}


JOINED = (STEPS, STEPS - 1)  # batches of each rank


def join_with_alignment(rank: int, world: int) -> Any:
    """Uneven batches under join(); alone, what they are: of each step the sum over ranks of the gradients, over two."""
    model = model_of_the_test()
    reseg = wrapped(model)
    run = DistributedDataParallel(model) if world > 1 else model
    optimizer = torch.optim.SGD(model.parameters(), 0.1)

    def loss_of(step: int, rank: int) -> Tensor:
        image, label = part(step, rank, 2)
        return task_loss(run(image), label) + reseg.alignment_loss(label)

    context = run.join() if isinstance(run, DistributedDataParallel) else contextlib.nullcontext()
    with context:
        for step in range(JOINED[rank]):
            optimizer.zero_grad()
            if world > 1:
                loss_of(step, rank).backward()
            else:
                for other in (r for r, count in enumerate(JOINED) if step < count):
                    (loss_of(step, other) / 2).backward()
            optimizer.step()
    return [full(p) for p in model.parameters()]


def join_with_unlabelled_images(rank: int, world: int) -> Any:
    """The second forward is the model's own, which sends nothing."""
    model = model_of_the_test()
    mixed = CutMixConsistency(model, rampup_steps=None, ignore_index=255, threshold=0.0)
    run = DistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with run.join():
        for step in range(JOINED[rank]):
            image, label = part(step, rank, world)
            loss = task_loss(run(image), label) + mixed.loss(image, ignoring)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            mixed.update()
    return [full(p) for p in model.parameters()]


def join_refused(rank: int, world: int) -> Any:
    """What is said of a join() that would abort the processes, for each that sends something beside the model."""
    messages = {}
    for name in ("deep", "unlabelled", "held by another module"):
        model = model_of_the_test()
        mixed = CutMixConsistency(model, rampup_steps=None, ignore_index=255)
        deep = DeepSupervision(model, batch()[0])
        run = DistributedDataParallel(nn.Sequential(model) if name == "held by another module" else model)
        try:
            with run.join():
                for step in range(JOINED[rank]):
                    image, label = part(step, rank, world)
                    loss = task_loss(run(image), label)
                    if name == "unlabelled":
                        loss = loss + mixed.loss(image, ignoring, forward=run)
                    else:
                        loss = loss + deep.loss(label, task_loss)
                    loss.backward()
            messages[name] = "it was not refused"
        except ValueError as error:
            messages[name] = f"{type(error).__name__}: {error}"
    return messages


def wrapped_later(rank: int, world: int) -> Any:
    """What is said of a model that was wrapped after the loss was built, without and with the wrapper in `loss`."""
    model = model_of_the_test()
    semi = SemiSupervised(model, batch()[0], rampup_steps=None)
    run = DistributedDataParallel(model)
    image, label = part(0, rank, world)
    try:
        semi.loss(image, label, image)
        message = "it was not refused"
    except ValueError as error:
        message = f"{type(error).__name__}: {error}"
    semi.loss(image, label, image, forward=run).backward()
    return message, [p.grad for p in model.parameters()]


def join_that_ends_with_the_first(rank: int, world: int) -> Any:
    model = model_of_the_test()
    run = DistributedDataParallel(model)
    ds = DeepSupervision(run, batch()[0])
    try:
        with run.join(throw_on_early_termination=True):
            for step in range(JOINED[rank]):
                image, label = part(step, rank, world)
                (task_loss(run(image), label) + ds.loss(label, task_loss)).backward()
    except RuntimeError as error:
        return ds.calls, str(error)
    return "nobody ended"


class Stream(torch.utils.data.IterableDataset):
    """Samples with a length that cannot be trusted."""

    def __init__(self, samples: int) -> None:
        self.samples = samples

    def __iter__(self) -> Any:
        return iter(list(zip(*batch(n=self.samples))))

    def __len__(self) -> int:
        return 100


class Batches:
    """An iterable without a length."""

    def __init__(self, batches: list[Any]) -> None:
        self.batches = batches

    def __iter__(self) -> Any:
        return iter(self.batches)


def stage_1_uneven(rank: int, world: int) -> Any:
    """What is said of uneven loaders with and without a length, and the teachers of those that stage 1 takes."""
    found: dict[str, Any] = {}
    batches = [part(step, rank, world) for step in range(JOINED[rank])]
    stream = torch.utils.data.DataLoader(Stream(2 * JOINED[rank]), 2)
    for name, loader in (("list", batches), ("iterable data set", stream), ("iterable", Batches(batches))):
        reseg = ReSegWrapper(model_of_the_test())
        try:
            reseg.fit_recon(loader, epochs=2, progress=False)
            found[name] = "it was not refused"
        except ValueError as error:
            found[name] = f"{type(error).__name__}: {error}"
    by_steps, even = ReSegWrapper(model_of_the_test()), ReSegWrapper(model_of_the_test())
    by_steps.fit_recon(batches, steps=5, progress=False)
    even.fit_recon(Batches([part(step, rank, world) for step in range(STEPS)]), epochs=2, progress=False)
    for name, reseg in (("steps", by_steps), ("even", even)):
        found[name] = [full(p) for p in reseg.teacher.parameters()]
    return found


CHECKS = [
    ddp,
    ddp_given_to_the_wrapper,
    compiled_ddp,
    ddp_over_compiled,
    deep_supervision,
    deep_supervision_unused_in_a_step,
    unlabelled_with_a_buffer_per_rank,
    unlabelled_with_broadcast_buffers,
    unlabelled_with_broadcast_buffers_on_an_older_torch,
    unlabelled_in_a_function_on_an_older_torch,
    stage_1,
    stage_1_with_other_seeds_and_batch_statistics,
    stage_1_with_a_distributed_sampler,
    fsdp_after_the_wrapper,
    compiled_fsdp_after_the_wrapper,
    fsdp_before_the_wrapper,
    fsdp_with_unlabelled_images,
    fsdp_before_the_wrapper_with_a_teacher,
    join_with_alignment,
    join_with_unlabelled_images,
    join_refused,
    wrapped_later,
    join_that_ends_with_the_first,
    stage_1_uneven,
]


def main(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", "the teacher's reconstruction loss")
    warnings.filterwarnings("ignore", "The .grad attribute of a Tensor that is not a leaf")  # of the compiler itself
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    found: dict[str, Any] = {}
    for check in CHECKS:
        try:
            found[check.__name__] = check(rank, 2)
        except Exception:
            found[check.__name__] = Exception(traceback.format_exc())
        torch.save(found, folder / f"{rank}.pt")
        dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
