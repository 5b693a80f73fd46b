"""Hugging Face's Trainer, run for real on models built from configs: steps, evaluation, checkpoints, wrong uses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from models import UNet, batch
from torch import Tensor
from torch.utils.data import Dataset

from reseg_loss import CutMixConsistency, ReSegError, SemiSupervised

pytest.importorskip("transformers")

from transformers import (
    ConvNextConfig,
    SegformerConfig,
    SegformerForSemanticSegmentation,
    TrainingArguments,
    UperNetConfig,
    UperNetForSemanticSegmentation,
)

from reseg_loss.integrations.huggingface import SemiSupervisedTrainer

pytestmark = [
    pytest.mark.filterwarnings("default"),  # the framework's own are many
    pytest.mark.filterwarnings("error:::reseg_loss"),
    pytest.mark.filterwarnings("ignore:no heads of deep supervision"),
]


def segformer() -> Any:
    return SegformerForSemanticSegmentation(
        SegformerConfig(
            depths=[1, 1, 1, 1], hidden_sizes=[4, 8, 12, 16], num_attention_heads=[1, 1, 2, 2], decoder_hidden_size=8,
            num_labels=3,
        )
    )  # fmt: skip


def upernet() -> Any:
    backbone = ConvNextConfig(
        depths=[1, 1, 1, 1], hidden_sizes=[4, 8, 12, 16], out_features=["stage1", "stage2", "stage3", "stage4"]
    )
    return UperNetForSemanticSegmentation(
        UperNetConfig(
            backbone_config=backbone, hidden_size=8, num_labels=3, auxiliary_in_channels=12, auxiliary_channels=4
        )
    )


def images(n: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    return batch(n=n, size=32, channels=3, seed=seed)


class Labelled(Dataset):
    def __init__(self, n: int, seed: int = 0, **more: Any) -> None:
        self.images, self.labels = images(n, seed)
        self.more = more

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Any:
        return {"pixel_values": self.images[index], "labels": self.labels[index], **self.more}


class Noted(SemiSupervisedTrainer):
    """Notes the training batches, and makes the random numbers of each known."""

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        if model.training:
            torch.manual_seed(len(self.batches))
            self.batches.append(dict(inputs))
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        if model.training:
            self.losses.append(loss.detach())
        return loss


def unlabelled_loader() -> list[Tensor]:
    return [*images(10, 1)[0].split(4)]  # 4, 4 and 2


def made(folder: Path, make: Any = segformer, steps: int = 5, optimizer: bool = False, **kwargs: Any) -> Noted:
    torch.manual_seed(0)
    model = make()
    semi = SemiSupervised(model, images(2)[0], rampup_steps=None, threshold=0.0)
    more = {}
    if optimizer:
        sgd = torch.optim.SGD([*model.parameters(), *semi.parameters()], 0.1)
        more["optimizers"] = (sgd, torch.optim.lr_scheduler.ConstantLR(sgd, 1.0))
    arguments = TrainingArguments(
        str(folder), max_steps=steps, per_device_train_batch_size=2, report_to=[], disable_tqdm=True, use_cpu=True,
        **{"save_strategy": "no", "max_grad_norm": 0.0, **kwargs},
    )  # fmt: skip
    sets = {"train_dataset": Labelled(6), "eval_dataset": Labelled(4, 2)}
    trainer = Noted(model, arguments, semi=semi, unlabelled=unlabelled_loader(), **sets, **more)
    trainer.batches, trainer.losses = [], []
    return trainer


def same(a: Any, b: Any) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def weights(model: torch.nn.Module) -> list[Tensor]:
    return [value.clone() for value in model.state_dict().values()]


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("make", [segformer, upernet, lambda: Plain(3)], ids=["no heads", "its own", "heads"])
def test_the_step_is_the_plain_loops_step(tmp_path, make, accumulate):
    trainer = made(tmp_path, make, optimizer=True, steps=4 // accumulate, gradient_accumulation_steps=accumulate)
    trainer.train()
    plain = made(tmp_path, make, optimizer=True)
    plain.model.train()
    unlabelled = unlabelled_loader()
    for step, part in enumerate(trainer.batches):
        torch.manual_seed(step)
        loss = plain.semi.loss(part["pixel_values"], part["labels"], unlabelled[step % 3])
        assert torch.equal(loss, trainer.losses[step])
        # of three batches in an epoch the third is the end of it
        last = step == 2 or (step + 1) % accumulate == 0
        (loss / (1 if step == 2 else accumulate)).backward()
        if last:
            plain.optimizer.step()
            plain.optimizer.zero_grad()
            plain.semi.update()
    assert same(weights(trainer.model), weights(plain.model))
    assert same(trainer.semi.parameters(), plain.semi.parameters())
    assert same(weights(trainer.semi.average), weights(plain.semi.average))
    assert trainer.semi.stats()["unlabelled"] > 0


class Plain(UNet):
    """A module that is not theirs, and has levels for heads."""

    def forward(self, pixel_values: Tensor, labels: Any = None) -> Any:
        return {"logits": super().forward(pixel_values)}


def test_the_heads_are_in_the_optimizer_that_the_trainer_makes(tmp_path):
    trainer = made(tmp_path, lambda: Plain(3))
    before = [p.detach().clone() for p in trainer.semi.parameters()]
    trainer.train()
    known = [id(p) for group in trainer.optimizer.param_groups for p in group["params"]]
    assert len(known) == len(set(known))
    assert {id(p) for p in trainer.semi.parameters()} < set(known)
    assert not any(torch.equal(x, y) for x, y in zip(before, trainer.semi.parameters(), strict=True))
    trainer.train()  # once more
    assert [id(p) for group in trainer.optimizer.param_groups for p in group["params"]] == known


def test_evaluation_and_what_is_saved_are_the_mean_teacher(tmp_path):
    trainer = made(tmp_path, optimizer=True, eval_strategy="steps", eval_steps=2)
    trainer.train()
    own, average = weights(trainer.model), trainer.semi.average.eval()
    assert not same(own, weights(average))
    found = trainer.evaluate()
    part = trainer.eval_dataset[:]
    with torch.no_grad():
        expected = average(pixel_values=part["pixel_values"], labels=part["labels"]).loss
    assert found["eval_loss"] == pytest.approx(expected.item(), rel=1e-5)
    logits = trainer.predict(trainer.eval_dataset).predictions
    with torch.no_grad():
        assert torch.allclose(torch.as_tensor(logits), average(part["pixel_values"]).logits, atol=1e-5)
    assert same(weights(trainer.model), own)
    trainer.save_model(str(tmp_path / "saved"))
    saved = SegformerForSemanticSegmentation.from_pretrained(tmp_path / "saved")
    assert same(weights(saved), weights(average))
    assert same(weights(trainer.model), own)
    # other weights in the model are what is evaluated then
    trainer.model.load_state_dict(segformer().state_dict())
    with torch.no_grad():
        expected = trainer.model.eval()(pixel_values=part["pixel_values"], labels=part["labels"]).loss
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected.item(), rel=1e-5)


def test_before_training_the_model_itself_is_evaluated(tmp_path):
    trainer = made(tmp_path)
    trainer.model.load_state_dict(segformer().state_dict())
    part = trainer.eval_dataset[:]
    with torch.no_grad():
        expected = trainer.model.eval()(pixel_values=part["pixel_values"], labels=part["labels"]).loss
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected.item(), rel=1e-5)


def test_the_best_model_is_the_mean_teacher_that_was_best(tmp_path):
    class Scores(Noted):
        """Best at step 2."""

        def evaluate(self, *args: Any, **kwargs: Any) -> Any:
            found = super().evaluate(*args, **kwargs)
            found["eval_score"] = float(self.state.global_step == 2)
            kept.append(weights(self.semi.average))
            return found

    kept: list[list[Tensor]] = []
    trainer = made(
        tmp_path, optimizer=True, eval_strategy="steps", eval_steps=2, save_strategy="steps", save_steps=2, steps=6,
        load_best_model_at_end=True, metric_for_best_model="score",
    )  # fmt: skip
    trainer.__class__ = Scores
    trainer.train()
    assert len(kept) == 3
    assert same(weights(trainer.semi.average), kept[0])
    assert same(weights(trainer.model), kept[0])


def test_a_call_of_update_while_it_trains_and_other_wrong_uses_are_refused(tmp_path):
    class Twice(Noted):
        def training_step(self, *args: Any, **kwargs: Any) -> Any:
            self.semi.update()
            return super().training_step(*args, **kwargs)

    trainer = made(tmp_path)
    trainer.__class__ = Twice
    with pytest.raises(ReSegError, match=r"Twice calls update\(\) after each optimizer step"):
        trainer.train()
    trainer.semi.update()

    trainer = made(tmp_path)
    trainer.train_dataset = Labelled(6, pixel_mask=torch.ones(32, 32))
    trainer.args.remove_unused_columns = False
    with pytest.raises(ReSegError, match=r"has \['labels', 'pixel_mask', 'pixel_values'\]; it must have"):
        trainer.train()

    arguments = {"args": trainer.args, "unlabelled": unlabelled_loader()}
    with pytest.raises(ReSegError, match="another model than the Trainer's"):
        SemiSupervisedTrainer(segformer(), semi=trainer.semi, **arguments)
    for wrong, message in (
        ({"label_smoothing_factor": 0.5}, r"label_smoothing_factor do not reach .*task_loss="),
        (
            {
                "save_only_model": True,
                "load_best_model_at_end": True,
                "save_strategy": "steps",
                "eval_strategy": "steps",
            },
            "leave out save_only_model",
        ),
    ):
        with pytest.raises(ReSegError, match=message):
            made(tmp_path, **wrong)
    with pytest.raises(ReSegError, match=r"compute_loss_func= and .*task_loss="):
        SemiSupervisedTrainer(trainer.model, semi=trainer.semi, compute_loss_func=lambda *_: 0, **arguments)
    mixed = CutMixConsistency(trainer.model, rampup_steps=None, ignore_index=255)
    with pytest.raises(ReSegError, match="semi= must be a SemiSupervised, got CutMixConsistency"):
        SemiSupervisedTrainer(trainer.model, semi=mixed, **arguments)  # pyright: ignore[reportArgumentType]

    trainer = made(tmp_path, save_strategy="steps", save_steps=2)
    trainer.train()
    (tmp_path / "checkpoint-4" / "semi.pt").unlink()
    with pytest.raises(ReSegError, match=r"checkpoint-4 has no semi\.pt"):
        made(tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
