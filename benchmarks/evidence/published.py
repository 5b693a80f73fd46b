"""What was published for the field's protocol on ACDC (SSL4MIS), and on which patients it was chosen.

Facts from the public code, logs and tables of the methods, and of those who repeated them. None of it is quoted where
only an abstract or a memory of it was at hand.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Published:
    """The mean DSC in percent that a source reports.

    `chosen` says which iteration the scores are of, and so what else than the training patients they depend on.
    """

    method: str
    patients: int
    dsc: float
    scored: str
    chosen: str
    source: str


_BOTH, _TEST = "validation and test (30 patients)", "test (20 patients)"
_BEST, _VALIDATION = "the best epoch on these 30 patients", "the best on validation"
_REPEATED, _UNKNOWN = "TraCoCo, docs/results.md", "not said"
_README, _LOGS = "UniMatch, README", "UniMatch, README and training logs"
_FILTER = "nnFilterMatch, README"

PUBLISHED = (
    Published("U-Net, labelled only", 1, 28.5, _BOTH, _UNKNOWN, _README),
    Published("U-Net, labelled only", 3, 41.5, _BOTH, _UNKNOWN, _README),
    Published("U-Net, labelled only", 7, 62.5, _BOTH, _UNKNOWN, _README),
    Published("UniMatch", 1, 85.43, _BOTH, _BEST, _LOGS),
    Published("UniMatch", 1, 84.63, _BOTH, "the last epoch", _LOGS),
    Published("UniMatch", 3, 88.86, _BOTH, _BEST, _LOGS),
    Published("UniMatch", 3, 88.77, _BOTH, "the last epoch", _LOGS),
    Published("UniMatch, repeated", 3, 87.61, _TEST, _UNKNOWN, _REPEATED),
    Published("UniMatch", 7, 89.85, _BOTH, _BEST, _LOGS),
    Published("UniMatch", 7, 89.68, _BOTH, "the last epoch", _LOGS),
    Published("UniMatch, repeated", 7, 89.92, _TEST, _UNKNOWN, _REPEATED),
    Published("UniMatch, repeated", 7, 88.08, _TEST, "the last iteration", "CrossMatch, issue 4"),
    Published("BCP", 3, 87.59, _TEST, _VALIDATION, "the paper, by " + _REPEATED),
    Published("BCP", 7, 88.84, _TEST, _VALIDATION, "the paper, by " + _REPEATED),
    Published("BCP + CauSSL", 7, 89.66, _TEST, _UNKNOWN, _REPEATED),
    Published("PS-MT, repeated", 3, 86.94, _TEST, _UNKNOWN, _REPEATED),
    Published("PS-MT, repeated", 7, 88.91, _TEST, _UNKNOWN, _REPEATED),
    Published("AD-MT", 3, 88.85, _TEST, _VALIDATION, "AD-MT, training logs"),
    Published("AD-MT", 7, 89.46, _TEST, _VALIDATION, "AD-MT, training logs"),
    Published("TraCoCo", 3, 89.46, _TEST, _UNKNOWN, _REPEATED),
    Published("TraCoCo", 7, 90.44, _TEST, _UNKNOWN, _REPEATED),
    Published("CrossMatch", 7, 88.27, _UNKNOWN, "the last iteration", "CrossMatch, issue 6"),
    Published("nnU-Net, labelled only", 3, 82.96, _TEST, _UNKNOWN, _FILTER),
    Published("nnU-Net, labelled only", 7, 86.31, _TEST, _UNKNOWN, _FILTER),
    Published("nnU-Net + consistency", 3, 89.51, _TEST, _UNKNOWN, _FILTER),
    Published("nnU-Net + consistency", 7, 89.58, _TEST, _UNKNOWN, _FILTER),
    Published("nnFilterMatch", 3, 89.56, _TEST, _UNKNOWN, _FILTER),
    Published("nnFilterMatch", 7, 90.06, _TEST, _UNKNOWN, _FILTER),
)

SEEN = (
    "Earlier choices of this project (augmentation, heads, their weights) were made on splits that contain the field's "
    "test patients, and three of our variants were scored on them on 2026-11-29. Nothing further is chosen on them."
)


def published(patients: int) -> str:
    """A Markdown table of the published scores with so many labelled patients; empty without any."""
    rows = [p for p in PUBLISHED if p.patients == patients]
    if not rows:
        return ""
    lines = ["| published, one draw of labelled patients | DSC | scored on | chosen by | source |"]
    lines.append("| --- " * 5 + "|")
    lines += [f"| {p.method} | {p.dsc:.2f} | {p.scored} | {p.chosen} | {p.source} |" for p in rows]
    return "\n".join(lines)
