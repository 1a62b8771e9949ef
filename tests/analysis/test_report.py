"""The report: its numbers against hand-computed ones, and the page as a parser of HTML sees it."""
import base64
import io
import math
import re

import numpy as np
import pytest
from PIL import Image

from scripts import report
from tests.analysis.pages import check_page, classes
from tests.conftest import run_on_folder
from tests.run_files import groups_of, ranks_of, summary_of, tree
from utils.analysis.figures import group_colours, inline_svg, plot_gains, plot_users
from utils.analysis.groups import Interval, mean_interval, typical_items
from utils.analysis.page import thumbnail
from utils.analysis.report import choose_users
from utils.data.histories import Histories


@pytest.fixture(scope="module")
def tiny_page(tiny_run, analyse, tmp_path_factory):
    path = tmp_path_factory.mktemp("report") / "page.html"
    analyse(report, tiny_run.folder, "--users", 9, "--items", 4, "--output", path)
    return check_page(path)


def test_page_shows_what_the_run_found_and_every_item_in_a_list_leads_to_its_card_and_back(tiny_page, tiny_run):
    text, summary = tiny_page.text, summary_of(tiny_run.folder)
    for stage in ("global", "personalized"):
        for split in ("valid", "test"):
            for metric, value in summary[stage][split].items():
                assert f"{100 * value:.2f}" in text, (stage, split, metric)
    for group, size in enumerate(summary["group_sizes"]):
        assert f"Group {group} {size} users" in text or f"Group {group} {size} (" in text
    assert len(tiny_page.cards("user")) == 9
    assert len(classes(tiny_page, "views")) == 4
    assert len(tiny_page.all("figure")) == 4  # loss, NDCG, map, gains
    assert "1e-05" in text or "1e-06" in text  # settings
    links = [attributes["href"][1:] for attributes in tiny_page.all("a")]
    shown = {link for link in links if link.startswith("item-")}
    assert shown == set(tiny_page.cards("item")) and len(shown) > 4
    users = [link for link in links if link.startswith("user-")]
    assert len(users) > len(set(users)) == 9  # from the list of users and from items
    numbers = [int(name.removeprefix("user-")) for name in tiny_page.cards("user")]
    found = sum(ranks_of(tiny_run.folder, stage)[user] < 10 for stage in ("global", "personalized") for user in numbers)
    # test items are marked as often as they are among the ten best, also of the farthest group, whose ranks no file holds
    assert 0 < found <= len(classes(tiny_page, "marked")) <= found + len(numbers)


def test_titles_and_ids_stay_text_in_a_report_in_the_run_folder(copied_run, relabelled):
    titles, raw_id = ["<script>alert(1)</script> red lamp", '"><img src=x onerror=alert(1)>'], "&lt;B003'\"<i>"
    folder = relabelled(titles, ["B001", "B002", raw_id])
    before = tree(copied_run.folder)
    run_on_folder(report, copied_run.folder, "--train_dir", folder, "--users", 40, "--items", 30)
    assert set(tree(copied_run.folder)) - set(before) == {"report.html"}
    page = check_page(copied_run.folder / "report.html")
    assert all(text in page.text for text in (*titles, raw_id))


def test_runs_of_one_data_set_side_by_side(tiny_run, tiny_global_run, tiny_dataset, tmp_path, capsys):
    path = tmp_path / "both.html"
    arguments = (tiny_run.folder, "--train_dir", tiny_dataset.train_dir, "--users", 3, "--items", 2, "--output", path)
    run_on_folder(report, tiny_global_run, *arguments)
    page = check_page(path)
    assert "A: global" in page.text and "B: own group" in page.text
    assert "Run A" in page.text and "Run B" in page.text  # attention
    assert len(classes(page, "differ")) >= 3  # method, epochs
    before, after = summary_of(tiny_global_run)["global"], summary_of(tiny_run.folder)["personalized"]
    gains = [f"{100 * (value - before['test'][metric]):+.2f}" for metric, value in after["test"].items()]
    assert re.findall(r"([-+][\d.]+) \[", page.text.partition("B − A")[2])[:6] == gains
    assert "both.html" in capsys.readouterr().out


