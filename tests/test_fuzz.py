"""Mutated inputs, hundreds or (-m slow) thousands: only our own errors come out, and what is accepted is what it says."""

import math
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from reports import WORDS

from poolshare.search.analysis.pareto import frontier
from poolshare.search.cli.options import integers, settings_of, words
from poolshare.search.config import SearchConfig, checked_config
from poolshare.search.counts import Counts
from poolshare.search.job.folder import RunFolder
from poolshare.search.job.records import read_json, write_json
from poolshare.search.progress import no_progress
from poolshare.search.study.journal import Journal, JournalStore
from poolshare.search.study.loop import Problem, run_study
from poolshare.space import Architecture, CostTable, PoolshareError, RunError, SearchSpace, parse_budget

SPACE = SearchSpace(depth=4, levels=(64, 16), operators=("max2d",), max_run=2)
MACS = CostTable("macs", 5, {64: 100, 16: 24}, {64: 71, 16: 17}, {("max2d", 64, 16): 2}, {64: 9, 16: 2})
TRIALS = 12

JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**20), 10**20) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
pytestmark = pytest.mark.fuzz  # how many examples: conftest.py
MANY = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])


@st.composite
def mutated(draw, content: bytes) -> bytes:
    """The content with a few pieces cut, doubled, moved, flipped or written over."""
    data = bytearray(content)
    for _ in range(draw(st.integers(1, 3))):
        start = draw(st.integers(0, max(0, len(data) - 1)))
        stop = min(len(data), start + draw(st.integers(0, 40)))
        match draw(st.sampled_from(("cut", "double", "flip", "write", "end"))):
            case "cut":
                del data[start:stop]
            case "double":
                data[stop:stop] = data[start:stop]
            case "flip" if start < len(data):
                data[start] ^= 1 << draw(st.integers(0, 7))
            case "write":
                data[start:stop] = draw(
                    st.binary(max_size=12) | st.sampled_from((b"-1", b"1e999", b"null", b"NaN", b"{"))
                )
            case "end":
                del data[start:]
    return bytes(data)


def refused(call, *arguments):
    """The call's result, or None where it raised an error of ours; any other error fails the test."""
    try:
        return call(*arguments)
    except PoolshareError:
        return None


@given(mutated(b"64*2 64 16@max2d*2 16@wkmedoids 4@tome*3"))
@MANY
def test_architecture_text(content):
    text = content.decode("utf-8", "replace")
    found = refused(Architecture.parse, text)
    assert found is None or Architecture.parse(str(found)) == found


@given(st.dictionaries(st.sampled_from(("runs", "x")), JSON) | JSON, st.lists(JSON, max_size=3), st.data())
@MANY
def test_architecture_json(value, runs, data):
    found = refused(Architecture.from_json, value)
    assert found is None or Architecture.from_json(found.to_json()) == found
    good = Architecture.parse("64*2 64 16@max2d*2").to_json()
    entry = data.draw(st.sampled_from(good["runs"]))
    entry[data.draw(st.sampled_from(("tokens", "operator", "length", "more")))] = data.draw(JSON)
    found = refused(Architecture.from_json, good)
    assert found is None or Architecture.from_json(found.to_json()) == found
    refused(Architecture.from_json, {"runs": runs})


@given(st.text(max_size=20) | mutated(b"depth=6,patch_size=4").map(lambda b: b.decode("utf-8", "replace")))
@MANY
def test_options_and_budgets(text):
    refused(settings_of, text)
    refused(integers, "--levels", text)
    words(text)
    refused(parse_budget, text, 10**9)


@given(st.sampled_from(list(SearchConfig.model_fields)), JSON)
@example("recipe", {"": math.inf})
@example("model_args", {"depth": [math.nan]})
@example("lr", math.inf)
@MANY
def test_configuration_values(name, value):
    found = refused(lambda: checked_config(**{"data": "digits", name: value}))
    assert found is None or SearchConfig(**found.model_dump(mode="json")) == found


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A small search on made-up scores: its folder, the names of its files, and its frontier."""
    path = tmp_path_factory.mktemp("fuzz") / "run"
    with RunFolder.claim(path, SearchConfig(data="digits")) as folder:
        folder.write_config("the images")
        search(folder)
    dense = {"architecture": str(SPACE[0]), "top1": 90.0, "macs": MACS.total(SPACE[0]), "parameters": 1}
    facts = WORDS | {"classes": ["0"], "certified": False, "space": SPACE.to_json(), "space_size": SPACE.size}
    write_json(
        folder.summary,
        {
            "format": 1,
            "dense": dense,
            "seconds": {"training": 1.0},
            "split_sizes": {"train": 8, "search": 2},
            "versions": {},
            **facts,
        },
    )
    return folder


def search(folder):
    """Score, by a fixed rule, what the study lacks; the candidates."""

    def score(architectures, progress):
        return [Counts((500 + MACS.total(architecture) % 97,), 1000) for architecture in architectures]

    problem = Problem(SPACE, MACS, MACS, SPACE.within(MACS), score)
    store = JournalStore(folder.journal, "study")
    return run_study(problem, store, "evolution", TRIALS, 0, no_progress, folder.write_candidates)


@given(st.data())
@MANY
def test_files_of_a_run(run, data):
    path = data.draw(st.sampled_from((run.path / "config.json", run.summary, run.candidates)))
    content, right_summary = path.read_bytes(), read_json(run.summary)
    right = {row.architecture: row for row in run.read_candidates().itertuples(index=False)}
    try:
        damage = data.draw(mutated(content))
        path.write_bytes(damage)
        folder = refused(RunFolder.open, run.path)
        if folder is not None:
            assert folder.config == run.config
            summary, found = refused(folder.read_summary), refused(folder.read_candidates)
            assert summary is None or {**summary} == {**right_summary}
            if found is not None:  # whole rows may be missing, nothing else
                assert all(right[row.architecture][1:] == row[1:] for row in found.itertuples(index=False))
    finally:
        path.write_bytes(content)


@given(st.data())
@MANY
def test_a_journal(run, tmp_path_factory, data):
    right = frontier(run.read_candidates())
    path = Path(tmp_path_factory.mktemp("journal"))
    write_json(path / "config.json", read_json(run.path / "config.json"))
    (path / "study.journal").write_bytes(data.draw(mutated(run.journal.read_bytes())))
    found = refused(search, RunFolder.open(path))
    assert found is None or frontier(found).equals(right)


@given(st.sampled_from(range(12)), st.sampled_from(("op_code", "study_id", "trial_id", "state", "values", "user_attr",
       "user_attrs", "params", "distributions", "directions", "datetime_start", "system_attrs", "worker_id")), JSON)  # fmt: skip
@MANY
def test_a_journal_of_a_stranger_whose_checksums_fit(run, tmp_path_factory, line, name, value):
    path = Path(tmp_path_factory.mktemp("journal"))
    logs = list(Journal(run.journal).read_logs(0))
    logs[line * len(logs) // 12][name] = value
    journal = Journal(path / "study.journal")
    try:
        journal.append_logs(logs)
    except ValueError:  # no journal can hold that
        return
    write_json(path / "config.json", read_json(run.path / "config.json"))
    refused(search, RunFolder.open(path))
    with pytest.raises(RunError), JournalStore(path / "absent" / "study.journal", "study"):
        pass
