"""Draw a finished run into its folder figures/: training curves, groups and what is typical of them, users on a map, gains."""
from utils.analysis.figures import plot_run
from utils.run.options import run_folder_parser, run_main


def main() -> None:
    """Parse, draw, print."""
    options = run_folder_parser(__doc__).parse_args()
    print(plot_run(options.run_folder, options.train_dir, options.device, options.clip_model))


if __name__ == "__main__":
    run_main(main)
