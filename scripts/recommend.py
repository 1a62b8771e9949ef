"""Recommend items to a user by a finished run: under their own group's adapter, the global one, and another group's."""
from utils.analysis.command_line import html_path, parse_raw_ids, place_of, raw_id, run_folder_parser
from utils.analysis.page import Page
from utils.analysis.recommendation import Recommender, as_json, as_text, known_user, new_user
from utils.common.console import number, run_main
from utils.common.files import write_json
from utils.run.finished import open_finished


def main() -> None:
    """Parse, rank, write, print."""
    parser = run_folder_parser(__doc__)
    who = parser.add_mutually_exclusive_group(required=True)
    who.add_argument("--user", type=number(int, 1, 2**63 - 1), help="the user's number in {name}_final.txt")
    history_help = "raw ids of a new user's history, in time order"
    who.add_argument("--history", type=raw_id, nargs="+", metavar="RAW_ID", help=history_help)
    parser.add_argument("--top_k", type=number(int, 1, 100), default=10, help="items to recommend")
    parser.add_argument("--other_group", type=number(int, 0), help="group to compare with (default: the farthest)")
    parser.add_argument("--output", type=html_path, help="page to write (default: recommend_{user}.html in the run's figures/)")
    options = parse_raw_ids(parser, "--history")
    run = open_finished(options.run_folder, **place_of(options))
    person = new_user(run.dataset, options.history) if options.user is None else known_user(run, options.user)
    rankings = Recommender(run).recommend(person, options.top_k, options.other_group)
    page = Page(run.dataset, f"Recommended to {person.name} by {run.folder.resolve().name}")
    page.add_user(person, [("", ranking) for ranking in rankings], options.top_k)
    path = options.output or options.run_folder / "figures" / f"recommend_{options.user or 'new'}.html"
    page.write(path)
    write_json(path.with_suffix(".json"), as_json(run, person, rankings))
    print(f"{as_text(person, rankings)}\n{path}\n{path.with_suffix('.json')}")


if __name__ == "__main__":
    run_main(main)
