"""One of two processes that torchrun starts: runs the page's code whole, and killed and resumed, and writes what came.

test_frameworks_page.py starts it and compares.
"""

from __future__ import annotations

import os
import sys
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import few_labels_worker as few
import torch
import torch.distributed as dist
from frameworks_page import code_after_the_diff
from models import UNet, batch
from models import task_loss as cross_entropy
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from reseg_loss import ReSegWrapper

DDP, FSDP2 = "torchrun, DistributedDataParallel", "FSDP2"


class KilledError(Exception):
    pass


class Run:
    """One start of a page's script: what it is given, and what it leaves."""

    def __init__(self, seed: int, kill_at: int | None = None) -> None:
        self.seed, self.kill_at = seed, kill_at
        self.losses: list[Tensor] = []
        self.fits = 0

    def task_loss(self, logits: Tensor, label: Tensor) -> Tensor:
        value = cross_entropy(logits, label)
        if logits.shape[-1] == 16:  # not of a head
            self.losses.append(value.detach().clone())
            if len(self.losses) == self.kill_at:
                raise KilledError
        return value

    def scope(self, sampler: bool) -> dict[str, Any]:
        data = TensorDataset(*batch(n=12))
        own = {"sampler": DistributedSampler(data, shuffle=False)} if sampler else {}
        return {
            "MyUNet": lambda: UNet(norm=lambda channels: nn.GroupNorm(1, channels)),
            "train_loader": DataLoader(data, batch_size=2, **own),
            "task_loss": self.task_loss,
            "torch": torch, "Path": Path, "dist": dist,
            "DistributedDataParallel": DistributedDataParallel,
            "fully_shard": fully_shard, "StateDictOptions": StateDictOptions,
            "get_state_dict": get_state_dict, "set_state_dict": set_state_dict,
        }  # fmt: skip

    def execute(self, code: str, sampler: bool = True, **scope: Any) -> dict[str, Any]:
        names = {**self.scope(sampler), **scope}
        original = ReSegWrapper.fit_recon

        def counted(*args: Any, **kwargs: Any) -> Any:
            self.fits += 1
            return original(*args, **kwargs)

        ReSegWrapper.fit_recon = counted
        torch.manual_seed(self.seed)
        try:
            exec(code, names)
        except KilledError:
            return {}
        finally:
            ReSegWrapper.fit_recon = original
        return self.found(names)

    def found(self, names: dict[str, Any]) -> dict[str, Any]:
        parts = {name: [full(p) for p in names[name].parameters()] for name in ("model", "ds") if name in names}
        teacher = [v.clone() for v in names["reseg"].teacher.state_dict().values()]
        return {**parts, "teacher": teacher, "losses": self.losses, "fits": self.fits, "calls": names["reseg"].calls}


