"""The page in a real browser: it opens alone, points select, axes switch, copying and keys work, text stays text."""

import shlex

import numpy as np
import pandas as pd
import pytest
from browser import LAPTOP, PHONE, Opened
from reports import ATTACK, SPACE, candidates, make_report

from poolshare.search.report.page import write_html
from poolshare.space import Architecture, SearchSpace
from poolshare.space.quantities import LATENCY, human

WORST = 200  # of the made-up rows: dear and inaccurate, so never on a frontier


def many(count: int = 400, **changes):
    """A run whose frontier is not trivial, with latency, a budget, a hand-made architecture and measured trust."""
    generator = np.random.default_rng(3)
    rows = candidates(count)
    share = rows["macs"] / 40e6
    rows["correct"] = np.clip(360 + 170 * share**0.25 + generator.normal(0, 12, count), 0, 540).astype(int)
    rows.loc[WORST, "correct"] = 400
    rows["top1"] = 100 * rows["correct"] / 540
    rows["parameters"] = generator.integers(300_000, 400_000, count)
    rows["latency_ms"] = np.round(2 + 8 * share + generator.uniform(0, 1, count), 3)
    point = {"architecture": "64", "macs": 1, "supernet_top1": 90.0, "retrained_top1": [91.0, 92.0]}
    estimate = {"value": 0.61, "low": 0.4, "high": 0.78}
    trust = {
        "tau": estimate,
        "ceiling": {"value": 0.7, "low": None, "high": None},
        "within": {"tau": {"value": None, "low": None, "high": None}, "ceiling": estimate},
        "bands": [{"low_macs": 10e6, "high_macs": 20e6, "n": 6, "tau": estimate, "ceiling": {"value": None}}],
        "points": [point, {**point, "supernet_top1": 95.0, "retrained_top1": [93.0]}],
    }
    dense = {**make_report().dense, "top1": 95.0, "latency_ms": 11.0}
    fields = {"dense": dense, "limits": {"macs": 30e6}, "included": [rows["architecture"][WORST]], "trust": trust}
    steps = np.arange(1, 801)
    curve = {"epoch": steps / 20, "loss": 2.3 * steps**-0.3 + generator.normal(0, 0.02, 800)}
    fields["curves"] = {
        "Tuning the dense model": pd.DataFrame(curve)[:100],
        "Training the supernet": pd.DataFrame(curve),
    }
    return make_report(rows, **(fields | changes))


@pytest.fixture(scope="module")
def report():
    return many()


