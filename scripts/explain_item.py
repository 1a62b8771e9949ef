"""Show what CLIP looks at in an item's title and image under each group's adapter of a finished LoRA or IA3 run."""
from pathlib import Path

from utils.analysis.attention import draw_explanation, explain_item, told_explanation
from utils.run.options import run_folder_parser, run_main


def main() -> None:
    """Parse, look, draw, print."""
    parser = run_folder_parser(__doc__)
    parser.add_argument("--item", required=True, help="raw id or number of the item")
    parser.add_argument(
        "--output", type=Path, default=None, help="PNG to write (default: explain_item_{number}.png in the run's figures/)"
    )
    options = parser.parse_args()
    item, explanation = explain_item(options.run_folder, options.item, options.train_dir, options.device, options.clip_model)
    path = options.output or options.run_folder / "figures" / f"explain_item_{item}.png"
    draw_explanation(path, explanation)
    print(f"{told_explanation(explanation)}\n{path}")


if __name__ == "__main__":
    run_main(main)
