"""What two processes do together: one of them, started by `processes`."""

from __future__ import annotations

import time
import traceback
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.join import Join
from torch.nn.parallel import DistributedDataParallel

from . import oracle
from .api import ReSegError, ReSegWrapper
from .subjects import TRUTH, aligned, batch, ignoring, mixing, net, supervised, task_loss

SECONDS = 60  # that one may wait for the other; longer is a hang
RANKS = 2


def life(name: str, rank: int, folder: str) -> None:
    """Run a scenario and leave what came of it: ("right" or "clear" or "unclear" or "silent", what)."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    if name in TOGETHER:
        dist.init_process_group(
            "gloo",
            init_method=f"file://{folder}/store",
            rank=rank,
            world_size=RANKS,
            timeout=timedelta(seconds=SECONDS),
        )
    try:
        {**TOGETHER, **APART}[name](rank, Path(folder))
        outcome = ("right", "")
    except oracle.WrongError as error:
        outcome = ("silent", str(error))
    except ReSegError as error:
        outcome = ("clear", str(error))
    except Exception as error:
        # the other has told why and is gone: that it is gone is gloo's to say
        gone = isinstance(error, RuntimeError) and any(w in str(error) for w in ("Connection", "closed by peer"))
        outcome = ("gone" if gone else "unclear", traceback.format_exc()[-500:] if not gone else str(error)[:200])
    torch.save(outcome, Path(folder) / f"outcome{rank}.pt")


def _mean(gradients: list[Tensor]) -> list[Tensor]:
    found = [g.detach().clone() for g in gradients]
    for g in found:
        dist.all_reduce(g)
    return [g / RANKS for g in found]


def _everywhere(tensors: Any, what: str) -> None:
    """Equal on both."""
    flat = torch.cat([t.detach().double().flatten() for t in tensors])
    both = [torch.zeros_like(flat) for _ in range(RANKS)]
    dist.all_gather(both, flat)
    oracle.same(both[0], both[1], f"{what} on the two ranks")


def _step(rank: int, sizes: tuple[int, int], preset: str) -> None:
    """DDP's gradients are the mean of what each rank's own batch gives by the oracle."""
    model, twin = net(), net()
    run = DistributedDataParallel(model)
    _, reseg = aligned(run, preset=preset)  # pyright: ignore
    image, label = batch(sizes[rank], seed=rank)
    loss = task_loss(run(image), label) + reseg.alignment_loss(label)
    loss.backward()
    with oracle.watching(twin, TRUTH) as seen:
        logits = twin(image)
        student = seen()
    body = next(m for m in reseg.teacher.modules() if type(m) is type(twin))
    with oracle.watching(body, TRUTH) as seen, torch.no_grad():
        body(oracle.index_map(label)[0].float())
        teacher = seen()
    reference = oracle.cross_entropy(logits, label) + oracle.alignment(
        student, teacher, standardized=preset == "standardized"
    )
    expected = _mean(oracle.gradients(reference, list(twin.parameters())))
    oracle.near([p.grad for p in model.parameters()], expected, "the gradient of two ranks", 1e-3)


def _supervised_step(rank: int, sizes: tuple[int, int]) -> None:
    model = net()
    run = DistributedDataParallel(model)
    _, ds = supervised(run)  # pyright: ignore
    optimizer = torch.optim.SGD([*model.parameters(), *ds.parameters()], 0.1)
    for step in range(3):
        image, label = batch(sizes[rank], seed=2 * step + rank)
        loss = task_loss(run(image), label) + ds.loss(label, task_loss)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    _everywhere([*model.parameters(), *ds.parameters()], "model and heads")


def _mixed_step(rank: int, sizes: tuple[int, int]) -> None:
    model = net()
    run = DistributedDataParallel(model)
    _, mixed = mixing(model)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for step in range(3):
        image, label = batch(2, seed=2 * step + rank)
        loss = ignoring(run(image), label) + mixed.loss(batch(sizes[rank], seed=9 + rank)[0], ignoring, forward=run)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        mixed.update()
    _everywhere([*model.parameters(), *mixed.average.parameters()], "model and mean teacher")


def _joined(kind: str) -> Callable[[int, Path], None]:
    """Ranks with 2 and 3 batches under torch's join."""

    def run(rank: int, folder: Path) -> None:
        model = net()
        ddp = DistributedDataParallel(model)
        reseg = aligned(ddp)[1] if kind == "the alignment" else None  # pyright: ignore
        ds = supervised(ddp)[1] if kind == "deep supervision" else None  # pyright: ignore
        mixed = mixing(model)[1] if kind == "unlabelled images" else None
        own = [*(ds.parameters() if ds else ())]
        optimizer = torch.optim.SGD([*model.parameters(), *own], 0.1)
        with Join([ddp]):
            for step in range(2 + rank):
                image, label = batch(seed=2 * step + rank)
                loss = ignoring(ddp(image), label)
                if reseg is not None:
                    loss = loss + reseg.alignment_loss(label)
                if ds is not None:
                    loss = loss + ds.loss(label, ignoring)
                if mixed is not None:
                    loss = loss + mixed.loss(image, ignoring, forward=ddp)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                if mixed is not None:
                    mixed.update()
        _everywhere(model.parameters(), "the model")

    return run


