"""scripts.reproduce_tables: the right runs, each once, and tables that say what the runs' files say."""
import json
import math
import shutil

import numpy as np
import pytest
from scipy import stats

from scripts import reproduce_tables
from tests.conftest import RUN, run_script, tiny_arguments
from tests.run_files import change_json, read_csv, summary_of
from utils.analysis.reproduction import ADAPTERS, estimated_seconds, format_plan, plan_runs
from utils.analysis.tables import blocks_of, finished_blocks, paper_figures, write_tables
from utils.common.errors import PerPEFTError
from utils.run.reports import write_ranks
from utils.run.run import Run
from utils.training.evaluation import METRICS, Ranks

ROWS = [  # of Tables 2 and 3: the method, its run, and the stage whose metrics count
    ("w/o MM", "none", "global"), ("Frozen MM", "frozen", "global"), ("Global PEFT", "lora_global", "global"),
    ("PerPEFT", "lora", "personalized"), ("w/o textual modality", "lora_image", "personalized"),
    ("w/o visual modality", "lora_text", "personalized"), ("w/o group-specific negatives", "lora_negatives_all", "personalized"),
    ("Large Global PEFT", "lora_large_global", "global"), ("Random grouping", "lora_grouping_random", "personalized"),
    ("PerPEFT", "lora", "personalized"),
]  # fmt: skip


def reproduce(*arguments):
    run_script(arguments, reproduce_tables.main)


@pytest.fixture(scope="module")
def tiny_tables(tiny_dataset, tiny_clip, tmp_path_factory):
    """Both tables of one tiny LoRA trial: the folder of runs, that of tables, and the command."""
    folder = tmp_path_factory.mktemp("reproduction")
    short = {"global_epochs": 1, "num_epochs": 1, "dataset": None}  # the tables set the data set and the adapter
    common = tiny_arguments(tiny_dataset, tiny_clip, folder / "runs", None, **short)
    arguments = ["--dataset", "tiny", "--trials", 1, "--tables_dir", folder / "tables", *common]
    reproduce(*arguments)
    return folder / "runs", folder / "tables", arguments


def test_every_row_says_what_its_run_says_and_stage_1_is_trained_once(tiny_tables):
    runs, tables, _ = tiny_tables
    found = {name: summary_of(runs / RUN.format(name)) for _, name, _ in ROWS}
    assert {run.name for run in runs.iterdir()} == {RUN.format(name) for name in found}
    for method in ("negatives_all", "grouping_random"):
        shared = found[f"lora_{method}"]["global"]
        assert shared["best_epoch"] == 0 and shared["test"] == found["lora"]["global"]["test"]
    assert {path.name for path in tables.iterdir()} == {"tiny.md", "tiny.csv", "tiny.tex"}
    for row, (method, name, stage) in zip(read_csv(tables / "tiny.csv"), ROWS, strict=True):
        value = found[name][stage]["test"]["NDCG@30"]
        assert row["method"] == method and float(row["NDCG@30"]) == pytest.approx(100 * value, abs=1e-4)
        assert row["NDCG@30_sd"] == row["NDCG@30_paper"] == "" and row["trials"] == "1"
    text = (tables / "tiny.md").read_text()
    assert text.count("PerPEFT against") == 2 and "paper" not in text


def test_a_second_call_trains_nothing_and_writes_all_that_is_finished(tiny_tables, monkeypatch, capsys):
    _, tables, arguments = tiny_tables
    before = (tables / "tiny.csv").read_text()
    monkeypatch.delattr(Run, "_train")
    for more, planned in (((), 9), (("--tables", 2), 4)):
        (tables / "tiny.csv").unlink()
        reproduce(*arguments, *more)
        assert (tables / "tiny.csv").read_text() == before
        assert f"0 of {planned} runs to do" in capsys.readouterr().out


def test_a_dry_run_lists_and_estimates_and_runs_nothing(tiny_tables, capsys, tmp_path):
    runs, _, arguments = tiny_tables
    copied = shutil.copytree(runs, tmp_path / "runs")
    shutil.rmtree(copied / RUN.format("lora_text"))
    reproduce(*arguments, "--output_dir", copied, "--tables_dir", tmp_path / "tables", "--dry_run")
    text = capsys.readouterr().out
    (line,) = [line for line in text.splitlines() if line.startswith("to do")]
    assert "--modality text" in line and " min" in line and "1 of 9 runs to do" in text
    assert not (tmp_path / "tables").exists() and len(list(copied.iterdir())) == 8


@pytest.fixture
def plan(tmp_path):
    """Plan runs of Table 2 on `arts` with an empty folder of runs."""
    return lambda trials, *kinds: plan_runs("arts", [2], list(kinds or ["lora"]), trials, ["--output_dir", str(tmp_path)])


