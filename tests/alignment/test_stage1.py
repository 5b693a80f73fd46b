"""Stage 1: it learns, leaves no trace, continues after a kill, and refuses what cannot work."""

from __future__ import annotations

import copy
import random

import numpy as np
import pytest
import torch
from models import Evaluated, UNet, WritesIntoItsInput, batch, loader, task_loss
from torch import nn

from reseg_loss import ReconLoss, ReSegError, ReSegWrapper
from reseg_loss.alignment import stage1
from reseg_loss.alignment.stage1 import sample_pixels
from reseg_loss.common.files import write_atomically
from reseg_loss.functional import semi_orthogonal

untrained = pytest.mark.filterwarnings("ignore:the teacher's reconstruction loss")


def wrapper(model: nn.Module | None = None, **kwargs) -> ReSegWrapper:
    return ReSegWrapper(model or UNet(), **kwargs)


def states() -> tuple:
    return torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()


def weights(reseg: ReSegWrapper) -> dict[str, torch.Tensor]:
    return {k: v.clone() for k, v in reseg.teacher.state_dict().items()}


def equal(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_it_learns_more_than_a_constant_image_and_reconstructs():
    torch.manual_seed(0)
    reseg = wrapper()
    history = reseg.fit_recon(loader(8), epochs=8, optimizer=lambda p: torch.optim.Adam(p, 1e-2), progress=False)
    assert len(history) == 8
    assert history[-1] < 0.5 * history[0]
    image, label = batch(seed=9)
    reconstruction = reseg.reconstruct(label)
    assert reconstruction.shape == image.shape
    assert ReconLoss()(reconstruction, image) < ReconLoss()(torch.full_like(image, image.mean()), image) / 2
    assert not reconstruction.requires_grad


def test_a_teacher_that_learnt_nothing_is_warned_about():
    reseg = wrapper()
    with pytest.warns(UserWarning, match="no better than the best constant image"):
        reseg.fit_recon(loader(2), epochs=1, optimizer=lambda p: torch.optim.SGD(p, 1e-6), progress=False)


@pytest.mark.parametrize(("calls", "judged"), [([6], 3), ([4, 6], 2)])
def test_a_short_stage_1_is_judged_by_its_second_half_or_by_what_was_resumed(tmp_path, monkeypatch, calls, judged):
    seen = []
    monkeypatch.setattr(stage1, "_compare_with_constant", lambda last, pixels, loss: seen.append(last))
    torch.manual_seed(0)
    data, history = loader(3), []
    for epochs in calls:
        history = wrapper().fit_recon(data, epochs=epochs, checkpoint=tmp_path / "stage1.pt", progress=False)
    assert seen[-1] == pytest.approx(sum(history[-judged:]) / judged, rel=1e-5)


@untrained
def test_the_log_has_a_line_an_epoch_and_says_that_it_resumes(tmp_path, caplog):
    caplog.set_level("INFO", "reseg_loss")
    torch.manual_seed(0)
    for epochs in (1, 2):
        history = wrapper().fit_recon(loader(3), epochs=epochs, checkpoint=tmp_path / "one.pt", progress=False)
    lines = [record.getMessage() for record in caplog.records if "stage 1" in record.getMessage()]
    assert lines == [
        f"stage 1, epoch 1, step 3: reconstruction loss {history[0]:.4f}",
        f"stage 1 resumes from {tmp_path / 'one.pt'} after epoch 1, step 3",
        f"stage 1, epoch 2, step 6: reconstruction loss {history[1]:.4f}",
    ]


@untrained
def test_random_states_model_gradients_and_modes_stay_as_they_were():
    torch.manual_seed(3)
    model = UNet(dropout=0.5)
    image, label = batch()
    task_loss(model(image), label).backward()
    model.encoder[0].eval()
    before = copy.deepcopy(model.state_dict())
    gradients = [p.grad.clone() for p in model.parameters()]
    modes = [m.training for m in model.modules()]
    data = loader()
    expected = states()
    wrapper(model).fit_recon(data, epochs=2, progress=False)
    assert all(torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in zip(states(), expected))
    assert equal(model.state_dict(), before)
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), gradients))
    assert [m.training for m in model.modules()] == modes


