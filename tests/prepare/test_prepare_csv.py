"""A shop's two CSV files become a data set, and every mistake in them is told with its line."""
import pytest

from scripts import prepare_csv
from tests.conftest import draw_image
from tests.prepare.test_prepare_amazon import histories_of, run
from utils.data.dataset import read_dataset
from utils.items.data_check import check_dataset
from utils.prepare.interactions import key_of
from utils.prepare.shop_tables import _read_time

ORDER = ["lamp", "mug", "chair"]


@pytest.fixture
def shop(tmp_path, monkeypatch):
    """Runs the script on two texts, and gives the exit code; images lie in shop/img."""
    (tmp_path / "shop" / "img").mkdir(parents=True)
    for number, name in enumerate(ORDER):
        draw_image(number).save(tmp_path / "shop" / "img" / f"{name}.png")

    def make(interactions, items, *options):
        for name, text in (("buys.csv", interactions), ("items.csv", items)):
            content = text if isinstance(text, bytes) else text.encode()
            (tmp_path / "shop" / name).write_bytes(content)
        folder = ["--interactions", tmp_path / "shop" / "buys.csv", "--items", tmp_path / "shop" / "items.csv"]
        return run(monkeypatch, *folder, "--name", "mine", "--train_dir", tmp_path / "data", *options, main=prepare_csv.main)

    return make


ITEMS = "item,title,image\nlamp,A &amp; B,img/lamp.png\nmug,Mug,img/mug.png\nchair,Chair,img/chair.png\n"
BUYS = "user,item,time\n" + "".join(f"{user},{item},{time}\n" for user in "abcde" for time, item in enumerate(ORDER))


def test_by_hand(shop, tmp_path, capsys):
    buys = (
        "\ufeffitem , price, time,user\r\n"
        'mug,3,2024-01-02,"ann"\r\nlamp,3,2024-01-01T10:00:00Z, ann\r\n\r\nchair,3,2024-01-01T12:00:00+05:00,ann\r\n'
        "lamp,3,2025-01-01,ann\r\ngone,3,2025-01-01,ann\r\nlamp,3,2025-01-01,bob\r\n"
    )
    items = f"image,item,title\n{tmp_path / 'shop' / 'img' / 'lamp.png'},lamp,A &amp; B\nimg/mug.png,mug,\"Mug,\nblue\"\n"
    items += "img/chair.png,chair,Chair\n,vase,Vase\nimg/mug.png,rug, \n"
    assert shop(buys, items, "--core", 1) == 0
    told = capsys.readouterr().out
    expected = {"ann": ["chair", "lamp", "mug"], "bob": ["lamp"]}
    assert histories_of(tmp_path / "data", "mine") == [expected[user] for user in sorted(expected, key=key_of)]
    dataset = read_dataset(tmp_path / "data", "mine")
    assert dict(zip(dataset.raw_ids, dataset.titles)) == {"lamp": "A & B", "mug": "Mug, blue", "chair": "Chair"}
    assert all(path.read_bytes().startswith(b"\xff\xd8\xff") for path in dataset.image_paths)
    assert check_dataset(tmp_path / "data", "mine", 2).usable
    rows = dict(row.rsplit(maxsplit=1) for row in told.splitlines() if row.startswith("  "))
    rows = {name.strip(): count for name, count in rows.items()}
    assert (rows["no title"], rows["no image"], rows["read"]) == ("1", "1", "6")
    assert (rows["of an item that is unknown or left out"], rows["of an item the user had bought before"]) == ("1", "1")
    assert told.endswith("--C 2\n")


def test_the_core_is_five_unless_told(shop, tmp_path, capsys):
    assert shop(BUYS, ITEMS) == 2  # five users, but three items
    assert "no user and no item has 5 purchases" in capsys.readouterr().err
    assert shop(BUYS, ITEMS, "--core", 3) == 0
    assert histories_of(tmp_path / "data", "mine") == [ORDER] * 5


def test_a_image_that_is_none_goes_with_its_item(shop, tmp_path, capsys):
    (tmp_path / "shop" / "img" / "vase.png").write_text("no image")
    buys = BUYS + "".join(f"{user},vase,9\n" for user in "abcde")
    assert shop(buys, ITEMS + "vase,Vase,img/vase.png\n", "--core", 3) == 0
    assert histories_of(tmp_path / "data", "mine") == [ORDER] * 5
    assert "vase," in (tmp_path / "data" / "mine_failed_images.csv").read_text()
    assert "mine_failed_images.csv" in capsys.readouterr().out


