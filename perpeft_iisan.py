"""PerPEFT with IISAN on cached CLIP states: global PEFT, user grouping, personalized PEFT, full-ranking evaluation."""
from utils.common.console import run_main
from utils.run.build import has_groups
from utils.run.opening import train
from utils.run.run import Run


def stages(run: Run) -> None:
    """The paper's three stages."""
    run.train_global()  # 1. one adapter for all users
    if has_groups(run.options):  # the methods that it is compared with end here
        run.group_users()  # 2. users with similar interests into C groups
        run.train_personalized()  # 3. an adapter for every group


def main(arguments: list[str] | None = None) -> None:
    """Train, continue, or evaluate a run."""
    train(__doc__, ("iisan",), stages, arguments)


if __name__ == "__main__":
    run_main(main)
