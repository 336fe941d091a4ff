"""Proposers, the total encoding, and the loop: every sampler under one contract, on a table of known scores."""

import random

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from poolshare.search.analysis.pareto import frontier
from poolshare.search.config import SearchConfig
from poolshare.search.counts import Counts
from poolshare.search.job.folder import RunFolder
from poolshare.search.progress import no_progress
from poolshare.search.samplers.propose import PROPOSERS, Scored, decode, distributions, encode
from poolshare.search.study.journal import JournalStore
from poolshare.search.study.loop import GENERATION, Problem, run_study
from poolshare.space import CostTable, SearchSpace

SPACE = SearchSpace(depth=6, levels=(64, 36, 16), operators=("max2d", "avg2d"), max_run=2)
POOLS = {("max2d", 64, 36): 1, ("max2d", 64, 16): 2, ("max2d", 36, 16): 3}
POOLS |= {("avg2d", before, after): cost + 4 for (_, before, after), cost in POOLS.items()}
MACS = CostTable("macs", 5, {64: 100, 36: 53, 16: 24}, {64: 71, 36: 40, 16: 17}, POOLS, {64: 9, 36: 6, 16: 2})
IMAGES = 1000


def accuracy(architecture):
    """Correct images by a made-up but fixed rule: more MACs help, early drops and sharing at the end hurt."""
    drops = sum(6 - i for i, layer in enumerate(architecture.layers) if layer.operator == "max2d")
    shares = sum(i for i, layer in enumerate(architecture.layers) if layer.shared)
    return 400 + MACS.total(architecture) // 2 - 9 * drops - 2 * shares


class Counter:
    """A score that remembers what it was asked."""

    def __init__(self):
        self.asked = []

    def __call__(self, architectures, progress):
        self.asked += architectures
        progress(1.0)
        return [Counts((accuracy(architecture),), IMAGES) for architecture in architectures]


def make_problem(score, budget=None):
    return Problem(SPACE, MACS, MACS, SPACE.within(MACS, None, budget), score)


def make_folder(path):
    with RunFolder.claim(path, SearchConfig(data="digits")) as folder:
        return folder


def run(problem, folder, sampler, trials, seed=0, name="study"):
    """A study in the journal of a run folder, which publishes its candidates."""
    store = JournalStore(folder.journal, name)
    return run_study(problem, store, sampler, trials, seed, no_progress, folder.write_candidates)


@pytest.fixture(scope="module")
def everything():
    return [Scored(a, 100 * accuracy(a) / IMAGES, MACS.total(a)) for a in SPACE]


def test_every_architecture_decodes_from_its_own_encoding():
    for architecture in SPACE:
        assert decode(encode(architecture, SPACE), SPACE) == architecture


@given(st.randoms(use_true_random=False))
@settings(max_examples=300, deadline=None)
def test_every_combination_of_parameters_decodes_to_a_member(rng):
    params = {
        name: rng.choice(d.choices) if hasattr(d, "choices") else rng.randint(d.low, d.high)
        for name, d in distributions(SPACE).items()
    }
    architecture = decode(params, SPACE)
    assert architecture in SPACE
    assert decode(encode(architecture, SPACE), SPACE) == architecture


@pytest.mark.parametrize("name", PROPOSERS)
def test_proposals_are_new_distinct_within_the_budget_and_repeat_from_their_key(name, everything):
    allowed = SPACE.within(MACS, None, 400)
    scored = random.Random(1).sample(everything, 100)
    proposals = PROPOSERS[name](allowed, MACS, scored, "key", 40)
    assert proposals == PROPOSERS[name](allowed, MACS, scored, "key", 40)
    assert proposals != PROPOSERS[name](allowed, MACS, scored, "another", 40)
    assert len(set(proposals)) == 40
    assert all(proposal in allowed for proposal in proposals)
    assert not set(proposals) & {candidate.architecture for candidate in scored}


@pytest.mark.parametrize("name", PROPOSERS)
def test_an_exhausted_space_gives_no_proposals(name, everything):
    assert PROPOSERS[name](SPACE.within(MACS), MACS, everything, "key", 10) == []


@pytest.mark.parametrize("sampler", ["evolution", "random", "nsga2", "tpe"])
def test_every_sampler_finds_something_within_the_tightest_budget(sampler, tmp_path):
    limit = min(map(MACS.total, SPACE))
    problem = make_problem(Counter(), limit)
    assert problem.allowed.size < 10
    frame = run(problem, make_folder(tmp_path / "run"), sampler, 5, 0)
    assert frame["macs"].min() == limit


@pytest.mark.parametrize("sampler", ["evolution", "random", "nsga2", "tpe"])
def test_every_sampler_scores_each_architecture_once_and_fills_the_record(sampler, tmp_path):
    score = Counter()
    folder = make_folder(tmp_path / "run")
    frame = run(make_problem(score, 450), folder, sampler, 120, 0)
    assert len(score.asked) == len(set(score.asked)) == len(frame)
    pd.testing.assert_frame_equal(frame, folder.read_candidates())
    for row in frame.itertuples():
        architecture = SPACE[SPACE.rank(type(SPACE[0]).parse(row.architecture))]
        assert (row.correct, row.total, row.macs) == (accuracy(architecture), IMAGES, MACS.total(architecture))
    with JournalStore(folder.journal, "study") as store:
        trials = store.study().get_trials()
    assert len(trials) == 120
    assert all(trial.state.name == "COMPLETE" for trial in trials)
    for trial in trials:
        excess = max(0, trial.values[1] - 450)
        assert (sum(trial.constraints.values()), trial.user_attrs["macs_over_budget"]) == (excess, excess)


@pytest.mark.parametrize("sampler", ["evolution", "random"])
def test_a_search_stopped_anywhere_and_continued_gives_the_same_candidates(sampler, tmp_path):
    undisturbed = run(make_problem(Counter()), make_folder(tmp_path / "a"), sampler, 130, 7)

    class Stopped(Exception):
        pass

    folder = make_folder(tmp_path / "b")
    for _ in range(2):  # in the first and in the second generation
        score = Counter()

        def stop(architectures, progress, score=score):
            result = score(architectures, progress)
            if len(score.asked) > GENERATION - 10:
                raise Stopped
            return result

        with pytest.raises(Stopped):
            run(make_problem(stop), folder, sampler, 130, 7)
        with open(folder.journal, "ab") as journal:  # a killed writer leaves half a line
            journal.write(b'{"op_code": 5, "worker')
        first = run(make_problem(Counter()), folder, sampler, GENERATION, 7)
        assert len(first) == GENERATION
    continued = run(make_problem(Counter()), folder, sampler, 130, 7)
    pd.testing.assert_frame_equal(continued, undisturbed)


def test_evolution_comes_closer_to_the_true_frontier_than_random_draws(tmp_path, everything):
    table = pd.DataFrame({"architecture": str(c.architecture), "top1": c.score, "macs": c.cost} for c in everything)
    true = set(frontier(table)["architecture"])

    def found(sampler, seed):
        folder = make_folder(tmp_path / f"{sampler}{seed}")
        frame = run(make_problem(Counter()), folder, sampler, 150, seed)
        return len(true & set(frame["architecture"]))

    assert sum(found("evolution", seed) for seed in range(3)) > sum(found("random", seed) for seed in range(3))
