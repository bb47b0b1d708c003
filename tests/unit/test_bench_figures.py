"""A figure's goals, with numbers worked by hand."""

import pytest

from bench.figures import Figure, percentile, table


@pytest.mark.parametrize(
    ("goal", "reached"),
    [
        ({"at_most": 2.0}, True),
        ({"at_most": 1.9}, False),
        ({"times_min": 10}, True),  # 20 / 2
        ({"times_min": 10.1}, False),
        ({"share_min": 0.75}, True),  # 1.5 / 2
        ({"share_min": 0.76}, False),
        ({"limit_times_max": 1.34}, True),  # 2 / 1.5 = 1.333…
        ({"limit_times_max": 1.33}, False),
        ({"below_min": 0.9}, True),  # 2 is 90 % below 20
        ({"below_min": 0.91}, False),
        ({"at_most": 2.0, "times_min": 11}, False),
        ({}, None),
    ],
)
def test_goal_is_reached_on_its_bound_and_missed_beyond_it(
    goal: dict[str, float], reached: bool | None
) -> None:
    assert Figure("x", "ms", 2.0, seed_like=20.0, limit=1.5, **goal).reached is reached


def test_goal_without_what_it_compares_with_is_missed() -> None:
    assert Figure("x", "ms", 2.0, times_min=1).reached is False
    assert Figure("x", "ms", 2.0, share_min=0.1).reached is False


def test_what_was_too_short_to_be_measured_has_no_ratio() -> None:
    figure = Figure("x", "ms", 0.0, seed_like=20.0, limit=1.5)
    assert (figure.times, figure.share) == (None, None)


def test_percentile_is_a_value_that_so_many_do_not_exceed() -> None:
    values = [40.0, 10.0, 30.0, 20.0]
    assert [percentile(values, share) for share in (0.25, 0.5, 0.51, 0.99)] == [10, 20, 30, 40]


def test_table_shows_ways_ratios_and_verdict() -> None:
    figures = [
        Figure("snapshot", "s", 0.25, seed_like=80.0, limit=0.2, times_min=100, share_min=0.9),
        Figure("memory", "MB", 1234.0),
    ]
    assert table(figures).splitlines() == [
        "what      unit   ours  seed    x  limit  share  goal",
        "snapshot  s      0.25    80  320    0.2   0.80  ≥ 100x, ≥ 0.9 of limit  MISSED",
        "memory    MB    1,234",
    ]


def test_figure_survives_being_saved() -> None:
    figure = Figure("snapshot", "s", 0.25, seed_like=80.0, times_min=100)
    assert figure.as_json()["times"] == 320
    assert Figure.from_json(figure.as_json()) == figure
