"""Scoring a whole space: its pieces against brute force, continuing from any byte, and memory that stays bounded."""

import multiprocessing
import os
import random
import time

import pandas as pd
import pytest

from poolshare.search.counts import Counts
from poolshare.search.progress import no_progress
from poolshare.search.samplers.exhaustive import WALK, WALKS, piece_cost, score_everything, subtrees
from poolshare.search.study.loop import Problem
from poolshare.search.study.open import open_store
from poolshare.space import CostTable, RunError, SearchSpace, forecast, forecast_space

SPACE = SearchSpace(depth=6, levels=(64, 36, 16), operators=("max2d", "avg2d"), max_run=2)
POOLS = {("max2d", 64, 36): 1, ("max2d", 64, 16): 2, ("max2d", 36, 16): 3}
POOLS |= {("avg2d", before, after): cost + 4 for (_, before, after), cost in POOLS.items()}
MACS = CostTable("macs", 5, {64: 100, 36: 53, 16: 24}, {64: 71, 36: 40, 16: 17}, POOLS, {64: 9, 36: 6, 16: 2})
IMAGES = 1000


class Score:
    """Counts by a fixed rule, and what it was asked; `stop` ends it before that many architectures."""

    def __init__(self, stop=None):
        self.asked, self.stop = [], stop

    def __call__(self, architectures, progress):
        if self.stop is not None and len(self.asked) + len(architectures) > self.stop:
            raise KeyboardInterrupt
        self.asked += architectures
        progress(0.5)
        progress(1.0)
        return [Counts((300 + MACS.total(architecture) // 2,), IMAGES) for architecture in architectures]


def score(folder, by, advance=no_progress, record=None):
    """Score the space over a journal in the folder."""
    folder.mkdir(exist_ok=True)
    problem = Problem(SPACE, MACS, MACS, SPACE.within(MACS), by, record=record or {})
    return score_everything(problem, open_store(folder / "journal", None, "whole"), advance)


@pytest.fixture
def small_walks(monkeypatch):
    """The space is cut as finely as a large one."""
    monkeypatch.setattr("poolshare.search.samplers.exhaustive.SUBTREE", 1)
    monkeypatch.setattr("poolshare.search.samplers.exhaustive.WALK", 1)


@pytest.mark.parametrize("target", [1, 300, 2000, 10**9])
@pytest.mark.parametrize("most", [1, 7, 4096])
def test_pieces_are_the_space_in_order_with_the_cost_of_their_own_walk(target, most):
    pieces = list(subtrees(SPACE, MACS, target, most))
    assert [a for piece in pieces for a in piece.members(SPACE)] == list(SPACE)
    for piece in pieces:
        members = piece.members(SPACE)
        assert len(members) == piece.architectures <= most
        assert all(a.layers[: len(piece.prefix)] == piece.prefix for a in members)
        assert piece.cost == forecast(members, MACS).cost
        prefix = MACS.source + sum(map(MACS.edge, (None, *piece.prefix), piece.prefix))
        assert piece.cost - prefix <= target or piece.architectures == 1
    if target == 10**9 and most == 4096:
        assert len(pieces) == 1
        assert pieces[0].cost == forecast_space(SPACE, MACS).cost


def test_cutting_a_large_space_costs_little():
    costs = {196: 100, 100: 45, 49: 20}
    macs = CostTable("macs", 12, costs, {n: c * 4 // 5 for n, c in costs.items()}, {}, dict.fromkeys(costs, 1))
    space = SearchSpace(depth=12, levels=(196, 100, 49), operators=("max2d",), max_run=3)
    macs = CostTable("macs", 12, macs.own, macs.shared, dict.fromkeys(space.reductions, 1), macs.sink)
    pieces = list(subtrees(space, macs, piece_cost(space, macs, WALKS, WALK)))
    assert sum(piece.cost for piece in pieces) <= 1.05 * forecast_space(space, macs).cost


def test_every_row_is_right_and_progress_rises_to_one(tmp_path):
    shares = []
    frame = score(tmp_path, Score(), lambda share, note: shares.append(share))
    assert list(frame["architecture"]) == [str(a) for a in SPACE]
    assert list(frame["correct"]) == [300 + MACS.total(a) // 2 for a in SPACE]
    assert list(frame["macs"]) == [MACS.total(a) for a in SPACE]
    assert shares == sorted(shares)
    assert shares[-1] == 1


def test_it_continues_from_any_byte_of_its_journal(tmp_path, small_walks):
    frame = score(tmp_path / "whole", Score())
    content = (tmp_path / "whole" / "journal").read_bytes()
    rng, asked = random.Random(0), []
    for number, cut in enumerate([0, 3, len(content) - 1, *(rng.randrange(len(content)) for _ in range(8))]):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / "journal").write_bytes(content[:cut])
        missing = Score()
        pd.testing.assert_frame_equal(score(folder, missing), frame)
        asked.append((cut, len(missing.asked)))
        score(folder, missing)
        assert len(missing.asked) == asked[-1][1]  # all is known now
    counts = [count for _, count in sorted(asked)]
    assert counts == sorted(counts, reverse=True)  # the more was kept, the less is left
    assert counts[0] == SPACE.size > counts[len(counts) // 2] > counts[-1]


def test_finished_pieces_survive_a_stop(tmp_path, small_walks):
    first, second = Score(stop=SPACE.size // 2), Score()
    with pytest.raises(KeyboardInterrupt):
        score(tmp_path, first)
    score(tmp_path, second)
    assert sorted(map(SPACE.rank, first.asked + second.asked)) == list(range(SPACE.size))
    assert len(first.asked) > SPACE.size // 4


def test_what_was_scored_before_is_not_scored_again(tmp_path):
    record = {a: Counts((300 + MACS.total(a) // 2,), IMAGES) for a in SPACE}
    nothing = Score()
    frame = score(tmp_path, nothing, record=record)
    assert nothing.asked == []
    assert list(frame["correct"]) == [counts.sums[0] for counts in record.values()]


def in_a_process(folder, log):
    def noted(architectures, progress):
        time.sleep(0.02)
        with open(log / str(os.getpid()), "a") as file:
            file.write("".join(f"{architecture}\n" for architecture in architectures))
        return Score()(architectures, progress)

    score(folder, noted)


def test_workers_score_every_architecture_once_and_both_have_their_share(tmp_path, small_walks):
    log = tmp_path / "log"
    log.mkdir()
    crew = [multiprocessing.get_context("fork").Process(target=in_a_process, args=(tmp_path, log)) for _ in range(2)]
    for process in crew:
        process.start()
    for process in crew:
        process.join()
        assert process.exitcode == 0
    shares = [path.read_text().splitlines() for path in log.iterdir()]
    assert sorted(line for share in shares for line in share) == sorted(map(str, SPACE))
    assert min(map(len, shares)) > SPACE.size // 10, list(map(len, shares))
    nothing = Score()
    pd.testing.assert_frame_equal(score(tmp_path, nothing), score(tmp_path / "alone", Score()))
    assert nothing.asked == []


@pytest.mark.parametrize(
    "facts",
    [{"first": 1}, {"architectures": 2**31}, {"counts": [1]}, {"counts": None}, {"counts": [[1, IMAGES + 1]]}, {"counts": [[1, 0]]},
     {"counts": "all"}, {"first": "0"}],
)  # fmt: skip
def test_a_study_of_another_space_or_a_damaged_one_is_refused(facts, tmp_path):
    score(tmp_path / "right", Score())
    with open_store(tmp_path / "right" / "journal", None, "whole") as store:
        *right, last = store.study().get_trials()
    last.user_attrs |= facts
    (tmp_path / "wrong").mkdir()
    with open_store(tmp_path / "wrong" / "journal", None, "whole") as store:
        store.study().add_trials([*right, last])
    with pytest.raises(RunError, match="damaged"):
        score(tmp_path / "wrong", Score())
