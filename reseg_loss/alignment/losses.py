"""Thin modules over `functional`: the reconstruction loss of stage 1 and the cross-alignment of stage 2."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from .. import functional as RF
from ..common.inputs import check_feature, check_number, check_scalar, check_weight
from ..errors import ReSegError, outline
from ..recording.extractor import Features
from .terms import alignment_terms


class ReconLoss(nn.Module):
    """alpha * MSE + beta * L1 between a reconstruction and the image (eqs. 1-3; 0.6 and 0.4 are the paper's)."""

    def __init__(self, alpha: float = 0.6, beta: float = 0.4) -> None:
        super().__init__()
        self.alpha, self.beta = check_weight("alpha", alpha), check_weight("beta", beta)

    def forward(self, prediction: Tensor, image: Tensor, valid: Tensor | None = None) -> Tensor:
        """See `functional.recon_loss`."""
        return RF.recon_loss(prediction, image, valid, alpha=self.alpha, beta=self.beta)

    def extra_repr(self) -> str:  # noqa: D102
        return f"alpha={self.alpha}, beta={self.beta}"


def term_names(levels: int) -> list[str]:
    """The names of the terms of eq. 7 for a number of levels; level 1 is the finest."""
    kinds = ("encoder_to_decoder", "decoder_to_encoder")
    return [*(f"{kind}_{i + 1}" for kind in kinds for i in range(levels)), "bottleneck"]


def pair_terms(student: Features, teacher: Features) -> dict[str, tuple[Tensor, Tensor]]:
    """{term: (student's feature, teacher's feature)}, crossed as in eqs. 4-6.

    Raises:
        ReSegError: a side is not a `Features`, or the two have different numbers of levels.
    """
    for side, features in (("student", student), ("teacher", teacher)):
        if not isinstance(features, Features) or not {*map(type, features[:2])} <= {tuple, list}:
            raise ReSegError(
                f"{side} is {outline(features)}; it must be Features(encoder, decoder, bottleneck), where the first "
                "two are tuples of tensors"
            )
    counts = {len(student.encoder), len(student.decoder), len(teacher.encoder), len(teacher.decoder)}
    if len(counts) != 1:
        raise ReSegError(
            f"student has {len(student.encoder)} encoder and {len(student.decoder)} decoder features, "
            f"teacher {len(teacher.encoder)} and {len(teacher.decoder)}; every level needs all four"
        )
    sides = (
        (*student.decoder, *student.encoder, student.bottleneck),
        (*teacher.encoder, *teacher.decoder, teacher.bottleneck),
    )
    return {name: (s, t) for name, s, t in zip(term_names(len(student.encoder)), *sides)}


class CrossAlignmentLoss(nn.Module):
    """The sum of all alignment terms divided by `divisor` (eq. 7).

    Args:
        encoder_to_decoder: weight of teacher encoder against student decoder (eq. 4), at every level. A term with
            weight 0 is not computed.
        decoder_to_encoder: weight of teacher decoder against student encoder (eq. 5), at every level.
        bottleneck: weight of bottleneck against bottleneck (eq. 6).
        divisor: the paper divides the sum of its seven terms by 3; this stays the same if terms are switched off.
        normalize: None compares raw features; "batch" standardizes every channel on both sides first.
        seed: of the fixed semi-orthogonal 1x1 map. The student's feature goes through it if the two features of a term
            have different numbers of channels.

    Raises:
        ReSegError: a weight is negative or not finite, all weights are 0, or another value is invalid.
    """

    def __init__(
        self,
        encoder_to_decoder: float = 1.0,
        decoder_to_encoder: float = 1.0,
        bottleneck: float = 1.0,
        *,
        divisor: float = 3.0,
        normalize: Literal["batch"] | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if normalize not in (None, "batch"):
            raise ReSegError(f"normalize={normalize!r}; it must be None or 'batch'")
        self.encoder_to_decoder = check_weight("encoder_to_decoder", encoder_to_decoder)
        self.decoder_to_encoder = check_weight("decoder_to_encoder", decoder_to_encoder)
        self.bottleneck = check_weight("bottleneck", bottleneck)
        if not (self.encoder_to_decoder or self.decoder_to_encoder or self.bottleneck):
            raise ReSegError("every term has weight 0; to switch the alignment off, pass weight=0 to ReSegWrapper")
        self.divisor: float = check_number("divisor", divisor, above=0)
        self.seed: int = check_number("seed", seed, least=0, most=2**63 - 1, whole=True)
        self.normalize = normalize
        self._fixed: dict[tuple[int, int, torch.device, torch.dtype], Tensor] = {}

    def term_weight(self, name: str) -> float:
        """The weight of one term (a name of `term_names`), before the division.

        Raises:
            ReSegError: no term has that name.
        """
        kind, _, level = name.rpartition("_") if isinstance(name, str) else ("", "", "")
        if kind in ("encoder_to_decoder", "decoder_to_encoder") and level.isdecimal() and level[0] != "0":
            return getattr(self, kind)
        if name == "bottleneck":
            return self.bottleneck
        raise ReSegError(
            f"there is no term {name!r}; the terms are encoder_to_decoder_1, decoder_to_encoder_1, ..., bottleneck"
        )

    def forward(self, student: Features, teacher: Features, valid: Tensor | None = None) -> Tensor:
        """The loss, a scalar in at least fp32: `combine(terms(...))`, with the arguments of `terms`."""
        return self.combine(self.terms(student, teacher, valid))

    def terms(self, student: Features, teacher: Features, valid: Tensor | None = None) -> dict[str, Tensor]:
        """The terms by name, unweighted, each a scalar in at least fp32. Terms with weight 0 are left out.

        Args:
            student: features (B, C, *spatial), finest level first; they receive the gradient.
            teacher: features of the same sizes; their channels may differ.
            valid: (B, 1, *image) with 1 where the label counts and 0 where it is ignored. At every level it is used as
                the valid area fraction.

        Raises:
            ReSegError: levels or sizes differ, or a feature is not a dense floating point tensor.
        """
        pairs = {name: pair for name, pair in pair_terms(student, teacher).items() if self.term_weight(name)}
        for name, (s, t) in pairs.items():
            check_feature(f"{name}: the student's feature", s)
            check_feature(f"{name}: the teacher's feature", t)
            if s.shape[0] != t.shape[0] or s.shape[2:] != t.shape[2:]:
                raise ReSegError(
                    f"{name}: the student's feature has shape {tuple(s.shape)}, the teacher's {tuple(t.shape)}; batch "
                    "and size must agree. If the image size is odd at this level, pad the image to a multiple of the "
                    "stride"
                )
        matched = {name: (self._match_channels(s, t.shape[1]), t) for name, (s, t) in pairs.items()}
        # the compiler fuses plain operations itself
        if valid is None and not torch.compiler.is_compiling() and not any(t.requires_grad for _, t in pairs.values()):
            return dict(zip(matched, alignment_terms(list(matched.values()), normalize=self.normalize)))
        areas: dict[tuple[int, ...], Tensor] = {}
        terms: dict[str, Tensor] = {}
        for name, (s, t) in matched.items():
            size = tuple(t.shape[2:])
            if valid is not None and size not in areas:
                areas[size] = RF.valid_fraction(valid, size)
            terms[name] = RF.alignment_term(s, t, areas.get(size), normalize=self.normalize)
        return terms

    def combine(self, terms: Mapping[str, Tensor]) -> Tensor:
        """The weighted sum of the terms divided by the divisor (eq. 7); 0 without any terms.

        Raises:
            ReSegError: `terms` is not a mapping of terms, each a scalar.
        """
        if not isinstance(terms, Mapping):
            raise ReSegError(f"terms is {outline(terms)}; it must be a mapping, as `terms()` returns it")
        for name, term in terms.items():
            check_scalar(f"terms[{name!r}]", term)
        if not terms:  # at weight 0 of the wrapper, and where `every` skips a call
            return torch.zeros(())
        weighted = [(self.term_weight(name), term) for name, term in terms.items()]
        return torch.stack([term if weight == 1 else weight * term for weight, term in weighted]).sum() / self.divisor

    def _match_channels(self, x: Tensor, channels: int) -> Tensor:
        if x.shape[1] == channels:
            return x
        # a map of bf16 values is as good as another; see `functional.project`
        dtype = x.dtype if x.dtype == torch.bfloat16 else torch.promote_types(x.dtype, torch.float32)
        key = (channels, x.shape[1], x.device, dtype)
        if key not in self._fixed:  # kept, so that no later step copies to the device or casts
            with torch.inference_mode(False):  # training may use it next
                self._fixed[key] = RF.semi_orthogonal(channels, x.shape[1], self.seed).to(x.device, dtype)
        return RF.project(x, self._fixed[key])
