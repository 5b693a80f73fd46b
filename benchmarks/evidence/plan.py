"""What is run, written down before it is: a plan is a JSON file beside this package."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from .harness import Settings
from .variants import Variant, from_plan


@dataclass(frozen=True)
class Plan:
    """A question, how it is decided, and the runs that answer it.

    Attributes:
        name: the file's name without suffix.
        question: what is asked.
        rule: how the numbers decide it.
        data: "acdc", "acdc_native" (with the field's patients), "sunnybrook", "hippocampus" or "synapse"; or another
            name of data that was measured elsewhere.
        patients: labelled ones.
        seeds: of split, weights and batches.
        decide_on: the scores that the rule reads: one of `parts`, or the other data set's name.
        variants: all run for a seed before the next seed begins.
        settings: shared by all.
        parts: which parts are scored.
        drawn: the labelled patients are drawn by the seed, where the field has a choice of its own for all seeds.
        also_test: another data set on which the network is scored: {"data", "classes": [[ours, theirs], ...]}.
        elsewhere: another data set, of which variants have unlabelled images ("half elsewhere").
        of_class: the class that the rule reads, where it is not the mean over all.
        published: DSC in percent that the publication reports for a variant, by its name.
        published_hd95: HD95, likewise.
        outside: of runs that were made elsewhere, and whose plan was written after them: where, and of what.
        minutes: that a variant's run is expected to take, stage 1 included, by its name; empty where not said.
    """

    name: str
    question: str
    rule: str
    data: str
    patients: int
    seeds: tuple[int, ...]
    decide_on: str
    variants: tuple[Variant, ...]
    settings: Settings
    parts: tuple[str, ...] = ("validation", "test")
    drawn: bool = False
    also_test: dict[str, Any] | None = None
    elsewhere: str = ""
    of_class: str = ""
    published: Mapping[str, float] = field(default_factory=dict)
    published_hd95: Mapping[str, float] = field(default_factory=dict)
    outside: str = ""
    minutes: Mapping[str, float] = field(default_factory=dict)

    @property
    def scored(self) -> tuple[str, ...]:
        """The parts on which networks are scored, and the other data set."""
        return *self.parts, *([self.also_test["data"]] if self.also_test else [])

    def runs(self) -> Iterator[tuple[int, Variant]]:
        """Seed by seed, so that whatever was run is paired."""
        return ((seed, variant) for seed in self.seeds for variant in self.variants)

    def key(self, seed: int, variant: Variant, size: int) -> str:
        """The same for the same run, whatever plan and name it comes under.

        `size` is that of the slices as they are stored, at which predictions are scored.
        """
        what = {
            "data": self.data,
            "stored": size,
            "patients": self.patients,
            "seed": seed,
            "settings": self.settings.options(),
            "variant": variant.options(),
            "parts": self.parts,
            "also_test": self.also_test,
            **({"drawn": True} if self.drawn else {}),  # so that earlier runs keep their keys
            **({"elsewhere": self.elsewhere} if variant.images == "half elsewhere" else {}),
        }
        return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:16]


def read_plan(path: Path) -> Plan:
    """Read and check a plan."""
    raw = json.loads(path.read_text())
    unknown = raw.keys() - {f.name for f in fields(Plan)}
    if unknown:
        raise ValueError(f"{path.name}: unknown entries {sorted(unknown)}")
    plan = Plan(
        **{
            "name": path.stem,
            **raw,
            "seeds": tuple(raw["seeds"]),
            "variants": tuple(from_plan(entry) for entry in raw["variants"]),
            "settings": Settings(**raw.get("settings", {})),
            "parts": tuple(raw.get("parts", ("validation", "test"))),
        }
    )
    names = [variant.name for variant in plan.variants]
    if len(set(names)) != len(names):
        raise ValueError(f"{path.name}: a variant is named twice")
    for what in ("published", "published_hd95", "minutes"):
        others = sorted(getattr(plan, what).keys() - set(names))
        if others:
            raise ValueError(f"{path.name}: {what!r} has {others}, which are no variants of the plan")
    named: dict[str, str] = {}  # runs are found by their options: of two names for the same, one would have none
    for variant in plan.variants:
        first = named.setdefault(json.dumps(variant.options(), sort_keys=True), variant.name)
        if first != variant.name:
            raise ValueError(f"{path.name}: {first!r} and {variant.name!r} have the same options")
    asking = [variant.name for variant in plan.variants if variant.images == "half elsewhere"]
    if bool(asking) != bool(plan.elsewhere):
        what = f"{asking} need" if asking else f"no variant has images of {plan.elsewhere!r}, but the plan names"
        raise ValueError(f"{path.name}: {what} another data set, as 'elsewhere'")
    if plan.decide_on not in plan.scored:
        raise ValueError(f"{path.name}: decided on {plan.decide_on!r}, and only {', '.join(plan.scored)} are scored")
    return plan


def smaller(plan: Plan, **settings: Any) -> Plan:
    """The plan with other settings, for a trial."""
    return replace(plan, settings=replace(plan.settings, **settings))
