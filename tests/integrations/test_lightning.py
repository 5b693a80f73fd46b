"""Lightning, run for real: stage 1, steps, checkpoint, a killed run and its resumption."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from models import IGNORED, UNet, batch, ignoring, task_loss
from torch import Tensor

from reseg_loss import CutMixConsistency, DeepSupervision, ReSegError, ReSegWrapper

L = pytest.importorskip("lightning.pytorch")
from reseg_loss.integrations.lightning import ReSegCallback  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("default"),  # the framework's own are many
    pytest.mark.filterwarnings("error:::reseg_loss"),
    pytest.mark.filterwarnings("ignore:the teacher's reconstruction loss"),
]
CUDA = torch.cuda.is_available()


class Bare(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = UNet()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        image, label = batch
        return task_loss(self.net(image), label)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        image, label = batch
        self.log("val", task_loss(self.net(image), label))

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.05, momentum=0.9)


class Segmenter(Bare):
    """With both of the library's losses."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__()
        self.reseg = ReSegWrapper(self.net, **{"weight": 1.0, **kwargs})
        self.ds = DeepSupervision(self.net, batch()[0])

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        label = batch[1]
        task = super().training_step(batch, batch_idx)
        return task + self.reseg.alignment_loss(label) + self.ds.loss(label, task_loss)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD([*self.parameters(), *self.ds.parameters()], 0.05, momentum=0.9)


@pytest.fixture(autouse=True)
def _same_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)


class KilledError(Exception):
    pass


class KillAt(L.Callback):
    def __init__(self, epoch: int, batch: int) -> None:
        self.at = epoch, batch

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if (trainer.current_epoch, batch_idx) == self.at:
            raise KilledError


class Losses(L.Callback):
    def __init__(self) -> None:
        self.seen: list[Tensor] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.seen.append(outputs["loss"].cpu())


def data() -> torch.utils.data.DataLoader:
    return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*batch(n=6)), batch_size=2)


def fit(
    module: Any, folder: Path, callbacks: list[Any], resume: str | None = None, epochs: int = 3, **kwargs: Any
) -> list[Tensor]:
    """Train; the losses of all steps."""
    losses = Losses()
    trainer = L.Trainer(
        **{"accelerator": "auto", "devices": 1, **kwargs},
        max_epochs=epochs,
        callbacks=[*callbacks, losses, L.callbacks.ModelCheckpoint(folder, save_last=True)],
        default_root_dir=folder,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, data(), data(), ckpt_path=resume)
    return losses.seen


def segmenter(seed: int = 0, **kwargs: Any) -> Segmenter:
    torch.manual_seed(seed)
    return Segmenter(**kwargs)


def same(a: Any, b: Any) -> bool:
    """To the bit; on a GPU, which adds in any order, nearly."""
    pairs = list(zip(a, b, strict=True))
    return all(torch.allclose(x, y, rtol=1e-3, atol=1e-4) if CUDA else torch.equal(x, y) for x, y in pairs)


@pytest.mark.parametrize(
    ("precision", "kwargs"),
    [("32-true", {}), ("bf16-mixed", {"preset": "standardized"})],
    ids=["fp32", "bf16"],
)
def test_a_killed_run_goes_on_as_if_it_had_not_been(tmp_path, monkeypatch, precision, kwargs):
    fits = []
    original = ReSegWrapper.fit_recon
    monkeypatch.setattr(ReSegWrapper, "fit_recon", lambda self, *a, **k: fits.append(original(self, *a, **k)))
    whole = segmenter(**kwargs)
    losses = fit(whole, tmp_path / "whole", [ReSegCallback(steps=4)], precision=precision)

    with pytest.raises(KilledError):
        fit(segmenter(**kwargs), tmp_path / "cut", [ReSegCallback(steps=4), KillAt(2, 1)], precision=precision)
    assert [len(history) for history in fits] == [2, 2]
    fresh = segmenter(seed=7)
    last = str(tmp_path / "cut" / "last.ckpt")
    rest = fit(fresh, tmp_path / "cut", [ReSegCallback(steps=4)], resume=last, precision=precision)
    assert len(fits) == 2, "the teacher came from the checkpoint"
    assert same(rest, losses[-3:])
    assert same(fresh.net.state_dict().values(), whole.net.state_dict().values())
    assert same(fresh.ds.parameters(), whole.ds.parameters())
    assert same(fresh.reseg.teacher.state_dict().values(), whole.reseg.teacher.state_dict().values())
    assert fresh.reseg.calls == whole.reseg.calls == 9
    assert not fresh.reseg.teacher.training


def test_the_checkpoint_is_a_bare_modules_with_the_teacher_under_callbacks(tmp_path):
    module = segmenter()
    fit(module, tmp_path, [ReSegCallback(epochs=1)], epochs=1)
    checkpoint = torch.load(tmp_path / "last.ckpt", weights_only=True)
    bare = Bare()
    assert list(checkpoint["state_dict"]) == list(bare.state_dict())
    state = checkpoint["callbacks"]["ReSegCallback"]
    assert set(state) == {"losses", "trained", "random"}
    assert (set(state["losses"]), state["trained"]) == ({"reseg", "ds"}, {})
    assert state["losses"]["reseg"]["calls"] == 3
    loaded = Bare.load_from_checkpoint(tmp_path / "last.ckpt", map_location="cpu")
    image, _ = batch()
    assert torch.equal(loaded.eval().net(image), module.cpu().eval().net(image))


