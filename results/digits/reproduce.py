"""The main job on digits, and whether what it finds holds up when retrained: every number of this folder.

    python results/digits/reproduce.py            # about 40 minutes on 2 cores; resumes where it was stopped

1. `poolshare search --data digits`, as the README gives it.
2. The dense architecture and the best one within 60 % of its MACs are exported.
3. Each is retrained with 5 seeds, from the supernet's weights and from scratch, and tested; pairs share a seed.
4. The same ViT is trained alone, by labels only, for as many steps as the supernet, and tested beside the
   supernet's own dense path.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pandas as pd
from rich.console import Console
from scipy.stats import t as student_t

from poolshare.search.exported.export import export_architecture
from poolshare.search.exported.retrain import retrain
from poolshare.search.job.folder import RunFolder
from poolshare.search.job.prepare import prepare
from poolshare.search.job.records import write_csv, write_json
from poolshare.search.report.report import load_report
from poolshare.search.scoring import answers
from poolshare.space import Architecture
from poolshare.supernet import SuperNet
from poolshare.supernet.training.checkpoint import load_tensors
from poolshare.supernet.training.loop import train_model

HERE = Path(__file__).parent
SEEDS = range(5)


def paired(table: pd.DataFrame, mode: str) -> dict[str, Any]:
    """Mean test top-1 of both models, and the mean difference with its 95 % t-interval over seeds, in points."""
    wide = table[table["start"] == mode].pivot(index="seed", columns="model", values="test_top1")
    difference = wide["searched"] - wide["dense"]
    reach = student_t.ppf(0.975, len(wide) - 1) * difference.std(ddof=1) / len(wide) ** 0.5
    return {
        "start": mode,
        "seeds": len(wide),
        "dense_top1": round(wide["dense"].mean(), 3),
        "searched_top1": round(wide["searched"].mean(), 3),
        "difference": round(difference.mean(), 3),
        "interval_95": [round(difference.mean() - reach, 3), round(difference.mean() + reach, 3)],
    }


def dense_path(folder: RunFolder) -> dict[str, float]:
    """Test top-1 of the supernet's dense path, and of the same ViT trained alone on the same images as often."""
    job = prepare(folder.config)
    job.supernet.load_state_dict(load_tensors(folder.supernet)[0])
    (correct,), images, _ = answers(job.supernet, job.data.eval_loader("test", 256)).counts
    name, options = job.supernet.base
    alone = SuperNet.from_timm(name, job.supernet.space, **options)

    train_model(alone, job.data, job.recipe, seed=folder.config.seed)
    (correct_alone,), _, _ = answers(alone, job.data.eval_loader("test", 256)).counts
    return {"supernet_dense_path": 100 * correct / images, "trained_alone": 100 * correct_alone / images}


def main() -> None:
    """Run or resume everything."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("runs/digits-results"), help="for weights; can be deleted")
    work = parser.parse_args().work
    console = Console(stderr=True)
    run = work / "run"
    command = "from poolshare.search.cli import main; main()"
    subprocess.run([sys.executable, "-c", command, "search", "--data", "digits", "--out", str(run)], check=True)
    folder = RunFolder.open(run)
    for name in ("candidates.csv", "pareto.csv", "pareto.png", "summary.json"):
        shutil.copy(run / name, HERE / name)
    summary = folder.read_summary()
    chosen = load_report(folder, "60%").pick("budget")
    architectures = {"dense": summary["dense"]["architecture"], "searched": chosen.architecture}
    rows = []
    for model, text in architectures.items():
        exported = work / model
        if not exported.exists():
            export_architecture(folder, Architecture.parse(text), exported)
        for start in ("supernet", "scratch"):
            for seed in SEEDS:
                target = work / f"{model}-{start}-{seed}"
                if not target.exists():
                    retrain(exported, target, from_scratch=start == "scratch", seed=seed, console=console)
                facts = json.loads((target / "architecture.json").read_text(encoding="utf-8"))
                row = {"model": model, "start": start, "seed": seed}
                row |= {key: facts[key] for key in ("architecture", "macs", "parameters")}
                tested = {"test_top1": facts["test_score"], "test_correct": facts["test_details"]["correct"]}
                rows.append(row | tested | {"test_total": facts["test_total"]})
                write_csv(HERE / "retrained.csv", pd.DataFrame(rows))
    table = pd.DataFrame(rows)
    result = {
        "architectures": architectures,
        "share_of_dense_macs": round(float(chosen["macs"]) / summary["dense"]["macs"], 4),
        "frontier_points": len(pd.read_csv(folder.pareto)),
        "paired": [paired(table, start) for start in ("supernet", "scratch")],
        "dense_path_test_top1": dense_path(folder),
        "commit": subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True
        ).stdout.strip(),
        "versions": summary["versions"],
    }
    write_json(HERE / "result.json", result)
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
