"""A start of the page's code for few labels: whole, then again until it kills itself; or what goes on after that.

test_few_labels.py starts it, once for each and framework, and compares what it leaves.
"""

from __future__ import annotations

import os
import signal
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from frameworks_page import code_after_the_diff
from models import UNet, batch, task_loss
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from reseg_loss import SemiSupervised
from reseg_loss.consistency import BROADCASTS_TWICE

EARLY = {"rampup_steps=2000": "rampup_steps=4, threshold=0.34", "10_000": "9", "% 500": "% 2"}


class Run:
    """What a framework's code is given, and what it leaves."""

    def __init__(self, seed: int, kill_at: int | None) -> None:
        self.seed, self.kill_at = seed, kill_at
        self.losses: list[float] = []
        self.unlabelled: list[float] = []

    def execute(self, code: str, names: dict[str, Any]) -> dict[str, Any]:
        loss_of = SemiSupervised.loss

        def counted(semi: SemiSupervised, *args: Any, **kwargs: Any) -> Tensor:
            loss = loss_of(semi, *args, **kwargs)
            self.losses.append(loss.item())
            stats = semi.stats()
            self.unlabelled.append(stats["weight"] * stats["unlabelled"])
            if len(self.losses) == self.kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
            return loss

        SemiSupervised.loss = counted
        torch.manual_seed(self.seed)
        try:
            exec(code, names)
        finally:
            SemiSupervised.loss = loss_of
        semi = names["semi"] if "semi" in names else names["module"].semi
        return {
            "losses": self.losses,
            "unlabelled": self.unlabelled,
            "model": dict(semi.model.state_dict()),
            "average": dict(semi.average.state_dict()),
            "heads": [p.detach() for p in semi.parameters()],
        }


class Slices(Dataset):
    """Images, labelled or not, in whatever form a framework wants a sample."""

    def __init__(self, n: int, form: Callable[..., Any], seed: int = 0, channels: int = 1, size: int = 16) -> None:
        self.pairs, self.form = [*zip(*batch(n=n, seed=seed, channels=channels, size=size))], form

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> Any:
        return self.form(*self.pairs[index])


def unet() -> UNet:
    return UNet(dropout=0.2)


def pair(image: Tensor, label: Tensor) -> Any:
    return image, label


def alone(image: Tensor, label: Tensor) -> Tensor:
    return image


def channel(image: Tensor, label: Tensor) -> Any:
    return {"image": image, "label": label[None]}


def lightning() -> tuple[str, dict[str, Any]]:
    import lightning.pytorch as L

    quiet = "logger=False, enable_progress_bar=False, enable_model_summary=False, accelerator='cpu', "
    more = {"max_epochs=100, ": f"max_epochs=3, {quiet}", "fit(Segmenter()": "fit(module := Segmenter()"}
    return code_after_the_diff("Few labels in Lightning", **EARLY, **more), {
        "L": L, "torch": torch, "MyUNet": unet, "task_loss": task_loss,
        "train_loader": DataLoader(Slices(6, pair), 2, shuffle=True),
        "unlabelled_loader": DataLoader(Slices(20, alone, 1), 4, shuffle=True),
        "val_loader": DataLoader(Slices(4, pair, 2), 2),
    }  # fmt: skip


def lightning_by_steps() -> tuple[str, dict[str, Any]]:
    """With `batches` for a loader, and checkpoints in the middle of its one epoch."""
    from reseg_loss import batches

    code, names = lightning()
    for old, new in {
        'train_loader = {"labelled": train_loader, "unlabelled": unlabelled_loader}': "",
        'image, label = batch["labelled"]': "image, label, unlabelled = batch",
        'batch["unlabelled"]': "unlabelled",
        "max_epochs=3": "max_epochs=1, val_check_interval=2",
    }.items():
        assert old in code
        code = code.replace(old, new)
    return code, names | {"train_loader": batches(names["train_loader"], names["unlabelled_loader"], steps=9)}


