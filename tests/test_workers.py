"""Several workers on one search: a journal and a real PostgreSQL, workers killed at random, passwords kept."""

import json
import multiprocessing
import os
import random
import shutil
import signal
import socket
import subprocess
import tempfile
import traceback
from collections import Counter
from pathlib import Path

import optuna
import pandas as pd
import pytest
import sqlalchemy
from conftest import DIGITS, Forked, call, one_of_each
from optuna.trial import TrialState

from poolshare.search import Classification
from poolshare.search.job import worker
from poolshare.search.job.folder import RunFolder
from poolshare.search.job.job import study_name
from poolshare.search.job.prepare import load_weights, prepare
from poolshare.search.job.records import read_json, write_json
from poolshare.search.job.together import make_problem
from poolshare.search.progress import no_progress
from poolshare.search.samplers.exhaustive import score_everything
from poolshare.search.samplers.propose import PROPOSERS
from poolshare.search.study import postgres as database
from poolshare.search.study.journal import JournalStore
from poolshare.search.study.loop import run_study
from poolshare.search.study.open import open_store
from poolshare.search.study.postgres import PostgresStore
from poolshare.space import ConfigError, PoolshareError, RunError

PASSWORD = "se{c}ret%20p@ss:w/ord"
QUOTED = "se%7Bc%7Dret%2520p%40ss%3Aw%2Ford"  # as an address has it
TRIALS = 30  # two generations; each trial in PostgreSQL takes a quarter of a CPU second
SEARCH = ["search", "--data", "digits", "--model-args", "depth=5,embed_dim=16,num_heads=2", "--batch-size", "128"]
SEARCH += ["--levels", "64,36,16,4", "--epochs", "1", "--sampler", "evolution", "--device", "cpu"]


@pytest.fixture(scope="session")
def postgres():
    """A private PostgreSQL cluster with a password, in a temporary folder, run by an ordinary user; its address.

    Whoever asks for it has imported the drivers, which processes forked from it need not import again.
    """
    pytest.importorskip("psycopg", reason="needs the extra: pip install '.[postgres]'")
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin"))
    command = shutil.which("initdb")
    binaries = found[-1] if found else Path(command).parent if command else None
    if binaries is None:
        pytest.skip("no PostgreSQL server is installed; on Debian: apt-get install postgresql")
    as_user = []
    if os.geteuid() == 0:  # PostgreSQL does not run as root
        as_user = ["runuser", "-u", "nobody", "--"]
        if shutil.which("runuser") is None:
            pytest.skip("PostgreSQL does not run as root, and there is no runuser to become an ordinary user")
    folder = Path(tempfile.mkdtemp(prefix="poolshare-postgres-"))
    if as_user:
        shutil.chown(folder, "nobody")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    (folder / "password").write_text(PASSWORD)
    (folder / "password").chmod(0o644)
    run = lambda *words: subprocess.run([*as_user, *map(str, words)], check=True, capture_output=True, cwd=folder)
    run(binaries / "initdb", "-D", folder / "data", "-U", "searcher", "-A", "scram-sha-256", "-E", "UTF8",
        "--no-locale", "--pwfile", folder / "password")  # fmt: skip
    options = f"-c listen_addresses=127.0.0.1 -c port={port} -c unix_socket_directories='' -c fsync=off"
    run(binaries / "pg_ctl", "-D", folder / "data", "-o", options, "-l", folder / "log", "-w", "start")
    optuna.storages.RDBStorage("sqlite://")
    sqlalchemy.create_engine("postgresql+psycopg://")
    yield f"postgresql://searcher:{QUOTED}@127.0.0.1:{port}/postgres"
    run(binaries / "pg_ctl", "-D", folder / "data", "-m", "immediate", "stop")
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """A search that one undisturbed process did, over the journal."""
    folder = tmp_path_factory.mktemp("alone") / "run"
    status, _, err = call(*SEARCH, "--trials", TRIALS, "--out", folder, "-q")
    assert status == 0, err
    return folder


@pytest.fixture(scope="module")
def job(alone):
    """That search's data and trained supernet, in this process."""
    job = prepare(RunFolder.open(alone).config)
    load_weights(job.supernet, alone / "supernet.safetensors")
    return job


def begun(alone, path, kind="journal"):
    """A copy of the run before anything was scored."""
    path.mkdir()
    write_json(path / "config.json", read_json(alone / "config.json") | {"storage": kind})
    shutil.copy(alone / "supernet.safetensors", path)
    return RunFolder.open(path)


