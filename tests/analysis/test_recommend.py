"""Recommendations and exported vectors against peft, transformers and loops alone; and what is said where there are none."""
import json
from functools import partial

import numpy as np
import pytest
import torch

from scripts import export_vectors, recommend
from tests.analysis.pages import check_page, classes
from tests.plain import ITEMS, plain_model, plain_state
from tests.run_files import change_json, groups_of, ranks_of, tree
from utils.analysis.recommendation import best_items, choose_groups
from utils.common.errors import PerPEFTError


@torch.no_grad()
def plain_top(model, history, top_k=10):
    state = plain_state(model, history)
    scored = [(float(state @ model.e[item]), item) for item in ITEMS if item not in history]
    return sorted(scored, key=lambda pair: -pair[0])[:top_k]


@pytest.fixture(scope="module")
def plain(tiny_run, tiny_dataset, tiny_clip):
    """The plain models of the run: "global", 0, 1, 2."""
    folder = tiny_run.folder
    groups = {group: folder / "personalized" / f"group_{group}" for group in range(3)}
    models = {group: plain_model(where.parent, where, tiny_dataset, tiny_clip) for group, where in groups.items()}
    return models | {"global": plain_model(folder / "global", folder / "global", tiny_dataset, tiny_clip)}


@pytest.fixture
def recommended(copied_run, analyse):
    """Recommend by the copied run; returns what recommend_{name}.json holds."""

    def result(name, *arguments):
        analyse(recommend, copied_run.folder, *arguments)
        return json.loads((copied_run.folder / "figures" / f"recommend_{name}.json").read_text())

    return result


def assert_ranked(ranking, expected):
    items = ranking["items"]
    assert [(item["item"], item["rank"]) for item in items] == [(item, rank) for rank, (_, item) in enumerate(expected, 1)]
    assert [item["score"] for item in items] == pytest.approx([score for score, _ in expected], abs=1e-4)


@pytest.mark.parametrize("user", [2, 8, 50])
def test_recommendations_are_the_best_items_by_a_plain_loop(copied_run, tiny_dataset, plain, recommended, user, capsys):
    result = recommended(user, "--user", user, "--top_k", 7)
    *history, test_item = tiny_dataset.histories[user]
    own, by_global, other = result["recommendations"]
    group = groups_of(copied_run.folder)[user]
    assert (own["adapter"], own["group"]) == ("own group", group)
    assert (by_global["adapter"], by_global["group"]) == ("global", None)
    assert other["adapter"] == "other group" and other["group"] in {0, 1, 2} - {group}
    for ranking, model in ((own, plain[group]), (by_global, plain["global"]), (other, plain[other["group"]])):
        assert_ranked(ranking, plain_top(model, history, 7))
    assert result["user"] == user and [item["item"] for item in result["history"]] == history
    assert result["test_item"]["item"] == test_item
    assert own["rank_of_test_item"] == ranks_of(copied_run.folder, "personalized")[user] + 1
    assert by_global["rank_of_test_item"] == ranks_of(copied_run.folder, "global")[user] + 1
    first = own["items"][0]
    assert first["raw_id"] == f"B{first['item']:03d}"
    assert first["title"] == (tiny_dataset.titles[first["item"] - 1] or "No description available.")
    output = capsys.readouterr().out
    assert "training and validation interactions" in output and f"recommend_{user}.json" in output
    page = check_page(copied_run.folder / "figures" / f"recommend_{user}.html")
    assert len(classes(page, "row")) == 4 and first["title"] in page.text
    links = [attributes["href"] for attributes in page.all("a") if attributes["href"].startswith("#item-")]
    assert links[: len(history[-7:])] == [f"#item-{item}" for item in history[-7:]]
    assert len(classes(page, "marked")) == sum(ranking["rank_of_test_item"] <= 7 for ranking in result["recommendations"])


def test_new_users_get_the_nearest_group_and_are_compared_with_the_farthest(copied_run, tiny_dataset, plain, recommended):
    members = {group: [] for group in range(3)}
    for user, group in groups_of(copied_run.folder).items():
        items = tiny_dataset.histories[user]
        members[group].append(plain_state(plain["global"], items[:-1] if len(items) >= 3 else items))
    centres = {group: torch.stack(states).mean(0) for group, states in members.items()}
    assigned = set()
    for history in ([3, 14, 25], [21, 24, 28, 22], [11, 13, 17], [1]):
        result = recommended("new", "--history", *(f"B{item:03d}" for item in history))
        own, by_global, other = result["recommendations"]
        vector = plain_state(plain["global"], history)
        distances = {group: float((vector - centre).norm()) for group, centre in centres.items()}
        assert own["group"] == min(distances, key=distances.get) and other["group"] == max(distances, key=distances.get)
        assert_ranked(own, plain_top(plain[own["group"]], history))
        assert_ranked(by_global, plain_top(plain["global"], history))
        assert result["user"] is None and result["test_item"] is None and own["rank_of_test_item"] is None
        assigned.add(own["group"])
    assert len(assigned) > 1  # otherwise this test shows little