def monai() -> tuple[str, dict[str, Any]]:
    from monai.engines import SupervisedEvaluator, SupervisedTrainer
    from monai.handlers import CheckpointLoader, CheckpointSaver, MeanDice, ValidationHandler
    from monai.networks.nets import UNet as MonaiUNet

    def classes(output: Any) -> Any:
        return [x["pred"].argmax(0, keepdim=True) for x in output], [x["label"] for x in output]

    more = {"device, 100": "device, 3", "(2, 2, 2))": "(2, 2, 2), dropout=0.2)"}
    return code_after_the_diff("Few labels in MONAI", **EARLY, **more), {
        "torch": torch, "Path": Path, "device": torch.device("cpu"), "UNet": MonaiUNet,
        "SupervisedTrainer": SupervisedTrainer, "SupervisedEvaluator": SupervisedEvaluator,
        "CheckpointSaver": CheckpointSaver, "CheckpointLoader": CheckpointLoader,
        "DistributedDataParallel": nn.parallel.DistributedDataParallel,
        "ValidationHandler": ValidationHandler,
        "dice": MeanDice(num_classes=3, output_transform=classes),
        "train_loader": DataLoader(Slices(6, channel), 2, shuffle=True),
        "unlabelled_loader": DataLoader(Slices(20, alone, 1), 4, shuffle=True),
        "val_loader": DataLoader(Slices(4, channel, 2), 2),
    }  # fmt: skip


def huggingface() -> tuple[str, dict[str, Any]]:
    from transformers import SegformerConfig, SegformerForSemanticSegmentation, TrainingArguments

    quiet = "report_to=[], disable_tqdm=True, use_cpu=True, per_device_train_batch_size=2, learning_rate=1e-3, "
    more = {
        ".from_pretrained(\"nvidia/mit-b0\", num_labels=3)": "(config)",
        '"models", max': f'"models", {quiet} max',
        "=500": "=2", "16, 16)": "32, 32)",
    }  # fmt: skip
    config = SegformerConfig(
        depths=[1, 1, 1, 1], hidden_sizes=[4, 8, 12, 16], num_attention_heads=[1, 1, 2, 2], decoder_hidden_size=8,
        num_labels=3,
    )  # fmt: skip

    def form(image: Tensor, label: Tensor) -> Any:
        return {"pixel_values": image, "labels": label}

    large = {"channels": 3, "size": 32}
    return code_after_the_diff("Hugging Face", **EARLY, **more), {
        "torch": torch, "Path": Path, "config": config, "TrainingArguments": TrainingArguments,
        "SegformerForSemanticSegmentation": SegformerForSemanticSegmentation,
        "train_set": Slices(6, form, **large), "val_set": Slices(4, form, 2, **large),
        "unlabelled_loader": DataLoader(Slices(20, alone, 1, **large), 4, shuffle=True),
    }  # fmt: skip


def accelerate() -> tuple[str, dict[str, Any]]:
    from accelerate import Accelerator

    return code_after_the_diff("Few labels with Accelerate", **EARLY, **{"Accelerator(": "Accelerator(cpu=True, "}), {
        "torch": torch, "Path": Path, "Accelerator": Accelerator, "MyUNet": unet,
        "train_loader": DataLoader(Slices(6, pair), 2, shuffle=True),
        "unlabelled_loader": DataLoader(Slices(20, alone, 1), 4, shuffle=True),
    }  # fmt: skip


def torchrun() -> tuple[str, dict[str, Any]]:
    """Of two processes."""

    def loader(data: Dataset, size: int) -> DataLoader:
        return DataLoader(data, size, sampler=DistributedSampler(data))

    more = {"dist.init_process_group()": "pass"}
    if not BROADCASTS_TWICE:  # as the page says
        more["(MyUNet())"] = "(MyUNet(), broadcast_buffers=False)"
    return code_after_the_diff("Few labels with torchrun", **EARLY, **more), {
        "torch": torch, "Path": Path, "os": os, "dist": dist, "MyUNet": unet,
        "DistributedDataParallel": nn.parallel.DistributedDataParallel,
        "train_loader": loader(Slices(12, pair), 2), "unlabelled_loader": loader(Slices(36, alone, 1), 4),
    }  # fmt: skip


def main(framework: str, folder: Path, kill_at: int) -> None:
    """Run the page's code; at `kill_at` 0 that of the run that was killed, again."""
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    rank = 0
    if framework == "torchrun":
        dist.init_process_group("gloo")
        rank = dist.get_rank()
    for name in ["whole", "cut"] if kill_at else ["cut"]:
        (folder / name).mkdir(exist_ok=True)
        os.chdir(folder / name)
        code, names = globals()[framework]()
        mine = kill_at if name == "cut" and kill_at and rank == 0 else None
        found = Run(0 if kill_at else 7, mine).execute(code, names)
        torch.save(found, folder / f"{name}_{rank}.pt")
    if framework == "torchrun":
        dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]))