@untrained
def test_the_loop_is_the_published_objective_on_every_batch():
    torch.manual_seed(4)
    reseg = wrapper(example_input=batch()[0])
    teacher = copy.deepcopy(reseg.teacher)
    data = list(loader(3))
    history = reseg.fit_recon(data, steps=3, optimizer=lambda p: torch.optim.SGD(p, 0.1), progress=False)
    optimizer = torch.optim.SGD(teacher.parameters(), 0.1)
    losses = []
    for image, label in data:
        x = teacher(label)
        value = 0.6 * (x - image).square().mean() + 0.4 * (x - image).abs().mean()
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        losses.append(value.item())
    assert history == pytest.approx([sum(losses) / 3], rel=1e-6)
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(weights(reseg).values(), teacher.state_dict().values()))


@untrained
@pytest.mark.parametrize("bound", [True, False])
@pytest.mark.parametrize("workers", [0, 2])
def test_a_killed_run_continues_to_the_same_bits(tmp_path, bound, workers):
    class KilledError(Exception):
        pass

    class DyingLoader:
        """A loader that dies in the middle of its third epoch."""

        def __init__(self, inner):
            self.inner, self.epoch = inner, 0

        def __iter__(self):
            self.epoch += 1
            for i, item in enumerate(self.inner):
                if self.epoch == 3 and i == 1:
                    raise KilledError
                yield item

    def run(data, path=None):
        torch.manual_seed(5)
        model = UNet(dropout=0.3)
        reseg = wrapper(model, example_input=batch()[0] if bound else None)
        history = reseg.fit_recon(data, epochs=4, checkpoint=path, progress=False, scheduler=schedule)
        return history, weights(reseg), states()

    def schedule(optimizer):
        return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.9**step)

    def data():
        image, label = batch(n=8)
        dataset = torch.utils.data.TensorDataset(image, label)
        return torch.utils.data.DataLoader(dataset, batch_size=2, shuffle=True, num_workers=workers)

    expected = run(data())
    path = tmp_path / "stage1.pt"
    with pytest.raises(KilledError):
        run(DyingLoader(data()), path)
    assert len(torch.load(path, weights_only=True)["history"]) == 2
    actual = run(data(), path)
    assert actual[0] == expected[0]
    assert equal(actual[1], expected[1])
    # a finished run is read, not trained again
    assert equal(run(data(), path)[1], expected[1])


@untrained
def test_a_run_does_not_continue_with_a_schedule_that_it_had_not_or_without_the_one_it_had(tmp_path):
    given = [None, lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 1)]
    for first, then, message in ((*given, "resumed with scheduler="), (*given[::-1], "resumed without scheduler=")):
        path = tmp_path / message
        wrapper().fit_recon(loader(), epochs=1, checkpoint=path, progress=False, scheduler=first)
        with pytest.raises(ReSegError, match=message):
            wrapper().fit_recon(loader(), epochs=2, checkpoint=path, progress=False, scheduler=then)


def test_a_checkpoint_is_written_atomically(tmp_path):
    path = tmp_path / "deep" / "state.pt"
    write_atomically({"a": 1}, path)

    class Unpicklable:
        def __reduce__(self):
            raise RuntimeError("disk full")

    with pytest.raises(RuntimeError, match="disk full"):
        write_atomically({"a": Unpicklable()}, path)
    assert torch.load(path, weights_only=True) == {"a": 1}


def test_infinite_and_missing_losses_raise():
    image, label = batch()
    image[0, 0, 0, 0] = float("nan")
    with pytest.raises(ReSegError, match="loss is nan"):
        wrapper().fit_recon([(image, label)], epochs=1, progress=False)
    with pytest.raises(ReSegError, match="loader is empty"):
        wrapper().fit_recon([], epochs=1, progress=False)


@untrained
def test_loaders_of_dicts_lists_3d_and_several_channels():
    image, label = batch(dims=3, size=16, channels=2)
    for item in ({"image": image, "label": label.unsqueeze(1).float()}, (image, [label, label[:, ::2, ::2, ::2]])):
        reseg = wrapper(UNet(in_channels=2, dims=3))
        reseg.fit_recon([item], epochs=1, progress=False)
        assert reseg.reconstruct(label).shape == image.shape


