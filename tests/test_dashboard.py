"""optuna-dashboard on a study of ours, in a real browser: names, feasibility, architectures and MACs are there to see."""

import json
import threading
import urllib.request
from wsgiref.simple_server import WSGIRequestHandler, make_server

import pytest
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from test_search import MACS, SPACE, Counter, make_folder, make_problem, run

from poolshare.space import Architecture

BUDGET = 400


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    """The address of a dashboard over the journal of a search whose study has a hostile name."""
    wsgi = pytest.importorskip("optuna_dashboard", reason="needs pip install '.[dashboard]'").wsgi
    folder = make_folder(tmp_path_factory.mktemp("dashboard") / "run")
    run(make_problem(Counter(), BUDGET), folder, "nsga2", 100, name="<script>alert(1)</script>")

    class Silent(WSGIRequestHandler):
        def log_message(self, *_):
            pass

    application = wsgi(JournalStorage(JournalFileBackend(str(folder.journal))))
    with make_server("127.0.0.1", 0, application, handler_class=Silent) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_the_dashboard_reads_feasibility_and_the_facts_of_every_trial(address):
    with urllib.request.urlopen(f"{address}/api/studies/0?after=0") as answer:
        study = json.load(answer)
    assert study["objective_names"] == ["top-1 (%)", "MACs"]
    trials = study["trials"]
    assert len(trials) == 100
    over = 0
    for trial in trials:
        facts = {entry["key"]: entry["value"] for entry in trial["user_attrs"]}
        macs = MACS.total(SPACE.check(Architecture.parse(facts["architecture"].strip('"'))))
        excess = max(0, macs - BUDGET)
        assert trial["values"][1] == macs == int(facts["macs"])
        assert trial["constraints"] == [excess]  # what it greys points by
        assert (facts["feasible"], facts["macs_over_budget"]) == (str(excess == 0), str(excess))
        over += excess > 0
    assert 0 < over < 100


def test_a_person_sees_them(browser, address):
    page = browser.new_page()
    page.set_default_timeout(120_000)  # its script is megabytes: on a machine with all cores taken 30 s are too few
    dialogs: list[str] = []
    page.on("dialog", lambda dialog: (dialogs.append(dialog.message), dialog.dismiss()))
    page.goto(f"{address}/dashboard/studies/0")
    page.get_by_text("Pareto Front").wait_for()
    text = page.inner_text("body")
    assert all(name in text for name in ("top-1 (%)", "MACs", "<script>alert(1)</script>"))
    page.goto(f"{address}/dashboard/studies/0/trials?numbers=3")
    page.get_by_text("User Attributes").wait_for()
    text = " ".join(page.inner_text("body").split())
    assert all(f"{name} " in text for name in ("architecture", "macs", "feasible"))
    assert dialogs == []