@pytest.fixture(params=["journal", "postgresql"])
def place(request, alone, job, tmp_path, monkeypatch):
    """An empty study on either storage: (run folder, a function that makes a store of it)."""
    url = request.getfixturevalue("postgres") if request.param == "postgresql" else None
    monkeypatch.setattr(database, "HEARTBEAT_SECONDS", 1)
    monkeypatch.setattr(database, "GRACE_SECONDS", 2)
    folder = begun(alone, tmp_path / "run", request.param)
    name = f"{study_name(job, folder)} {tmp_path}"
    return folder, lambda: open_store(folder.journal, url, name)


def searcher(job, place, trials):
    _, make_store = place
    run_study(make_problem(job), make_store(), "evolution", trials, 0, no_progress)


def trials_of(place):
    with place[1]() as store:
        return store.study().get_trials()


def table(trials):
    """What was found, in the order of the candidates: architectures, their counts and their costs."""
    rows = sorted(
        (t.user_attrs["generation"], t.user_attrs["position"], t) for t in trials if t.state.name == "COMPLETE"
    )
    return [(t.user_attrs["architecture"], *t.user_attrs["counts"], int(t.values[1])) for *_, t in rows]


def expected(alone, trials):
    found = pd.read_csv(alone / "candidates.csv")
    return list(found[["architecture", "correct", "total", "macs"]].itertuples(index=False, name=None))[:trials]


def crew_killed_at_random(workers, kills, target, *arguments):
    """So many processes that call `target`, of which some are killed and replaced; returns how many were."""
    forking, rng = multiprocessing.get_context("fork"), random.Random(kills)
    crew, killed = [], 0
    while crew or not killed:
        while len(crew) < workers:
            crew.append(forking.Process(target=target, args=arguments))
            crew[-1].start()
        crew[0].join(rng.uniform(0.1, 0.4))
        for process in [process for process in crew if process.exitcode is not None]:
            assert process.exitcode == 0
            crew.remove(process)
            workers -= 1
        if crew and killed < kills:
            victim = crew.pop(rng.randrange(len(crew)))
            victim.kill()
            victim.join()
            killed += victim.exitcode == -signal.SIGKILL
    return killed


@pytest.mark.parametrize(
    ("workers", "trials", "kills"), [(2, TRIALS, 3), pytest.param(4, 80, 30, marks=pytest.mark.slow)]
)
def test_workers_killed_at_random_find_what_one_undisturbed_process_finds(
    workers, trials, kills, place, alone, job, tmp_path
):
    if trials == TRIALS:
        undisturbed = expected(alone, trials)
    else:
        folder = begun(alone, tmp_path / "undisturbed")
        by_one = folder, lambda: open_store(folder.journal, None, "undisturbed")
        searcher(job, by_one, trials)
        undisturbed = table(trials_of(by_one))
    killed = crew_killed_at_random(workers, kills, searcher, job, place, trials)
    found = trials_of(place)
    assert {trial.state for trial in found} <= {TrialState.COMPLETE, TrialState.FAIL}
    scored = Counter(trial.user_attrs["architecture"] for trial in found if trial.state == TrialState.COMPLETE)
    assert set(scored.values()) == {1}
    assert table(found) == undisturbed
    print(f"{killed} kills, {sum(trial.state == TrialState.FAIL for trial in found)} trials given back")


def whole_space(job, place):
    return score_everything(make_problem(job), place[1](), no_progress)


@pytest.mark.parametrize("place", ["journal", pytest.param("postgresql", marks=pytest.mark.slow)], indirect=True)
def test_workers_killed_at_random_score_a_whole_space_each_sub_tree_once(place, job, monkeypatch):
    monkeypatch.setattr("poolshare.search.samplers.exhaustive.SUBTREE", 1)  # cut as finely as a large space
    monkeypatch.setattr("poolshare.search.samplers.exhaustive.WALK", 4)
    killed = crew_killed_at_random(3, 4, whole_space, job, place)
    found = trials_of(place)
    assert {trial.state for trial in found} <= {TrialState.COMPLETE, TrialState.FAIL}
    complete = [trial for trial in found if trial.state == TrialState.COMPLETE]
    ranks = [
        r for t in complete for r in range(t.user_attrs["first"], t.user_attrs["first"] + t.user_attrs["architectures"])
    ]
    space = job.supernet.space
    assert sorted(ranks) == list(range(space.size))
    counts = make_problem(job).score(list(space), lambda share: None)  # in one walk, without a study
    frame = whole_space(job, place)
    assert list(frame["architecture"]) == [str(architecture) for architecture in space]
    assert [*zip(frame["correct"], frame["total"], strict=True)] == [(each.sums[0], each.total) for each in counts]
    assert len(trials_of(place)) == len(found)  # nothing was scored again
    print(f"{killed} kills, {len(complete)} sub-trees, {len(found) - len(complete)} given back")


