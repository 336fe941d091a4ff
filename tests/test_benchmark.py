"""Tables of true scores as objectives, and the model of accuracy that the evolution asks."""

import gzip
import random

import numpy as np
import pandas as pd
import pytest
from scipy.integrate import quad
from scipy.stats import norm

from poolshare.search.analysis.pareto import frontier
from poolshare.search.config import SearchConfig
from poolshare.search.job.folder import RunFolder
from poolshare.search.progress import no_progress
from poolshare.search.samplers.benchmark import Benchmark
from poolshare.search.samplers.surrogate import _RATES, _RATIOS, Surrogate, expected_gain
from poolshare.search.study.journal import JournalStore
from poolshare.search.study.loop import run_study
from poolshare.space import CostTable, RunError, SearchSpace

SPACE = SearchSpace(depth=5, levels=(64, 16, 4), max_run=2)
POOLS = {("max2d", 64, 16): 3, ("max2d", 64, 4): 3, ("max2d", 16, 4): 1}
MACS = CostTable("macs", 5, {64: 100, 16: 24, 4: 9}, {64: 71, 16: 17, 4: 6}, POOLS, {64: 9, 16: 6, 4: 2})
PARAMETERS = CostTable(
    "parameters", 7, {64: 50, 16: 50, 4: 50}, {64: 30, 16: 30, 4: 30}, dict.fromkeys(POOLS, 0), {64: 3, 16: 3, 4: 3}
)


def made() -> Benchmark:
    rng = random.Random(3)
    rows = [
        {
            "architecture": str(a),
            "macs": MACS.total(a),
            "parameters": PARAMETERS.total(a),
            "correct": rng.randrange(600, 1001),
            "total": 1000,
        }
        for a in SPACE
    ]
    return Benchmark.of(pd.DataFrame(rows), SPACE, MACS, PARAMETERS)


def test_a_benchmark_reads_back_the_same_from_equal_bytes(tmp_path):
    table = made()
    for name in ("a.csv.gz", "b.csv.gz"):
        table.save(tmp_path / name)
    assert (tmp_path / "a.csv.gz").read_bytes() == (tmp_path / "b.csv.gz").read_bytes()
    again = Benchmark.load(tmp_path / "a.csv.gz")
    assert (again.space, again.macs, again.parameters) == (SPACE, MACS, PARAMETERS)
    pd.testing.assert_frame_equal(again.frame, table.frame)


def test_a_search_on_a_benchmark_finds_the_frontier_of_the_table(tmp_path):
    table = made()
    with RunFolder.claim(tmp_path / "run", SearchConfig(data="digits")) as folder:
        frame = run_study(table.problem(), JournalStore(folder.journal, "s"), "evolution", SPACE.size, 0, no_progress)
    assert len(frame) == SPACE.size
    columns = ["architecture", "top1", "macs", "parameters"]
    pd.testing.assert_frame_equal(frontier(frame)[columns], frontier(table.candidates)[columns])


def test_a_flipped_bit_of_a_benchmark_is_refused_or_changes_nothing(tmp_path):
    path, rng = tmp_path / "benchmark.csv.gz", random.Random(0)
    made().save(path)
    right, refused = Benchmark.load(path), 0
    for file in (path, tmp_path / "benchmark.json"):
        content = file.read_bytes()
        for _ in range(30):
            position, bit = rng.randrange(len(content)), 1 << rng.randrange(8)
            file.write_bytes(content[:position] + bytes([content[position] ^ bit]) + content[position + 1 :])
            try:
                found = Benchmark.load(path)
            except RunError:
                refused += 1
                continue
            pd.testing.assert_frame_equal(found.frame, right.frame)  # the time in gzip's header, for instance
            assert found == Benchmark(right.space, right.macs, right.parameters, found.frame)
        file.write_bytes(content)
    assert refused > 45


