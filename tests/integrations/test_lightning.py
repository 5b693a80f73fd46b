"""Lightning, run for real: stage 1, steps, checkpoint, a killed run and its resumption."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from models import IGNORED, UNet, batch, ignoring, task_loss
from torch import Tensor

from reseg_loss import CutMixConsistency, DeepSupervision, ReSegError, ReSegWrapper, SemiSupervised, batches

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
    with pytest.raises(ReSegError, match="exactly one of epochs= and steps="):
        fit(segmenter(), tmp_path, [ReSegCallback()])
    module = segmenter()
    fit(module, tmp_path, [ReSegCallback(steps=2)], epochs=1)
    module = segmenter()
    del module.ds
    module.heads = DeepSupervision(module.net, batch()[0])
    with pytest.raises(ReSegError, match=r"self\.ds, but the module has \['reseg', 'heads'\]"):
        fit(module, tmp_path, [ReSegCallback(steps=2)], resume=str(tmp_path / "last.ckpt"))
    for state, what in (({"reseg": {}}, "has no 'losses', 'trained', 'random'"), (None, "is None, not dict")):
        with pytest.raises(ReSegError, match=f"this state of a ReSegCallback {what}"):
            ReSegCallback(steps=2).load_state_dict(state)


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


# --- few labels


class FewLabels(Bare):
    """Notes what it sees."""

    def __init__(self) -> None:
        super().__init__()
        image = batch()[0]
        self.semi = SemiSupervised(self.net, image, rampup_steps=None, threshold=0.35)
        self.validated: list[list[Tensor]] = []
        self.trained: list[list[Tensor]] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.trained.append(weights(self.net))
        (image, label), (unlabelled, _) = batch["labelled"], batch["unlabelled"]
        return self.semi.loss(image, label, unlabelled)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.validated.append(weights(self.net))
        super().validation_step(batch, batch_idx)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.validated.append(weights(self.net))

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD([*self.parameters(), *self.semi.parameters()], 0.05, momentum=0.9)


def weights(model: torch.nn.Module) -> list[Tensor]:
    return [value.detach().cpu().clone() for value in model.state_dict().values()]


def few_labels(seed: int = 0) -> FewLabels:
    torch.manual_seed(seed)
    return FewLabels()


def two_loaders() -> dict[str, Any]:
    unlabelled = torch.utils.data.TensorDataset(*batch(n=10, seed=1))
    return {"labelled": data(), "unlabelled": torch.utils.data.DataLoader(unlabelled, batch_size=2)}


def trainer_of(folder: Path, *callbacks: Any, **kwargs: Any) -> Any:
    arguments = {"max_epochs": 2, "logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    return L.Trainer(callbacks=[*callbacks], default_root_dir=folder, **{**arguments, **kwargs})


def test_the_step_is_the_plain_loops_step_and_an_epoch_goes_through_the_longer_loader(tmp_path):
    class Seeded(L.Callback):
        def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
            torch.manual_seed(batch_idx)

    module = few_labels()
    trainer_of(tmp_path, ReSegCallback(), Seeded(), max_epochs=1, accelerator="cpu").fit(module, two_loaders())
    plain, loaders = few_labels(), two_loaders()
    optimizer, labelled = plain.configure_optimizers(), [*loaders["labelled"]]
    for step, (unlabelled, _) in enumerate(loaders["unlabelled"]):
        torch.manual_seed(step)
        loss = plain.semi.loss(*labelled[step % 3], unlabelled)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        plain.semi.update()
    assert module.semi.calls == plain.semi.calls == 5
    assert same(weights(module.net), weights(plain.net))
    assert same(weights(module.semi.average), weights(plain.semi.average))
    assert same(module.semi.parameters(), plain.semi.parameters())


@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_mean_teacher_follows_once_after_each_step_of_the_optimizer(tmp_path, accumulate):
    module = few_labels()
    seen: list[int] = []
    update = module.semi.update
    module.semi.update = lambda: (seen.append(module.semi.calls), update())  # pyright: ignore
    trainer = trainer_of(tmp_path, ReSegCallback(), max_epochs=1, accumulate_grad_batches=accumulate)
    trainer.fit(module, two_loaders())
    assert seen == {1: [1, 2, 3, 4, 5], 2: [2, 4, 5]}[accumulate]


def test_a_call_of_update_in_the_module_raises_during_training_only(tmp_path):
    class Twice(FewLabels):
        def on_train_batch_end(self, *_: Any) -> None:
            self.semi.update()

    module = Twice()
    with pytest.raises(ReSegError, match=r"ReSegCallback calls update\(\) after each optimizer step; remove"):
        trainer_of(tmp_path, ReSegCallback()).fit(module, two_loaders())
    module.semi.update()


def test_validation_sees_the_mean_teacher_and_the_model_gets_its_own_weights_back(tmp_path):
    class Around(L.Callback):
        """Placed before ours: what the module has before and after."""

        def __init__(self) -> None:
            self.before: list[list[Tensor]] = []
            self.after: list[list[Tensor]] = []

        def on_validation_start(self, trainer: Any, module: Any) -> None:
            self.before.append(weights(module.net))

        def on_validation_batch_end(self, trainer: Any, module: Any, *_: Any) -> None:
            assert same(weights(module.net), weights(module.semi.average))

    around, module = Around(), few_labels()
    trainer = trainer_of(tmp_path, around, ReSegCallback(), num_sanity_val_steps=0)
    trainer.fit(module, two_loaders(), data())
    assert len(around.before) == 2
    assert not same(around.before[0], module.validated[0])
    assert same(module.trained[5], around.before[0])  # the first step of the next epoch
    assert same(weights(module.net), around.before[1])
    other = few_labels()
    trainer_of(tmp_path, ReSegCallback(validate_average=False), num_sanity_val_steps=0).fit(
        other, two_loaders(), data()
    )
    assert same(other.trained[5], other.validated[0])


def test_the_best_checkpoint_is_the_mean_teacher_that_was_validated(tmp_path):
    class Scores(FewLabels):
        """Best in the middle."""

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            super().validation_step(batch, batch_idx)
            self.log("score", float(abs(self.trainer.current_epoch - 1)))

    torch.manual_seed(0)
    module = Scores()
    best = L.callbacks.ModelCheckpoint(tmp_path, monitor="score")
    trainer = trainer_of(tmp_path, best, ReSegCallback(), max_epochs=3, num_sanity_val_steps=0)
    trainer.fit(module, two_loaders(), data())
    checkpoint = torch.load(best.best_model_path, weights_only=True, map_location="cpu")
    bare = Bare()
    bare.load_state_dict(checkpoint["state_dict"])
    assert list(checkpoint["state_dict"]) == list(bare.state_dict())
    assert same(weights(bare.net), module.validated[3])
    trained = checkpoint["callbacks"]["ReSegCallback"]["trained"]["semi"]
    assert same(module.trained[10], trained.values())
    # what is tested: without a checkpoint the mean teacher as it is, with one that of the checkpoint
    own, average = weights(module.net), weights(module.semi.average)
    for _ in range(2):
        module.validated.clear()
        trainer.test(module, data(), verbose=False)
        assert same(module.validated[0], average)
        assert same(weights(module.net), own)
    module.validated.clear()
    trainer.test(module, data(), ckpt_path=best.best_model_path, verbose=False)
    assert same(module.validated[0], checkpoint["state_dict"].values())
    module.validated.clear()
    trainer.test(module, data(), verbose=False)
    assert same(module.validated[0], checkpoint["state_dict"].values()), "they are the module's now"
    other = Bare()
    module.load_state_dict(other.state_dict())
    module.validated.clear()
    trainer.test(module, data(), verbose=False)
    assert same(module.validated[0], weights(other.net))


def save(trainer: Any, module: FewLabels, folder: Path) -> None:
    if not (folder / "whenever.ckpt").exists():
        trainer.save_checkpoint(folder / "whenever.ckpt")


@pytest.mark.parametrize("hook", ["on_train_batch_end", "on_validation_batch_end", "on_validation_end"])
def test_a_checkpoint_of_any_moment_has_both_weights(tmp_path, hook):
    saver = L.Callback()
    setattr(saver, hook, lambda trainer, module, *_: save(trainer, module, tmp_path))
    module = few_labels()
    trainer = trainer_of(tmp_path, saver, ReSegCallback(), max_epochs=2, num_sanity_val_steps=0)
    trainer.fit(module, two_loaders(), data())
    checkpoint = torch.load(tmp_path / "whenever.ckpt", weights_only=True, map_location="cpu")
    at = 1 if hook == "on_train_batch_end" else 5
    trained = checkpoint["callbacks"]["ReSegCallback"]["trained"]["semi"]
    assert same(module.trained[at], trained.values())
    average = checkpoint["callbacks"]["ReSegCallback"]["losses"]["semi"]["consistency"]["average"]
    assert same(checkpoint["state_dict"].values(), average.values())
    if at == 5:
        assert same(module.validated[0], average.values())


def test_a_failure_while_it_validates_leaves_the_model_with_its_own_weights(tmp_path):
    class Fails(FewLabels):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            raise KilledError

    module = Fails()
    with pytest.raises(KilledError):
        trainer_of(tmp_path, ReSegCallback(), num_sanity_val_steps=0).fit(module, two_loaders(), data())
    assert not same(weights(module.net), weights(module.semi.average))


def test_after_a_failure_in_training_the_mean_teacher_is_tested(tmp_path):
    class Fails(FewLabels):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            if self.global_step == 4:
                raise KilledError
            return super().training_step(batch, batch_idx)

    module, trainer = Fails(), trainer_of(tmp_path, ReSegCallback())
    with pytest.raises(KilledError):
        trainer.fit(module, two_loaders())
    module.validated.clear()
    trainer.test(module, data(), verbose=False)
    assert same(module.validated[0], weights(module.semi.average))


def test_stage_1_takes_no_batches_from_training(tmp_path):
    """With persistent workers a loader has a single iterator."""

    class Counts(Segmenter):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            steps.append((self.current_epoch, batch_idx))
            return super().training_step(batch, batch_idx)

    steps: list[tuple[int, int]] = []
    torch.manual_seed(0)
    kept = torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(*batch(n=6)), batch_size=2, num_workers=1, persistent_workers=True
    )
    trainer_of(tmp_path, ReSegCallback(steps=4, progress=False)).fit(Counts(), kept)
    assert steps == [(epoch, i) for epoch in range(2) for i in range(3)]


def test_uses_that_would_save_or_validate_something_else_are_refused(tmp_path):
    only = L.callbacks.ModelCheckpoint(tmp_path, save_weights_only=True)
    with pytest.raises(ReSegError, match=r"save_weights_only=True.*ReSegCallback\(validate_average=False\)"):
        trainer_of(tmp_path, only, ReSegCallback()).fit(few_labels(), two_loaders())
    trainer_of(tmp_path, only, ReSegCallback(validate_average=False), max_epochs=1).fit(few_labels(), two_loaders())
    module = few_labels()
    module.other = CutMixConsistency(module.net, rampup_steps=None, ignore_index=IGNORED)
    with pytest.raises(ReSegError, match="two mean teachers average the same model"):
        trainer_of(tmp_path, ReSegCallback()).fit(module, two_loaders())

    loaders = two_loaders()
    with pytest.raises(ReSegError, match=r"batches\(steps=\) is a whole run.*max_epochs=1"):
        trainer_of(tmp_path, ReSegCallback()).fit(
            few_labels(), batches(loaders["labelled"], loaders["unlabelled"], steps=4)
        )

    class Others(FewLabels):
        def configure_optimizers(self) -> Any:
            return torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], 0.1)

    with pytest.raises(ReSegError, match="no optimizer has parameters of the model that SemiSupervised averages"):
        trainer_of(tmp_path, ReSegCallback()).fit(Others(), two_loaders())
