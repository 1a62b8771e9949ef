"""Recommend items to a user by a finished run: under their own group's adapter, the global one, and another group's."""
from pathlib import Path

from utils.analysis.recommendation import known_user, new_user, recommend, told_recommendations, write_recommendations
from utils.common.errors import PerPEFTError
from utils.run.finished import open_finished
from utils.run.options import number, run_folder_parser, run_main


def main() -> None:
    """Parse, rank, draw, print."""
    parser = run_folder_parser(__doc__)
    whom = parser.add_mutually_exclusive_group(required=True)
    whom.add_argument("--user", type=number(int, 1, 2**63 - 1), default=None, help="the user's number in {name}_final.txt")
    whom.add_argument("--history", nargs="+", metavar="RAW_ID", default=None, help="what a new user has bought, in time order")
    parser.add_argument("--top_k", type=number(int, 1, 100), default=10, help="items to recommend")
    parser.add_argument("--other_group", type=number(int, 0), default=None, help="group to compare with (default: the farthest)")
    parser.add_argument(
        "--output", type=Path, default=None, help="PNG to write (default: recommend_{user}.png in the run's figures/)"
    )
    options = parser.parse_args()
    who = "new" if options.user is None else options.user
    path = options.output or options.run_folder / "figures" / f"recommend_{who}.png"
    if path.suffix.lower() != ".png":
        raise PerPEFTError(f"--output {path}: a name that ends in .png is wanted; a .json is written beside it")
    run = open_finished(options.run_folder, options.device, options.train_dir, options.clip_model)
    person = new_user(run.dataset, options.history) if options.user is None else known_user(run, options.user)
    rankings = recommend(run, person, options.top_k, options.other_group)
    json_path = write_recommendations(path, run, person, rankings, options.top_k)
    print(f"{told_recommendations(run, person, rankings)}\n{path}\n{json_path}")


if __name__ == "__main__":
    run_main(main)
