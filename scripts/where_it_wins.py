"""Compare a PerPEFT run with another by rank depth, user, item and group; share of its top 20 outside the group's items."""
from pathlib import Path

from utils.analysis.where_it_wins import compare
from utils.common.console import run_main, script_parser


def main() -> None:
    """Parse, compare, print."""
    parser = script_parser(__doc__, "--train_dir")
    parser.add_argument("run_folder", type=Path, help="folder of a finished PerPEFT run, as in ./runs")
    parser.add_argument("other_folder", type=Path, help="folder of the finished run that it is compared with")
    vectors_help = "folders of scripts.export_vectors with --histories train_and_valid"
    parser.add_argument("--vectors", type=Path, nargs="+", default=[], help=vectors_help)
    options = parser.parse_args()
    print(compare(options.run_folder, options.other_folder, options.train_dir, options.vectors))


if __name__ == "__main__":
    run_main(main)
