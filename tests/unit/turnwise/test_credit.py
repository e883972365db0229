"""Credit assignment, checked against the golden numbers of the method and a few by hand."""

from collections.abc import Sequence
from typing import Any, Literal, get_args

import msgspec
import numpy as np
import pytest

from turnwise.credit import (
    PRESETS,
    Credit,
    CreditOptions,
    Norm,
    advantage_bound,
    credit,
    curriculum_weights,
    token_advantages,
)
from turnwise.credit_batch import to_batch
from turnwise.errors import InvalidInput
from turnwise.scores import turn_gains

SCORES: list[list[float | None]] = [[-2.0, -1.0, -0.2], [-2.0, -2.1, -1.5]]
OUTCOMES = [1.0, 0.4]
ONE = 0.999997  # the z-score of one of two outcomes 0.6 apart


def golden(
    scores: Sequence[Sequence[float | None]] = SCORES,
    outcomes: Sequence[float | None] = OUTCOMES,
    **options: Any,
) -> Credit:
    return credit(to_batch(scores, outcomes, [len(scores)]), CreditOptions(**options))


def about(*numbers: float) -> Any:
    return pytest.approx(list(numbers), abs=1.01e-6)


@pytest.mark.parametrize("kind", ["log_prob", "prob"])
def test_a_batch_has_the_gains_of_its_rollouts(kind: Literal["log_prob", "prob"]) -> None:
    result = golden(gain=kind)

    alone = [turn_gains(scores, kind) for scores in SCORES]
    assert [result.gains[:2].tolist(), result.gains[3:5].tolist()] == alone
    assert result.gain_valid.tolist() == [True, True, False, True, True, False]


def test_a_turn_that_adds_nothing_still_has_a_gain() -> None:
    assert turn_gains([-1.0, -1.0]) == [0.0]
    assert golden([[-1.0, -1.0], [-1.0, -2.0]]).gain_valid.tolist() == [True, False, True, False]


def test_golden_a_log_prob_and_separate() -> None:
    result = golden()

    assert result.gain_pool.mean.tolist() == about(0.575)
    assert result.gain_pool.std.tolist() == about(0.414578)
    assert result.outcome_pool.mean.tolist() == about(0.7)
    assert result.outcome_pool.std.tolist() == about(0.3)
    assert (result.gain_pool.count.tolist(), result.outcome_pool.count.tolist()) == ([4], [2])
    z = [1.025136, 0.542719, ONE, -1.628157, 0.060302, -ONE]
    assert result.normalised.tolist() == about(*z)
    expected = [2.567852, 1.542716, ONE, -2.567852, -0.939694, -ONE]
    assert result.advantages.tolist() == about(*expected)


def test_golden_a_discounted_and_spread_over_tokens() -> None:
    result = golden(gamma=0.9)

    first, second = [2.323581, 1.442716, ONE], [-2.383883, -0.839695, -ONE]
    assert result.advantages.tolist() == about(*first, *second)
    spans = [(0, 3), (3, 6), (6, 8)]
    policy = np.array([True, True, False, True, True, False, True, True])
    for advantages, (one, two, three) in (
        (result.advantages[:3], first),
        (result.advantages[3:], second),
    ):
        tokens = token_advantages(advantages, spans, policy)
        assert tokens.tolist() == about(one, one, 0, two, two, 0, three, three)


def test_golden_b_prob_and_separate() -> None:
    result = golden(gain="prob")

    assert [*result.gain_pool.mean, *result.gain_pool.std] == about(0.192798, 0.172454)
    z = [0.230475, 1.496356, ONE, -1.192640, -0.534192, -ONE]
    assert result.normalised.tolist() == about(*z)
    expected = [2.726828, 2.496353, ONE, -2.726828, -1.534188, -ONE]
    assert result.advantages.tolist() == about(*expected)


def test_golden_c_prob_and_joint_is_the_preset_of_the_first_paper() -> None:
    result = credit(to_batch(SCORES, OUTCOMES, [2]), PRESETS["paper_v1"])

    assert result.joint_pool is not None
    assert [*result.joint_pool.mean, *result.joint_pool.std] == about(0.361865, 0.327100)
    z = [-0.395355, 0.272045, 1.950880, -1.145652, -0.798503, 0.116585]
    assert result.normalised.tolist() == about(*z)
    expected = [1.827570, 2.222925, 1.950880, -1.827570, -0.681919, 0.116585]
    assert result.advantages.tolist() == about(*expected)


