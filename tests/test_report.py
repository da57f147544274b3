"""The report, opened in a real browser: every figure is drawn, nothing is fetched, and nothing overflows."""

import base64
import hashlib
import html
import json
import math
import re
import shutil
import time
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from selenium.webdriver import Chrome, ChromeOptions
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import Select

from quee_core.baselines import BASELINES
from quee_core.record import BudgetRow, SegmentCost, SweepRecord
from quee_core.report import figures, palette
from quee_core.report.page import render
from quee_core.report.summary import closest_rival, summarise
from quee_core.report.wording import duration, interval, percent, points, quantity
from quee_core.runs import record_digest
from tests import sweep_records

CHROMIUM, DRIVER = "/usr/bin/chromium", "/usr/bin/chromedriver"
FLAGS = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update", "--disable-dev-shm-usage",
)  # fmt: skip
PHONE, WIDE = 360, 1280
RECORDS: dict[str, Callable[[], SweepRecord]] = {
    "realistic": sweep_records.realistic_record,
    "thousand classes": sweep_records.thousand_class_record,
    "many exits": sweep_records.many_exit_record,
    "losing": sweep_records.losing_record,
    "sparse": sweep_records.sparse_record,
    "hostile": sweep_records.hostile_record,
}

FIGURE_STATE = """
return [...document.querySelectorAll('[data-figure]')].map((canvas) => {
  const size = (node) => { const box = node.getBoundingClientRect(); return Math.max(box.width, box.height); };
  const traces = [...canvas.querySelectorAll('g.trace, g.hm')];
  const svg = canvas.querySelector('svg.main-svg')?.getBoundingClientRect();
  return {
    name: canvas.dataset.figure, wanted: canvas.data.length, room: canvas.clientWidth,
    drawn: traces.length, visible: traces.filter((trace) => size(trace) > 1).length,
    width: svg?.width ?? 0, height: svg?.height ?? 0,
    notes: [...canvas.querySelectorAll('.annotation-text')].map((note) => note.textContent),
  };
});"""
OVERFLOWING = """
const width = document.documentElement.clientWidth;
const outside = [...document.body.querySelectorAll('*')].filter((node) => {
  const box = node.getBoundingClientRect();
  return box.width > 0 && (box.right > width + 0.5 || box.left < -0.5)
    && !node.closest('.scroll, pre, svg, .skip') && !node.closest('.js-plotly-plot');
});
return [document.documentElement.scrollWidth - width, outside.map((node) => node.outerHTML.slice(0, 120))];"""


