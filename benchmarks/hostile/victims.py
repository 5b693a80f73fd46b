"""The trainings that are killed. Each goes on from the files in its folder, and marks its progress in one of them."""

from __future__ import annotations

import os
import random
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from . import mutants
from .api import CutMixConsistency, DeepSupervision, ReSegWrapper
from .subjects import CLASSES, IGNORED, batch, ignoring, net

STAGE_1, STATE, FINAL, PROGRESS = "stage1.pt", "state.pt", "final.pt", "progress"
EPOCHS, STEPS = 4, 8


def life(kind: str, folder: str, seed: int, mutant: str | None = None) -> None:
    """One life of a training in a process of its own: from where the files are to its end, unless it is killed."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    tqdm.set_lock(threading.RLock())  # its own is one of processes, which a kill would leave behind
    if mutant is not None:
        mutants.by_name(mutant).apply()
    KINDS[kind](Path(folder), seed)


def mark(folder: Path) -> None:
    """One more byte of progress, at once."""
    with open(folder / PROGRESS, "ab", buffering=0) as file:
        file.write(b".")


class Patients(Dataset[tuple[Tensor, Tensor]]):
    """Images that are augmented with the random numbers of three libraries."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder = folder
        self.image, self.label = batch(6, seed=seed)

    def __len__(self) -> int:
        return len(self.image)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        mark(self.folder)
        gain = random.uniform(0.9, 1.1) * float(np.random.uniform(0.9, 1.1))
        image, label = self.image[index] * gain, self.label[index]
        return (image.flip(1), label.flip(0)) if torch.rand(()) < 0.5 else (image, label)


def start(seed: int) -> None:
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)


def stage_1(folder: Path, seed: int) -> None:
    """Stage 1 alone, with one of several optimizers, schedules and kinds of net."""
    start(seed)
    adam, sgd = torch.optim.AdamW, lambda p: torch.optim.SGD(p, 0.05, momentum=0.9, nesterov=True)
    options: dict[str, Any] = [
        {},
        {"optimizer": sgd, "scheduler": lambda o: torch.optim.lr_scheduler.StepLR(o, 3, 0.5)},
        {"optimizer": adam, "amp": torch.bfloat16},
        {"optimizer": adam, "scheduler": lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.01, total_steps=50)},
    ][seed % 4]
    model = net(seed, norm="batch" if seed % 2 else "group", dropout=0.2)
    reseg = ReSegWrapper(model, preset="paper" if seed % 3 else "standardized")
    loader = DataLoader(Patients(folder, seed), 2, shuffle=True)
    history = reseg.fit_recon(loader, epochs=EPOCHS, checkpoint=folder / STAGE_1, progress=False, **options)
    save({"teacher": dict(reseg.teacher.state_dict()), "history": history}, folder / FINAL)


def loop(folder: Path, seed: int) -> None:
    """Both stages in a loop that saves everything after every step."""
    start(seed)
    model = net(seed, norm="batch", dropout=0.2)
    example = batch(seed=seed)[0]
    reseg = ReSegWrapper(model, example_input=example, weight=0.5, every=1 + seed % 2)
    deep = DeepSupervision(model, num_classes=CLASSES, example_input=example, ignore_index=IGNORED)
    mixed = CutMixConsistency(model, deep=deep, rampup_steps=STEPS, ignore_index=IGNORED, threshold=0.4)
    optimizer = torch.optim.AdamW([*model.parameters(), *deep.parameters()], 1e-3)
    holders = {"reseg": reseg, "deep": deep, "mixed": mixed, "model": model, "optimizer": optimizer}
    loader = DataLoader(Patients(folder, seed), 2, shuffle=True)
    first = 0
    if (folder / STATE).exists():
        state = torch.load(folder / STATE, weights_only=True)
        for name, holder in holders.items():
            holder.load_state_dict(state[name])
        first = state["step"]
        torch.set_rng_state(state["torch"])
        version, internal, gauss = state["random"]
        random.setstate((version, tuple(internal), gauss))
        np.random.set_state(("MT19937", np.array(state["numpy"], np.uint32), *state["numpy_at"]))
    else:
        reseg.fit_recon(loader, epochs=2, checkpoint=folder / STAGE_1, progress=False)
    stream = batches(loader)
    for step in range(first, STEPS):
        image, label = next(stream)
        other, _ = next(stream)
        with reseg.record():  # the forward of `mixed` is another
            logits = model(image)
        loss = ignoring(logits, label) + reseg.alignment_loss(label) + deep.loss(label, ignoring)
        loss = loss + mixed.loss(other, ignoring)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        mixed.update()
        at: Any = np.random.get_state()
        save(
            {
                **{name: holder.state_dict() for name, holder in holders.items()},
                "step": step + 1,
                "torch": torch.get_rng_state(),
                "random": random.getstate(),
                "numpy": at[1].tolist(),
                "numpy_at": [*at[2:]],
            },
            folder / STATE,
        )
        mark(folder)
        stream = batches(loader)  # so that no half epoch is in the loader's memory
    save({name: holder.state_dict() for name, holder in holders.items()}, folder / FINAL)


def batches(loader: DataLoader[Any]) -> Iterator[Any]:
    while True:
        yield from loader


def save(state: dict[str, Any], path: Path) -> None:
    """The trial's own atomic write, of what is the user's affair."""
    partial = path.with_suffix(f".{os.getpid()}.own")
    torch.save(state, partial)
    os.replace(partial, path)


KINDS: dict[str, Callable[[Path, int], None]] = {"stage_1": stage_1, "loop": loop}