@pytest.mark.parametrize("damage", ["cut", "row", "cost", "count", "sidecar", "edited", "name"])
def test_a_damaged_benchmark_is_refused(damage, tmp_path):
    path = tmp_path / "benchmark.csv.gz"
    made().save(path)
    text = gzip.decompress(path.read_bytes()).decode().splitlines()
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:200])
    elif damage == "sidecar":
        (tmp_path / "benchmark.json").write_text("{}")
    elif damage == "edited":
        sidecar = tmp_path / "benchmark.json"
        sidecar.write_text(sidecar.read_text().replace('"max_run": 2', '"max_run": 3'))
    elif damage == "name":
        path = tmp_path / "benchmark.csv"
    else:
        cells = text[5].split(",")
        column, value = {"row": (0, text[6].split(",")[0]), "cost": (1, "12"), "count": (3, "1001")}[damage]
        cells[column] = value
        text[5] = ",".join(cells)
        path.write_bytes(gzip.compress("\n".join(text).encode()))
    with pytest.raises(RunError):
        Benchmark.load(path)


@pytest.mark.parametrize(("mean", "spread", "best"), [(0.0, 1.0, 0.5), (96.2, 0.4, 97.0), (5.0, 2.0, 1.0)])
def test_the_expected_gain_is_the_integral(mean, spread, best):
    integral, _ = quad(lambda x: (x - best) * norm.pdf(x, mean, spread), best, mean + 12 * spread)
    assert float(expected_gain(np.array([mean]), spread, np.array([best]))[0]) == pytest.approx(integral, rel=1e-6)


def unlikeness(first, second):
    """Token levels between two architectures, and the layers that share or pool in another way."""
    way = lambda layer: (layer.shared, layer.operator)
    levels = SPACE.levels.index
    pairs = list(zip(first.layers, second.layers, strict=True))
    return sum(abs(levels(a.tokens) - levels(b.tokens)) + (way(a) != way(b)) for a, b in pairs)


@pytest.mark.parametrize("expected", [(), (3, 17)])
def test_the_surrogate_is_the_gaussian_process_that_foretells_best_and_takes_expected_scores_as_seen(expected):
    rng = random.Random(0)
    known = list({SPACE.sample(rng): None for _ in range(60)})
    top1 = np.array([90 + MACS.total(a) / 50 + rng.gauss(0, 0.3) for a in known])
    pool = [a for a in SPACE if a not in known]
    model = Surrogate(SPACE, known, top1, pool)
    for member in expected:
        model.expect(member)

    def covariance(first, second, rate):
        return np.exp([[-rate * unlikeness(a, b) for b in second] for a in first])

    centred = top1 - top1.mean()

    def likelihood(rate, ratio):  # of each score given all others, one fit for each, with the likeliest variance
        gram = covariance(known, known, rate) + ratio * np.eye(len(known))
        missed, unsure = [], []
        for index in range(len(known)):
            others = np.arange(len(known)) != index
            weights = np.linalg.solve(gram[np.ix_(others, others)], gram[others, index])
            missed.append(centred[index] - weights @ centred[others])
            unsure.append(gram[index, index] - weights @ gram[others, index])
        variance = np.mean(np.square(missed) / unsure)
        return norm.logpdf(missed, scale=np.sqrt(variance * np.array(unsure))).sum(), rate, ratio, variance

    _, rate, ratio, variance = max(likelihood(rate, ratio) for rate in _RATES for ratio in _RATIOS)
    seen = known + [pool[member] for member in expected]
    gram, across = covariance(seen, seen, rate) + ratio * np.eye(len(seen)), covariance(pool, seen, rate)
    mean = across[:, : len(known)] @ np.linalg.solve(gram[: len(known), : len(known)], centred) + top1.mean()
    left = 1 - np.einsum("ij,ji->i", across, np.linalg.solve(gram, across.T))
    np.testing.assert_allclose(model.mean, mean, rtol=1e-9)
    np.testing.assert_allclose(model.spread, np.sqrt(variance * (left + ratio)), rtol=1e-6)