def runs_of(runs, method, peft_type="lora"):
    return [run for run in runs if run.method.name == method and run.peft_type == peft_type]


def finish(run, share, seconds=60, valid=None):
    """Write what the tables read of a finished run: `share` of 40 users have rank 0, the others rank 100."""
    run.folder.mkdir(parents=True)
    users = np.arange(40)
    ranks = np.where(users < share * len(users), 0, 100)
    split = dict.fromkeys(METRICS, share)
    stage = {"best_epoch": 1, "valid": split | {"NDCG@20": valid or share}, "test": split}
    summary = {"global": stage, run.method.stage: stage, "seconds": {"global": seconds}, "config": run.options}
    summary |= {"dataset_fingerprint": None, "contents_fingerprint": None, "device": "cpu"}
    (run.folder / "summary.json").write_text(json.dumps(summary))
    write_ranks(run.folder / f"{run.method.stage}_ranks.csv", users + 1, Ranks(users, ranks, ranks))


def test_an_estimate_is_the_mean_of_runs_alike(plan):
    runs = plan(3, "lora", "iisan")
    mine, glob = runs_of(runs, "PerPEFT"), runs_of(runs, "Global PEFT")[0]
    assert estimated_seconds(mine[2], {}) is None
    finished = {mine[0]: 100.0, mine[1]: 300.0}
    assert estimated_seconds(mine[2], finished | {glob: 50.0}) == 200
    assert estimated_seconds(glob, finished) == 200  # nothing of its own row: its adapter's
    assert all(estimated_seconds(run, finished) is None for run in runs if run.peft_type == "iisan")
    for run, seconds in finished.items():
        finish(run, 0.1, seconds)
    # three more of LoRA's at 200 s, but for what has no adapter; of nothing of IISAN's is anything known
    assert format_plan(runs).endswith("16 of 18 runs to do, about 13 min, and 12 without an estimate")


def test_runs_of_several_adapters_share_what_has_none_as_do_plans_of_any_single_one():
    runs = plan_runs("arts", [2, 3], list(ADAPTERS), 2, [])
    assert len({run.folder for run in runs}) == len(runs)
    first = [run for run in runs if run.trial == 0]
    assert len(first) == 2 + 3 * 6 + 1  # w/o MM and Frozen once; six of every adapter; a larger rank of LoRA alone
    assert [run.trial for run in runs] == sorted(run.trial for run in runs)
    assert runs[0].folder.name == "arts_lora_lr0.0001_wd0.0001_seed0"  # whom others start from comes first
    assert runs_of(runs, "PerPEFT", "iisan")[0].command() == "python3 perpeft_iisan.py --dataset arts --trial 0"
    (found,) = {tuple(run.folder.name for run in plan_runs("beauty_care", [2], [kind], 1, [])[:2]) for kind in ADAPTERS}
    assert found == ("beauty_care_none_lr0.0001_wd0.0001_seed0", "beauty_care_frozen_lr0.0001_wd0.0001_seed0")


def test_options_of_clips_adapters_do_not_reach_iisan():
    passed_on = ["--rank", "8", "--maxlen", "8", "--gradient_checkpointing", "--precision=bf16"]
    runs = plan_runs("arts", [2], list(ADAPTERS), 1, passed_on)
    (lora,), (ia3,), (iisan,) = (runs_of(runs, "PerPEFT", kind) for kind in ADAPTERS)
    assert lora.options["rank"] == 8 and iisan.options["rank"] is None and iisan.options["maxlen"] == 8
    assert "--rank" not in iisan.arguments and iisan.arguments[-2:] == ("--maxlen", "8")
    assert (ia3.options["rank"], ia3.options["precision"]) == (4, "bf16")
    assert runs_of(runs, "Frozen MM")[0].arguments[-2:] == ("--maxlen", "8")


@pytest.mark.parametrize("flag", ["--method", "--trial", "--init_from=x", "--peft_type"])
def test_what_the_rows_set_cannot_be_passed_on(flag):
    with pytest.raises(PerPEFTError, match="leave it out"):
        plan_runs("arts", [2], ["lora"], 1, [flag, "1"])


@pytest.fixture
def arts_blocks(plan):
    """Table 2 on `arts`: three trials of PerPEFT, two of Global PEFT, one of Frozen MM, none of w/o MM; one run of IISAN."""
    runs = plan(3, "lora", "iisan")
    for name, shares in {"PerPEFT": (0.5, 0.6, 0.7), "Global PEFT": (0.4, 0.5), "Frozen MM": (0.4,)}.items():
        for run, share in zip(runs_of(runs, name), shares):
            finish(run, share, valid=0.9 if name == "Frozen MM" else None)
    finish(runs_of(runs, "PerPEFT", "iisan")[0], 0.2)
    return blocks_of(runs, "arts")


