"""The table of `turnwise credit --table`: a line and a bar for every turn, 80 columns or more."""

from collections.abc import Iterator

import msgspec

from turnwise.credit import Credit, CreditOptions
from turnwise.credit_batch import CreditBatch

BOLD, DIM, RED, GREEN = 1, 2, 31, 32
HEADINGS = f"{'turn':>6}  {'earns':<7}{'reward':>10}{'normalised':>12}{'advantage':>11}  "
MIN_BAR, MAX_BAR = 4, 30  # Columns on each side of the centre line.


class Look(msgspec.Struct, frozen=True):
    """What the terminal can show."""

    width: int = 80
    color: bool = False
    blocks: bool = True  # Block characters; else ASCII.

    def paint(self, code: int, text: str) -> str:
        return f"\x1b[{code}m{text}\x1b[0m" if self.color and text else text

    def bar(self, share: float) -> str:
        """Return a bar left or right of a centre line; a share of -1 or 1 fills its side."""
        columns = min(max((self.width - len(HEADINGS) - 1) // 2, MIN_BAR), MAX_BAR)
        full, half = divmod(round(2 * columns * abs(share)), 2)
        if not self.blocks:
            bar, centre = "#" * (full + half), "|"
        elif share < 0:
            bar, centre = "▐" * half + "█" * full, "│"
        else:
            bar, centre = "█" * full + "▌" * half, "│"
        left, right = (bar, "") if share < 0 else ("", bar)
        color = RED if share < 0 else GREEN
        space = " " * (columns - len(left))
        return space + self.paint(color, left) + centre + self.paint(color, right)


def table(batch: CreditBatch, result: Credit, options: CreditOptions, look: Look) -> Iterator[str]:
    """Yield the lines of the table."""
    top = float(abs(result.advantages[result.mask]).max(initial=0.0))
    rollout = turn = 0
    for group, rollouts in enumerate(batch.rollouts_per_group.tolist()):
        zero_signal = "  zero-signal" if result.zero_signal[group] else ""
        yield look.paint(BOLD, f"groups[{group}]{zero_signal}")
        yield from _statistics(result, group)
        yield look.paint(DIM, HEADINGS.rstrip())
        for index in range(rollouts):
            end = turn + int(batch.turns_per_rollout[rollout])
            judged = bool(batch.outcome_valid[rollout])
            yield f"  rollouts[{index}]" + ("" if judged else "  outcome invalid: masked")
            outcome = float(batch.outcomes[rollout]) if judged else None
            yield from _turns(result, range(turn, end), outcome, top, look)
            rollout, turn = rollout + 1, end
        yield ""
    yield from _totals(result, options)
    yield f"a full bar is an advantage of {_number(top)}"


def _turns(
    result: Credit, turns: range, outcome: float | None, top: float, look: Look
) -> Iterator[str]:
    for number, turn in enumerate(turns, start=1):
        last = turn == turns[-1]
        gain = float(result.gains[turn]) if result.gain_valid[turn] else None
        reward, advantage = outcome if last else gain, float(result.advantages[turn])
        line = f"{number:>6}  {'outcome' if last else 'gain':<7}"
        line += f"{'invalid' if reward is None else _number(reward):>10}"
        line += f"{_number(float(result.normalised[turn])):>12}{_number(advantage):>11}  "
        if result.mask[turn]:
            yield line + look.bar(advantage / top if top else 0.0).rstrip()
        else:
            yield look.paint(DIM, line + "masked")


def _number(value: float) -> str:
    return f"{value:+z.3f}" if abs(value) < 1000 else f"{value:+.2e}"


def _statistics(result: Credit, group: int) -> Iterator[str]:
    pools = {"gains": result.gain_pool, "outcomes": result.outcome_pool, "joint": result.joint_pool}
    for name, pool in pools.items():
        if pool is not None and pool.count[group]:
            mean, std = _number(float(pool.mean[group])), float(pool.std[group])
            tied = "  tied" if pool.tied[group] else ""
            yield f"  {name:<9}{pool.count[group]:>4}  mean {mean}  std {std:.3g}{tied}"


def _totals(result: Credit, options: CreditOptions) -> Iterator[str]:
    weights = f"outcome_weight {options.outcome_weight:g}, gain_weight {options.gain_weight:g}"
    yield f"{options.gain}, {options.norm}, gamma {options.gamma:g}, {weights}"
    counts = {
        "zero-signal": result.zero_signal,
        "tied outcomes": result.outcome_pool.tied,
        "tied gains": result.gain_pool.tied,
    }
    told = ", ".join(f"{name} {int(groups.sum())}" for name, groups in counts.items())
    yield f"of {len(result.zero_signal)} groups: {told}"