def test_run_without_groups_has_a_report(tiny_global_run, analyse, tmp_path):
    analyse(report, tiny_global_run, "--users", 2, "--items", 0, "--output", tmp_path / "page.html")
    text = check_page(tmp_path / "page.html").text
    assert "Drawn at random" in text and not any(part in text for part in ("Largest gain", "Gain by group", "“Moved”"))


def test_users_of_the_gallery_are_the_ones_that_gained_and_lost_most():
    ids = np.arange(10, 22)
    before = np.array([0, 1, 5, 30, 30, 2, 3, 9, 50, 40, 7, 8])
    after = np.array([0, 4, 0, 0, 25, 2, 60, 9, 50, 0, 7, 8])
    chosen = choose_users(ids, [before, after], 6)
    assert [user for user, *_ in chosen[:4]] == [19, 13, 16, 11]  # the first two to rank 0 from beyond 20, the farther one first
    assert [kind for _, kind, _ in chosen] == ["Largest gain"] * 2 + ["Largest loss"] * 2 + ["Drawn at random"] * 2
    assert len({user for user, _, _ in chosen} & set(ids.tolist())) == 6
    assert chosen[0][2] == "+1.00" and chosen == choose_users(ids, [before, after], 6)
    assert {choice[1:] for choice in choose_users(ids, [after], 30)} == {("Drawn at random", "")}
    assert len(choose_users(ids, [after], 30)) == 12


@pytest.mark.parametrize(("num_groups", "width"), [(1, 5), (12, 5), (25, 5), (3, 1)])
def test_map_has_as_many_colours_as_groups(num_groups, width):
    vectors = np.random.default_rng(0).normal(size=(80, width))
    svg = inline_svg("map", "users", plot_users, vectors, np.arange(80) % num_groups, num_groups)
    assert len(set(group_colours(num_groups))) == num_groups
    assert all(colour in svg for colour in group_colours(num_groups))


def test_figures_take_the_pages_colours_and_refer_to_nothing_else():
    svg = inline_svg("one", 'loss "x"', plot_gains, ["a < b & c"], [Interval(0.1, 0.0, 0.2, 9)])
    assert "currentColor" in svg and "var(--rule)" in svg and "http" not in svg and "<metadata" not in svg
    assert "a &lt; b &amp; c" in svg and "aria-label=\"loss &#34;x&#34;\"" in svg
    ids = set(re.findall(r'id="([^"]+)"', svg))
    assert ids and all(name.startswith("one-") for name in ids)


def decoded(uri):
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.partition("base64,")[2]))).convert("RGB")).astype(int)


def test_thumbnails_keep_the_whole_image_or_the_centre_that_clip_sees(tmp_path):
    image = Image.new("RGB", (300, 100), (255, 0, 0))
    image.paste((0, 0, 255), (100, 0, 200, 100))
    image.save(tmp_path / "wide.png")
    whole = decoded(thumbnail(tmp_path / "wide.png", 60))
    assert whole.shape == (20, 60, 3) and whole[10, 3, 0] > 200 and whole[10, 30, 2] > 200
    centre = decoded(thumbnail(tmp_path / "wide.png", 60, crop=1.0))
    assert centre.shape == (60, 60, 3) and centre[30, 3:57, 2].min() > 200
    image.paste((0, 255, 0), (125, 25, 175, 75))
    image.save(tmp_path / "wide.png")
    inner = decoded(thumbnail(tmp_path / "wide.png", 60, crop=0.5))  # a resized image of 300 x 100, cropped to 50 x 50
    assert inner.shape[0] == inner.shape[1] and inner[3:-3, 3:-3, 1].min() > 200
    (tmp_path / "broken.jpg").write_bytes(b"no image")
    for name in ("broken.jpg", "missing.jpg"):
        assert np.ptp(decoded(thumbnail(tmp_path / name))) <= 2  # grey


