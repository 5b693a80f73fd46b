"""Does the trial notice what is wrong? Every mutant of the library must fail an attempt that the code itself passes."""

from __future__ import annotations

from collections.abc import Sequence

from . import bad_calls, bad_semi, bad_states, bad_steps, changes, kills, nets
from .mutants import MUTANTS, Mutant, StaleError
from .verdict import NEVER, Attempt, Tally, judge, show

PARTS = ("nets", "compile", "inputs")
GOOD = ("right", "clear")
KILLED = (
    "a resumed stage 1 forgets its random state",
    "a file is not written atomically",
)  # tried with real kills, too


def run(tally: Tally, seed: int = 0, some: int | None = None, parts: Sequence[str] = PARTS) -> None:
    """Every mutant, or `some` of them, against the attempts of some parts that the code passes as it is."""
    all_of = battery()
    sound = {part: [attempt for attempt in all_of[part] if judge(attempt)[0] in GOOD] for part in parts}
    how = "benchmarks.hostile.mutants.by_name({!r}).apply(), then the trial"
    for mutant in MUTANTS[:some]:
        try:
            caught = _caught(mutant, sound, seed)
        except StaleError as error:
            tally.add("mutants", mutant.name, "unclear", str(error), how.format(mutant.name))
            continue
        show(f"mutants: {mutant.name}: {'; '.join(caught) or 'SURVIVES'}")
        what = "" if caught else "it survives the trial"
        tally.add("mutants", mutant.name, "right" if caught else "silent", what, how.format(mutant.name))


def battery() -> dict[str, list[Attempt]]:
    """By part, the attempts whose result is compared with an independent one."""
    sections = (*bad_steps.SECTIONS, *bad_semi.SECTIONS, *bad_calls.SECTIONS, *bad_states.SECTIONS)
    inputs = [attempt for section in sections for attempt in section()]
    return {
        "nets": list(nets.attempts_on_own()),
        "compile": [
            a for a in changes.attempts(quick=True) if "nothing changed" in a.name or a.target == "quantization"
        ],
        "inputs": [a for a in inputs if a.refusal is NEVER or a.name in ALSO or a.target.endswith(".state_dict")],
    }


ALSO = (
    "ReSegWrapper.alignment_loss: two forwards", "ReSegWrapper.remove: after a forward", "Teacher.train: then train()",
    "Teacher.train: then its body's train()", "ReSegWrapper.fit_recon: a NaN image last",
    "ReSegWrapper.fit_recon: NaN by the last update", "CutMixConsistency.update: fresh",
    "CutMixConsistency.reset: fresh",
)  # fmt: skip


def _caught(mutant: Mutant, sound: dict[str, list[Attempt]], seed: int) -> list[str]:
    """The first attempt of each part that notices."""
    found = []
    with mutant.applied():
        for part, attempts in sound.items():
            for attempt in attempts:
                kind, _ = judge(attempt)
                if kind not in GOOD:
                    found.append(f"{part} ({attempt.name}: {kind})")
                    break
    if mutant.name in KILLED:
        tally = Tally()
        kills.run(tally, seed, 6, mutant.name)
        if not tally.clean:
            found.append(f"kills ({tally.findings[0].name}: {tally.findings[0].kind})")
    return found
