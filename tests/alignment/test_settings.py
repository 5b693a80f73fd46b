"""Values that cannot be are refused by the settings themselves, before anything is built."""

from __future__ import annotations

from typing import Any

import pytest

from reseg_loss import ReSegError, Settings
from reseg_loss.alignment.settings import settings_of

NAN = float("nan")
BAD: dict[str, list[Any]] = {
    **{name: [NAN, -1, "1", None, [1.0], 1j] for name in ("weight", "bottleneck", "alpha", "beta")},
    "divisor": [0, -3, NAN, "3", None, [3]],
    "seed": ["0", None, 1.5, -(2**70), [0], NAN],
    "ignore_index": ["255", 1.5, NAN, [255], True],
    "output": [1.5, b"0", ("a", 1.5), True, {"a": 1}, object()],
    "levels": [2, "2", [None], [2.0], [NAN], ["2"], [True], [[2, "2"]], {"levels": 2}],
    "every": [0, -1, 1.5, "2", None, True, NAN],
    "normalize": ["instance", 1, []],
    "teacher_dtype": ["half", 1, []],
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in BAD.items() for value in values])
def test_a_value_that_cannot_be_is_refused_by_name(name, value):
    with pytest.raises(ReSegError, match=f"^{name}="):
        Settings(**{name: value})


def test_settings_that_leave_no_term_are_refused():
    with pytest.raises(ReSegError, match="every term has weight 0"):
        Settings(encoder_to_decoder=0, decoder_to_encoder=0, bottleneck=0)


@pytest.mark.parametrize("preset", ["papr", None, 3, []])
def test_an_unknown_preset_is_refused(preset):
    with pytest.raises(ReSegError, match="unknown preset"):
        settings_of(preset)