@pytest.mark.parametrize("kind", one_of_each(("journal", "postgresql"), "journal"))
def test_search_and_worker_share_a_whole_space_and_leave_the_files_of_one_process(kind, digits_run, tmp_path, request):
    alone = digits_run.folder
    folder = begun(alone, tmp_path / kind, kind).path
    hidden = {} if kind == "journal" else {"POOLSHARE_STORAGE": request.getfixturevalue("postgres")}
    worker = Forked.verb("worker", folder, "--json", "-q", **hidden)
    status, _, err = Forked.verb(*DIGITS, "-q", "--out", folder, **hidden).wait()
    assert status == 0, err
    status, out, err = worker.wait()
    assert status == 0, err
    assert json.loads(out)["candidates"] == len(pd.read_csv(alone / "candidates.csv"))
    for name in ("candidates.csv", "pareto.csv"):
        assert (folder / name).read_bytes() == (alone / name).read_bytes()
    pd.testing.assert_frame_equal(*(pd.read_csv(path / "benchmark.csv.gz") for path in (folder, alone)))


def test_a_worker_waits_for_no_supernet_before_it_refuses_what_it_was_given(digits_run, monkeypatch):
    monkeypatch.setattr(worker, "_wait_for_supernet", lambda *arguments: pytest.fail("it waited"))

    class Others(Classification):
        name = "others"

    for options, says in (
        ({"device": "cuda:99"}, "device 'cuda:99' cannot be used here"),
        ({"data_dir": "x"}, "--data-dir x belongs to"),
        ({"task": Others()}, "the task of this run is classification, and others was given"),
    ):
        with pytest.raises(PoolshareError, match=says):
            worker.work(digits_run.folder, **options)


@pytest.mark.parametrize("kind", one_of_each(("journal", "postgresql"), "postgresql"))
def test_a_worker_waits_for_run_and_supernet_then_shares_the_search_and_no_password_is_kept(
    kind, alone, job, tmp_path, request, monkeypatch
):
    monkeypatch.setattr("poolshare.search.job.worker.SECONDS_BETWEEN_LOOKS", 0.1)
    ready = begun(alone, tmp_path / f"{kind} to be", kind).path
    (ready / "supernet.safetensors").unlink()
    folder = tmp_path / kind
    hidden = {} if kind == "journal" else {"POOLSHARE_STORAGE": request.getfixturevalue("postgres")}
    worker = Forked.verb("worker", folder, "--json", **hidden)
    worker.wait_for("waiting 10 minutes for `poolshare search` to begin it")
    ready.rename(folder)
    worker.wait_for("waiting for `poolshare search` to train it")
    search = Forked.verb(*SEARCH, "--trials", str(TRIALS), "--out", folder, "--json", **hidden)
    status, *rest = search.wait()
    assert status == 0, rest
    status, out, err = worker.wait()
    assert status == 0, err
    assert "waiting for `poolshare search` to train it" in err
    address = None if kind == "journal" else request.getfixturevalue("postgres")
    with open_store(folder / "study.journal", address, study_name(job, RunFolder.open(folder))) as store:
        trials = store.study().get_trials(states=(TrialState.COMPLETE,))
    # Those without a worker were answered from the record.
    names = [trial.user_attrs["worker"] for trial in trials if "worker" in trial.user_attrs]
    by_worker = sum(f"-{worker.pid}-" in name for name in names)
    by_search = sum(f"-{search.pid}-" in name for name in names)
    assert by_worker + by_search == len(names)
    assert json.loads(out) == {"run": str(folder), "scored": by_worker, "candidates": TRIALS}
    for name in ("candidates.csv", "pareto.csv"):
        assert (folder / name).read_bytes() == (alone / name).read_bytes()
    assert not list(folder.glob(".worker-*"))
    texts = [out, err, *rest, *(path.read_bytes().decode(errors="replace") for path in folder.iterdir())]
    assert not any(secret in text for text in texts for secret in (PASSWORD, QUOTED))
    assert (folder / "study.journal").exists() == (kind == "journal")
    if kind == "journal":
        return
    status, _, err = call("worker", folder)
    assert (status, "is in a postgresql: give --storage" in err) == (1, True), err
    status, _, err = call("worker", alone, "--storage", request.getfixturevalue("postgres"))
    assert (status, "is in a journal: leave out --storage" in err) == (1, True), err


