"""What a run leaves, read back and made comparable."""
import csv
import json


def read_csv(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def rows_of(folder, stage):
    return [row for row in read_csv(folder / "metrics.csv") if row["stage"] == stage]


def without_seconds(folder):
    """The rows of metrics.csv without their times."""
    return [{name: value for name, value in row.items() if name != "seconds"} for row in read_csv(folder / "metrics.csv")]


def summary_of(folder):
    return json.loads((folder / "summary.json").read_text())


def change_json(path, change):
    """Rewrite a JSON file after `change(content)`."""
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def groups_of(folder):
    return {int(row["user"]): int(row["group"]) for row in read_csv(folder / "groups.csv")}


def ranks_of(folder, stage, split="test"):
    return {int(row["user"]): int(row[f"{split}_rank"]) for row in read_csv(folder / f"{stage}_ranks.csv")}


def tree(folder):
    """{relative path: bytes} of a folder's files."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def leftovers(folder):
    """What a write that did not end would leave."""
    return [path for path in folder.rglob(".*") if path.suffix in (".tmp", ".old")]


def outcome(folder):
    """All that a run left, bytes for bytes, without what may differ: times, drawings, the lock, the order in a set."""
    left = tree(folder)
    left.pop(".lock", None)
    for name in left:
        path = folder / name
        if path.suffix == ".png":
            left[name] = None
        elif path.name == "adapter_config.json":  # holds a set, in another order in every process
            options = json.loads(path.read_text()).items()
            left[name] = {option: sorted(value) if isinstance(value, list) else value for option, value in options}
        elif name == "metrics.csv":
            left[name] = without_seconds(folder)
        elif name == "summary.json":
            left[name] = {key: value for key, value in summary_of(folder).items() if key != "seconds"}
    return left