@pytest.fixture(scope="module")
def file(report, tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "report.html"
    write_html(report, path)
    return path


@pytest.fixture
def opened(browser, file):
    found = Opened(browser, file)
    yield found
    found.context.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("viewport", [LAPTOP, PHONE], ids=["laptop", "phone"])
def test_it_opens_alone_without_error_and_fits_the_window(browser, file, viewport, scheme):
    opened = Opened(browser, file, viewport, scheme)
    assert opened.text("#headline").startswith("Within half a point of dense at")
    assert opened.page.evaluate("document.documentElement.scrollWidth") <= viewport["width"]
    opened.page.locator("#take-title").scroll_into_view_if_needed()
    assert opened.requests == [opened.address]
    assert opened.problems == []
    opened.context.close()


def test_a_request_that_a_script_tries_is_refused(opened):
    refused = opened.page.evaluate("fetch('https://example.org/').then(() => 'went out', error => `${error.name}`)")
    assert refused == "TypeError"
    assert opened.requests == [opened.address]
    opened.problems.clear()


def test_it_begins_with_the_cheapest_within_half_a_point_of_dense(opened, report):
    frontier = report.by("macs")
    close = frontier[frontier["top1"] >= 94.5].iloc[0]
    assert opened.text("#architecture") == close["architecture"]
    assert opened.text("#headline") == f"Within half a point of dense at {close['macs'] / 4e5:.0f} % of its MACs."
    assert "at most half a point" in opened.text("#selection-why")
    opened.page.locator("#picks button", has_text="Most accurate").click()
    assert opened.text("#architecture") == frontier["architecture"].iloc[-1]
    opened.page.locator("#picks button").last.click()
    assert opened.text("#architecture") == str(SPACE[0])
    opened.page.locator("#picks button", has_text="Half a point from dense").click()
    assert opened.text("#architecture") == close["architecture"]


@pytest.mark.parametrize("viewport", [LAPTOP, PHONE], ids=["click", "tap"])
def test_any_point_selects_and_shows_its_numbers(browser, file, report, viewport):
    opened = Opened(browser, file, viewport)
    opened.page.locator("#view label", has_text="all points").click()
    frontier = set(report.frontier["architecture"])
    for row in [0, *np.flatnonzero(~report.candidates["architecture"].isin(frontier))[[10, 100, 200, 300]]]:
        x, y = opened.place(int(row))
        (opened.page.touchscreen.tap if viewport is PHONE else opened.page.mouse.click)(x, y)
        # Another point may lie on the very same pixel: what is shown must belong together and lie there.
        shown = report.candidates.set_index("architecture").loc[opened.text("#architecture")]
        at = opened.place(list(report.candidates["architecture"]).index(shown.name))
        assert np.hypot(at[0] - x, at[1] - y) < 12
        numbers = dict(zip(opened.texts("#numbers dt"), opened.texts("#numbers dd"), strict=True))
        [expected] = report.rows(report.candidates[report.candidates["architecture"] == shown.name])
        assert numbers["Top-1"] == f"{shown['top1']:.2f} % 95 %: {expected.low:.1f} to {expected.high:.1f}"
        difference = f"{abs(shown['top1'] - 95.0):.2f} points"
        assert numbers["Against dense"].lstrip("−+±").startswith(difference)
        assert numbers["MACs"].startswith(f"{human(shown['macs'])} {100 * shown['macs'] / 40e6:.1f} % of dense")
        assert numbers["Parameters"].startswith(human(shown["parameters"]))
        assert numbers["Latency"].startswith(LATENCY.format(shown["latency_ms"]))
        better = int((report.candidates["correct"] > shown["correct"]).sum())
        assert numbers["Accuracy rank"].startswith(f"{better + 1} of 400 ")
        rank = SPACE.rank(Architecture.parse(shown.name))
        assert numbers["Number in the space"].startswith(f"{rank:,} of {SPACE.size:,}")
    assert opened.problems == []
    opened.context.close()


def test_hovering_tells_a_point_without_selecting_it(opened, report):
    before = opened.text("#architecture")
    row = list(report.candidates["architecture"]).index(report.frontier["architecture"].iloc[0])
    opened.page.mouse.move(*opened.place(row))
    opened.page.locator(".tip").wait_for(state="visible")
    assert opened.text(".tip code") == report.frontier["architecture"].iloc[0]
    assert opened.text("#architecture") == before


@pytest.mark.parametrize(("label", "cost"), [("parameters", "parameters"), ("latency", "latency_ms"), ("MACs", "macs")])
def test_the_axis_switches(opened, report, label, cost):
    opened.page.locator("#axis label", has_text=label).click()
    frontier = report.by(cost)
    assert opened.texts("#frontier tbody code") == list(frontier["architecture"])
    assert opened.texts("#frontier td.share") == [
        f"{100 * value / report.dense[cost]:.1f} %" for value in frontier[cost]
    ]
    assert label in opened.text("#headline")
    assert opened.page.locator("#plot circle.point").count() == len(frontier)
    assert opened.page.locator("#plot line.budget").count() == (1 if cost == "macs" else 0)
    # Frontier points stand where their numbers say, to the pixel, between the first and the last.
    xs = [float(circle.get_attribute("cx")) for circle in opened.page.locator("#plot circle.point").all()]
    ys = [float(circle.get_attribute("cy")) for circle in opened.page.locator("#plot circle.point").all()]
    costs, top1 = frontier[cost].to_numpy(float), frontier["top1"].to_numpy()
    assert np.allclose(np.polyval(np.polyfit(costs, xs, 1), costs), xs, atol=0.6)
    assert np.allclose(np.polyval(np.polyfit(top1, ys, 1), top1), ys, atol=0.6)
    assert xs[-1] > xs[0]
    assert ys[-1] < ys[0]


def test_copying_gives_commands_that_a_shell_reads_back(opened, report):
    architecture = opened.text("#architecture")
    out = f"runs/digits-export-{SPACE.rank(Architecture.parse(architecture))}"
    expected = {
        "architecture": architecture,
        "export": f"poolshare export runs/digits --architecture '{architecture}' --out {out}",
        "retrain": f"poolshare retrain {out}",
        "load": f'import timm, poolshare.supernet\nmodel = timm.create_model("local-dir:{out}", pretrained=True)',
    }
    for name, text in expected.items():
        opened.page.locator(f"button[data-copy={name}]").click()
        opened.page.locator("#toast", has_text="Copied").wait_for()
        assert opened.page.evaluate("navigator.clipboard.readText()") == text
    words = shlex.split(expected["export"])
    assert words[words.index("--architecture") + 1] == architecture
    assert shlex.join(words) == expected["export"]


def test_copying_works_where_the_clipboard_is_not_granted(opened):
    opened.page.evaluate("() => { navigator.clipboard.writeText = () => Promise.reject(new Error('no')); }")
    opened.page.locator("button[data-copy=retrain]").click()
    opened.page.locator("#toast", has_text="Copied").wait_for()
    assert opened.page.evaluate("navigator.clipboard.readText()") == opened.text("#retrain")


def test_keys_walk_along_the_frontier(opened, report):
    frontier = list(report.frontier["architecture"])
    for _ in range(40):  # reached by the tabulator alone
        opened.page.keyboard.press("Tab")
        if opened.page.evaluate("document.activeElement.id") == "plot":
            break
    assert opened.page.evaluate("document.activeElement.id") == "plot"
    assert opened.page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    opened.page.keyboard.press("Home")
    seen = [opened.text("#architecture")]
    for _ in frontier:
        opened.page.keyboard.press("ArrowRight")
        seen.append(opened.text("#architecture"))
    assert seen == [*frontier, frontier[-1]]
    opened.page.keyboard.press("ArrowLeft")
    assert opened.text("#architecture") == frontier[-2]
    opened.page.keyboard.press("End")
    assert opened.text("#architecture") == frontier[-1]
    assert opened.text("#selection-kind") == f"Frontier point {len(frontier)} of {len(frontier)}, by MACs"
    # Everything that can be clicked is a control that keys reach.
    assert opened.page.locator("#frontier tbody tr:not(:has(button))").count() == 0
    opened.page.locator("#frontier tbody button").first.press("Enter")
    assert opened.text("#architecture") == frontier[0]
    opened.page.locator("#more-expensive").press("Enter")
    assert opened.text("#architecture") == frontier[1]
    opened.page.locator("#axis input").first.press("ArrowRight")
    assert opened.texts("#frontier tbody code") == list(report.by("parameters")["architecture"])


@pytest.mark.parametrize(
    "text", ["64 64 16@max2d 16*2 4@kmedoids*3", "64*3 64*3 64*2", "64 16@kmedoids 4@kmedoids*2 4 4*3"]
)
def test_the_picture_is_the_architecture(opened, text):
    opened.page.evaluate("text => byId('picture').replaceChildren(drawPicture(text))", text)
    layers = Architecture.parse(text).layers
    bars = opened.page.locator("#picture rect").all()
    heights = [float(bar.get_attribute("height")) for bar in bars]
    assert heights == pytest.approx([max(3, heights[0] * layer.tokens / 64) for layer in layers])
    assert [bar.get_attribute("class") for bar in bars] == ["follower" if one.shared else "own" for one in layers]
    assert opened.page.locator("#picture .bracket").count() == sum(
        run.length > 1 for run in Architecture.parse(text).runs
    )
    marks = [layer.operator for layer in layers if layer.operator]
    assert opened.page.locator("#picture polygon.mark").count() == len(marks)
    assert opened.page.locator("#picture .mark-text").all_text_contents() == marks
    assert f"layer 7: {layers[7].tokens} tokens" in opened.page.locator("#picture svg").get_attribute("aria-label")


def test_maps_over_layers_hold_the_frontiers_shares(opened, report):
    table = report.layer_shares()
    for label, group in (("all scored", "all"), ("frontier", "macs")):
        opened.page.locator("#group label", has_text=label).click()
        part = table[table["cost"] == group]
        expected = ["" if share == 0 else f"{100 * share:.0f}" if share >= 0.005 else "<1" for share in part["share"]]
        shown = [text.strip() for text in opened.page.locator("#heat td").all_text_contents()]
        assert len(shown) == len(expected)
        for cell, text, share in zip(shown, expected, part["share"], strict=True):
            assert cell == text or abs(float(cell) - 100 * share) <= 0.5  # halves may be rounded either way


def test_progress_trust_budget_and_hand_made_architectures_are_shown(opened, report):
    words = opened.text("#progress-words")
    assert f"{report.hypervolume:.4f} after 400 evaluations" in words
    trust = opened.text("#trust-words")
    assert "0.61 (0.40 to 0.78)" in trust
    assert "agrees by 0.70;" in trust
    assert "of like cost τ is not measured, its ceiling 0.61 (0.40 to 0.78)" in trust
    assert "2 architectures, 3 trainings" in trust
    assert opened.page.locator("#trust circle").count() == 2
    assert opened.texts("#trust-bands tbody td") == ["10.0 M to 20.0 M", "6", "0.61 (0.40 to 0.78)", "not measured"]
    assert opened.page.locator("#plot .budget-text").text_content() == "budget 30.0 M MACs"
    assert opened.page.locator("#plot rect.mine").count() == 1
    opened.page.mouse.click(*opened.place(WORST))
    assert opened.text("#architecture") == report.included[0]
    assert opened.text("#selection-kind") == "Included by hand"
    assert "included by hand" in opened.text("#legend")


def test_trainings_are_drawn_where_there_were_any(opened, report, browser, tmp_path):
    assert opened.page.locator("#curves-card").is_visible()
    captions = opened.texts("#curves figcaption")
    last = report.curves["Training the supernet"]["loss"].iloc[-100:].mean()
    assert captions[0].startswith("Tuning the dense model: loss over epochs. It ended at ")
    assert float(captions[1].removesuffix(".").rsplit(" ", 1)[1]) == pytest.approx(last, rel=0.1)
    ends = [shape.bounding_box() for shape in opened.page.locator("#curves path.front").all()]
    assert all(box["width"] > 100 and box["height"] > 50 for box in ends)
    write_html(many(curves={}), tmp_path / "report.html")
    without = Opened(browser, tmp_path / "report.html")
    assert not without.page.locator("#curves-card").is_visible()
    without.context.close()


def test_where_half_a_point_is_out_of_reach_the_page_says_what_the_nearest_loses(browser, tmp_path):
    report = many(dense={**make_report().dense, "top1": 100.0, "latency_ms": 11.0}, limits={"macs": 20e6})
    write_html(report, tmp_path / "report.html")
    opened = Opened(browser, tmp_path / "report.html")
    best = report.frontier.iloc[-1]
    assert best["top1"] < 99.5
    assert opened.text("#headline") == (
        f"Nothing that was scored comes within half a point of dense; the nearest loses {100 - best['top1']:.1f} points at "
        f"{best['macs'] / 4e5:.0f} % of its MACs."
    )
    assert "over the budget" in opened.text("#legend")
    opened.context.close()


def test_a_run_without_latency_trust_or_budget_has_none_of_them(browser, tmp_path):
    write_html(make_report(), tmp_path / "report.html")
    opened = Opened(browser, tmp_path / "report.html")
    assert opened.texts("#axis label") == ["MACs", "parameters"]
    assert not opened.page.locator("#trust-card").is_visible()
    assert opened.page.locator("#plot line.budget").count() == 0
    assert "budget" not in opened.text("#legend")
    assert opened.problems == []
    opened.context.close()


def test_numbers_read_the_same_in_both_languages(opened):
    values = [0, 7, 999, 1000, 999_499, 999_600, 9_994_000, 9_996_000, 99_960_000, 1_261_000_000, 17_600_000_000]
    assert opened.page.evaluate("values => values.map(human)", values) == list(map(human, values))


def luminance(colour: np.ndarray) -> float:
    """WCAG's relative luminance of (3,) values from 0 to 255."""
    share = colour / 255
    linear = np.where(share <= 0.04045, share / 12.92, ((share + 0.055) / 1.055) ** 2.4)
    return float(linear @ (0.2126, 0.7152, 0.0722))


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_all_text_has_the_contrast_that_wcag_asks_for(browser, file, scheme):
    opened = Opened(browser, file, LAPTOP, scheme)
    # For every element with text of its own: its colour, and the backgrounds below it from the page upwards.
    found = opened.page.evaluate(
        """() => [...document.querySelectorAll("body *")].flatMap(element => {
          const own = [...element.childNodes].some(node => node.nodeType === 3 && node.textContent.trim());
          const seen = element.getClientRects().length && !element.closest("button:disabled, noscript, script, .hidden");
          if (!own || !seen) return [];
          const style = getComputedStyle(element), layers = [];
          for (let up = element; up; up = up.parentElement) {
            const before = getComputedStyle(up, "::before");
            if (before.content !== "none") layers.push([before.backgroundColor, +before.opacity]);
            layers.push([getComputedStyle(up).backgroundColor, 1]);
          }
          const text = element.ownerSVGElement ? style.fill : style.color;
          return [[element.textContent.trim().slice(0, 40), text, layers.reverse()]];
        })"""
    )
    assert len(found) > 150

    def numbers(colour):
        values = [float(part) for part in colour[colour.index("(") + 1 : -1].replace(",", " ").split()]
        return np.array(values[:3]), values[3] if len(values) > 3 else 1.0

    for text, colour, layers in found:
        ground = np.array([255.0, 255.0, 255.0])
        for layer, opacity in layers:
            paint, alpha = numbers(layer)
            ground = ground + (paint - ground) * alpha * opacity
        light, dark = sorted((luminance(numbers(colour)[0]), luminance(ground)), reverse=True)
        assert (light + 0.05) / (dark + 0.05) >= 4.5, (text, colour, ground)
    opened.context.close()


def test_the_plot_follows_the_colour_scheme(opened):
    def miss():
        """How far the points on the canvas are from the style sheet's colour for them."""
        painted, wanted = opened.page.evaluate(
            "() => { const c = plot.canvas, d = c.getContext('2d').getImageData(0, 0, c.width, c.height).data;"
            " const wanted = getComputedStyle(document.documentElement).getPropertyValue('--crowd').trim();"
            " let i = 0; while (d[i + 3] < 150) i += 4;"
            " return [[d[i], d[i + 1], d[i + 2]], [1, 3, 5].map(at => parseInt(wanted.slice(at, at + 2), 16))]; }"
        )
        return np.abs(np.subtract(painted, wanted)).max(), wanted

    distance, light = miss()
    assert distance <= 2
    opened.page.emulate_media(color_scheme="dark")
    opened.page.evaluate("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")
    distance, dark = miss()
    assert distance <= 2
    assert np.abs(np.subtract(light, dark)).max() > 2


def test_hostile_names_are_text(browser, tmp_path):
    hostile = "<script>alert(1)</script>"
    report = many(
        title=f"{hostile} {ATTACK}", run=f"runs/{hostile}'`$(x)", facts={hostile: {hostile: f"{hostile}<img src=x>"}}
    )
    write_html(report, tmp_path / "report.html")
    opened = Opened(browser, tmp_path / "report.html")
    opened.page.wait_for_timeout(200)  # an alert would need a moment
    assert opened.problems == []
    assert opened.requests == [opened.address]
    assert opened.page.locator("script").count() == 2
    assert opened.page.locator("img").count() == 0
    assert opened.text("h1") == f"{hostile} {ATTACK}"
    assert opened.texts(".facts dt, .facts dd") == [hostile, f"{hostile}<img src=x>"]
    words = shlex.split(opened.text("#export"))
    assert words[2] == f"runs/{hostile}'`$(x)"
    opened.context.close()


def test_without_javascript_it_says_where_the_numbers_are(browser, file):
    opened = Opened(browser, file, java_script_enabled=False)
    assert "The same numbers lie beside it in pareto.csv and candidates.csv" in opened.text("noscript")
    assert "Certified:" in opened.text("header")
    assert opened.page.locator(".facts dl").count() > 0
    opened.context.close()


def test_thirty_thousand_candidates_are_all_there(browser, tmp_path):
    space = SearchSpace(12, (196, 100, 49), ("max2d",), 3)
    generator = np.random.default_rng(0)
    texts = [str(architecture) for architecture in space]
    correct = generator.integers(4000, 5000, len(texts))
    rows = candidates(2).iloc[[0] * len(texts)].reset_index(drop=True)
    rows = rows.assign(architecture=texts, correct=correct, total=5000, top1=correct / 50)
    rows["macs"] = generator.integers(10**8, 10**9, len(texts))
    dense = {"architecture": texts[0], "top1": correct[0] / 50, "macs": 10**9, "parameters": 1}
    report = make_report(rows, dense=dense, space=space, space_size=space.size)
    write_html(report, tmp_path / "report.html")
    opened = Opened(browser, tmp_path / "report.html")
    opened.page.locator("#view label", has_text="all points").click()
    assert "scored (31,294)" in opened.text("#legend")
    for row in (17, 30_000):
        x, y = opened.place(row)
        opened.page.mouse.click(x, y)
        at = opened.place(texts.index(opened.text("#architecture")))
        assert np.hypot(at[0] - x, at[1] - y) < 12
    assert opened.problems == []
    opened.context.close()
