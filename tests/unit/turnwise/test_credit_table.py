"""The table: a bar per turn that shows sign and size, in colour only when asked."""

import re

import pytest

from turnwise.credit import Credit, CreditOptions, credit
from turnwise.credit_batch import CreditBatch, to_batch
from turnwise.credit_table import Look, table

GOLDEN = to_batch([[-2, -1, -0.2], [-2, -2.1, -1.5]], [1.0, 0.4], [2])


def lines(batch: CreditBatch, look: Look, options: CreditOptions | None = None) -> list[str]:
    options = options or CreditOptions()
    result: Credit = credit(batch, options)
    return list(table(batch, result, options, look))


def test_every_turn_has_its_numbers_and_its_bar() -> None:
    shown = lines(GOLDEN, Look(width=80))

    assert shown[0] == "groups[0]"
    assert shown[1].split() == ["gains", "4", "mean", "+0.575", "std", "0.415"]
    assert shown[2].split() == ["outcomes", "2", "mean", "+0.700", "std", "0.3"]
    assert shown[4] == "  rollouts[0]"
    assert shown[5].split() == ["1", "gain", "+1.000", "+1.025", "+2.568", "│" + "█" * 14]
    assert shown[7].split() == ["3", "outcome", "+1.000", "+1.000", "+1.000", "│" + "█" * 5 + "▌"]
    assert shown[9].split() == ["1", "gain", "-0.100", "-1.628", "-2.568", "█" * 14 + "│"]
    assert shown[-1] == "a full bar is an advantage of +2.568"


@pytest.mark.parametrize("width", [80, 100, 200])
def test_no_line_is_wider_than_the_terminal(width: int) -> None:
    large = to_batch([[-1e6, -1.0, -9e5]] * 2 + [[0.0]], [1e6, -1e6, None], [3])

    wordy = CreditOptions(norm="scaled_separate", gamma=0.95, outcome_weight=0.75, gain_weight=0.75)
    for options in (wordy, CreditOptions(norm="joint")):
        assert max(map(len, lines(large, Look(width=width), options))) <= width


def test_the_centre_lines_stand_under_each_other() -> None:
    bars = [line for line in lines(GOLDEN, Look()) if "│" in line]

    assert len(bars) == 6
    assert len({line.index("│") for line in bars}) == 1


def test_colour_tells_the_sign_and_takes_no_room() -> None:
    plain, colored = lines(GOLDEN, Look()), lines(GOLDEN, Look(color=True))

    assert not any("\x1b" in line for line in plain)
    assert [re.sub(r"\x1b\[\d+m", "", line) for line in colored] == plain
    assert "\x1b[32m██" in colored[5]
    assert "\x1b[31m██" in colored[9]


def test_masked_turns_are_dim_and_say_so() -> None:
    batch = to_batch([[-2, None, -0.2], [-2, -2.1, -1.5], [-1.0]], [1.0, 0.4, None], [3])

    shown = lines(batch, Look(color=True))

    masked = [line for line in shown if line.endswith("masked\x1b[0m")]
    assert len(masked) == 3
    assert all(line.startswith("\x1b[2m") for line in masked)
    assert masked[0].split()[2:5] == ["gain", "invalid", "+0.000"]
    assert "  rollouts[2]  outcome invalid: masked" in shown


def test_ascii_terminals_get_ascii() -> None:
    shown = lines(GOLDEN, Look(blocks=False))

    assert all(line.isascii() for line in shown)
    assert shown[5].endswith("|" + "#" * 14)


def test_a_group_without_signal_is_called_so() -> None:
    shown = lines(to_batch([[-1.0], [-1.0]], [0.5, 0.5], [2]), Look())

    assert shown[0] == "groups[0]  zero-signal"
    assert shown[1].split() == ["outcomes", "2", "mean", "+0.500", "std", "0.0001", "tied"]
    assert shown[-2] == "of 1 groups: zero-signal 1, tied outcomes 1, tied gains 0"


def test_options_stand_below() -> None:
    shown = lines(GOLDEN, Look(), CreditOptions(norm="raw", gamma=0.5))

    assert shown[-3] == "log_prob, raw, gamma 0.5, outcome_weight 1, gain_weight 1"