def test_golden_d_log_prob_and_joint() -> None:
    result = golden(norm="joint")

    assert result.joint_pool is not None
    assert [*result.joint_pool.mean, *result.joint_pool.std] == about(0.616667, 0.384780)
    expected = [2.468938, 1.472700, 0.996238, -2.468938, -0.606406, -0.563091]
    assert result.advantages.tolist() == about(*expected)


def test_golden_e_tied_outcomes_leave_the_gains_teaching() -> None:
    result = golden(outcomes=[0.4, 0.4])

    expected = [1.567855, 0.542719, 0.0, -1.567855, 0.060302, 0.0]
    assert result.advantages.tolist() == about(*expected)
    assert result.outcome_pool.tied.tolist() == [True]
    assert result.gain_pool.tied.tolist() == [False]
    assert not result.zero_signal.any()


def test_golden_f_a_format_penalty_is_an_outcome_like_any_other() -> None:
    result = golden(outcomes=[1.0, -2.0])

    assert [*result.outcome_pool.mean, *result.outcome_pool.std] == about(-0.5, 1.5)
    expected = [2.567854, 1.542718, 0.999999, -2.567854, -0.939697, -0.999999]
    assert result.advantages.tolist() == about(*expected)


@pytest.mark.parametrize(
    ("norm", "expected"),
    [
        ("raw", [2.410688, 2.128550, ONE, -1.141066, -0.153582, -ONE]),
        ("scaled_separate", [2.925914, 1.666660, ONE, -2.925914, -0.925923, -ONE]),
        ("per_turn_index", [2.999984, 1.999986, ONE, -2.999984, -1.999986, -ONE]),
        ("gain_only", [1.567855, 0.542719, 0.0, -1.567855, 0.060302, 0.0]),
        ("outcome_only", [ONE, ONE, ONE, -ONE, -ONE, -ONE]),
    ],
)
def test_golden_numbers_of_the_other_norms(norm: str, expected: list[float]) -> None:
    assert golden(norm=norm).advantages.tolist() == about(*expected)


def test_outcome_only_knows_no_discount_and_is_the_preset_of_grpo() -> None:
    assert PRESETS["grpo"].norm == "outcome_only"
    assert golden(norm="outcome_only", gamma=0.0).advantages.tolist() == about(
        *[ONE] * 3, *[-ONE] * 3
    )


def test_golden_missing_score_masks_two_turns_through_which_the_return_flows() -> None:
    result = golden([[-2.0, None, -0.2], SCORES[1]])

    assert result.advantages.tolist() == about(ONE, ONE, ONE, -ONE, 0.0, -ONE)
    assert result.mask.tolist() == [False, False, True, True, True, True]
    assert result.gain_pool.count.tolist() == [2]


@pytest.mark.parametrize("norm", ["separate", "joint", "raw", "outcome_only", "gain_only"])
def test_every_norm_masks_the_same_turns(norm: str) -> None:
    result = golden([[-2.0, None, -0.2], SCORES[1], [-1.0]], [1.0, 0.4, None], norm=norm)

    assert result.mask.tolist() == [False, False, True, True, True, True, False]


@pytest.mark.parametrize("norm", ["separate", "joint", "scaled_separate", "raw", "per_turn_index"])
def test_a_missing_outcome_masks_the_rollout_and_its_gains_count_nowhere(norm: str) -> None:
    with_it = golden([*SCORES, [-9.0, -1.0, -0.5]], [*OUTCOMES, None], norm=norm)
    without = golden(norm=norm)

    assert with_it.advantages.tolist() == [*without.advantages.tolist(), 0.0, 0.0, 0.0]
    assert with_it.normalised[6:].tolist() == [0.0, 0.0, 0.0]
    assert with_it.mask.tolist() == [True] * 6 + [False] * 3
    assert with_it.gains[6:8].tolist() == [8.0, 0.5]
    assert with_it.gain_pool.mean.tolist() == without.gain_pool.mean.tolist()


def test_a_pool_of_one_value_has_no_signal() -> None:
    result = golden([[-2.0, -1.0], [-3.0]], [1.0, 0.0], norm="raw")

    assert result.normalised.tolist() == about(0.0, 0.999998, -0.999998)
    assert (result.gain_pool.count.tolist(), result.gain_pool.tied.tolist()) == ([1], [False])


