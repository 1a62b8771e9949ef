"""Draw a finished run into its folder figures/: training curves, groups and what is typical of them, users on a map, gains."""
from utils.cli import run_folder_parser, run_main
from utils.run_figures import plot_run


def main() -> None:
    """Parse, draw, print."""
    options = run_folder_parser(__doc__).parse_args()
    print(plot_run(options.run_folder, options.train_dir, options.device, options.clip_model))


if __name__ == "__main__":
    run_main(main)
