"""What is compared: a variant is a few options of the library, and a catalogue names those that plans use."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from .label_teacher import RESTORED, Aligning, Distilling, Idea, idea_of, restorer_sees

STANDARDIZED = {"preset": "standardized"}
ONEHOT_TEACHER = {"label_input": "onehot", "weight": 0.0}  # a teacher without alignment
DS_X2 = {"weights": [1.0, 0.5, 0.25]}
DS_EQUAL = {"weights": [1.0, 1.0, 1.0]}

_CHOICES: dict[str, tuple[str | None, ...]] = {
    "teacher": ("image", "untrained", "label", "autoencoder"),
    "fed": ("label", "other label", "image"),
    "unlabelled": (
        None,
        "forward",
        "entropy",
        "reconstruction",
        "pseudo-label",
        "mean teacher",
        "cutmix",
        "copy-paste",
    ),
    "images": ("others", "labelled", "half", "half elsewhere"),
}


@dataclass(frozen=True)
class Variant:
    """How a run differs from the bare one.

    Attributes:
        name: for tables.
        reseg: keywords of `ReSegWrapper`; None builds none.
        teacher: what stage 1 taught: "image" (label to image, the method), "untrained", "label" (label to label) or
            "autoencoder" (image to image).
        fed: what the teacher sees in stage 2: the "label", an "other label" (of the next sample of the batch) or the
            "image".
        crossed: False aligns encoder with encoder and decoder with decoder.
        until: the share of the run after which the alignment is off.
        deep: keywords of `DeepSupervision` ("weights" are its `level_weights`); None builds none.
        unlabelled: the loss on a second batch, whose labels are not used: "forward" (none; only batch normalisation
            sees it), "entropy", "reconstruction" (by the frozen teacher, of the image from the prediction),
            "pseudo-label", "mean teacher", "cutmix" (the mean teacher's pseudo-label on mixed images) or "copy-paste"
            (the same, mixed with labelled images).
        images: of that batch: of the "others", the training patients without labels, or again the "labelled" ones;
            "half" goes without so many of the others as are half of the training patients, and "half elsewhere" has
            patients of the plan's other data set in their place.
        unlabelled_weight: its factor, reached after a ramp of 40 % of the run.
        unlabelled_deep: supervise the heads of deep supervision with the pseudo-label, too.
        mixing: what is other about CutMix (`mixing_of`); None is the package's default.
        label_teacher: an idea about a teacher that sees label maps (`idea_of`). "untrained" of `teacher` and "other
            label" of `fed` are its controls, too.
        batch: so many times the plan's images a step.
        free: score what takes no further training, too: an average of the weights (CutMix's mean teacher, where there
            is none without its loss), and the model with batch statistics of the training patients without labels.
        long: train for the steps of stage 1 and 2 together.
        longer: train for so many times the steps, a control of what costs more per step.
    """

    name: str
    reseg: Mapping[str, Any] | None = None
    teacher: str = "image"
    fed: str = "label"
    crossed: bool = True
    until: float = 1.0
    deep: Mapping[str, Any] | None = None
    unlabelled: str | None = None
    images: str = "others"
    unlabelled_weight: float = 1.0
    unlabelled_deep: bool = False
    mixing: Mapping[str, Any] | None = None
    label_teacher: Mapping[str, Any] | None = None
    batch: float = 1.0
    free: bool = False
    long: bool = False
    longer: float = 1.0

    def __post_init__(self) -> None:
        for name, allowed in _CHOICES.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"variant {self.name!r}: {name}={getattr(self, name)!r}; it is one of {allowed}")
        if self.deep is None and self.unlabelled_deep:
            raise ValueError(f"variant {self.name!r}: unlabelled_deep needs deep supervision")
        if self.unlabelled != "cutmix" and self.mixing is not None:
            raise ValueError(f"variant {self.name!r}: mixing is an option of unlabelled='cutmix'")
        self._check_idea()

    def options(self) -> dict[str, Any]:
        """What differs from the bare run, as plain values; the name is no option."""
        bare = Variant("")
        return {k: v for k, v in asdict(self).items() if k != "name" and v != getattr(bare, k)}

    def _check_idea(self) -> None:
        if self.idea is None:
            return
        if isinstance(self.idea, Aligning) != (self.reseg is not None):
            raise ValueError(f"variant {self.name!r}: label_teacher 'aligns' needs reseg, and no other goes with it")
        if not isinstance(self.idea, Distilling) and (self.unlabelled != "cutmix" or self.mixing is not None):
            raise ValueError(f"variant {self.name!r}: label_teacher needs unlabelled='cutmix', and no mixing")

    @property
    def idea(self) -> Idea | None:
        """What `label_teacher` says."""
        return idea_of(self.label_teacher)

    @property
    def stage_1(self) -> tuple[str, str] | None:
        """(label input, what is taught) of the teacher that has to be trained; None without one.

        Of one that restores label maps `RESTORED`, and what it sees.
        """
        sees = restorer_sees(self.idea)
        if sees is not None:
            return None if self.teacher == "untrained" else (RESTORED, sees)
        if self.reseg is None or self.teacher == "untrained":
            return None
        return str(self.reseg.get("label_input", "index")), self.teacher

    @property
    def step(self) -> Variant:
        """The same training step: variants that share it share a captured graph."""
        return replace(self, name="", teacher="image", long=False, longer=1.0, until=1.0)

    @property
    def sees_others(self) -> bool:
        """Whether it uses the images of the training patients without labels."""
        return self.free or (self.unlabelled is not None and self.images != "labelled")

    def steps(self, stage_2: int, stage_1: int) -> int:
        """Of its training, where the plan's stages have so many."""
        return round(stage_2 * self.longer) + stage_1 * self.long


def from_plan(entry: str | Mapping[str, Any]) -> Variant:
    """A name of the catalogue, or a variant written out."""
    if isinstance(entry, str):
        known = {**CATALOGUE, **REMOVED}
        if entry not in known:
            raise ValueError(f"unknown variant {entry!r}; known: {', '.join(CATALOGUE)}")
        return known[entry]
    unknown = entry.keys() - {f.name for f in fields(Variant)}
    if unknown:
        raise ValueError(f"unknown options {sorted(unknown)} of variant {entry.get('name')!r}")
    return Variant(**entry)


_BOTH: dict[str, Any] = {"reseg": STANDARDIZED, "deep": DS_X2}
_ENTROPY: dict[str, Any] = {"deep": DS_X2, "unlabelled": "entropy", "unlabelled_weight": 0.1}
_DEEP_CUTMIX: dict[str, Any] = {"deep": DS_X2, "unlabelled": "cutmix", "unlabelled_deep": True}

CATALOGUE: dict[str, Variant] = {
    variant.name: variant
    for variant in (
        Variant("bare"),
        Variant("bare, long", long=True),
        Variant("paper", reseg={"preset": "paper"}),
        Variant("standardized", reseg=STANDARDIZED),
        # controls of what it is that helps
        Variant("standardized, untrained teacher", reseg=STANDARDIZED, teacher="untrained"),
        Variant("standardized, other label", reseg=STANDARDIZED, fed="other label"),
        Variant("standardized, label to label", reseg=STANDARDIZED, teacher="label"),
        Variant("standardized, image to image", reseg=STANDARDIZED, teacher="autoencoder", fed="image"),
        Variant("standardized, uncrossed", reseg=STANDARDIZED, crossed=False),
        Variant("standardized, no encoder to decoder", reseg={**STANDARDIZED, "encoder_to_decoder": 0.0}),
        Variant("standardized, no decoder to encoder", reseg={**STANDARDIZED, "decoder_to_encoder": 0.0}),
        Variant("standardized, no bottleneck", reseg={**STANDARDIZED, "bottleneck": 0.0}),
        Variant("standardized, first half", reseg=STANDARDIZED, until=0.5),
        Variant("standardized, onehot", reseg={**STANDARDIZED, "label_input": "onehot"}),
        # deep supervision
        Variant("ds", deep={"weights": [0.5, 0.25, 0.125]}),
        Variant("ds x2", deep=DS_X2),
        Variant("ds x4", deep={"weights": [2.0, 1.0, 0.5]}),
        Variant("ds equal", deep=DS_EQUAL),
        Variant("ds coarse", deep={"weights": [0.5, 1.0, 2.0]}),
        Variant("ds x2 + standardized", **_BOTH),
        Variant("ds x2 + standardized, untrained teacher", **_BOTH, teacher="untrained"),
        Variant("ds x2 + standardized, other label", **_BOTH, fed="other label"),
        # images without labels; "forward" only lets batch normalisation see them
        Variant("unlabelled forward", unlabelled="forward"),
        Variant("entropy", unlabelled="entropy", unlabelled_weight=0.1),
        Variant("reconstruction", reseg=ONEHOT_TEACHER, unlabelled="reconstruction"),
        Variant("pseudo-label", unlabelled="pseudo-label"),
        Variant("mean teacher", unlabelled="mean teacher"),
        Variant("cutmix", unlabelled="cutmix"),
        Variant("ds x2 + unlabelled forward", deep=DS_X2, unlabelled="forward"),
        Variant("ds x2 + entropy", **_ENTROPY),
        Variant("ds x2 + entropy 1", deep=DS_X2, unlabelled="entropy"),
        Variant("ds x2 + reconstruction", deep=DS_X2, reseg=ONEHOT_TEACHER, unlabelled="reconstruction"),
        Variant(
            "ds x2 + reconstruction, untrained teacher",
            deep=DS_X2,
            reseg=ONEHOT_TEACHER,
            teacher="untrained",
            unlabelled="reconstruction",
        ),
        Variant("ds x2 + pseudo-label", deep=DS_X2, unlabelled="pseudo-label"),
        Variant("ds x2 + deep pseudo-label", deep=DS_X2, unlabelled="pseudo-label", unlabelled_deep=True),
        Variant("ds x2 + mean teacher", deep=DS_X2, unlabelled="mean teacher"),
        Variant("ds x2 + cutmix", deep=DS_X2, unlabelled="cutmix"),
        Variant("ds x2 + deep cutmix", **_DEEP_CUTMIX),
        Variant("ds equal + deep cutmix", **{**_DEEP_CUTMIX, "deep": DS_EQUAL}),
        Variant("ds x2 + deep copy-paste", deep=DS_X2, unlabelled="copy-paste", unlabelled_deep=True),
        Variant("ds x2 + deep cutmix + standardized", reseg=STANDARDIZED, **_DEEP_CUTMIX),
        Variant("ds x2, 2.5 times as long", deep=DS_X2, longer=2.5),
        # the same without further images: what is the method's doing, and what the data's
        Variant("ds x2 + deep cutmix, labelled images", **_DEEP_CUTMIX, images="labelled"),
        Variant("bare, for free", free=True),
        Variant("ds x2, for free", deep=DS_X2, free=True),
        Variant("ds equal, for free", deep=DS_EQUAL, free=True),
        Variant("ds x2 + deep cutmix, for free", **_DEEP_CUTMIX, free=True),
        Variant("ds x2 + entropy, labelled images", **_ENTROPY, images="labelled"),
        Variant("ds x2 + cutmix + standardized", **_BOTH, unlabelled="cutmix"),
    )
}

# measured while the library had their options: tables still show them, and nothing can run them
REMOVED: dict[str, Variant] = {
    variant.name: variant
    for variant in (
        Variant("ds x2 soft", deep={**DS_X2, "soft": True}),
        Variant("ds x2 all sides", deep={**DS_X2, "sides": "all"}),
    )
}