class Browser:
    """Chromium at a chosen width, with its console and its network log at hand."""

    def __init__(self, profile: Path) -> None:
        if missing := [tool for tool in (CHROMIUM, DRIVER) if shutil.which(tool) is None]:
            pytest.fail(
                f"{missing} not found: the report is tested in a browser; apt-get install chromium chromium-driver"
            )
        options = ChromeOptions()
        options.binary_location = CHROMIUM
        for flag in (*FLAGS, f"--user-data-dir={profile}"):
            options.add_argument(flag)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
        self.driver = Chrome(options=options, service=Service(DRIVER))

    def open(self, page: Path, width: int, theme: str = "light") -> None:
        """Load `page` afresh and wait until all figures are drawn."""
        self.emulate(theme)
        self.resize(width)
        self.driver.get(page.as_uri())
        self.wait(theme, width)

    def emulate(self, theme: str) -> None:
        self.driver.execute_cdp_cmd(
            "Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": theme}]}
        )

    def resize(self, width: int) -> None:
        size = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width == PHONE}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)

    def wait(self, theme: str, width: int, patience: float = 60) -> None:
        deadline = time.monotonic() + patience
        while time.monotonic() < deadline:
            drawn = self.run("return document.documentElement.dataset.drawn ?? ''").split()
            if drawn[:1] == [theme] and int(drawn[1]) in range(width - 20, width + 1):  # a scroll bar takes some
                return
            time.sleep(0.05)
        pytest.fail(f"figures not drawn for {theme}, {width} px after {patience} s; console: {self.console()}")

    def run(self, script: str) -> Any:
        return self.driver.execute_script(script)

    def find(self, selector: str) -> Any:
        return self.driver.find_element(By.CSS_SELECTOR, selector)

    def console(self) -> list[str]:
        return [entry["message"] for entry in self.driver.get_log("browser")]

    def requests(self) -> list[str]:
        """Every address that a page asked for since the last call, but for inline data.

        The tab that Chromium opens at its start is a page of its own, and may still be loading.
        """
        events = [json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance")]
        asked = [e["params"] for e in events if e["method"] == "Network.requestWillBeSent"]
        urls = [a["request"]["url"] for a in asked if not a["documentURL"].startswith("chrome://")]
        return [url for url in urls if not url.startswith(("data:", "blob:"))]


@cache
def record_of(name: str) -> SweepRecord:
    return RECORDS[name]()


@cache
def rendered(name: str) -> str:
    return render(record_of(name))


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    own = Browser(tmp_path_factory.mktemp("chromium"))
    yield own
    own.driver.quit()


def written(name: str, folder: Path) -> Path:
    page = folder / "report.html"
    page.write_text(rendered(name), "utf-8")
    return page


def check_figures(browser: Browser, name: str) -> None:
    """Every trace that a figure holds is an SVG group on the page, and some of it can be seen."""
    states = browser.run(FIGURE_STATE)
    assert [s["name"] for s in states] == [
        "front", "shares_by_exit", "shares_by_path", "shares_by_class", "reliability", "uniform", "costs", "grid",
    ]  # fmt: skip
    for state in states:
        assert state["width"] > 200, state
        assert state["height"] > 150, state
        assert state["width"] <= state["room"] + 0.5, state
        if state["wanted"]:
            assert state["drawn"] == state["wanted"], state
            assert state["visible"] > 0, state
        else:
            assert name == "sparse", state
            assert state["notes"], state
        if name == "realistic":
            assert state["visible"] == state["wanted"], state


def check_width(browser: Browser) -> None:
    surplus, outside = browser.run(OVERFLOWING)
    assert surplus <= 0, outside
    assert outside == []


@pytest.mark.parametrize("name", ["realistic", "thousand classes", "many exits", "sparse"])
def test_every_figure_is_drawn_on_a_phone_and_on_a_wide_screen(name: str, browser: Browser, tmp_path: Path) -> None:
    page = written(name, tmp_path)
    browser.requests()
    browser.open(page, PHONE)
    check_figures(browser, name)
    check_width(browser)
    browser.resize(WIDE)  # a phone turned, a window widened: the same page draws anew
    browser.wait("light", WIDE)
    check_figures(browser, name)
    check_width(browser)
    assert browser.console() == []
    assert browser.requests() == [page.as_uri()]


def test_a_page_opened_wide_and_dark_is_dark_all_over(browser: Browser, tmp_path: Path) -> None:
    browser.open(written("realistic", tmp_path), WIDE, theme="dark")
    check_figures(browser, "realistic")
    brightness = (
        "const [r, g, b] = getComputedStyle(document.querySelector('{}')).{}.match(/\\d+/g); return +r + +g + +b;"
    )
    assert browser.run(brightness.format("body", "backgroundColor")) < 150
    assert browser.run(brightness.format("[data-figure=front] .bg, [data-figure=front] svg", "fill")) < 150
    assert browser.run(brightness.format("[data-figure=front] .xtitle", "fill")) > 400
    browser.find("#theme").click()
    browser.wait("light", WIDE)
    assert browser.run(brightness.format("body", "backgroundColor")) > 600
    assert browser.run(brightness.format("[data-figure=front] .xtitle", "fill")) < 300
    assert browser.console() == []


def test_controls_change_what_is_shown(browser: Browser, tmp_path: Path) -> None:
    record = record_of("thousand classes")
    browser.open(written("thousand classes", tmp_path), PHONE)
    browser.find("[data-axis=log]").click()
    assert browser.run("return document.querySelector('[data-figure=front]').layout.xaxis.type") == "log"
    check_figures(browser, "thousand classes")

    browser.run("document.querySelector('#class-table').open = true")
    time.sleep(0.2)
    lines = "return [...document.querySelectorAll('#class-table tbody tr')].map((row) => row.textContent)"
    whole = browser.run(lines)
    assert len(whole) == len(record.class_names) == 1000
    Select(browser.find("#share-point")).select_by_index(0)
    assert browser.run(lines) != whole
    browser.find("#class-filter").send_keys("0042")
    (only,) = browser.run(lines)
    assert record.class_names[42] in only
    check_width(browser)
    assert browser.console() == []


def test_names_are_shown_as_they_are_and_none_is_obeyed(browser: Browser, tmp_path: Path) -> None:
    record = record_of("hostile")
    browser.open(written("hostile", tmp_path), PHONE)
    check_figures(browser, "hostile")
    check_width(browser)
    assert browser.find("h1").text == record.name
    assert browser.run("return document.images.length") == 0
    ticks = browser.run(
        "return [...document.querySelectorAll('[data-figure=shares_by_class] .ytick')].map((tick) => tick.textContent)"
    )
    for name in record.class_names:
        assert any(tick.startswith(name[:12]) for tick in ticks), ticks
    legend = browser.run(
        "return [...document.querySelectorAll('[data-figure=front] .legendtext')].map((entry) => entry.textContent)"
    )
    assert any(record.name in entry for entry in legend), legend
    assert browser.console() == []


def test_policy_of_the_page_admits_its_own_scripts_alone() -> None:
    page = rendered("realistic")
    policy = re.search(r'http-equiv="Content-Security-Policy" content="([^"]*)"', page)
    assert policy
    allowed = html.unescape(policy[1])
    scripts = re.findall(r"<script>(.*?)</script>", page, re.DOTALL)
    assert len(scripts) == 2
    hashes = [base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts]
    assert f"script-src 'sha256-{hashes[0]}' 'sha256-{hashes[1]}';" in allowed
    assert allowed.startswith("default-src 'none';")
    assert page.count("* plotly.js v") == 1
    outside_scripts = re.sub(r"<script.*?</script>", "", page, flags=re.DOTALL)
    assert not re.search(r"""(?:src|href)\s*=\s*["']?(?:https?:|//|\.|/)""", outside_scripts)


def test_page_shows_everything_that_the_record_holds() -> None:
    record = record_of("realistic")
    shown = html.unescape(re.sub(r"<script.*?</script>", "", rendered("realistic"), flags=re.DOTALL))
    wanted = [record.name, record.backbone, record.dataset, record.device, record.created, record.code_version]
    wanted += [*record.cautions, *record.versions.values(), *record.fingerprints.values(), *record.fingerprints]
    wanted += [*record.seeds, *record.versions, *(f"{count:,}" for count in record.splits.values())]
    wanted += [timing.stage for timing in record.timings] + [gate.gate for gate in record.calibration]
    wanted += [point.setting for front in record.fronts for point in front.points]
    wanted += [percent(point.cost) for front in record.fronts for point in front.points]
    wanted += [interval(p.low, p.high) for front in record.fronts for p in front.points]
    wanted += [interval(row.difference_low, row.difference_high, signed=True) for row in record.budgets]
    wanted += [points(f.hypervolume_gain) for f in record.fronts if f.hypervolume_gain is not None]
    wanted += [percent(row.cost) for row in record.drops if row.cost is not None]
    wanted += [cost.piece for cost in record.segment_costs] + [quantity(cost.bitops) for cost in record.segment_costs]
    wanted += [row.failure for row in record.grid if row.failure] + [
        f"{row.brier:.4f}" for row in record.grid if row.brier
    ]
    wanted += [percent(u.cost) for u in record.uniform_accuracies] + list(record.config)
    assert [text for text in wanted if text not in shown] == []


def test_the_page_says_what_each_baseline_needs() -> None:
    record = sweep_records.realistic_record()
    page = render(record)
    for own in record.baselines:
        row = f"<td>{own.labels:,}</td><td>{own.trainings:,}</td><td>{own.seconds:.1f} s</td>"
        assert row + "<td>a thing &lt;for&gt; each λ</td>" in page
    assert "What each baseline needs" not in render(record.model_copy(update={"baselines": ()}))


def test_records_of_before_there_were_such_needs_are_read() -> None:
    record = sweep_records.realistic_record()
    older = SweepRecord.model_validate(record.model_dump(mode="json", exclude={"baselines"}))
    assert older.baselines == ()
    assert record.baselines


def test_what_a_baseline_needs_shows_in_the_digest_and_how_fast_it_was_does_not() -> None:
    record = sweep_records.realistic_record()

    def with_needs(**changes: float) -> SweepRecord:
        return record.model_copy(update={"baselines": tuple(b.model_copy(update=changes) for b in record.baselines)})

    assert record_digest(with_needs(seconds=999.0)) == record_digest(record)
    assert record_digest(with_needs(trainings=999)) != record_digest(record)


def test_rendering_twice_gives_the_same_page() -> None:
    assert render(record_of("hostile")) == rendered("hostile")


@pytest.mark.parametrize("name", RECORDS)
def test_every_colour_of_a_figure_has_one_for_the_dark(name: str) -> None:
    for title, figure in figures.all_figures(record_of(name)).items():
        used = set(re.findall(r'"(#[0-9a-fA-F]{3,8}|rgba?\([^"]*\))"', figure.to_json()))
        assert used <= set(palette.DARK), title
        assert figure.layout.title.text
        assert figure.layout.height


@pytest.mark.parametrize("name", RECORDS)
def test_hovering_a_front_tells_all_of_each_point(name: str) -> None:
    record = record_of(name)
    texts = [text for trace in figures.front(record).data for text in trace.hovertext or ()]
    hovers = [html.unescape(text.replace("<br>", "\n")) for text in texts]
    assert len(hovers) == sum(len(front.points) for front in record.fronts)
    for front in record.fronts:
        for point in front.points:
            told = [percent(point.cost), f"{percent(point.accuracy)} (95%: {interval(point.low, point.high)})"]
            told += [f"n = {point.n:,}"] + ([] if point.price is None else [f"λ = {point.price:.4g}"])
            told += [] if point.setting.startswith("λ") else [point.setting]
            assert any(all(part in hover for part in told) for hover in hovers), told


def test_each_method_has_a_marker_of_its_own_in_the_legend() -> None:
    record = record_of("realistic")
    rival = next(front for front in record.fronts if front.kind == "baseline")
    fronts = [front for front in record.fronts if front.kind == "quee"]
    fronts += [rival.model_copy(update={"method": name}) for name in ("gates", *BASELINES)]
    drawn = figures.front(record.model_copy(update={"fronts": tuple(fronts)}))
    markers = [(t.marker.symbol, t.marker.color) for t in drawn.data if t.showlegend and t.mode == "markers"]
    assert len(markers) == len(set(markers)) == len(fronts)


def test_points_that_were_not_chosen_stand_apart() -> None:
    record = record_of("realistic")
    quee = record.fronts[0]
    extra = quee.points[0].model_copy(update={"chosen": False, "cost": 0.5, "accuracy": 0.2})
    front = quee.model_copy(update={"points": (*quee.points, extra)})
    drawn = figures.front(record.model_copy(update={"fronts": (front,)}))
    lines = [trace for trace in drawn.data if trace.mode == "lines" and not trace.fill]
    assert all(0.2 not in trace.y for trace in lines)
    hollow = [trace for trace in drawn.data if trace.mode == "markers" and trace.marker.color == palette.SURFACE]
    assert [list(trace.y) for trace in hollow] == [[0.2]]
    assert "not chosen on select" in hollow[0].hovertext[0]


@pytest.mark.parametrize("name", ["realistic", "many exits", "losing"])
def test_bars_of_shares_add_up_to_every_image(name: str) -> None:
    record = record_of(name)
    by_exit, by_class = figures.shares_by_exit(record), figures.shares_by_class(record)
    for panel in ("x", "x2"):
        bars = [trace.y for trace in by_exit.data if trace.xaxis == panel]
        for total in map(sum, zip(*bars, strict=True)):
            assert total == pytest.approx(1)
    for total in map(sum, zip(*(trace.x for trace in by_class.data), strict=True)):
        assert total == pytest.approx(1)
    for total in map(sum, zip(*figures.shares_by_path(record).data[0].z, strict=True)):
        assert total == pytest.approx(1)


def test_a_class_called_all_is_a_class() -> None:
    record = record_of("realistic")
    renamed = tuple(
        row.model_copy(update={"class_name": "all"}) if row.class_name == "Bag" else row for row in record.shares
    )
    before, after = (
        figures.shares_by_price(record),
        figures.shares_by_price(record.model_copy(update={"shares": renamed})),
    )
    assert [len(classes) for _, classes in after.values()] == [10] * len(before)
    assert [whole for whole, _ in after.values()] == [whole for whole, _ in before.values()]


intervals = st.tuples(*[st.floats(-0.2, 0.2)] * 3).map(sorted)


@settings(deadline=None)  # the first example may have to build the record
@given(gains=st.lists(st.none() | intervals, min_size=4, max_size=4), budgets=st.lists(intervals, max_size=4))
def test_the_headline_claims_no_more_than_its_intervals(
    gains: list[list[float] | None], budgets: list[list[float]]
) -> None:
    record = record_of("realistic")
    fronts = [record.fronts[0]]
    for front, gain in zip(record.fronts[1:], gains, strict=True):
        low, mean, high = gain or (None, None, None)
        fronts.append(
            front.model_copy(
                update={"hypervolume_gain": mean, "hypervolume_gain_low": low, "hypervolume_gain_high": high}
            )
        )
    rows = [
        BudgetRow(
            budget=0.5, accuracy=0.9, low=0.8, high=0.95, n=100, baseline="static", baseline_accuracy=0.9,
            difference=mean, difference_low=low, difference_high=high,
        )
        for low, mean, high in budgets
    ]  # fmt: skip
    summary = summarise(record.model_copy(update={"fronts": tuple(fronts), "budgets": tuple(rows)}))
    compared = [g for f, g in zip(record.fronts[1:], gains, strict=True) if f.kind == "baseline" and g is not None]
    won = any(low > 0 for low, _, _ in budgets)
    lost = any(high < 0 for _, _, high in budgets)
    beaten = any(high < 0 for _, _, high in compared)
    if summary.verdict == "better":
        assert not lost
        assert all(low > 0 for low, _, _ in compared)
        assert compared or won
    if beaten or (lost and not compared):
        assert summary.verdict in ("worse", "mixed")
    if summary.verdict == "mixed":
        assert won or all(low > 0 for low, _, _ in compared)
        assert lost or beaten
    for count, word in (
        (sum(low > 0 for low, _, _ in budgets), "better"),
        (sum(high < 0 for *_, high in budgets), "worse"),
    ):
        assert not budgets or f"{word} at {count}" in summary.sentence


def test_a_losing_sweep_says_so_first() -> None:
    record = record_of("losing")
    summary = summarise(record)
    assert summary.verdict == "worse"
    assert "worse" in summary.headline
    assert summary.tiles[0].value.startswith("−")
    assert rendered("losing").index("▼ worse") < rendered("losing").index('id="budgets"')


def test_a_front_that_begins_later_is_said_first() -> None:
    record = record_of("losing")
    rival = closest_rival(record)
    assert rival is not None

    def sentence(late: str) -> str:
        """With every front at a cost of 10 % from its first point on, but for `late`, at 30 %."""
        fronts = []
        for front in record.fronts:
            first = front.points[0].model_copy(update={"cost": 0.3 if front.method == late else 0.1})
            fronts.append(front.model_copy(update={"points": (first,)}))
        return summarise(record.model_copy(update={"fronts": tuple(fronts), "cheapest_cost": 0.1})).sentence

    assert "begins at" not in sentence("no method")
    assert "QuEE’s front begins at 30.0%" in sentence("quee")
    assert "22.2 points are held against QuEE" in sentence("quee")
    assert "at 30.0%. Costs" in sentence(rival.method)
    assert "22.2 points are held against the baseline" in sentence(rival.method)


def test_accuracy_that_is_never_reached_is_said_first() -> None:
    record = record_of("realistic")
    for cost, said in ((None, True), (0.9, False)):
        drops = tuple(
            row.model_copy(update={"cost": cost}) if row.method == "quee" and row.drop == 0 else row
            for row in record.drops
        )
        tile = summarise(record.model_copy(update={"drops": drops})).tiles[1]
        assert ("never as accurate" in tile.detail) == said


def test_costs_near_full_accuracy_say_that_they_have_no_interval() -> None:
    record = record_of("realistic")
    assert "without an interval" in summarise(record).tiles[1].detail
    never = tuple(row.model_copy(update={"cost": None}) for row in record.drops)
    tile = summarise(record.model_copy(update={"drops": never})).tiles[1]
    assert tile.value == "–"
    assert "without an interval" in tile.detail
    shown = re.sub(r"<script.*?</script>", "", rendered("realistic"), flags=re.DOTALL)
    [table] = [t for t in re.findall(r"<table>.*?</table>", shown, re.DOTALL) if "full path’s" in t]
    assert "without an interval" in table.partition("</caption>")[0]


def test_the_grid_tells_k_and_how_clusters_were_made_only_where_there_are_any() -> None:
    record = record_of("realistic")
    drawn = [trace for trace in figures.grid(record).data if trace.showlegend]
    told = {(trace.name, x): hover for trace in drawn for x, hover in zip(trace.x, trace.hovertext, strict=True)}
    fitted = [row for row in record.grid if row.failure is None]
    assert len(told) == len(fitted)
    assert [x for name, x in told if name.startswith("nearest_cluster")] == ["20"]
    for (_, x), hover in told.items():
        assert f"clusters: {x}<br>" in hover
        assert ("shrinkage: 5.0" in hover) == ("algorithm: kmeans" in hover) == (x != "∞")
        assert hover.count("∞") == (x == "∞")
    shown = re.sub(r"<script.*?</script>", "", rendered("realistic"), flags=re.DOTALL)
    [table] = [t for t in re.findall(r"<table>.*?</table>", shown, re.DOTALL) if ">clustering_features<" in t]
    assert table.count("<td>∞</td>") == sum(row.point["clusters"] is None for row in record.grid)


def test_a_bit_width_has_one_colour_in_all_figures() -> None:
    record = record_of("realistic")
    own = {
        (trace.name, trace.marker.color)
        for figure in (figures.shares_by_exit(record), figures.costs(record), figures.uniform(record))
        for trace in figure.data
        if trace.name.endswith(" bits") and trace.marker.color
    }
    assert {name for name, _ in own} == {"2 bits", "4 bits", "8 bits", "32 bits"}
    assert len(own) == 4


@settings(deadline=None, max_examples=30)  # every example builds a figure
@given(st.lists(st.floats(1e-6, 1e12), min_size=1, max_size=5))
def test_a_logarithmic_axis_has_two_ticks_or_more(values: list[float]) -> None:
    pieces = tuple(
        SegmentCost(piece=f"segment {k}", bits=8, macs=1.0, bitops=value, milliseconds=value)
        for k, value in enumerate(values)
    )
    axis = figures.costs(record_of("sparse").model_copy(update={"segment_costs": pieces})).layout.xaxis
    low, high = math.log10(min(values)), math.log10(max(values))
    ticks = [k for k in range(-7, 14) if low <= k <= high and k % (axis.dtick or 1) == 0]
    assert len(ticks) in ((0, 1) if axis.dtick is None else (2, 3))


def test_a_class_without_test_images_is_not_drawn() -> None:
    record = record_of("realistic")
    shares = tuple(
        row.model_copy(update={"n": 0, "shares": {}}) if row.class_name == "Bag" else row for row in record.shares
    )
    drawn = figures.shares_by_class(record.model_copy(update={"shares": shares})).layout.yaxis.ticktext
    assert len(drawn) == 10
    assert "Bag" not in drawn


def test_nothing_to_compare_claims_nothing() -> None:
    summary = summarise(record_of("sparse"))
    assert summary.verdict == "unknown"
    assert [tile.value for tile in summary.tiles] == ["–", "–", "50"]


@given(st.floats(1e-6, 9e17))
def test_a_quantity_keeps_three_digits(value: float) -> None:
    number, _, prefix = quantity(value).partition("\u00a0")
    scale = {"": 1, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15}[prefix]
    assert float(number) * scale == pytest.approx(value, rel=5.1e-3)


@given(st.floats(-1, 1))
def test_a_difference_never_shows_a_sign_that_it_lacks(value: float) -> None:
    text = points(value)
    assert float(text.replace("−", "-")) == pytest.approx(100 * value, abs=0.0051)
    assert text.startswith("+") == (round(100 * value, 2) > 0)
    assert text.startswith("−") == (round(100 * value, 2) < 0)


def test_times_are_in_the_unit_that_suits_them() -> None:
    assert [duration(s) for s in (0.04, 59.94, 59.99, 60, 3599.4, 3600, 90000)] == [
        "0.0 s", "59.9 s", "1 min 00 s", "1 min 00 s", "59 min 59 s", "1 h 00 min", "25 h 00 min",
    ]  # fmt: skip