def test_the_strongest_is_chosen_by_validation_and_tested_over_users_in_common_trials(arts_blocks):
    compared = arts_blocks[0].comparison()
    assert compared.strongest == "Frozen MM"  # whose test figures are worse than the global's, but its validation's are better
    assert (compared.users, compared.trials) == (40, 1)  # only trial 0 is there of both
    difference = np.array([0.0] * 16 + [1] * 4 + [0] * 20)  # hits of 20 users against 16
    p = 2 * stats.t.sf(difference.mean() / (difference.std(ddof=1) / math.sqrt(40)), 39)
    assert (compared.difference, compared.p) == pytest.approx((10, p))
    assert f"+10.00 points, p = {p:.4f}" in str(compared)


def test_no_user_differs_and_no_common_trial(plan):
    runs = plan(2)
    glob, ours = runs_of(runs, "Global PEFT"), runs_of(runs, "PerPEFT")
    finish(glob[1], 0.5)
    finish(ours[0], 0.5)
    assert blocks_of(runs, "arts")[0].comparison() is None
    finish(glob[0], 0.5)
    compared = blocks_of(runs, "arts")[0].comparison()
    assert compared.difference == 0 and math.isnan(compared.p) and "no user differs" in str(compared)


def test_runs_with_other_settings_are_never_taken_for_these(plan, tmp_path):
    finish(plan(1)[0], 0.5)
    shorter = ["--output_dir", str(tmp_path), "--num_epochs", "3"]
    assert finished_blocks("arts", 1, shorter) == []
    with pytest.raises(PerPEFTError, match="num_epochs 20 instead of 3"):  # before anything is trained or written
        reproduce("--dataset", "arts", "--trials", 1, "--tables_dir", tmp_path / "tables", *shorter)
    assert not (tmp_path / "tables").exists()


def test_runs_of_different_data_or_damaged_ones_make_no_table(plan):
    runs = plan(2)[:2]
    for run in runs:
        finish(run, 0.5)
    changes = {"different data": lambda summary: summary.update(dataset_fingerprint="other"), "json is damaged": dict.clear}
    for message, change in changes.items():
        change_json(runs[1].folder / "summary.json", change)
        with pytest.raises(PerPEFTError, match=message):
            blocks_of(runs, "arts")


def test_markdown_csv_and_latex_of_the_same_figures(arts_blocks, tmp_path):
    write_tables(tmp_path / "tables", "arts", arts_blocks, trials=3)
    text, _, of_iisan = (tmp_path / "tables" / "arts.md").read_text().partition("Table 2, iisan")
    assert "| PerPEFT [1 of 3 trials] | 20.00 |" in of_iisan and "| Frozen MM [1 of 3 trials] | **40.00** |" in of_iisan
    assert "Global PEFT" not in of_iisan  # another adapter's runs stay out
    assert "| method | HR@20 | paper | HR@30 | paper | NDCG@20 | paper | NDCG@30 | paper |" in text
    assert "| PerPEFT | **60.00 (10.00)** | 6.62 |" in text  # the paper's figure beside ours
    assert "| Global PEFT [2 of 3 trials] | 45.00 (7.07) | 6.01 |" in text
    assert "| Frozen MM [1 of 3 trials] | 40.00 | 4.87 |" in text
    tex = (tmp_path / "tables" / "arts.tex").read_text()
    assert r"PerPEFT & \textbf{60.00 (10.00)} & 6.62 &" in tex and r"Global PEFT [2 of 3 trials] & 45.00 (7.07) & 6.01" in tex
    assert tex.count(r"\begin{tabular}") == tex.count(r"\end{tabular}") == 2 and "% PerPEFT against Frozen MM" in tex
    rows = read_csv(tmp_path / "tables" / "arts.csv")
    assert rows[2]["HR@20"] == "60.0000" and rows[2]["HR@20_sd"] == "10.0000"
    assert (rows[2]["strongest_other"], rows[2]["difference"]) == ("Frozen MM", "10.0000") and rows[1]["p"] == ""


def test_the_papers_figures():
    assert paper_figures(2, "lora", "Global PEFT", "arts") == {"HR@20": 6.01, "HR@30": 7.81, "NDCG@20": 2.42, "NDCG@30": 2.81}
    assert paper_figures(2, "iisan", "w/o MM", "arts")["HR@20"] == 3.91
    assert paper_figures(3, "lora", "PerPEFT", "sports_outdoors")["HR@20"] == 4.82
    assert paper_figures(3, "ia3", "Random grouping", "arts") == {} == paper_figures(2, "lora", "PerPEFT", "mine")