@pytest.mark.parametrize("norm", ["separate", "joint", "scaled_separate", "raw", "per_turn_index"])
def test_float_residue_is_no_signal(norm: str) -> None:
    residue = [[-0.3, -0.2, -0.1], [-0.7, -0.6, -0.5]]  # every gain is 0.1 but for rounding
    assert len({-0.2 - -0.3, -0.1 - -0.2, -0.6 - -0.7, -0.5 - -0.6}) > 1
    result = golden(residue, [0.1, 0.1], norm=norm)

    assert result.gain_pool.tied.tolist() == result.outcome_pool.tied.tolist() == [True]
    assert not result.advantages.any()
    assert result.zero_signal.tolist() == [True]


def test_ties_of_the_largest_numbers_stay_ties_in_a_large_group() -> None:
    # 100,000 values: their plain sum has rounded by more than the threshold of a tie.
    batch = to_batch([[999_999.9] * 1000] * 100, [-999_999.9] * 100, [100], given="gains")

    result = credit(batch)

    assert result.zero_signal.tolist() == [True]
    assert result.gain_pool.mean.tolist() == about(999_999.9)


def test_spread_just_below_the_threshold_is_no_signal() -> None:
    result = golden([[-1.0], [-1.0]], [0.0, 1.8e-6])  # standard deviation 0.9e-6

    assert result.advantages.tolist() == [0.0, 0.0]
    assert result.outcome_pool.tied.tolist() == [True]


def test_spread_just_above_the_threshold_is_signal_but_no_explosion() -> None:
    result = golden([[-1.0], [-1.0]], [0.0, 4e-6])

    # (r - mu) = 2e-6, sigma = sqrt(4e-12 + 1e-8) = 1.0002e-4, plus 1e-6
    assert result.advantages.tolist() == pytest.approx([-0.019798, 0.019798], abs=1e-6)


def test_scaled_separate_lifts_gains_tenfold_at_most_and_to_a_third_of_no_outcome() -> None:
    # 30 gains, one of them apart: mean |z| = 2 * sqrt(29) / 30 = 0.359011; outcomes are tied.
    gains = [[1.0], *[[0.0]] * 29]
    result = credit(
        to_batch(gains, [0.5] * 30, [30], given="gains"), CreditOptions(norm="scaled_separate")
    )

    assert result.normalised[0] == pytest.approx(0.3 / 0.359011 * 29**0.5, rel=1e-4)
    crowd = [[1.0], *[[0.0]] * 9_999]  # mean |z| = 0.02, and 0.3 / 0.02 is above 10
    result = credit(
        to_batch(crowd, [0.5] * 10_000, [10_000], given="gains"),
        CreditOptions(norm="scaled_separate"),
    )
    assert result.normalised[0] == pytest.approx(10 * 9_999**0.5, rel=1e-3)


def test_per_turn_index_compares_a_gain_with_those_of_the_same_turn() -> None:
    # The third gain stands alone at its index; the last turns stand at three different ones.
    gains: list[list[float]] = [[1.0, 5.0, 9.0], [3.0, 5.0], []]
    batch = to_batch(gains, [1.0, 1.0, 1.0], [3], given="gains")

    result = credit(batch, CreditOptions(norm="per_turn_index", gamma=0.0))

    assert result.advantages.tolist() == about(-0.999999, 0, 0, 0, 0.999999, 0, 0, 0)


def test_weights_act_after_normalisation() -> None:
    result = golden(outcome_weight=0.5, gain_weight=2.0, gamma=0.0)

    expected = [2.050272, 1.085438, 0.5 * ONE, -3.256314, 0.120604, -0.5 * ONE]
    assert result.advantages.tolist() == about(*expected)
    assert result.normalised.tolist() == golden().normalised.tolist()


def test_weights_reach_raw_and_outcome_only_too() -> None:
    # raw: 2 * 1.410691 + 0.5 * 0.999997
    assert golden(norm="raw", outcome_weight=0.5, gain_weight=2.0).advantages[0] == pytest.approx(
        3.321380, abs=3e-6
    )
    assert golden(norm="outcome_only", outcome_weight=0.5).advantages[0] == pytest.approx(0.5 * ONE)


def test_curriculum_moves_weight_from_gains_to_outcome() -> None:
    assert curriculum_weights(0, 100) == (0.5, 1.0)
    assert curriculum_weights(50, 100) == (0.75, 0.75)
    assert curriculum_weights(100, 100) == curriculum_weights(101, 100) == (1.0, 0.5)


