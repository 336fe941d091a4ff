"""Pictures of the pages of real runs and of what becomes one token, and how fast a page of 31,294 candidates is.

    python results/page/reproduce.py runs/digits runs/eurosat      # a minute; chromium must be installed
    python results/page/reproduce.py --tokens [--weights vit_tiny_patch16_224.safetensors]      # seconds

1. Each run's report.html is written again and photographed: the first window on a laptop in light and on a phone in dark
   colours, and the whole page; the run's numbers are copied beside the pictures.
2. A page with every architecture of DeiT-Tiny's space, at its exact costs and with made-up accuracies (only the speed is
   looked at), is opened, drawn, pointed at and clicked: medians in speed.json.
3. With --tokens instead of these: what ViT-Tiny with ImageNet's weights makes one token of scikit-learn's two photos.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import statistics
import subprocess
import tempfile
import time
from io import BytesIO
from pathlib import Path
from typing import Any

import pandas as pd
from PIL import Image
from playwright.sync_api import Browser, sync_playwright
from sklearn import datasets

from poolshare.search import draw_regions
from poolshare.search.job.folder import RunFolder
from poolshare.search.job.records import versions, write_json
from poolshare.search.report.page import write_html
from poolshare.search.report.report import Report
from poolshare.search.report.write import write_report
from poolshare.space import SearchSpace
from poolshare.supernet import SuperNet, measure_macs, measure_parameters

HERE = Path(__file__).parent
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
OPENINGS, TRIES = 7, 50
TOKENS = {
    "merged": "196 196 147@tome 147 98@tome 98 49@tome 49 16@tome 16 16 16",
    "dropped": "196 196 196 147@topk 147 147 98@topk 98 98 49@topk 49 49",
}


def photograph(browser: Browser, page: Path, name: str) -> None:
    """The first window on a laptop and on a phone, and the whole page on a laptop."""
    for kind, width, height, scheme in (("laptop", 1280, 860, "light"), ("phone", 390, 844, "dark")):
        context = browser.new_context(
            viewport={"width": width, "height": height},
            color_scheme=scheme,
            is_mobile=kind == "phone",
        )
        window = context.new_page()
        window.goto(page.resolve().as_uri())
        shots = {kind: False, "whole": True} if kind == "laptop" else {kind: False}
        for part, full in shots.items():
            keep(Image.open(BytesIO(window.screenshot(full_page=full))), f"{name}-{part}")
        context.close()


def keep(picture: Image.Image, name: str) -> None:
    """Write a picture of 256 colours into this folder."""
    picture.convert("RGB").quantize(256, Image.Quantize.MAXCOVERAGE).save(HERE / f"{name}.png", optimize=True)


def crowd(path: Path) -> None:
    """Write the page of 31,294 made-up candidates."""
    space = SearchSpace(depth=12, levels=(196, 100, 49), operators=("max2d",), max_run=3)
    net = SuperNet.from_timm("deit_tiny_patch16_224", space, num_classes=10)
    macs, parameters = measure_macs(net), measure_parameters(net)
    rng, rows = random.Random(0), []
    for architecture in space:
        cost = macs.total(architecture)
        correct = min(5000, max(0, round(50 * (88 + 8 * (cost / macs.total(space[0])) ** 0.3 + rng.gauss(0, 1.5) - 8))))
        rows.append((str(architecture), correct / 50, correct, 5000, cost, parameters.total(architecture), 0))
    columns = ["architecture", "top1", "correct", "total", "macs", "parameters", "generation"]
    frame = pd.DataFrame(rows, columns=columns)
    dense = frame.iloc[0][["architecture", "top1", "macs", "parameters"]].to_dict()
    write_html(Report("made up, for speed only", frame, dense, True, space.size, "runs/none", space=space), path)


def speed(browser: Browser, page: Path) -> dict[str, Any]:
    """Milliseconds: until a fresh window shows the page, and for what follows a pointer, a click and a switch."""
    opening = []
    for _ in range(OPENINGS):
        window = browser.new_page(viewport={"width": 1280, "height": 860})
        start = time.perf_counter()
        window.goto(page.as_uri())
        window.evaluate("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")
        opening.append(1000 * (time.perf_counter() - start))
        if len(opening) < OPENINGS:
            window.close()

    def median(action: str) -> float:
        return window.evaluate(
            f"""() => {{ const times = [], box = plot.root.getBoundingClientRect();
              for (let n = 0; n < {TRIES}; n++) {{ const start = performance.now(); {action};
                document.body.offsetHeight; times.push(performance.now() - start); }}
              return times.sort((a, b) => a - b)[{TRIES // 2}]; }}"""
        )

    return {
        "candidates": window.evaluate("data.scored"),
        "megabytes": round(page.stat().st_size / 1e6, 2),
        "open_ms": [round(value) for value in opening],
        "open_ms_median": round(statistics.median(opening)),
        "draw_ms": round(median("plot.draw()"), 1),
        "find_point_under_pointer_ms": round(
            median("plot.nearest({ clientX: box.left + 100 + 9 * n, clientY: box.top + 200 }, 20)"), 2
        ),
        "select_ms": round(median("select(600 * n)"), 1),
        "switch_axis_ms": round(median("state.cost = data.costs[n % 2].name; showAll()"), 1),
        "browser": browser.version,
    }


def draw_tokens(weights: str | None) -> None:
    """Write tokens-….png: merging, and dropping."""
    photos = sorted(Path(datasets.__file__).parent.glob("images/*.jpg"))
    begin: dict[str, Any] = {"pretrained": True} if weights is None else {"weights": weights}
    for name, text in TOKENS.items():
        out = HERE / f"tokens-{name}.png"
        out.unlink(missing_ok=True)
        draw_regions(text, photos, out, model="vit_tiny_patch16_224", **begin)


def main() -> None:
    """Photograph, then measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", type=Path, help="finished run folders; pictures are named after them")
    parser.add_argument("--tokens", action="store_true", help="draw what becomes one token, and nothing else")
    parser.add_argument("--weights", help="of ViT-Tiny; default: timm's pretrained ones")
    arguments = parser.parse_args()
    runs = arguments.runs
    if arguments.tokens:
        return draw_tokens(arguments.weights)
    with sync_playwright() as playwright, tempfile.TemporaryDirectory() as folder:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=FLAGS)
        for run in runs:
            opened = RunFolder.open(run)
            write_report(opened)
            photograph(browser, opened.report, run.name)
            for part in ("candidates.csv", "layers.csv", "progress.csv", "summary.json"):
                shutil.copy(run / part, HERE / f"{run.name}-{part}")
        page = Path(folder, "crowd.html")
        crowd(page)
        result = speed(browser, page)
        browser.close()
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=HERE, capture_output=True, text=True)
    write_json(HERE / "speed.json", result | {"commit": commit.stdout.strip(), "versions": versions()})
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