def _stage_1(batches: tuple[int, int], **options: Any) -> Callable[[int, Path], None]:
    def run(rank: int, folder: Path) -> None:
        torch.manual_seed(rank)
        reseg = ReSegWrapper(net(), example_input=batch()[0])
        reseg.fit_recon([batch(seed=3 * rank + i) for i in range(batches[rank])], progress=False, **options)
        _everywhere(reseg.teacher.state_dict().values(), "the teacher")

    return run


def _resumed(rank: int, folder: Path) -> None:
    loader = [batch(seed=3 * rank + i) for i in range(2)]
    whole = aligned(ready=False)[1]
    whole.fit_recon(loader, epochs=3, progress=False)
    broken = aligned(ready=False)[1]
    broken.fit_recon(loader, epochs=1, checkpoint=folder / "stage1.pt", progress=False)
    again = aligned(ready=False)[1]
    again.fit_recon(loader, epochs=3, checkpoint=folder / "stage1.pt", progress=False)
    oracle.same(dict(again.teacher.state_dict()), dict(whole.teacher.state_dict()), "the resumed teacher")
    _everywhere(again.teacher.state_dict().values(), "the teacher")


def _bad_label(stage: str) -> Callable[[int, Path], None]:
    """One rank's label is bad: it says so, and the other does not wait for ever."""

    def run(rank: int, folder: Path) -> None:
        model = net()
        image, label = batch(seed=rank)
        bad = label + 7 if rank else label
        if stage == "stage 1":
            reseg = ReSegWrapper(model, example_input=image)
            reseg.fit_recon([(image, bad)] * 3, epochs=2, progress=False)
            raise oracle.WrongError("a bad label was taken")
        ddp = DistributedDataParallel(model)
        reseg = aligned(ddp)[1]  # pyright: ignore
        loss = ddp(image).sum() + reseg.alignment_loss(bad)
        loss.backward()
        if rank:
            raise oracle.WrongError("a bad label was taken")

    return run


def _damaged_file(rank: int, folder: Path) -> None:
    if rank == 0:
        (folder / "stage1.pt").write_text("no file of stage 1")
    dist.barrier()
    aligned(ready=False)[1].fit_recon([batch()], epochs=1, checkpoint=folder / "stage1.pt", progress=False)
    raise oracle.WrongError("a foreign file was taken")


def _unwritable(rank: int, folder: Path) -> None:
    aligned(ready=False)[1].fit_recon([batch()], epochs=1, checkpoint="/proc/nothing/stage1.pt", progress=False)
    raise oracle.WrongError("no file was written, without a word")


