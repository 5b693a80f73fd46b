"""nnU-Net's trainer with stage 1 before its first epoch and the alignment loss in its training steps."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer  # pyright: ignore[reportMissingImports]
from torch import Tensor, nn

from ...alignment.stage1_file import Stage1File
from ...alignment.wrapper import ReSegWrapper
from ...errors import ReSegError
from .checkpoints import finish, trainer_to_predict_with

IGNORED = 255  # where regions have an ignore label


class nnUNetTrainerReSeg(nnUNetTrainer):  # noqa: N801
    """`nnUNetv2_train DATASET CONFIGURATION FOLD -tr nnUNetTrainerReSeg`.

    Stage 1 runs on the fold's own training batches. Its file is reseg_stage1.pth in the output folder. `--c` takes the
    teacher from it, and a killed stage 1 resumes from it. Checkpoints name the stock trainer, because the network is
    the same, so they can predict where this library is not installed. At weight 0 this is the stock trainer.

    Attributes:
        reseg_settings: keywords of `ReSegWrapper`. Label input and ignore value follow from the data set.
        recon_epochs: length of stage 1, in epochs of `num_iterations_per_epoch` steps.
    """

    reseg_settings: ClassVar[dict[str, Any]] = {"preset": "paper"}
    recon_epochs = 50
    reseg: ReSegWrapper | None = None

    def on_train_start(self) -> None:
        """Set the hooks before the (lazily) compiled network is called, and fit the teacher or take the file's."""
        super().on_train_start()
        if self.reseg_settings.get("weight") == 0:
            return
        self.reseg = reseg = self._make_reseg()
        self.loss = _WithAlignment(self.loss, reseg, self.label_of)
        file: Path | None = Path(self.output_folder) / "reseg_stage1.pth"
        if self.current_epoch > 0:
            self._refuse_another_teacher(file)
        elif self.disable_checkpointing:
            file = None
        elif self.local_rank == 0 and not self.logger.resume:
            file.unlink(missing_ok=True)  # of an earlier run in this folder
        amp = torch.float16 if self.grad_scaler is not None else None
        history = reseg.fit_recon(_Epoch(self), epochs=self.recon_epochs, amp=amp, checkpoint=file)
        self.print_to_log_file(f"stage 1: reconstruction loss {history[0]:.4f} at first, {history[-1]:.4f} at the end")

    def on_train_epoch_end(self, train_outputs: list[dict[str, Any]]) -> None:
        """Log the alignment; the logged loss contains it."""
        super().on_train_epoch_end(train_outputs)
        if self.reseg is not None:
            value = self.reseg.stats().get("alignment", 0.0)  # none at weight 0
            self.print_to_log_file(f"alignment {value:.4f} times {self.reseg.weight}")

    def save_checkpoint(self, filename: str) -> None:
        """Save as the stock trainer under its name, atomically."""
        partial = f"{filename}.stock"
        super().save_checkpoint(partial)
        if self.local_rank == 0 and not self.disable_checkpointing:
            name = trainer_to_predict_with(type(self), nnUNetTrainerReSeg)
            finish(partial, filename, {"trainer_name": name, "reseg_trainer": type(self).__name__})

    def _refuse_another_teacher(self, file: Path) -> None:
        """Raise a ReSegError if stage 1 would run in the middle of a training, on the way to another teacher."""
        stage_1 = Stage1File(file).read()
        done = 0 if stage_1 is None else len(stage_1["history"])
        if done < self.recon_epochs:
            raise ReSegError(
                f"with --c this run goes on, but {file} has {done} of {self.recon_epochs} epochs of stage 1, and the "
                "others would train another teacher: put this run's file there, and leave recon_epochs as it was"
            )

    def _make_reseg(self) -> ReSegWrapper:
        labels, settings = self.label_manager, dict(self.reseg_settings)
        if labels.has_regions:
            settings["label_input"] = "onehot"
        if labels.has_ignore_label:
            settings["ignore_index"] = IGNORED if labels.has_regions else labels.ignore_label
        patch = self.configuration_manager.patch_size
        example = torch.zeros(1, self.num_input_channels, *patch, device=self.device)
        return ReSegWrapper(self.network, example_input=example, **settings)

    def label_of(self, target: Tensor | list[Tensor]) -> Tensor:
        """The label at full resolution. For regions, the ignore channel at the end becomes a value in the others."""
        label = target[0] if isinstance(target, list) else target
        if self.label_manager.has_regions and self.label_manager.has_ignore_label:
            return torch.where(label[:, -1:] > 0, IGNORED, label[:, :-1].to(torch.uint8))
        return label


class _Epoch:
    """An epoch's number of batches from the trainer's endless loader."""

    def __init__(self, trainer: nnUNetTrainerReSeg) -> None:
        self.trainer = trainer

    def __len__(self) -> int:
        return self.trainer.num_iterations_per_epoch

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for _ in range(len(self)):
            batch = next(self.trainer.dataloader_train)
            yield batch["data"], self.trainer.label_of(batch["target"])


class _WithAlignment(nn.Module):
    """nnU-Net's loss, plus the alignment loss in training."""

    def __init__(self, loss: nn.Module, reseg: ReSegWrapper, label: Any) -> None:
        super().__init__()
        self.loss, self.reseg, self.label = loss, reseg, label

    def forward(self, output: Any, target: Any) -> Tensor:
        value = self.loss(output, target)
        if not torch.is_grad_enabled():  # it validates with the same loss
            return value
        return value + self.reseg.alignment_loss(self.label(target))
