"""Export a finished run's item and user vectors for a vector search engine: inner products are the model's scores."""
from pathlib import Path

from utils.analysis.command_line import place_of, run_folder_parser
from utils.analysis.export import export_vectors
from utils.common.console import run_main
from utils.run.finished import open_finished


def main() -> None:
    """Parse, encode, write, print."""
    parser = run_folder_parser(__doc__)
    parser.add_argument("--output", type=Path, required=True, help="a new folder")
    histories_help = "the histories behind user vectors: all interactions, or those that the test metrics were computed from"
    parser.add_argument("--histories", choices=("all", "train_and_valid"), default="all", help=histories_help)
    options = parser.parse_args()
    run = open_finished(options.run_folder, **place_of(options))
    shapes = export_vectors(run, options.output, options.histories)
    for name, shape in shapes.items():
        print(f"{name:<24}{' x '.join(map(str, shape))}")
    print(f"and item_ids.txt, user_ids.txt, one line a row, in {options.output}")


if __name__ == "__main__":
    run_main(main)
