"""nnU-Net's trainer with unlabelled images: a mean teacher labels them, the network learns these on mixed images."""

# pyright: reportMissingImports=false
from __future__ import annotations

import math
from contextlib import nullcontext
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from torch import Tensor, nn

from ...common.inputs import check_number, check_weight
from ...errors import ReSegError
from ...mean_teacher import MeanTeacher
from ...mixing import perturbed, ramp_up, random_intensities
from ...recording.copying import unwrap
from . import progress, step, unlabelled
from .checkpoints import finish, trainer_to_predict_with

LOGGED: tuple[str, ...] = ("unlabelled_loss", "sure_share")
STUDENT = "reseg_student"  # in checkpoints


class nnUNetTrainerSemi(nnUNetTrainer):  # noqa: N801
    """`nnUNetv2_train DATASET CONFIGURATION FOLD -tr nnUNetTrainerSemi`, after `prepare DATASET`.

    Validation uses the mean teacher's weights, and checkpoints hold them as the network's. Checkpoints name the stock
    trainer, so they can predict where this library is not installed. They also hold the network in training, for `--c`.
    At weight 0 or without unlabelled images this is the stock trainer.

    Attributes:
        unlabelled_weight: a factor of the unlabelled loss, after the ramp.
        rampup: the share of all epochs over which the loss grows to that weight (`reseg_loss.mixing.ramp_up`).
        threshold: a pseudo-label is sure if its probability is at least this.
        ema_decay: decay of the mean teacher, per step.
    """

    unlabelled_weight: float = 1.0
    rampup: float = 0.4
    threshold: float = 0.95
    ema_decay: float = 0.99

    unlabelled_patches: unlabelled.nnUNetDataLoader | None = None
    mean_teacher: MeanTeacher | None = None
    student_of_checkpoint: dict[str, Tensor] | None = None

    def on_train_start(self) -> None:
        """Find the unlabelled images, and set up the mean teacher, the loss and the loader for them."""
        if not self.was_initialized:
            self.initialize()
        check_weight("unlabelled_weight", self.unlabelled_weight)
        check_number("rampup", self.rampup, least=0, most=1)
        check_number("threshold", self.threshold, least=0, most=1)
        check_number("ema_decay", self.ema_decay, least=0, below=1)
        images = self.unlabelled_images() if self.unlabelled_weight else None
        if images is None:
            if self.student_of_checkpoint is not None:
                raise ReSegError(
                    "this run was started with unlabelled images, but has none now: prepare them again and use an "
                    "unlabelled_weight other than 0, or start over without --c"
                )
            super().on_train_start()
            return
        if self.current_epoch > 0 and self.student_of_checkpoint is None:
            raise ReSegError(
                f"the checkpoint of --c has no {STUDENT!r}: this run was started without unlabelled images, so start "
                "over without --c; or a base of this trainer loads checkpoints without calling super(), so list "
                "nnUNetTrainerSemi before it"
            )
        if hasattr(self, "reseg_settings"):
            raise ReSegError("nnUNetTrainerSemi and nnUNetTrainerReSeg cannot be bases of the same trainer")
        if self.is_cascaded:
            raise ReSegError("unlabelled images have no segmentation of a previous stage: cascades are not supported")
        whole = self.batch_size
        self.batch_size, others = step.shares(whole)
        self.whole_batch, self.unlabelled_patches = whole, unlabelled.patches(self, images, others)
        # as many patches to validate on as ever
        self.num_val_iterations_per_epoch = math.ceil(self.num_val_iterations_per_epoch * whole / self.batch_size)
        super().on_train_start()
        self.loss = step.LossOfBoth(self.loss, self._unlabelled_loss())
        self.mean_teacher = MeanTeacher(self.network, self.ema_decay)
        self.mean_teacher.reset()
        if self.student_of_checkpoint is not None:  # the network's weights are the mean teacher's
            unwrap(self.network).load_state_dict(self.student_of_checkpoint)
            self.student_of_checkpoint = None
        self.print_to_log_file(
            f"{len(images.identifiers)} unlabelled images; a step has {self.batch_size} patches with labels and "
            f"{others} without (unlabelled_weight {self.unlabelled_weight}, rampup {self.rampup}, "
            f"threshold {self.threshold}, ema_decay {self.ema_decay})"
        )

    def unlabelled_images(self) -> unlabelled.Images | None:
        """The images from `prepare`, and cases of imagesTr whose label is only "ignore"; None if there are none."""
        dataset = Path(self.preprocessed_dataset_folder_base)
        labelled = self.dataset_class(self.preprocessed_dataset_folder)
        sources = unlabelled.prepared(dataset, self.plans_manager, self.configuration_manager)
        unlabelled.refuse_unprepared(sources, dataset.name, self.dataset_json["file_ending"], self.plans_manager)
        unlabelled.refuse_labelled(sources, labelled.identifiers)
        sources |= dict.fromkeys(self.without_labels, labelled)
        if self.without_labels and any(self.configuration_manager.use_mask_for_norm):
            self.print_to_log_file(
                f"WARNING: {unlabelled.named(self.without_labels)}: nnU-Net normalizes images of this data set without "
                'the zeros around them, but not where the label is "ignore", so these look different from all others; '
                "put them into imagesUn instead"
            )
        if sources:
            return unlabelled.Images(sources)
        self.print_to_log_file(
            f"No unlabelled images: this training is nnU-Net's own. To use images in {dataset.name}/imagesUn of "
            f"nnUNet_raw, run {unlabelled.command(dataset.name, self.plans_manager)}. Cases whose label is only "
            '"ignore" are used, too'
        )
        return None

    def get_dataloaders(self) -> tuple[Any, Any]:
        """nnU-Net's, where training batches have "unlabelled" patches, too."""
        if self.unlabelled_patches is None:
            return super().get_dataloaders()
        with unlabelled.without_processes():
            loaders = super().get_dataloaders()
        return unlabelled.joined(loaders, self.unlabelled_patches, self.whole_batch, self.device.type == "cuda")

    def do_split(self) -> tuple[list[str], list[str]]:
        """nnU-Net's split, without the cases that have no label."""
        split = super().do_split()
        if not self.unlabelled_weight or not self.without_labels:
            return split
        training, validation = ([case for case in part if case not in self.without_labels] for part in split)
        self.print_to_log_file(f"{len(training)} training and {len(validation)} validation cases have a label.")
        if not training or not validation:
            raise ReSegError(f"fold {self.fold} has no case with a label to train on, or none to validate on")
        return training, validation

    @cached_property
    def without_labels(self) -> set[str]:
        """Cases of imagesTr whose label is only "ignore"."""
        return unlabelled.without_labels(self.dataset_class(self.preprocessed_dataset_folder), self.label_manager)

    def train_step(self, batch: dict[str, Any]) -> dict[str, Any]:
        """nnU-Net's own step, on its batch together with mixed unlabelled images."""
        if self.mean_teacher is None:
            return super().train_step(batch)
        images = batch["unlabelled"].to(self.device, non_blocking=True)
        with torch.autocast(self.device.type) if self.device.type == "cuda" else nullcontext():
            logits = self.mean_teacher.predict(images)
        logits = logits if isinstance(logits, Tensor) else logits[0]
        ignored = self._ignored()
        target = step.pseudo_target(logits, self.threshold, ignored, self.label_manager.has_regions)
        mixed, target = step.mixed(images, target)
        self.loss.expect(step.downsampled(target, self._get_deep_supervision_scales()), self.factor())
        data = torch.cat([batch["data"].to(self.device, non_blocking=True), perturbed(mixed, self.perturb)])
        outputs = super().train_step({**batch, "data": data})
        # read before the update, which then runs while the next batch is loaded
        values = torch.stack([self.loss.unlabelled.float(), step.counted(target, ignored)]).tolist()
        self.mean_teacher.update()
        return {**outputs, **dict(zip(LOGGED, values))}

    def perturb(self, images: Tensor) -> Tensor:
        """Change the intensities of mixed images, (B, C, *spatial). It must not move anything in them."""
        return random_intensities(images)

    def factor(self) -> float:
        """The factor of the unlabelled loss in this epoch."""
        epochs = self.rampup * self.num_epochs
        return self.unlabelled_weight * ramp_up(self.current_epoch, epochs if epochs > 0 else None)

    def on_train_epoch_end(self, train_outputs: list[dict[str, Any]]) -> None:
        """Log the unlabelled loss, which the logged loss contains, and the share of sure voxels."""
        super().on_train_epoch_end(train_outputs)
        if self.mean_teacher is None:
            return
        if not all(name in output for output in train_outputs for name in LOGGED):
            raise ReSegError(
                "this trainer's train_step did not call that of nnUNetTrainerSemi, so no unlabelled image was used: "
                "list nnUNetTrainerSemi first among its bases, or call super().train_step"
            )
        found = np.array([[output[name] for name in LOGGED] for output in train_outputs]).mean(0)
        if self.is_ddp:
            everywhere: list[Any] = [None] * dist.get_world_size()
            dist.all_gather_object(everywhere, found)
            found = np.mean(everywhere, 0)
        values = dict(zip(LOGGED, found.tolist()))
        progress.log(self.logger, values, self.current_epoch)
        self.print_to_log_file(
            f"unlabelled loss {values['unlabelled_loss']:.4f} times {self.factor():.4f}, "
            f"{100 * values['sure_share']:.1f} % of voxels sure"
        )

    def on_validation_epoch_start(self) -> None:
        """Validate with the mean teacher's weights."""
        super().on_validation_epoch_start()
        self._exchange_weights()

    def on_validation_epoch_end(self, val_outputs: list[dict[str, Any]]) -> None:
        """Continue training with the network's own weights."""
        self._exchange_weights()
        super().on_validation_epoch_end(val_outputs)

    def on_epoch_end(self) -> None:
        """Plot what is logged."""
        super().on_epoch_end()
        if self.mean_teacher is not None and self.local_rank == 0:
            progress.plot(self.logger, LOGGED, self.output_folder)

    def on_train_end(self) -> None:
        """Leave the mean teacher's weights in the network, because nnU-Net validates it next."""
        super().on_train_end()
        if self.mean_teacher is not None:
            self._exchange_weights()
            self.mean_teacher = None

    def save_checkpoint(self, filename: str) -> None:
        """Save as the stock trainer under its name, with the mean teacher's weights as the network's, atomically."""
        partial = f"{filename}.stock"
        super().save_checkpoint(partial)
        if self.local_rank == 0 and not self.disable_checkpointing:
            name = trainer_to_predict_with(type(self), nnUNetTrainerSemi)
            changes: dict[str, Any] = {"trainer_name": name, "reseg_trainer": type(self).__name__}
            if self.mean_teacher is not None:
                changes["network_weights"] = self.mean_teacher.network.state_dict()
                changes[STUDENT] = unwrap(self.network).state_dict()
            finish(partial, filename, changes)

    def load_checkpoint(self, filename_or_checkpoint: dict[str, Any] | str) -> None:
        """Load the mean teacher's weights into the network, to validate or predict; `on_train_start` does the rest."""
        super().load_checkpoint(filename_or_checkpoint)
        checkpoint = filename_or_checkpoint
        if isinstance(checkpoint, str):
            checkpoint = torch.load(checkpoint, map_location="cpu", weights_only=False)
        self.student_of_checkpoint = checkpoint.get(STUDENT)

    def _exchange_weights(self) -> None:
        """Swap the weights and buffers of the network and the mean teacher, in place."""
        if self.mean_teacher is None:
            return
        with torch.no_grad():
            for a, b in zip(_tensors(self.mean_teacher.network), _tensors(unwrap(self.network)), strict=True):
                kept = a.clone()
                a.copy_(b)
                b.copy_(kept)

    def _ignored(self) -> int:
        """The value of voxels that do not count."""
        own = self.label_manager.ignore_label
        return int(max(self.label_manager.all_labels)) + 1 if own is None else own

    def _unlabelled_loss(self) -> nn.Module:
        """The same kind of loss as for the labelled images, built for labels with an ignore value."""
        own, labels = self.label_manager, {**self.dataset_json["labels"], "ignore": self._ignored()}
        self.label_manager = self.plans_manager.get_label_manager({**self.dataset_json, "labels": labels})
        try:
            loss = self._build_loss()
        finally:
            self.label_manager = own
        scales = self._get_deep_supervision_scales()
        levels = None if scales is None else len(scales)
        axes = len(self.configuration_manager.patch_size)
        heads, regions = own.num_segmentation_heads, own.has_regions
        step.check_ignoring(loss, heads, levels, self._ignored(), regions, axes, self.device)
        return loss


def _tensors(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]