@untrained
@pytest.mark.parametrize("amp", [torch.bfloat16, torch.float16])
def test_amp(amp):
    reseg = wrapper()
    history = reseg.fit_recon(loader(), epochs=3, amp=amp, progress=False)
    assert history[-1] < history[0]
    assert all(v.isfinite().all() for v in weights(reseg).values())
    assert next(reseg.teacher.parameters()).dtype == torch.float32


def test_ignored_pixels_are_left_out_of_the_loss_and_enter_as_zero():
    torch.manual_seed(6)
    image, label = batch()
    label[:, :8] = 255
    changed = image.clone()
    changed[:, :, :8] = 1e3
    results = []
    for data in ((image, label), (changed, label)):
        torch.manual_seed(7)
        reseg = wrapper(ignore_index=255)
        history = reseg.fit_recon([data], epochs=12, optimizer=lambda p: torch.optim.Adam(p, 0.02), progress=False)
        results.append(history)
    assert results[0] == results[1]
    encoded, valid = reseg.teacher.encoding.encode(label)
    assert not encoded[:, :, :8].any()
    assert not valid[:, :, :8].any()


def test_an_optimizer_of_the_users_and_a_loop_of_the_users_work():
    torch.manual_seed(8)
    image, label = batch()
    reseg = wrapper(example_input=image)
    optimizer = torch.optim.Adam(reseg.teacher.parameters(), 1e-2)
    first = reseg.fit_recon([(image, label)], epochs=20, optimizer=optimizer, progress=False)
    assert first[-1] < first[0]

    own = wrapper(example_input=image)
    optimizer, loss = torch.optim.Adam(own.teacher.parameters(), 1e-2), ReconLoss()
    for _ in range(3):
        value = loss(own.teacher(label), image)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
    own.freeze_teacher()
    own.model(image)
    assert own.alignment_loss(label) > 0


def test_refusals():
    image, label = batch()
    with pytest.raises(ReSegError, match="exactly one of epochs= and steps="):
        wrapper().fit_recon([(image, label)])
    with pytest.raises(ReSegError, match="epochs=0; it must be a whole number >= 1"):
        wrapper().fit_recon([(image, label)], epochs=0)
    with pytest.raises(ReSegError, match=r"values \[7\.0\]"):
        wrapper().fit_recon([(image, label.clamp_min(7))], epochs=1, progress=False)
    with pytest.raises(ReSegError, match="does not fit an image"):
        wrapper().fit_recon([(image, label[:, ::2])], epochs=1, progress=False)
    with pytest.raises(ReSegError, match=r"torch\.uint8"):
        wrapper(example_input=image).fit_recon([(image.byte(), label)], epochs=1, progress=False)
    with pytest.raises(ReSegError, match="2 image channels"):
        wrapper(UNet(in_channels=2), example_input=image.expand(-1, 2, -1, -1)).fit_recon(
            [(image, label)], epochs=1, progress=False
        )
    with pytest.raises(ReSegError, match=r"an image must be a dense tensor.* got a ndarray"):
        wrapper().fit_recon([(image.numpy(), label)], epochs=1, progress=False)
    frozen = wrapper(example_input=image)
    frozen.freeze_teacher()
    with pytest.raises(ReSegError, match="frozen already"):
        frozen.fit_recon([(image, label)], epochs=1)


@untrained
def test_the_progress_bar_shows_the_loss(capsys):
    wrapper().fit_recon(loader(), epochs=1)
    assert "loss=" in capsys.readouterr().err


@untrained
def test_a_finished_checkpoint_says_that_the_loader_is_not_used(tmp_path, caplog):
    path = tmp_path / "stage1.pt"
    wrapper().fit_recon(loader(), epochs=1, checkpoint=path, progress=False)
    assert not caplog.records
    wrapper().fit_recon(loader(), epochs=2, checkpoint=path, progress=False)
    assert not caplog.records
    wrapper().fit_recon(loader(), epochs=2, checkpoint=path, progress=False)
    assert "finished stage 1 (2 epochs)" in caplog.text