def test_typical_items_agree_with_the_formula_by_a_loop():
    random = np.random.default_rng(0)
    lists = [random.choice(np.arange(1, 13), size=6, p=np.arange(1, 13) / 78).tolist() for _ in range(30)]
    groups = np.arange(30) % 3
    found = typical_items(Histories.of_lists(lists), groups, 1, 12, top=4)
    ours, theirs, scores = {}, {}, {}
    for item in range(1, 13):
        y = ours[item] = sum(items.count(item) for items in lists[1::3])
        z = theirs[item] = sum(items.count(item) for items in lists) - y
        a = 12 * (y + z) / 180  # of the prior
        if y + z:
            difference = math.log((y + a) / (60 + 12 - y - a)) - math.log((z + a) / (120 + 12 - z - a))
            scores[item] = difference / math.sqrt(1 / (y + a) + 1 / (z + a))
    best = [item for item in sorted(scores, key=lambda item: -scores[item]) if scores[item] > 0][:4]
    lifts = [ours[item] / 60 / (theirs[item] / 120) if theirs[item] else math.inf for item in best]
    assert [(item, count) for item, count, _ in found] == [(item, ours[item]) for item in best] and len(best) > 1
    assert [lift for *_, lift in found] == pytest.approx(lifts)


def test_item_with_one_chance_interaction_is_less_typical_than_a_frequent_one_and_nothing_is_where_nobody_is():
    lists = [[1, 1, 1, 2], [1, 1, 3, 4], [3, 4, 4, 3], [1, 3, 4, 3]]
    found = typical_items(Histories.of_lists(lists), np.array([0, 0, 1, 1]), 0, 5)
    # by the ratio alone, item 2 would come first; neither what others have more often is typical, nor what nobody has
    assert found == [(1, 5, pytest.approx(5)), (2, 1, math.inf)]
    assert typical_items(Histories.of_lists([[1, 2], [2]]), np.array([0, 0]), 1, 2) == []
    assert typical_items(Histories.of_lists([[], []]), np.array([0, 1]), 1, 3) == []


def test_interval_agrees_with_one_computed_by_hand():
    half = 3.182446 * 1.290994 / 2  # t of 3 degrees of freedom at 97.5 %, times s / sqrt(n)
    assert mean_interval(np.array([1.0, 2.0, 3.0, 4.0])) == pytest.approx((2.5, 2.5 - half, 2.5 + half, 4), abs=1e-5)
    assert mean_interval(np.array([0.5])) == pytest.approx((0.5, np.nan, np.nan, 1), nan_ok=True)
    assert mean_interval(np.array([])) == pytest.approx((np.nan, np.nan, np.nan, 0), nan_ok=True)


def test_gains_by_group_follow_from_the_ranks_and_their_total_from_the_summary(tiny_run, tiny_page):
    def ndcg(rank):
        return 1 / math.log2(rank + 2) if rank < 20 else 0.0

    groups, summary = groups_of(tiny_run.folder), summary_of(tiny_run.folder)
    before, after = ranks_of(tiny_run.folder, "global"), ranks_of(tiny_run.folder, "personalized")
    for group in range(3):  # which sizes they have depends on the installed versions
        gain = mean_interval(np.array([ndcg(after[user]) - ndcg(before[user]) for user in after if groups[user] == group]))
        interval = f"{100 * gain.mean:+.2f} [{100 * gain.low:+.2f}, {100 * gain.high:+.2f}]" if gain.users > 1 else ""
        assert re.search(rf"Group {group} ?\d+ \(\d+ %\){gain.users} ?{re.escape(interval)}", tiny_page.text)
    total = summary["personalized"]["test"]["NDCG@20"] - summary["global"]["test"]["NDCG@20"]
    assert f"All users{len(after)}{100 * total:+.2f} [" in tiny_page.text
