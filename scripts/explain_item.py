"""Show where CLIP attends in an item's title and image under each group's adapter of a finished LoRA or IA3 run."""
from utils.analysis.attention import as_text, explain_items, require_attention
from utils.analysis.command_line import html_path, parse_raw_ids, place_of, raw_id, run_folder_parser
from utils.analysis.page import Page
from utils.common.console import run_main
from utils.run.finished import finished_dataset, finished_options, item_number


def main() -> None:
    """Parse, explain, write, print."""
    parser = run_folder_parser(__doc__)
    parser.add_argument("--item", type=raw_id, required=True, help="raw id or number of the item")
    output_help = "page to write (default: explain_item_{number}.html in the run's figures/)"
    parser.add_argument("--output", type=html_path, help=output_help)
    options = parse_raw_ids(parser, "--item")
    folder = options.run_folder
    run_options, expected = finished_options(folder, **place_of(options))
    require_attention(run_options, folder)
    dataset = finished_dataset(run_options, expected)
    item = item_number(dataset, options.item)
    (explanation,) = explain_items(run_options, dataset, folder, [item])
    page = Page(dataset, f"Attention to item {item} in {folder.resolve().name}")
    page.add_attention(explanation)
    path = options.output or folder / "figures" / f"explain_item_{item}.html"
    page.write(path)
    print(f"{as_text(explanation)}\n{path}")


if __name__ == "__main__":
    run_main(main)
