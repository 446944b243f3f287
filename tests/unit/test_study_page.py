"""What people see of a search: one page that needs nothing beside it, and pictures that say what the values say."""

import re
from dataclasses import replace
from html.parser import HTMLParser
from typing import Any
from xml.etree import ElementTree as ET

import pytest

from banjoray.reports.charts import STEPS, SVG, Mark, choice_axis, circles, lines, log_axis, number_axis
from banjoray.reports.study import study_page, study_picture
from banjoray.tuning.study import StudyResult, Trial

FREEZES = ("backbone", "none", {"layers": 4}, "embeddings", {"layers": 2}, {"patterns": ["*.bias"]})
EMPTY = {"meta", "link"}


def trial(number: int, score: float | None, status: str = "done", **values: Any) -> Trial:
    rising = (0.5, score) if score is not None else ()
    history = tuple({"epoch": float(epoch), "f1": told} for epoch, told in enumerate(rising, start=1))
    values = values or {"train.learning_rate": 1e-5 * 10**number, "freeze": FREEZES[number]}
    return Trial(f"t{number}", values, status, len(history), 10.0 * (number + 1), score, history, "read")


def study(*trials: Trial, **changes: Any) -> StudyResult:
    """By default three trials with a score and one without."""
    trials = trials or (trial(2, 0.9), trial(1, 0.8, "stopped early"), trial(0, 0.6), trial(3, None, "loss is nan"))
    shares = {"train.learning_rate": 0.75, "freeze": 0.25}
    result = StudyResult("mrpc-tune-1", "mrpc:3", trials[0].trial, "f1", "max", trials[0].score or 0.0, trials, shares)
    return replace(result, **changes)


