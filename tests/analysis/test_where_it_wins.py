"""Where PerPEFT wins, against cases computed by hand and a run's own ranks."""
import numpy as np
import pytest

from scripts import where_it_wins as script
from tests.conftest import run_script
from tests.run_files import change_json, ranks_of
from utils.analysis.export import export_vectors
from utils.analysis.where_it_wins import by_depth, by_stratum, rank_in_groups
from utils.common.errors import PerPEFTError
from utils.data.histories import Histories
from utils.run.finished import open_finished


def row(text, first):
    return next(line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith(f"| {first} |"))


def test_tables_by_depth_and_by_stratum_which_begins_at_its_bound_by_hand():
    text = by_depth(np.array([0, 4, 19, 600]), np.array([1, 4, 20, 3]))
    # differences of users at 1: 1 0 0 0, at 20: 0 0 1 -1; t(0.975, 3) = 3.1824
    assert row(text, "HR@1") == ["HR@1", "0.00", "25.00", "+25.00 ± 79.56"]
    assert row(text, "HR@20") == ["HR@20", "75.00", "75.00", "+0.00 ± 129.92"]
    assert row(text, "HR@500")[1:3] == ["100.00", "75.00"]
    own, other, lengths = np.array([0, 0, 99]), np.array([0, 50, 99]), np.array([3, 4, 5])
    text = by_stratum(own, other, lengths, {1: "low", 4: "high", 9: "none"}, "length")
    assert row(text, "low")[1:3] == ["33 %", "+0.00 ± nan"]
    assert row(text, "high")[1:3] == ["67 %", "+50.00 ± 635.31"]  # t(0.975, 1) = 12.706, deviation 70.71
    assert "none" not in text


def test_ranks_and_share_by_hand(tmp_path):
    """Users 0 and 1 are in group 0, whose items are 1, 2; user 2 is alone in group 1 with item 5; scores are 6, 5, ..., 1."""
    histories = Histories.of_lists([[1, 3, 2], [2, 3, 4], [5, 6, 1]])
    np.save(tmp_path / "users.npy", np.ones((3, 1), np.float32))
    np.save(tmp_path / "items_global.npy", np.arange(6, 0, -1, dtype=np.float32)[:, None])
    found = rank_in_groups(tmp_path, histories, np.array([0, 0, 1]), top=2)
    # candidates in order, without training and validation items: user 0: 2 4 5 6; user 1: 1 4 5 6; user 2: 1 2 3 4
    parts = (found.among_all, found.among_own, found.outside, found.share)
    assert [part.tolist() for part in parts] == [[0, 1, 0], [0, 6, 6], [0, 1, 1], [0.5, 0.5, 1.0]]
    with pytest.raises(PerPEFTError, match="3 users, but the data set has 1"):
        rank_in_groups(tmp_path, Histories.of_lists([[1, 3, 2]]), np.array([0]))
    with pytest.raises(PerPEFTError, match="holds no vectors of scripts.export_vectors"):
        rank_in_groups(tmp_path / "nowhere", histories, np.array([0, 0, 1]))


def test_a_run_against_one_without_groups(tiny_run, tiny_global_run, copied_run, tiny_dataset, tmp_path, capsys):
    run = open_finished(tiny_run.folder, "cpu", tiny_dataset.train_dir)
    export_vectors(run, tmp_path / "exported", "train_and_valid")
    found = rank_in_groups(tmp_path / "exported", run.dataset.histories, np.load(tmp_path / "exported" / "user_groups.npy"))
    ranks = np.array(list(ranks_of(tiny_run.folder, "personalized").values()))
    np.testing.assert_array_equal(found.among_all, ranks)
    more = [tiny_global_run, "--train_dir", tiny_dataset.train_dir]
    run_script([tiny_run.folder, *more, "--vectors", tmp_path / "exported"], script.main)
    text = capsys.readouterr().out
    assert by_depth(ranks, np.array(list(ranks_of(tiny_global_run, "global").values()))) in text
    assert row(text, "exported")[1] == f"{100 * found.share.mean():.1f} %"
    with pytest.raises(PerPEFTError, match="has no groups"):
        run_script([tiny_global_run, *more], script.main)
    change_json(copied_run.folder / "summary.json", lambda summary: summary.update(dataset_fingerprint="other"))
    with pytest.raises(PerPEFTError, match="data set 'tiny' is not the one that .* was trained on"):
        run_script([tiny_run.folder, copied_run.folder, *more[1:]], script.main)