def test_at_weight_0_there_is_no_stage_1_and_the_run_is_a_bare_one(tmp_path):
    class WithoutHeads(Bare):
        def __init__(self) -> None:
            super().__init__()
            self.reseg = ReSegWrapper(self.net, weight=0.0)

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return super().training_step(batch, batch_idx) + self.reseg.alignment_loss(batch[1])

    torch.manual_seed(0)
    bare = Bare()
    expected = fit(bare, tmp_path / "bare", [])
    torch.manual_seed(0)
    module = WithoutHeads()
    assert same(fit(module, tmp_path / "0", [ReSegCallback()]), expected)
    assert same(module.parameters(), bare.parameters())
    assert not module.reseg.ready


def test_stage_1_takes_another_loader_and_a_file_to_go_on_from(tmp_path):
    module, file = segmenter(), tmp_path / "stage1.pt"
    pairs = [batch(seed=seed) for seed in range(5)]
    seen = []
    loader = ({"image": seen.append(1) or image, "label": label} for image, label in pairs)
    fit(module, tmp_path, [ReSegCallback(loader=loader, epochs=1, checkpoint=file)], epochs=1)
    assert len(seen) == 5
    assert file.exists()


@pytest.mark.parametrize("precision", ["bf16-true", "64-true"])
def test_models_in_another_precision_train(tmp_path, precision):
    losses = fit(segmenter(), tmp_path, [ReSegCallback(steps=2)], epochs=1, precision=precision)
    assert all(loss.isfinite() for loss in losses)


@pytest.mark.parametrize("example", [None, batch()[0]], ids=["taps found in stage 1", "taps found before"])
def test_a_compiled_network_that_ran_in_the_sanity_check_is_served(tmp_path, example):
    class Compiled(Segmenter):
        def __init__(self) -> None:
            super().__init__()
            self.net = torch.compile(self.net, backend="eager")
            self.reseg = ReSegWrapper(self.net, example_input=example)

    module = Compiled()
    fit(module, tmp_path, [ReSegCallback(steps=2)], epochs=1)
    assert module.reseg.calls == module.ds.calls == 3


class Unlabelled(Bare):
    """With a mean teacher, on the labelled images for brevity."""

    def __init__(self) -> None:
        super().__init__()
        self.mixed = CutMixConsistency(self.net, rampup_steps=6, ignore_index=IGNORED, threshold=0.4)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return super().training_step(batch, batch_idx) + self.mixed.loss(batch[0], ignoring)


def test_a_mean_teacher_is_in_the_checkpoint_and_goes_on(tmp_path):
    torch.manual_seed(0)
    whole = Unlabelled()
    losses = fit(whole, tmp_path / "whole", [ReSegCallback()])
    torch.manual_seed(0)
    with pytest.raises(KilledError):
        fit(Unlabelled(), tmp_path / "cut", [ReSegCallback(), KillAt(2, 1)])
    fresh = Unlabelled()
    rest = fit(fresh, tmp_path / "cut", [ReSegCallback()], resume=str(tmp_path / "cut" / "last.ckpt"))
    assert same(rest, losses[-3:])
    assert fresh.mixed.calls == 9
    assert same(fresh.mixed.average.state_dict().values(), whole.mixed.average.state_dict().values())


def test_of_several_training_loaders_stage_1_wants_to_know_which(tmp_path):
    class Two(Segmenter):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return super().training_step(batch["labelled"], batch_idx)

    loaders = {"labelled": data(), "unlabelled": data()}
    arguments = {"max_epochs": 1, "logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    arguments |= {"default_root_dir": tmp_path, "enable_checkpointing": False}
    with pytest.raises(ReSegError, match=r"several training loaders.*ReSegCallback\(loader=\.\.\.\)"):
        L.Trainer(callbacks=[ReSegCallback(steps=2)], **arguments).fit(Two(), loaders)
    module = Two()
    L.Trainer(callbacks=[ReSegCallback(loader=data(), steps=2)], **arguments).fit(module, loaders)
    assert module.reseg.ready


def test_gradient_accumulation_counts_every_batch(tmp_path):
    module = segmenter()
    fit(module, tmp_path, [ReSegCallback(steps=2)], epochs=1, accumulate_grad_batches=3)
    assert module.reseg.calls == module.ds.calls == 3


def test_wrong_uses_say_what_to_do(tmp_path):
    with pytest.raises(ReSegError, match=r"write self.reseg = ReSegWrapper\(self.net\)"):
        fit(Bare(), tmp_path, [ReSegCallback(steps=1)])
    with pytest.raises(ReSegError, match="epochs= or steps="):
        fit(segmenter(), tmp_path, [ReSegCallback()])
    module = segmenter()
    fit(module, tmp_path, [ReSegCallback(steps=2)], epochs=1)
    module = segmenter()
    del module.ds
    module.heads = DeepSupervision(module.net, batch()[0])
    with pytest.raises(ReSegError, match=r"self\.ds, the module has \['reseg', 'heads'\]"):
        fit(module, tmp_path, [ReSegCallback(steps=2)], resume=str(tmp_path / "last.ckpt"))


def test_a_failed_stage_1_leaves_no_half_trained_teacher_in_a_checkpoint():
    module = segmenter()
    callback = ReSegCallback(steps=2)
    callback.setup(None, module, "fit")  # pyright: ignore[reportArgumentType]
    assert "reseg" not in callback.state_dict()["losses"]
    module.reseg = ReSegWrapper(module.net, example_input=batch()[0])
    callback.setup(None, module, "fit")  # pyright: ignore[reportArgumentType]
    assert "reseg" not in callback.state_dict()["losses"]
    module.reseg.freeze_teacher()
    assert "reseg" in callback.state_dict()["losses"]


def test_a_keyword_that_fit_recon_has_not_is_refused_when_the_callback_is_made():
    with pytest.raises(TypeError, match="epoch"):
        ReSegCallback(epoch=5)