class Page(HTMLParser):
    """The cells of a page's table by row, the text of its body, and the elements that stand open at its end."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.rows: list[list[str]] = []
        self.text = ""
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in EMPTY:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"</{tag}> at {self.getpos()}"

    def handle_data(self, data: str) -> None:
        self.text += f" {data}" if "body" in self.open else ""
        if {"td", "th"} & set(self.open):
            self.rows[-1][-1] += data.strip()


def pictures(page: str) -> list[ET.Element]:
    """By default importances, parallel coordinates, freezing, learning curves."""
    return [ET.fromstring(text) for text in re.findall(r"<svg.*?</svg>", page, re.DOTALL)]


def marks(picture: ET.Element) -> dict[str, ET.Element]:
    """The marks of a picture by the first two words of their tooltip."""
    groups = [group for group in picture.iter(f"{{{SVG}}}g") if "mark" in group.attrib["class"]]
    return {title_of(group).split(":")[0]: group for group in groups}


def title_of(element: ET.Element) -> str:
    return element.findtext(f"{{{SVG}}}title") or ""


def points(mark: ET.Element) -> list[tuple[float, float]]:
    line = mark.find(f"{{{SVG}}}polyline")
    assert line is not None
    return [(float(x), float(y)) for x, y in (pair.split(",") for pair in line.attrib["points"].split())]


def circle(mark: ET.Element) -> tuple[float, float, float]:
    dot = mark.find(f"{{{SVG}}}circle")
    assert dot is not None
    return float(dot.attrib["cx"]), float(dot.attrib["cy"]), float(dot.attrib["r"])


def words(picture: ET.Element) -> list[str]:
    return ["".join(text.itertext()) for text in picture.iter(f"{{{SVG}}}text")]


def test_a_page_is_whole_and_every_picture_in_it_is_xml() -> None:
    page = study_page(study())
    assert Page(page).open == []
    assert len(pictures(page)) == 4


def test_a_page_asks_no_one_for_anything() -> None:
    page = study_page(study())
    assert set(re.findall(r"https?:[^\"' ]*", page)) == {SVG}
    assert "<script" not in page
    assert "@import" not in page
    assert "url(" not in page
    assert re.findall(r"(?:src|href)=\"([^\"]*)\"", page) == ["data:,"]


def test_the_winner_and_its_version_come_first() -> None:
    told = Page(study_page(study())).text.split()
    assert " ".join(told).startswith(
        "mrpc-tune-1 mrpc:3 f1 0.9000 trial t2 learning_rate 0.001 freeze layers 4 trials 4"
    )


def test_every_trial_is_in_the_ranking_and_a_failed_one_with_its_reason() -> None:
    head, *rows = Page(study_page(study())).rows
    assert head == ["place", "trial", "learning_rate", "freeze", "f1", "epochs", "seconds", "cached states", "status"]
    assert rows == [
        ["1", "t2", "0.001", "layers 4", "0.9000", "2", "30.0", "read", "done"],
        ["2", "t1", "1e-4", "none", "0.8000", "2", "20.0", "read", "stopped early"],
        ["3", "t0", "1e-5", "backbone", "0.6000", "2", "10.0", "read", "done"],
        ["-", "t3", "0.01", "embeddings", "-", "0", "40.0", "read", "loss is nan"],
    ]


def test_a_failed_trial_is_in_no_picture() -> None:
    for picture in pictures(study_page(study()))[1:]:
        assert set(marks(picture)) == {"trial t0", "trial t1", "trial t2"}
    assert "embeddings" not in words(pictures(study_page(study()))[1])


def test_labels_are_text_wherever_they_stand() -> None:
    hostile = "<script>alert('1')</script>\"&\x00"
    values = {f"train.{hostile}": hostile, "freeze": {"patterns": [hostile]}}
    trials = [trial(number, 0.1 * number, hostile, **values) for number in range(3)]
    named = study(*trials, study_id=hostile, version=hostile, trial=hostile, metric=hostile, importances={hostile: 1.0})
    page = study_page(named)
    assert "<script" not in page
    assert Page(page).open == []
    assert pictures(page)
    assert ET.fromstring(study_picture(named)).tag == f"{{{SVG}}}svg"
    assert "<script" not in study_picture(named)


def test_lines_stand_at_their_values_on_every_axis() -> None:
    drawn = marks(pictures(study_page(study()))[1])
    rates, freezes, scores = zip(*(points(drawn[f"trial t{number}"]) for number in (0, 1, 2)), strict=True)
    assert [len({x for x, _ in axis}) for axis in (rates, freezes, scores)] == [1, 1, 1]
    assert rates[0][0] < freezes[0][0] < scores[0][0]
    # Up the page is down in pixels: a higher rate and a higher score stand higher, none below layers 4 below backbone.
    low, middle, high = (y for _, y in rates)
    assert low - middle == pytest.approx(middle - high, abs=0.2)
    assert low > middle > high
    backbone, none, layers = (y for _, y in freezes)
    assert none - layers == pytest.approx(layers - backbone, abs=0.2)
    assert none > layers > backbone
    worst, better, best = (y for _, y in scores)
    assert (worst - better) / (better - best) == pytest.approx(2, abs=0.02)


def test_the_best_have_the_strongest_colour_whether_high_or_low_is_better() -> None:
    for mode, order in (("max", [0, 1, 2]), ("min", [2, 1, 0])):
        drawn = marks(pictures(study_page(study(mode=mode)))[1])
        steps = [int(re.findall(r"s(\d)", drawn[f"trial t{number}"].attrib["class"])[0]) for number in order]
        assert steps == sorted(steps)
        assert steps[0] == 0
        assert steps[-1] == STEPS - 1
        assert ("Lower is better" in study_page(study(mode=mode))) == (mode == "min")


def test_the_winner_is_drawn_above_the_others() -> None:
    for picture in pictures(study_page(study()))[1:]:
        styles = {name: mark.attrib["class"].split() for name, mark in marks(picture).items()}
        assert [name for name, style in styles.items() if "won" in style] == ["trial t2"]
    assert list(marks(pictures(study_page(study()))[1]))[-1] == "trial t2"


def test_freezing_is_drawn_from_none_to_all_with_the_time_as_area() -> None:
    trials = [trial(number, 0.9 - 0.1 * number) for number in range(len(FREEZES))]
    picture = pictures(study_page(study(*trials)))[2]
    drawn = {name: circle(mark) for name, mark in marks(picture).items()}
    order = sorted(drawn, key=lambda name: drawn[name][0])
    # none, embeddings, layers 2, layers 4, backbone, patterns
    assert order == ["trial t1", "trial t3", "trial t4", "trial t2", "trial t0", "trial t5"]
    assert [drawn[f"trial t{number}"][1] for number in range(6)] == sorted(y for _, y, _ in drawn.values())
    assert (drawn["trial t3"][2] / drawn["trial t0"][2]) ** 2 == pytest.approx(4, abs=0.1)


def test_a_search_that_freezes_nothing_has_no_picture_of_it() -> None:
    trials = [trial(number, 0.1 * number, rate=0.1 * number) for number in range(4)]
    assert "What is frozen" not in study_page(study(*trials))


def test_a_learning_curve_has_a_point_for_each_epoch() -> None:
    drawn = marks(pictures(study_page(study()))[3])
    (first, low), (second, high) = points(drawn["trial t2"])
    assert first < second
    assert low > high
    assert len(drawn["trial t2"].findall(f"{{{SVG}}}circle")) == 2


def test_importances_are_bars_as_long_as_their_shares() -> None:
    picture = pictures(study_page(study()))[0]
    widths = [float(bar.attrib["width"]) for bar in picture.iter(f"{{{SVG}}}rect")][1::2]
    assert widths[0] / widths[1] == pytest.approx(3)
    assert words(picture) == ["learning_rate", "75%", "freeze", "25%"]
    assert "too few scores to tell" in study_page(study(importances={}))


@pytest.mark.parametrize(
    "trials",
    [
        [trial(0, 0.5)],
        [trial(0, None, "no memory"), trial(1, None, "loss is nan")],
        [trial(0, float("nan"), "done")],
        [replace(trial(0, 0.5), values={})],
        [replace(trial(0, 0.5), history=())],
        [trial(0, 0.5, rate=1e-3), trial(1, 0.5, rate=None)],
        [trial(0, 0.0, rate=0.0, other=-1.0), trial(1, 1e-12, rate=1e9, other=-1.0)],
    ],
    ids=["one", "all failed", "score nan", "no values", "no history", "two kinds", "far and near"],
)
def test_a_small_or_odd_study_is_told_too(trials: list[Trial]) -> None:
    page = study_page(study(*trials))
    assert Page(page).open == []
    assert len(Page(page).rows) == 1 + len(trials)
    assert [ET.fromstring(study_picture(study(*trials))).tag] == [f"{{{SVG}}}svg"]
    assert ("No trial has a score" in page) == all(one.score is None or one.score != one.score for one in trials)


def test_a_picture_is_a_file_of_its_own_on_white() -> None:
    picture = ET.fromstring(study_picture(study()))
    assert set(marks(picture)) == {"trial t0", "trial t1", "trial t2"}
    style, ground = list(picture)[:2]
    assert ".s0{color:" in (style.text or "")
    assert "var(" not in (style.text or "")
    assert ground.attrib == {"width": picture.attrib["width"], "height": picture.attrib["height"], "fill": "#ffffff"}


def test_keys_with_the_same_last_part_are_told_in_full() -> None:
    values = {"a.rate": 1, "b.rate": 2, "c.d": 3}
    trials = [replace(trial(number, 0.1 * number), values=values) for number in (2, 1)]
    assert words(pictures(study_page(study(*trials)))[1])[:3] == ["a.rate", "b.rate", "d"]


def test_a_log_axis_gives_every_power_of_ten_the_same_length() -> None:
    axis = log_axis("rate", [1e-5, 3e-4, 1e-2])
    assert [text for text, _ in axis.ticks] == ["1e-5", "1e-4", "0.001", "0.01"]
    assert [axis.share(number) for _, number in axis.ticks] == pytest.approx([0, 1 / 3, 2 / 3, 1])
    assert axis.at(3e-4) == pytest.approx(0.4924, abs=1e-4)


def test_a_log_axis_of_a_short_span_ends_close_to_its_values() -> None:
    axis = log_axis("rate", [9e-5, 1.1e-3])
    assert [text for text, _ in axis.ticks] == ["5e-5", "1e-4", "2e-4", "5e-4", "0.001", "0.002"]


@pytest.mark.parametrize(
    ("numbers", "ticks"),
    [
        ([0.61, 0.89], ["0.6", "0.7", "0.8", "0.9"]),
        ([-3.0, 4.0], ["-4", "-2", "0", "2", "4"]),
        ([1000.0, 9000.0], ["0", "2000", "4000", "6000", "8000", "10000"]),
        ([5.0], ["4.5", "5", "5.5"]),
        ([0.0], ["-1", "-0.5", "0", "0.5", "1"]),
    ],
    ids=str,
)
def test_an_even_axis_has_round_ticks_around_its_values(numbers: list[float], ticks: list[str]) -> None:
    axis = number_axis("score", numbers)
    assert [text for text, _ in axis.ticks] == ticks
    assert all(0 <= axis.at(number) <= 1 for number in numbers)


def test_epochs_have_whole_numbers() -> None:
    assert [text for text, _ in number_axis("epoch", [1.0, 3.0], least_step=1).ticks] == ["1", "2", "3"]


def test_choices_stand_at_equal_distances_and_one_alone_in_the_middle() -> None:
    axis = choice_axis("batch", [8, 16, 64, True])
    assert [axis.at(value) for value in (8, 16, 64, True)] == pytest.approx([0, 1 / 3, 2 / 3, 1])
    assert [text for text, _ in axis.ticks] == ["8", "16", "64", "true"]
    assert choice_axis("one", ["none"]).at("none") == 0.5


def test_charts_of_no_marks_are_charts() -> None:
    for draw in (lines, circles):
        assert marks(ET.fromstring(draw(number_axis("x", [1]), number_axis("y", [1]), [], "empty"))) == {}


def test_a_line_of_one_point_is_a_dot() -> None:
    mark = Mark("trial a: b", "s0", ((1.0, 1.0),))
    drawn = marks(ET.fromstring(lines(number_axis("x", [1]), number_axis("y", [1]), [mark], "one")))
    assert drawn["trial a"].find(f"{{{SVG}}}polyline") is None
    assert circle(drawn["trial a"])[0] > 0
