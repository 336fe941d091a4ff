"""Real runs in a real browser: from the page to a model in timm, and names from files that would be markup."""

import json
import shlex

import pandas as pd
import torch
from browser import Opened
from conftest import DIGITS, call
from PIL import Image
from sklearn.datasets import load_digits


def test_from_the_page_alone_to_a_model_in_timm(browser, tmp_path, monkeypatch):
    """Open, copy, run what was copied: the cheapest within half a point of dense, exported and loaded."""
    monkeypatch.chdir(tmp_path)
    assert call(*DIGITS, "-q", "--out", "runs/my digits")[0] == 0
    opened = Opened(browser, tmp_path / "runs" / "my digits" / "report.html")

    def copied(name):
        opened.page.locator(f"button[data-copy={name}]").click()
        opened.page.locator("#toast", has_text="Copied").wait_for()
        return opened.page.evaluate("navigator.clipboard.readText()")

    opened.page.locator("#picks button", has_text="Half a point from dense").click()
    command = shlex.split(copied("export"))
    assert command[0] == "poolshare"
    assert call(*command[1:])[0] == 0
    names: dict = {}
    exec(compile(copied("load"), "the page", "exec"), names)
    assert str(names["model"].architecture) == opened.text("#architecture")
    table = pd.read_csv(tmp_path / "runs" / "my digits" / "candidates.csv")
    dense = json.loads((tmp_path / "runs" / "my digits" / "summary.json").read_text())["dense"]
    close = table[table["top1"] >= dense["top1"] - 0.5]
    row = close[close["macs"] == close["macs"].min()].sort_values("top1").iloc[-1]
    assert opened.text("#architecture") == row["architecture"]
    assert names["model"](torch.zeros(1, 1, 8, 8)).shape == (1, 10)
    opened.context.close()


def test_a_data_set_with_hostile_names_is_text_in_terminal_and_page(browser, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    attack = "<img src=x onerror=alert(2)>"
    classes = ["<img src=x onerror=alert(1)>", "[red]\x1b[31mred"]
    digits = load_digits()
    for label, name in enumerate(classes):
        folder = tmp_path / attack / name
        folder.mkdir(parents=True)
        for index, image in enumerate(digits.images[digits.target == label][:60]):
            Image.fromarray((image * 15).astype("uint8")).save(folder / f"{index}.png")
    words = ["search", "--data", attack, "--model", "digits_vit", "--model-args", "depth=3,embed_dim=16,num_heads=2"]
    words += ["--epochs", "1", "--batch-size", "16", "--device", "cpu", "--out", "run " + attack]
    status, out, err = call(*words)
    assert status == 0, err
    assert attack in out
    assert "\x1b" not in out + err
    opened = Opened(browser, tmp_path / ("run " + attack) / "report.html")
    opened.page.wait_for_timeout(200)  # an alert would need a moment
    assert opened.problems == []
    assert opened.requests == [opened.address]
    assert opened.page.locator("script").count() == 2
    assert opened.page.locator("img").count() == 0
    assert opened.text("h1") == f"digits_vit on {attack}"
    facts = dict(zip(opened.texts(".facts dt"), opened.texts(".facts dd"), strict=True))
    assert classes[0] in facts["classes"]
    opened.context.close()