def test_a_file_that_is_not_of_stage_1_is_refused(tmp_path):
    path = tmp_path / "run.pt"
    torch.save({"model": {}, "reseg": {}}, path)
    with pytest.raises(ReSegError, match="not a file of stage 1"):
        wrapper().fit_recon(loader(), epochs=1, checkpoint=path, progress=False)
    assert torch.load(path, weights_only=True) == {"model": {}, "reseg": {}}
    whole = path.read_bytes()
    flipped = bytearray(whole)
    flipped[whole.index(b"reseg")] ^= 1
    damaged = [(whole[:-100], "is damaged"), (bytes(flipped), "is damaged"), (b"", "is empty")]
    for content, message in (*damaged, (b"no checkpoint", "not a file of stage 1")):
        path.write_bytes(content)
        with pytest.raises(ReSegError, match=message):
            wrapper().fit_recon(loader(), epochs=1, checkpoint=path, progress=False)
        assert path.read_bytes() == content
    torch.save([1, 2], path)
    with pytest.raises(ReSegError, match="it holds a list"):
        wrapper().fit_recon(loader(), epochs=1, checkpoint=path, progress=False)


@untrained
def test_stage_1_turns_gradients_on_but_refuses_inference_mode():
    with torch.no_grad():
        wrapper().fit_recon(loader(), epochs=1, progress=False)
    with torch.inference_mode(), pytest.raises(ReSegError, match="inference mode"):
        wrapper().fit_recon(loader(), epochs=1, progress=False)


@untrained
def test_a_checkpoint_of_other_settings_is_refused_and_stage_2_keeps_its_own(tmp_path):
    path = tmp_path / "stage1.pt"
    wrapper(weight=0.05).fit_recon(loader(), epochs=1, checkpoint=path, progress=False)
    with pytest.raises(ReSegError, match=r"ignore_index=None, here 255"):
        wrapper(ignore_index=255).fit_recon(loader(), epochs=1, checkpoint=path, progress=False)
    other = wrapper(preset="standardized", weight=0.5)
    other.fit_recon(loader(), epochs=2, checkpoint=path, progress=False)
    assert (other.weight, other.settings.weight, other.criterion.normalize) == (0.5, 0.5, "batch")


def test_an_optimizer_of_something_else_is_refused():
    model = UNet()
    with pytest.raises(ReSegError, match="no parameter of the teacher"):
        wrapper(model).fit_recon(loader(), epochs=1, optimizer=torch.optim.SGD(model.parameters(), 0.1), progress=False)
    with pytest.raises(ReSegError, match="amp= must be a dtype"):
        wrapper().fit_recon(loader(), epochs=1, amp=True)


def test_labels_that_are_all_ignored_are_refused():
    image, label = batch()
    with pytest.raises(ReSegError, match="every pixel of every label is ignored"):
        wrapper(ignore_index=255).fit_recon([(image, label * 0 + 255)], epochs=1, progress=False)


@untrained
def test_ignored_pixels_may_be_nan_in_the_image():
    image, label = batch()
    label[:, :4] = 255
    image[:, :, :4] = float("nan")
    reseg = wrapper(ignore_index=255, example_input=batch()[0])
    history = reseg.fit_recon(
        [(image, label)], epochs=12, optimizer=lambda p: torch.optim.Adam(p, 0.02), progress=False
    )
    assert np.isfinite(history).all()


@untrained
def test_loaders_without_a_length(capsys):
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            image, label = batch(n=4)
            return iter(zip(image, label))

    wrapper().fit_recon(torch.utils.data.DataLoader(Stream(), batch_size=2), epochs=2)
    assert "4step" in capsys.readouterr().err.replace(" ", "")


def test_the_best_constant_is_not_that_of_the_margin():
    """Images of a size that even distances divide, empty but for a square."""
    torch.manual_seed(0)
    label = torch.zeros(4, 64, 64, dtype=torch.long)
    label[:, 16:48, 16:48] = 1
    image = label.unsqueeze(1).float()
    adam = lambda p: torch.optim.Adam(p, 0.02)  # noqa: E731
    history = wrapper(UNet(classes=2)).fit_recon([(image, label)], epochs=12, optimizer=adam, progress=False)
    assert history[-1] < 0.1  # and no warning, which would be an error