@pytest.mark.parametrize(
    ("step", "steps", "place"),
    [(0, 0, "steps"), (-1, 4, "step"), (float("nan"), 4, "step"), ("1", 4, "step")],
)
def test_a_step_that_is_none_is_refused(step: Any, steps: int, place: str) -> None:
    with pytest.raises(InvalidInput, match=f"^{place}: must be a finite number from [01] to"):
        curriculum_weights(step, steps)


def test_given_gains_take_the_place_of_scores() -> None:
    batch = to_batch([[1.0, 0.8], [-0.1, 0.6]], OUTCOMES, [2], given="gains")

    assert credit(batch).advantages.tolist() == pytest.approx(golden().advantages.tolist())


def test_a_missing_gain_masks_its_turn_only() -> None:
    batch = to_batch([[1.0, None], [-0.1, 0.6]], OUTCOMES, [2], given="gains")

    assert credit(batch).mask.tolist() == [True, False, True, True, True, True]
    assert credit(batch).gain_pool.mean.tolist() == about(0.5)


def test_a_rollout_that_ended_before_its_first_turn_counts_nowhere() -> None:
    result = credit(to_batch([*SCORES, []], [*OUTCOMES, None], [3]))

    assert result.advantages.tolist() == golden().advantages.tolist()


@pytest.mark.parametrize("norm", get_args(Norm))
def test_a_batch_of_rollouts_without_a_turn_has_no_signal(norm: Norm) -> None:
    result = credit(to_batch([[], []], [1.0, None], [2]), CreditOptions(norm=norm))

    assert (result.advantages.size, result.mask.size) == (0, 0)
    assert result.zero_signal.tolist() == [True]


def test_masked_turns_have_no_token_advantages() -> None:
    policy, spans = np.ones(4, np.bool_), [(0, 1), (2, 4)]  # token 1 lies between the turns

    tokens = token_advantages(np.array([3.0, 5.0]), spans, policy, np.array([True, False]))

    assert tokens.tolist() == [3.0, 0.0, 0.0, 0.0]


@pytest.mark.parametrize(
    ("spans", "place"),
    [
        ([(0, 2), (1, 4)], r"turn_spans\[1\].*2\.\.4, got 1\.\.4"),  # overlap
        ([(2, 4), (0, 2)], r"turn_spans\[1\]"),  # order
        ([(0, 2), (2, 5)], r"turn_spans\[1\]"),  # past the end
        ([(0, 2), (2, 2)], r"turn_spans\[1\]"),  # empty
        ([(-1, 2), (2, 4)], r"turn_spans\[0\]"),
        ([(0, 2)], "differ in length: 1, 2 and 2"),
    ],
)
def test_spans_that_are_no_turns_are_refused(spans: list[tuple[int, int]], place: str) -> None:
    with pytest.raises(InvalidInput, match=place):
        token_advantages(np.ones(2), spans, np.ones(4, np.bool_))


@pytest.mark.parametrize(
    ("option", "value", "problem"),
    [
        ("norm", "seperate", "norm: unknown name 'seperate'.*joint.*nearest is 'separate'"),
        ("gain", "logprob", "gain: .*allowed are log_prob, prob; the nearest is 'log_prob'"),
        ("gamma", -0.1, "gamma: must be a finite number from 0 to 1, got -0.1"),
        ("gamma", 1.5, "gamma"),
        ("gamma", float("nan"), "gamma"),
        ("gamma", True, "gamma"),
        ("gamma", "1", "gamma"),
        ("gain_weight", -1.0, "gain_weight: must be a finite number from 0 to 100"),
        ("outcome_weight", float("inf"), "outcome_weight"),
        ("outcome_weight", 100.5, "outcome_weight: must be a finite number from 0 to 100"),
    ],
)
def test_an_option_out_of_range_is_named(option: str, value: Any, problem: str) -> None:
    with pytest.raises(InvalidInput, match=problem):
        CreditOptions(**{option: value})


@pytest.mark.parametrize("bad", [0.1, 2e-6, -1.1e6, float("nan"), float("inf"), -float("inf")])
def test_a_score_that_is_none_is_refused_in_its_place(bad: float) -> None:
    scores = [[-1.0], [-1.0], [-1.0, -1.0, bad]]

    with pytest.raises(InvalidInput, match=r"^groups\[1\]\.rollouts\[1\]\.scores\[2\]: .* 1e-06"):
        to_batch(scores, [0.0] * 3, [1, 2])


