"""Write a page that shows a finished run, or several of one data set side by side: results, groups, users, attention."""
import time

from utils.analysis.command_line import html_path, place_of, run_folder_parser
from utils.analysis.report import write_report
from utils.common.console import number, run_main


def main() -> None:
    """Parse, collect, write, print."""
    parser = run_folder_parser(__doc__, several=True)
    parser.add_argument("--users", type=number(int, 0, 1000), default=30, help="users whose recommendations are shown")
    parser.add_argument("--items", type=number(int, 0, 1000), default=30, help="items whose attention is shown (LoRA and IA3)")
    default = "report.html in the run folder; of several runs, beside the first one's folder"
    parser.add_argument("--output", type=html_path, help=f"page to write (default: {default})")
    options = parser.parse_args()
    start, folders = time.monotonic(), options.run_folder
    path = options.output or (folders[0] if len(folders) == 1 else folders[0].resolve().parent) / "report.html"
    write_report(folders, path, place_of(options), options.users, options.items)
    print(f"{path} ({path.stat().st_size / 1e6:.1f} MB, {time.monotonic() - start:.0f} s); open it in a browser")


if __name__ == "__main__":
    run_main(main)
