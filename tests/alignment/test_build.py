"""Building costs one dry forward, and a second in training only where the model ends in an activation."""

from __future__ import annotations

import pytest
from models import UNet, batch
from torch import Tensor, nn

from reseg_loss import DeepSupervision, ReSegWrapper

MODES: list[bool] = []


class Counting(UNet):
    """Notes the mode of every forward in `MODES`, which a dry forward does not undo as it does attributes."""

    def __init__(self, last: nn.Module | None = None, in_training: bool = True) -> None:
        super().__init__()
        MODES.clear()
        self.last, self.in_training = last, in_training

    def forward(self, x: Tensor) -> Tensor:
        MODES.append(self.training)
        logits = super().forward(x)
        return logits if self.last is None or (self.training and not self.in_training) else self.last(logits)


@pytest.mark.parametrize("made", [ReSegWrapper, DeepSupervision])
def test_one_forward_in_evaluation_tells_all(made):
    made(Counting(), batch()[0])
    assert MODES == [False]


def test_a_second_in_training_where_it_ends_in_an_activation():
    DeepSupervision(Counting(nn.Softmax(1), in_training=False), batch()[0])
    assert MODES == [False, True]
    MODES.clear()
    assert DeepSupervision(Counting(nn.Softmax(1)), batch()[0]).ending is not None
    assert MODES == [False, True]


def test_the_teacher_of_a_model_that_ends_in_an_activation_paints_any_image():
    assert isinstance(ReSegWrapper(Counting(nn.Sigmoid()), batch()[0]).teacher.after, nn.Conv2d)
    same = ReSegWrapper(UNet(classes=1), batch()[0]).teacher
    assert isinstance(same.after, nn.Identity)