@pytest.mark.parametrize("bad", [1.1e6, float("nan")])
def test_an_outcome_or_gain_out_of_range_is_refused_in_its_place(bad: float) -> None:
    with pytest.raises(InvalidInput, match=r"^groups\[1\]\.rollouts\[0\]\.outcome: "):
        to_batch([[-1.0], [-1.0]], [0.0, bad], [1, 1])
    with pytest.raises(InvalidInput, match=r"^groups\[0\]\.rollouts\[1\]\.gains\[0\]: "):
        to_batch([[], [bad]], [0.0, 0.0], [2], given="gains")


@pytest.mark.parametrize("bad", ["-1", "x", -(10**400), True, [-1.0], {}])
def test_what_is_no_number_is_refused_in_its_place(bad: Any) -> None:
    with pytest.raises(InvalidInput, match=r"^groups\[1\]\.rollouts\[0\]\.scores\[1\]: must be a"):
        to_batch([[-1], [-1, bad]], [1, None], [1, 1])
    with pytest.raises(InvalidInput, match=r"^groups\[0\]\.rollouts\[1\]\.outcome: must be a"):
        to_batch([[-1.0], [-1.0]], [1.0, bad], [2])


def test_what_stands_at_an_invalid_place_is_never_looked_at() -> None:
    clean = to_batch([[-2.0, None, -0.2], SCORES[1], [-1.0]], [*OUTCOMES, None], [3])
    values, outcomes = clean.values.copy(), clean.outcomes.copy()
    values[1], outcomes[2] = np.nan, np.inf

    dirty = credit(msgspec.structs.replace(clean, values=values, outcomes=outcomes))

    assert dirty.advantages.tolist() == credit(clean).advantages.tolist()
    some = to_batch([[1.0, None], [-0.1, 0.6]], OUTCOMES, [2], given="gains")
    unknown = np.array([1.0, np.nan, -0.1, 0.6])
    assert credit(msgspec.structs.replace(some, values=unknown)).gains[1] == 0.0


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"values": np.zeros(5)}, r"values: must be float64 of shape \(6,\), got .*\(5,\)"),
        ({"valid": np.ones(6)}, "valid: must be bool of shape"),  # 0 and 1 are no mask
        ({"outcome_valid": np.ones(3, np.bool_)}, "outcome_valid"),
        ({"outcomes": np.zeros((2, 1))}, "outcomes"),
        ({"turns_per_rollout": np.array([6])}, "turns_per_rollout"),
        ({"turns_per_rollout": np.array([7, -1])}, "batch: .*no count below 0"),
        ({"rollouts_per_group": np.array([2, 0])}, "batch: must hold groups with rollouts"),
    ],
)
def test_a_batch_whose_arrays_do_not_fit_is_refused(changes: Any, problem: str) -> None:
    with pytest.raises(InvalidInput, match=problem):
        msgspec.structs.replace(to_batch(SCORES, OUTCOMES, [2]), **changes)


def test_given_gains_belong_to_rollouts_of_a_turn_or_more() -> None:
    batch = to_batch([[1.0], []], OUTCOMES, [2], given="gains")

    with pytest.raises(InvalidInput, match=r"batch: .*no count below 0"):
        msgspec.structs.replace(batch, turns_per_rollout=np.array([3, 0]))  # 2 - 1 gains: still 1


@pytest.mark.parametrize(
    ("norm", "bound"),
    [
        ("separate", 99**0.5 + 99**0.5),
        ("per_turn_index", 99**0.5 + 99**0.5),
        ("raw", 10 + 99**0.5),
        ("outcome_only", 99**0.5),
        ("gain_only", 99**0.5),
    ],
)
def test_the_bound_is_what_one_rollout_apart_from_99_reaches(norm: Norm, bound: float) -> None:
    batch = to_batch([[1e6], *[[0.0]] * 99], [1e6, *[0.0] * 99], [100], given="gains")
    options = CreditOptions(norm=norm)

    assert advantage_bound(options, rollouts=100, turns=2) == pytest.approx(bound)
    assert credit(batch, options).advantages.max() == pytest.approx(bound)


def test_the_bound_of_joint_counts_one_pool_and_that_of_scaled_separate_ten_times_the_gains() -> (
    None
):
    joint = advantage_bound(CreditOptions(norm="joint", gain_weight=0.5), rollouts=4, turns=3)
    assert joint == pytest.approx(0.5 * 2 * 11**0.5 + 11**0.5)
    scaled = advantage_bound(CreditOptions(norm="scaled_separate"), rollouts=4, turns=3)
    assert scaled == pytest.approx(10 * 2 * 7**0.5 + 3**0.5)
    assert advantage_bound(CreditOptions(), rollouts=1, turns=1) == 0.0