def test_chosen_other_group_is_used(copied_run, tiny_dataset, tiny_clip, plain, recommended):
    """Where groups are random too, and where CLIP lies elsewhere now."""
    changed = {"grouping": "random", "clip_model": "moved/away"}
    change_json(copied_run.folder / "summary.json", lambda summary: summary["config"].update(changed))
    own, recommended = groups_of(copied_run.folder)[8], partial(recommended, 8, "--clip_model", tiny_clip, "--user", 8)
    for other in {0, 1, 2} - {own}:
        found = recommended("--other_group", other, "--top_k", 3)["recommendations"][2]
        assert found["group"] == other
        assert_ranked(found, plain_top(plain[other], tiny_dataset.histories[8][:-1], 3))
    with pytest.raises(PerPEFTError, match=f"the user's own group is {own}"):
        recommended("--other_group", own)


def test_user_with_too_few_interactions_has_no_test_item(tiny_dataset, plain, recommended):
    result = recommended(6, "--user", 6)  # with one interaction
    assert result["test_item"] is None and len(result["history"]) == 1 and "fewer than 3" in result["history_is"]
    assert_ranked(result["recommendations"][1], plain_top(plain["global"], tiny_dataset.histories[6]))


def test_run_without_groups_recommends_and_exports_by_its_one_model(tiny_global_run, tiny_dataset, tiny_clip, analyse, tmp_path):
    plain_global = plain_model(tiny_global_run / "global", tiny_global_run / "global", tiny_dataset, tiny_clip)
    path = tmp_path / "pages" / "page.html"
    analyse(recommend, tiny_global_run, "--user", 8, "--output", path)
    (only,) = json.loads(path.with_suffix(".json").read_text())["recommendations"]
    assert_ranked(only, plain_top(plain_global, tiny_dataset.histories[8][:-1]))
    assert not (tiny_global_run / "figures").exists()
    analyse(export_vectors, tiny_global_run, "--output", tmp_path / "out")
    assert tree(tmp_path / "out").keys() == {"items_global.npy", "users.npy", "item_ids.txt", "user_ids.txt"}
    expected = plain_state(plain_global, tiny_dataset.histories[8])
    np.testing.assert_allclose(np.load(tmp_path / "out" / "users.npy")[3], expected, atol=2e-5)


def test_best_items_leaves_out_the_history_and_breaks_ties_by_number():
    table = torch.tensor([[9.0], [1.0], [3.0], [2.0], [3.0], [0.0]])  # row 0 is the padding item
    assert best_items(torch.tensor([1.0]), table, np.array([3]), 3) == [(2, 3), (4, 3), (1, 1)]
    assert best_items(torch.tensor([1.0]), table, np.arange(1, 6), 3) == []


def test_groups_without_users_are_never_chosen():
    centres = np.array([[0.0, 0.0], [np.nan, np.nan], [3.0, 0.0], [-4.0, 0.0]])
    assert choose_groups(np.array([1.0, 0.0]), None, centres, None) == (0, 3)
    assert choose_groups(np.array([-3.0, 0.0]), None, centres, None) == (3, 2)
    assert choose_groups(np.array([1.0, 0.0]), 2, centres, None) == (2, 3)
    assert choose_groups(np.array([1.0, 0.0]), 0, centres[:2], None) == (0, None)


@pytest.mark.parametrize("histories", ["all", "train_and_valid"])
def test_exported_vectors_are_those_of_plain_models(tiny_run, tiny_dataset, plain, analyse, tmp_path, histories):
    before, out = tree(tiny_run.folder), tmp_path / "out"
    analyse(export_vectors, tiny_run.folder, "--output", out, "--histories", histories)
    assert tree(tiny_run.folder) == before
    for name, model in (("global", plain["global"]), *((f"group_{group}", plain[group]) for group in range(3))):
        items = np.load(out / f"items_{name}.npy")
        np.testing.assert_allclose(items, model.e[1:].detach(), atol=2e-5)
        assert items.dtype == np.float32
    assert (out / "item_ids.txt").read_text().split("\n") == [*(f"B{item:03d}" for item in ITEMS), ""]
    ids = [int(line) for line in (out / "user_ids.txt").read_text().splitlines()]
    users, groups = np.load(out / "users.npy"), np.load(out / "user_groups.npy").tolist()
    assert dict(zip(ids, groups)) == groups_of(tiny_run.folder) and users.dtype == np.float32
    for user, group, vector in zip(ids, groups, users, strict=True):
        items = tiny_dataset.histories[user]
        known = items if histories == "all" or len(items) < 3 else items[:-1]
        np.testing.assert_allclose(vector, plain_state(plain[group], known), atol=2e-5)
