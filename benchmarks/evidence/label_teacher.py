"""Teachers that see label maps, ideas to be measured: they clean pseudo-labels, align on them, or are learnt from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from examples.backbones.unet import UNet
from reseg_loss import CutMixConsistency
from reseg_loss.mixing import mix, random_boxes

RESTORED = "restored"  # the label input of a stage 1 that learns to restore damaged maps


@dataclass(frozen=True)
class Cleaning:
    """A teacher that restores damaged label maps corrects the mean teacher's predictions before they are learnt.

    Attributes:
        image: it sees the image, too.
        taken: "its own" prediction instead of the mean teacher's, or the "mean" of both probabilities. Where the two
            name different classes that is at most (1 + 1/2) / 2, below the threshold: nothing counts there.
    """

    image: bool = False
    taken: Literal["its own", "mean"] = "its own"


@dataclass(frozen=True)
class Aligning:
    """The reconstruction teacher sees the mean teacher's prediction of the mixed images, in the place of their label.

    The alignment grows as the loss of the pseudo-labels does. Pixels of which the mean teacher is not sure are what it
    predicts.

    Attributes:
        labelled: labelled images are aligned with their labels, too.
    """

    labelled: bool = False


@dataclass(frozen=True)
class Distilling:
    """The model learns on labelled images what a teacher predicts that sees the image and a damaged label.

    After label-assisted distillation (Qiu et al., arXiv 2407.13254), with this project's damages in the place of its
    noise, and without its second path, a consistency of the teacher's training.

    Attributes:
        temperature: of both distributions.
        weight: of the divergence.
    """

    temperature: float = 1.0
    weight: float = 1.0


Idea = Cleaning | Aligning | Distilling
IDEAS: dict[str, type[Cleaning] | type[Aligning] | type[Distilling]] = {
    "cleans": Cleaning,
    "aligns": Aligning,
    "distils": Distilling,
}


def idea_of(options: Mapping[str, Any] | None) -> Idea | None:
    """Of a variant's `label_teacher`: "does" is a name of `IDEAS`, all else its attributes."""
    if options is None:
        return None
    given = dict(options)
    does = given.pop("does", None)
    if does not in IDEAS:
        raise ValueError(f"label_teacher: does={does!r}; it is one of {', '.join(IDEAS)}")
    try:
        idea = IDEAS[does](**given)
    except TypeError as error:
        raise ValueError(f"label_teacher: {does!r} has no such option ({error})") from error
    if isinstance(idea, Cleaning) and idea.taken not in ("its own", "mean"):
        raise ValueError(f"label_teacher: taken={idea.taken!r}; it is 'its own' or 'mean'")
    return idea


def restorer_sees(idea: Idea | None) -> str | None:
    """What the teacher that restores label maps sees; None where the idea has no such teacher."""
    if isinstance(idea, Cleaning):
        return "label and image" if idea.image else "label"
    return "label and image" if isinstance(idea, Distilling) else None


class LabelTeacher(nn.Module):
    """Damaged label map in, logits of the whole one out: the evidence's U-Net, whatever network the student is."""

    def __init__(self, classes: int, width: int, sees: str) -> None:
        super().__init__()
        self.classes, self.sees_image = classes, sees == "label and image"
        self.made_of = classes, classes + self.sees_image, width
        self.body = UNet(*self.made_of)

    def forward(self, label: Tensor, image: Tensor) -> Tensor:
        """(B, H, W) int64 and the image (B, 1, H, W) to logits (B, classes, H, W)."""
        numbers = torch.arange(self.classes, device=label.device).view(-1, 1, 1)
        seen = (label[:, None] == numbers).float()
        return self.body(torch.cat([seen, image.float()], 1) if self.sees_image else seen)

    def redraw(self, seed: int) -> None:
        """New weights, the same for a seed."""
        with torch.random.fork_rng():
            torch.manual_seed(seed + 100_000)
            fresh = UNet(*self.made_of)
        self.body.load_state_dict(fresh.state_dict())


class Cleaned(CutMixConsistency):
    """CutMix whose pseudo-labels a teacher of label maps has corrected.

    Args:
        cleaner: gives logits of a predicted map (B, H, W) and its images, as `LabelTeacher`.
        taken: as in `Cleaning`.
        other: a control: the cleaner sees the map of the next sample.
    """

    def __init__(self, model: nn.Module, *, cleaner: nn.Module, taken: str, other: bool, **keywords: Any) -> None:
        super().__init__(model, **keywords)
        self.cleaner, self.taken, self.other = cleaner, taken, other

    def _select(self, output: Any, images: Tensor, which: int) -> tuple[Tensor, Tensor]:
        prediction, logits = super()._select(output, images, which)
        return (prediction, self.cleaned(logits, images)) if which == 1 else (prediction, logits)

    @torch.no_grad()
    def cleaned(self, logits: Tensor, images: Tensor) -> Tensor:
        """What stands for the mean teacher's logits."""
        label = logits.argmax(1)
        cleaned = self.cleaner(label.roll(1, 0) if self.other else label, images).float()
        if self.taken == "its own":
            return cleaned
        return torch.logaddexp(cleaned.log_softmax(1), logits.float().log_softmax(1))


class Corrected(nn.Module):
    """What `Cleaned` makes of the mean teacher's prediction: scored to see whether the correction corrects."""

    def __init__(self, mixed: Cleaned) -> None:
        super().__init__()
        # the method alone: in train mode the cleaner, which is frozen, would change its statistics
        self.average, self.cleaned = mixed.average, mixed.cleaned

    def forward(self, image: Tensor) -> Tensor:
        return self.cleaned(self.average(image), image)


class Seen(CutMixConsistency):
    """CutMix that keeps what the mean teacher predicts on the mixed images, sure or not."""

    _predicted: Tensor | None = None

    def _select(self, output: Any, images: Tensor, which: int) -> tuple[Tensor, Tensor]:
        prediction, logits = super()._select(output, images, which)
        if which == 1:
            self._predicted = logits.argmax(1)
        return prediction, logits

    def exchange(self, images: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
        """With the boxes of CutMix, kept for `taken`."""
        assert self._predicted is not None
        box = random_boxes(images)
        self._predicted = mix(self._predicted, box)
        return mix(images, box), mix(label, box)

    def taken(self) -> Tensor:
        """The predicted classes (B, H, W) of the last step's mixed images; only once."""
        assert self._predicted is not None
        predicted, self._predicted = self._predicted, None
        return predicted


def distillation(logits: Tensor, taught: Tensor, temperature: float) -> Tensor:
    """Mean over pixels of KL(taught || predicted) in nats, both (B, C, *spatial), times the temperature's square."""
    ours, theirs = ((x.float() / temperature).log_softmax(1) for x in (logits, taught))
    divergence = F.kl_div(ours, theirs, log_target=True, reduction="none").sum(1)
    return temperature**2 * divergence.mean()