def full(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach().cpu().clone()


def whole_and_resumed(code: str, folder: Path, **kwargs: Any) -> dict[str, Any]:
    """The script from start to end, and the same killed in its last epoch and started again."""
    here = Path.cwd()
    found = {}
    for name, runs in {"whole": [Run(0)], "resumed": [Run(0, kill_at=8), Run(7)]}.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        os.chdir(folder / name)
        try:
            for run in runs:
                found[name] = run.execute(code, **kwargs)
                dist.barrier()
        finally:
            os.chdir(here)
    return found


def ddp(folder: Path) -> Any:
    return whole_and_resumed(code_after_the_diff(DDP, **{"dist.init_process_group()": "pass"}), folder)


def fsdp2(folder: Path) -> Any:
    return whole_and_resumed(code_after_the_diff(FSDP2), folder)


def accelerate(folder: Path) -> Any:
    from accelerate import Accelerator

    code = code_after_the_diff("Accelerate", **{"Accelerator(": "Accelerator(cpu=True, "})
    return whole_and_resumed(code, folder, sampler=False, Accelerator=Accelerator)


def monai_engine(folder: Path) -> Any:
    from monai.engines import SupervisedTrainer
    from monai.handlers import CheckpointSaver
    from monai.losses import DiceCELoss
    from monai.networks.nets import UNet as MonaiUNet

    code = code_after_the_diff(
        "MONAI engines and Ignite",
        **{"device, 100": "device, 1", "train_loader, net": "train_loader, DistributedDataParallel(net)"},
    )
    data = [{"image": image, "label": label[:, None]} for image, label in [part(step) for step in range(3)]]
    os.chdir(folder)
    names = {
        "UNet": MonaiUNet, "SupervisedTrainer": SupervisedTrainer, "CheckpointSaver": CheckpointSaver,
        "DiceCELoss": DiceCELoss, "DistributedDataParallel": DistributedDataParallel, "torch": torch,
        "device": torch.device("cpu"), "train_loader": data,
    }  # fmt: skip
    torch.manual_seed(dist.get_rank())
    exec(code, names)
    return Run(0).found({**names, "model": names["net"]})


def lightning(folder: Path) -> Any:
    import lightning.pytorch as L

    trainer = (
        "L.Trainer(max_epochs=1, accelerator='cpu', devices=2, strategy='ddp', logger=False, "
        "enable_progress_bar=False, enable_model_summary=False"
    )
    code = code_after_the_diff(
        "Lightning",
        **{"L.Trainer(max_epochs=100": trainer, "trainer.fit(Segmenter()": "trainer.fit(module := Segmenter()"},
    )
    os.chdir(folder)
    run = Run(dist.get_rank())
    names = {**run.scope(sampler=False), "L": L}
    torch.manual_seed(dist.get_rank())
    exec(code, names)
    module = names["module"]
    return run.found({"model": module.net, "ds": module.ds, "reseg": module.reseg})


def few_labels(make: Callable[[], tuple[str, dict[str, Any]]], folder: Path, **more: str) -> Any:
    """A page's code for few labels, whose processes begin with other weights."""
    code, names = make()
    for old, new in more.items():
        assert old in code, old
        code = code.replace(old, new)
    os.chdir(folder)
    found = few.Run(dist.get_rank(), None).execute(code, names)
    # running statistics are each process's own, the model's till the next forward
    model, average = ([v for k, v in found[part].items() if "running" not in k] for part in ("model", "average"))
    parts = {"model": model, "ds": found["heads"], "teacher": average}
    return {**parts, "losses": found["losses"], "calls": len(found["losses"])}


def few_labels_in_lightning(folder: Path) -> Any:
    processes = "accelerator='cpu', devices=2, strategy='ddp', "
    return few_labels(few.lightning, folder, **{"accelerator='cpu', ": processes})


def few_labels_in_monai(folder: Path) -> Any:
    return few_labels(few.monai, folder, **{"train_loader, net": "train_loader, DistributedDataParallel(net)"})


def few_labels_in_hugging_face(folder: Path) -> Any:
    buffers = f"ddp_broadcast_buffers={few.BROADCASTS_TWICE}"
    return few_labels(few.huggingface, folder, **{"use_cpu=True": f"use_cpu=True, ddp_backend='gloo', {buffers}"})


def part(step: int) -> tuple[Tensor, Tensor]:
    image, label = batch(n=4, seed=step)
    mine = slice(2 * dist.get_rank(), 2 * dist.get_rank() + 2)
    return image[mine], label[mine]


CHECKS: list[Callable[[Path], Any]] = [
    ddp, fsdp2, accelerate, monai_engine, lightning,
    few_labels_in_lightning, few_labels_in_monai, few_labels_in_hugging_face,
]  # fmt: skip


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    found: dict[str, Any] = {}
    for check in CHECKS:
        own = folder / check.__name__
        own.mkdir(exist_ok=True)
        try:
            found[check.__name__] = check(own)
        except ModuleNotFoundError as error:
            found[check.__name__] = error
        except Exception:
            found[check.__name__] = Exception(traceback.format_exc())
        torch.save(found, folder / f"{rank}.pt")
        dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