def test_database_errors_say_what_to_do_and_nothing_of_the_address(postgres):
    host = postgres.rpartition("@")[2]
    for url, error, says in (
        (postgres.replace(QUOTED, "wr0ng" + QUOTED), RunError, "refuses this user or password"),
        (postgres.replace("/postgres", "/absent"), RunError, "does not exist"),
        (f"postgresql://searcher:{QUOTED}@127.0.0.1:1/postgres", RunError, "cannot be reached"),
        (f"postgresql://searcher:{QUOTED}@host.invalid/postgres", RunError, "cannot be reached"),
        (f"postgresql://searcher:{PASSWORD}@{host}", ConfigError, "is not understood"),
        (f"postgresql://searcher:ss:w@{QUOTED}@{host}", RunError, "cannot be reached"),  # half of it taken for a host
        (f"postgresql://searcher:{QUOTED}@127.0.0.1:port/postgres", ConfigError, "is not understood"),
        (f"mysql://searcher:{QUOTED}@{host}", ConfigError, "is not understood"),
        (f"sqlite:///{QUOTED}", ConfigError, "is not understood"),
        (QUOTED, ConfigError, "is not understood"),
    ):
        with pytest.raises(error, match=says) as raised:
            PostgresStore(url, "study")
        told = "".join(traceback.format_exception(raised.value))
        assert not any(piece in told for piece in (PASSWORD, QUOTED, "c}ret", "ss:w", "searcher", "7Bc")), told


@pytest.mark.parametrize("place", ["postgresql"], indirect=True)  # a journal has no server
def test_a_database_that_breaks_off_is_a_clear_error_and_the_search_goes_on(place, postgres, alone, job, monkeypatch):
    psycopg = pytest.importorskip("psycopg")
    others = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE pid <> pg_backend_pid()"
    propose = PROPOSERS["evolution"]

    def cut_off(*arguments):  # while the lock is held
        monkeypatch.setitem(PROPOSERS, "evolution", propose)
        with psycopg.connect(postgres, autocommit=True) as connection:
            connection.execute(others)
        return propose(*arguments)

    monkeypatch.setitem(PROPOSERS, "evolution", cut_off)
    with pytest.raises(RunError, match="broke off") as raised:
        searcher(job, place, TRIALS)
    assert "searcher:" not in "".join(traceback.format_exception(raised.value))
    searcher(job, place, TRIALS)
    assert table(trials_of(place)) == expected(alone, TRIALS)


def test_a_killed_holder_of_the_lock_blocks_nobody_and_its_half_line_is_cut(alone, job, tmp_path):
    folder = begun(alone, tmp_path / "run")
    place = folder, lambda: JournalStore(folder.journal, "study")
    searcher(job, place, 10)

    def hold_and_die():
        with JournalStore(folder.journal, "study") as store, store.lock():
            store.journal._held.write(b'{"op_code":5,"worker')
            store.journal._held.flush()
            os.kill(os.getpid(), signal.SIGKILL)

    with place[1]() as open_already:
        study = open_already.study()
        dying = multiprocessing.get_context("fork").Process(target=hold_and_die)
        dying.start()
        dying.join()
        assert not folder.journal.read_bytes().endswith(b"\n")
        study.set_user_attr("note", "written after the half line")
        assert len(study.get_trials()) == 10
        assert open_already.workers() == 1
    searcher(job, place, TRIALS)
    assert table(trials_of(place)) == expected(alone, TRIALS)


def test_a_worker_with_other_images_or_another_supernet_is_refused_or_apart(alone, tmp_path):
    folder = begun(alone, tmp_path / "run")
    config = read_json(folder.path / "config.json")
    write_json(folder.path / "config.json", config | {"data": "other images"})
    status, _, err = call("worker", folder.path)
    assert (status, "are not those" in err) == (1, True), err
    write_json(folder.path / "config.json", config)
    job = prepare(folder.config)
    trained = prepare(folder.config)
    load_weights(trained.supernet, folder.supernet)
    assert study_name(job, folder) != study_name(trained, folder)