def _one_name(rank: int, folder: Path) -> None:
    """Two runs that know nothing of each other write one file, many times."""
    for attempt in range(6):
        reseg = aligned(ready=False)[1]
        name = folder / f"stage1_{attempt}.pt"
        _meet(folder, rank, attempt)
        reseg.fit_recon([batch(seed=rank)], epochs=6, checkpoint=name, progress=False)
        state = torch.load(name, weights_only=True)
        if not 1 <= len(state["history"]) <= 6:
            raise oracle.WrongError("the file is neither run's")


def _meet(folder: Path, rank: int, attempt: int) -> None:
    (folder / f"here_{rank}_{attempt}").touch()
    while not (folder / f"here_{1 - rank}_{attempt}").exists() and not (folder / f"outcome{1 - rank}.pt").exists():
        time.sleep(1e-4)


def _no_sync(rank: int, folder: Path) -> None:
    """Gradients that are accumulated, as DDP's no_sync does."""
    model = net()
    ddp = DistributedDataParallel(model)
    ds = supervised(ddp)[1]  # pyright: ignore
    optimizer = torch.optim.SGD([*model.parameters(), *ds.parameters()], 0.1)
    for step in range(4):
        context: AbstractContextManager[Any] = nullcontext() if step % 2 else ddp.no_sync()
        image, label = batch(seed=2 * step + rank)
        with context:
            (task_loss(ddp(image), label) + ds.loss(label, task_loss)).backward()
        if step % 2:
            optimizer.step()
            optimizer.zero_grad()
    _everywhere(model.parameters(), "the model")
    _everywhere(ds.parameters(), "the heads")


def _data_parallel(rank: int, folder: Path) -> None:
    aligned(nn.DataParallel(net()))  # pyright: ignore
    raise oracle.WrongError("nn.DataParallel was taken")


TOGETHER: dict[str, Callable[[int, Path], None]] = {
    "alignment, even batches": lambda r, f: _step(r, (2, 2), "standardized"),
    "alignment, uneven batches": lambda r, f: _step(r, (1, 3), "paper"),
    "deep supervision, even batches": lambda r, f: _supervised_step(r, (2, 2)),
    "deep supervision, uneven batches": lambda r, f: _supervised_step(r, (1, 3)),
    "unlabelled images, uneven batches": lambda r, f: _mixed_step(r, (2, 4)), "gradients accumulated": _no_sync,
    "the alignment under join()": _joined("the alignment"),
    "deep supervision under join()": _joined("deep supervision"),
    "unlabelled images under join()": _joined("unlabelled images"), "stage 1, even": _stage_1((2, 2), epochs=2),
    "stage 1, uneven, by epochs": _stage_1((2, 3), epochs=2), "stage 1, uneven, by steps": _stage_1((2, 3), steps=5),
    "stage 1, one rank without a batch": _stage_1((0, 2), epochs=1), "stage 1 resumed": _resumed,
    "stage 1, a bad label on one rank": _bad_label("stage 1"),
    "alignment, a bad label on one rank": _bad_label("stage 2"), "stage 1, a foreign file": _damaged_file,
    "stage 1, an unwritable file": _unwritable, "nn.DataParallel": _data_parallel,
}  # fmt: skip
APART: dict[str, Callable[[int, Path], None]] = {"two runs with one file name": _one_name}
MUST_REFUSE = (
    "stage 1, a bad label on one rank", "stage 1, a foreign file", "stage 1, an unwritable file", "nn.DataParallel",
)  # fmt: skip
# in the others, uneven ranks above all, both must end right, or both say that it cannot be
MUST_SERVE = (
    "alignment, even batches", "alignment, uneven batches", "deep supervision, even batches", "gradients accumulated",
    "stage 1, even", "stage 1 resumed", "two runs with one file name",
)  # fmt: skip
