"""What the scripts for finished runs refuse: in one sentence, and nothing is written."""
import re

import pytest

from scripts import explain_item, export_vectors, recommend, report
from tests.conftest import NUM_ITEMS, run_on_folder
from tests.run_files import change_json, tree
from utils.common.errors import PerPEFTError

NEEDED = {report: [], recommend: ["--user", 8], explain_item: ["--item", 1], export_vectors: ["--output", "vectors"]}


def with_file(name, content="none"):
    return lambda folder: (folder / name).write_text(content)


def with_option(**changes):
    return lambda folder: change_json(folder / "summary.json", lambda summary: summary["config"].update(changes))


@pytest.mark.parametrize(
    ("script", "change", "arguments", "message"),
    [
        *((script, lambda folder: (folder / "summary.json").unlink(), (), "holds no finished run") for script in NEEDED),
        *((script, lambda folder: folder.rename("elsewhere"), (), "is not there") for script in NEEDED),
        (report, with_file("personalized_ranks.csv", "user,valid_rank,test_rank\n2,1\n"), (), "_ranks.csv cannot be read"),
        (report, with_file("metrics.csv", "stage,epoch\nglobal,first\n"), (), "metrics.csv cannot be read"),
        (report, with_file("summary.json", '{"config": {"method": "perpeft"}}'), (), "summary.json is damaged"),
        (explain_item, with_file("personalized/group_2/adapter/adapter_model.safetensors"), (), "group_2 cannot be read"),
        (export_vectors, with_file("personalized/group_1/projector.pth"), (), "projector.pth cannot be read"),
        (export_vectors, with_file("../../vectors"), (), "vectors exists; remove it"),
        (recommend, None, ("--user", 3), "user 3 is not in tiny_final.txt, whose users' numbers go from 2 to 80"),
        (recommend, None, ("--user", 8, "--other_group", 3), "--other_group 3: the run has groups 0 to 2; name another"),
        (recommend, with_option(method="global"), ("--user", 8, "--other_group", 1), "method 'global' has no groups"),
        (recommend, with_option(grouping="random"), ("--history", "B001"), "this run's groups are random"),
        (recommend, with_option(clip_model="moved/away"), (),
         "'moved/away', which is no folder here, lies elsewhere: name it by --clip_model DIR"),
        (recommend, None, ("--history", "B001", "B031"), "item 'B031' is neither a raw id of tiny nor a number from 1 to 30"),
        *((explain_item, None, ("--item", name), f"item '{name}' is neither a raw id of tiny nor a number from 1 to 30")
          for name in ("B031", "0", str(NUM_ITEMS + 1), "-1", "1.5", "²", "9" * 30)),
        *((explain_item, with_option(peft_type=kind), (), f"--peft_type {kind}, which leaves CLIP's attention as it is")
          for kind in ("iisan", "frozen", "none")),
    ],
)  # fmt: skip
def test_one_sentence_says_what_is_wrong(copied_run, analyse, tmp_path, monkeypatch, script, change, arguments, message):
    monkeypatch.chdir(tmp_path)
    if change:
        change(copied_run.folder)
    before = set(tmp_path.rglob("*")), tree(tmp_path)
    with pytest.raises(PerPEFTError, match=re.escape(message)) as raised:
        analyse(script, copied_run.folder, *(arguments or NEEDED[script]))
    assert len(str(raised.value).splitlines()) == 1
    assert (set(tmp_path.rglob("*")), tree(tmp_path)) == before


def test_runs_that_cannot_be_compared_are_refused_before_any_is_opened(copied_run, tiny_run, monkeypatch):
    monkeypatch.delattr("utils.analysis.report.open_finished")
    change_json(copied_run.folder / "summary.json", lambda summary: summary.update(dataset_fingerprint="other"))
    with pytest.raises(PerPEFTError, match="the runs are of different data sets"):
        run_on_folder(report, copied_run.folder, tiny_run.folder)
    with pytest.raises(PerPEFTError, match="27 runs are more than the 26"):
        run_on_folder(report, *[tiny_run.folder] * 27)


def test_page_needs_a_name_that_ends_in_html(tiny_run, analyse, capsys):
    with pytest.raises(SystemExit):
        analyse(recommend, tiny_run.folder, "--user", 8, "--output", "page.png")
    assert "argument --output: 'page.png': expected a name that ends in .html" in capsys.readouterr().err