@pytest.mark.parametrize("interactions, items, told", [
    ("user,time\na,1\n", ITEMS, "buys.csv lacks the columns item (its first line names: user, time)"),
    ("", ITEMS, "buys.csv lacks the columns user, item, time (its first line names: none)"),
    ("user,item,time\n", ITEMS, "none of 0 purchases is of an item that can be used"),
    (BUYS, "item;title;image\n", "items.csv lacks the columns item, title, image (its first line names: item;title;image)"),
    (BUYS, "item,title,image\n", "items.csv has no item with title and image (it has no lines)"),
    (BUYS, "item,title,image\na,,\n", "items.csv has no item with title and image (no title: 1)"),
    (BUYS + "a,mug,yesterday\nb,mug,\nc,mug,nan\n", ITEMS, "(3): line 17 'yesterday', line 18 '', line 19 'nan'"),
    (BUYS + "a,mug,2024-01-01\n", ITEMS, "numbers as well as dates in the column time (1): line 2 '0', line 17 '2024-01-01'"),
    (BUYS + ",mug,3\na,,3\n", ITEMS, "lines without user or item (2): line 17, line 18"),
    (BUYS + "a,mug\n", ITEMS, "lines with fewer than 3 columns (1): line 17"),
    (BUYS, ITEMS + "vase,Vase,img/vase.png\n", "image files that are missing (1): line 5 'img/vase.png'"),
    (BUYS, ITEMS + "vase,Vase,img\n", "image files that are missing (1): line 5 'img'"),
    (BUYS, ITEMS + "mug,Mug,img/mug.png\n", "items that stand there twice (1): line 5 'mug' as line 3"),
    (BUYS, ITEMS + '"a\nb",Mug,img/mug.png\n', "item ids that are empty or hold a line break (1): line 6 'a\\nb'"),
    (BUYS, ITEMS + f"vase,Vase,{'x' * 5000}\n", "image files that are missing (1): line 5"),
    (BUYS, ITEMS + ",Vase,img/mug.png\n", "item ids that are empty or hold a line break (1): line 5 ''"),
    (BUYS.encode("utf-16"), ITEMS, "buys.csv is no UTF-8 text"),
    (BUYS + '"' + "x" * 200_000, ITEMS, "line 17: no CSV (field larger than field limit"),
])  # fmt: skip
def test_mistakes_are_told(shop, tmp_path, capsys, interactions, items, told):
    assert shop(interactions, items, "--core", 1) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and told in error
    assert not list((tmp_path / "data").glob("mine_*"))


def test_many_mistakes_are_few_lines(shop, capsys):
    assert shop(BUYS + "a,mug,?\n" * 5000, ITEMS) == 2
    error = capsys.readouterr().err
    assert "(5000): line 17 '?'" in error and "and 4990 more" in error and len(error) < 1000


def test_missing_files(shop, tmp_path, monkeypatch, capsys):
    shop(BUYS, ITEMS, "--core", 1)
    for place, name in ((1, "buys"), (3, "items")):
        options = ["--interactions", tmp_path / "shop" / "buys.csv", "--items", tmp_path / "shop" / "items.csv", "--name", "b"]
        options[place] = tmp_path / f"{name}.csv"
        assert run(monkeypatch, *options, "--train_dir", tmp_path / "data", main=prepare_csv.main) == 2
        assert f"{name}.csv" in capsys.readouterr().err


@pytest.mark.parametrize("text, time", [
    ("17", (17.0, False)), ("1.5e9", (1.5e9, False)), ("-1", (-1.0, False)), ("inf", (None, False)),
    ("1970-01-02", (86400.0, True)), ("1970-01-01T01:00:00Z", (3600.0, True)), ("1970-01-01 01:00:00+01:00", (0.0, True)),
    ("1969-12-31", (-86400.0, True)), ("31.12.1999", (None, True)), ("1970-13-01", (None, True)), ("", (None, True)),
])  # fmt: skip
def test_times(text, time):
    assert _read_time(text) == time


def test_a_restart_that_fails_keeps_the_old_data_set_and_one_that_works_its_hidden_states_not(shop, tmp_path):
    assert shop(BUYS, ITEMS, "--core", 3) == 0
    final, states = tmp_path / "data" / "mine_final.txt", tmp_path / "data" / "mine_preX.pt"
    before = final.read_text()
    states.write_text("of these titles and images")
    (tmp_path / "shop" / "img" / "none.png").write_text("no image")
    lost = "item,title,image\n" + "".join(f"new {item},New,img/none.png\n" for item in ORDER)
    buys = BUYS.replace("lamp", "new lamp").replace("mug", "new mug").replace("chair", "new chair")
    assert shop(buys, lost, "--core", 3, "--restart") == 2
    assert final.read_text() == before and states.exists()
    assert shop(BUYS, ITEMS.replace("Mug", "Cup"), "--core", 3, "--restart") == 0
    assert final.exists() and not states.exists()