class Several(UNet):
    """Heads of three levels, all at the image's size and the coarsest first, as nested U-Nets return them."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = nn.ModuleList([nn.Conv2d(c, 3, 1) for c in (16, 8)])

    def forward(self, x: torch.Tensor):
        outputs = []

        def head(module, args, output):
            level = len(outputs)
            outputs.append(nn.functional.interpolate(self.heads[level](output), size=x.shape[2:]))

        handles = [self.decoder[i].register_forward_hook(head) for i in (0, 1)]
        outputs.append(super().forward(x))
        for handle in handles:
            handle.remove()
        return outputs if self.training else outputs[-1]


@untrained
def test_an_output_that_does_not_depend_on_every_tap_is_refused_and_another_may_be_named():
    with pytest.raises(ReSegError, match=r"not train decoder.1 of the teacher.* pass output="):
        wrapper(Several()).fit_recon(loader(1), epochs=1, progress=False)
    reseg = wrapper(Several(), output=-1, example_input=batch()[0])  # in evaluation there is one output
    before = weights(reseg)
    reseg.fit_recon(loader(1), epochs=1, progress=False)
    assert {name for name, value in weights(reseg).items() if torch.equal(value, before[name])} == {
        f"body.heads.{i}.{kind}" for i in (0, 1) for kind in ("weight", "bias")
    }


def test_an_endless_loader_is_judged_by_its_end():
    image, label = batch(8)

    def endless():
        while True:
            yield image, label

    torch.manual_seed(0)
    history = wrapper().fit_recon(endless(), steps=40, progress=False)  # a warning would be an error
    assert history[0] > 0.69  # the mean of all steps: worse than the best constant image


@untrained
def test_another_default_dtype_does():
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        reseg = wrapper(UNet())
        reseg.fit_recon(loader(1), epochs=1, progress=False)
    finally:
        torch.set_default_dtype(before)
    assert reseg.ready


def test_numbers_of_our_own_generators_are_drawn_where_these_are_whatever_the_default_device_is():
    image = batch()[0]
    with torch.device("meta"):  # as good as a GPU here
        assert sample_pixels(image, None, torch.Generator("cpu").manual_seed(0)).shape == (1, 128)
        assert semi_orthogonal(2, 3).device.type == "cpu"


def test_parametrized_weights_are_drawn_anew():
    model = UNet()
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.utils.parametrizations.weight_norm(module)
    teacher = wrapper(model, example_input=batch()[0]).teacher.body
    own = dict(model.named_parameters())
    same = [n for n, p in teacher.named_parameters() if "original1" in n and torch.equal(p, own[n])]
    assert same == []
    assert any("original1" in name for name in own)


@untrained
def test_the_picture_of_a_teacher_with_an_activation_that_it_was_not_trained_with_is_refused():
    image, label = batch()
    reseg = ReSegWrapper(Evaluated(), example_input=image)
    reseg.fit_recon(loader(2), steps=2, progress=False)
    with pytest.raises(ReSegError, match="in evaluation mode the teacher ends in a softmax"):
        reseg.reconstruct(label)
    assert not any(p.requires_grad for p in reseg.teacher.parameters())
    assert not reseg.teacher.training
    reseg.model.train()(image)
    assert reseg.alignment_loss(label).isfinite()  # the features are those of stage 1


@untrained
@pytest.mark.parametrize("classes", [1, 3])
def test_a_float_label_stays_as_it_is_whatever_the_model_does_to_its_input(classes):
    image, label = batch(classes=max(classes, 2))
    given = label.unsqueeze(1).float()
    kept = given.clone()
    reseg = ReSegWrapper(WritesIntoItsInput(classes=classes), example_input=image)
    reseg.fit_recon([(image, given)], steps=2, progress=False)
    reseg.model.train()(image.clone())
    reseg.alignment_loss(given)
    reseg.reconstruct(given)
    assert torch.equal(given, kept)
