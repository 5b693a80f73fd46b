"""What a sigmoid or softmax module took in when it made a model's output: that of the one forward, or an error."""

from __future__ import annotations

import copy
import gc

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from reseg_loss import ReSegError
from reseg_loss.common.dryrun import dry_run
from reseg_loss.recording.ending import Ending

IMAGE = torch.randn(2, 3, 4, 4)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.end, self.blocks = nn.Conv2d(3, 3, 1), nn.Softmax(1), False

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        return checkpoint(self.end, x, use_reentrant=False) if self.blocks else self.end(input=x)  # pyright: ignore


def hooked(**kwargs) -> tuple[Net, Ending]:
    model = Net()
    return model, Ending(model, "end", **kwargs)


def refused(ending: Ending, output: Tensor, message: str) -> None:
    with pytest.raises(ReSegError, match=message):
        ending.logits(output)


def test_it_gives_the_input_once():
    model, ending = hooked()
    out = model(IMAGE)
    logits = ending.logits(out)
    assert torch.equal(logits, model.conv(IMAGE))
    assert torch.equal(logits.softmax(1), out)
    logits.sum().backward()
    assert model.conv.weight.grad is not None
    refused(ending, out, "did not run in training since the last call")


def test_only_the_forward_of_the_output_counts():
    model, ending = hooked()
    out = model(IMAGE)
    model(IMAGE + 1)
    refused(ending, out, "several training forwards have run the module 'end'")
    first, second = model(IMAGE), model(IMAGE + 1)
    assert torch.equal(ending.logits(second).softmax(1), second)
    assert not torch.equal(first, second)
    model(IMAGE)
    refused(ending, out + 1, "not the output of its module 'end'")
    model(IMAGE)
    refused(ending, out[:1], "not the output of its module 'end'")
    out = model(IMAGE)
    assert ending.logits(out.clone()).shape == out.shape  # a wrapper may hand on another tensor of its values


def test_what_is_no_step_leaves_nothing():
    model, ending = hooked()
    model.eval()(IMAGE)
    model.train()
    with torch.no_grad():
        model(IMAGE)
    with dry_run(model), torch.enable_grad():
        model.end.training = True
        model(IMAGE)
    model.blocks = True
    out = model(IMAGE)
    ending.logits(out)
    out.sum().backward()  # runs the module again
    refused(ending, out, "did not run")


def test_of_a_mean_teacher_forwards_without_gradients_count():
    model, ending = hooked(grad=False)
    refused(ending, model(IMAGE), "did not run")
    with torch.no_grad():
        out = model(IMAGE)
    assert torch.equal(ending.logits(out).softmax(1), out)


def test_copies_are_inert_and_hooks_go():
    model, ending = hooked()
    other = copy.deepcopy(model)
    out = other(IMAGE)
    refused(ending, out, "A copy of a model has no hooks")
    ending.remove()
    ending.remove()
    refused(ending, model(IMAGE), "did not run")
    assert not model.end._forward_hooks
    _kept = Ending(model, "end")
    assert model.end._forward_hooks
    del _kept
    gc.collect()
    assert not model.end._forward_hooks


@pytest.mark.parametrize(("path", "message"), [("nothing", "no module"), ("conv", "'conv' is a Conv2d"), ("", "Net")])
def test_only_sigmoids_and_softmaxes_end_a_model(path, message):
    model = Net()
    with pytest.raises(ReSegError, match=message):
        Ending(model, path)
    assert not model.conv._forward_hooks


def test_a_module_that_makes_something_else_has_no_logits():
    model, ending = hooked()
    model.end.register_forward_pre_hook(lambda m, args, kwargs: ((), {"input": kwargs["input"]}), with_kwargs=True)
    model.end.register_forward_hook(lambda m, args, out: out[:1])
    refused(ending, model(IMAGE), "'end'")
