"""Scoring a whole space: its pieces against brute force, continuing from any byte, and memory that stays bounded."""

import random

import pandas as pd
import pytest

from poolshare.search.exhaustive import score_everything, subtree_target, subtrees
from poolshare.search.progress import no_progress
from poolshare.search.run import RunFolder, SearchConfig, checked_row
from poolshare.search.study import Task
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
        return [300 + MACS.total(architecture) // 2 for architecture in architectures], IMAGES


def make_task(score):
    return Task(SPACE, MACS, MACS, SPACE.within(MACS), score)


def make_folder(path):
    with RunFolder.claim(path, SearchConfig(data="digits")) as folder:
        return folder


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
    pieces = list(subtrees(space, macs, subtree_target(space, macs)))
    assert sum(piece.cost for piece in pieces) <= 1.05 * forecast_space(space, macs).cost


def test_every_row_is_right_and_progress_rises_to_one(tmp_path):
    shares = []
    frame = score_everything(
        make_task(Score()), make_folder(tmp_path / "run"), lambda share, note: shares.append(share)
    )
    assert list(frame["architecture"]) == [str(a) for a in SPACE]
    assert list(frame["correct"]) == [300 + MACS.total(a) // 2 for a in SPACE]
    assert list(frame["macs"]) == [MACS.total(a) for a in SPACE]
    assert shares == sorted(shares)
    assert shares[-1] == pytest.approx(1)


def test_it_continues_from_any_byte_and_ends_with_the_same_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr("poolshare.search.exhaustive.DENSE_WALKS", 1)
    whole = make_folder(tmp_path / "whole")
    frame = score_everything(make_task(Score()), whole, no_progress)
    content = whole.candidates.read_bytes()
    rng = random.Random(0)
    for number, cut in enumerate([0, 3, len(content) - 1, *(rng.randrange(len(content)) for _ in range(8))]):
        folder = make_folder(tmp_path / str(number))
        folder.partial.write_bytes(content[:cut])
        score = Score()
        pd.testing.assert_frame_equal(score_everything(make_task(score), folder, no_progress), frame)
        assert folder.candidates.read_bytes() == content
        assert not folder.partial.exists()
        assert len(score.asked) == SPACE.size - max(content[:cut].count(b"\n") - 1, 0)


def test_finished_pieces_survive_a_stop(tmp_path, monkeypatch):
    monkeypatch.setattr("poolshare.search.exhaustive.DENSE_WALKS", 1)
    folder = make_folder(tmp_path / "run")
    first = Score(stop=SPACE.size // 2)
    with pytest.raises(KeyboardInterrupt):
        score_everything(make_task(first), folder, no_progress)
    second = Score()
    score_everything(make_task(second), folder, no_progress)
    assert first.asked + second.asked == list(SPACE)
    assert len(first.asked) > SPACE.size // 4


def test_a_part_of_another_space_is_refused_untouched(tmp_path):
    folder = make_folder(tmp_path / "run")
    header = b"architecture,top1,correct,total,macs,parameters,generation,check\n"
    foreign = f"{checked_row('64*6,50,1,2,3,4,0')}\n".encode()
    flipped = f"{checked_row(f'{SPACE[0]},50,1,2,3,4,0')}\n".encode().replace(b"50", b"51")
    for text in (header + foreign, header + flipped, b"something else\n"):
        folder.partial.write_bytes(text)
        with pytest.raises(RunError, match="delete"):
            score_everything(make_task(Score()), folder, no_progress)
        assert folder.partial.read_bytes() == text
