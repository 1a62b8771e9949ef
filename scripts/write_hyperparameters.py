"""Write perpeft_hyperparameter.pickle from the table of the paper's settings in utils/run/hyperparameters.py."""
from utils.common.console import run_main, script_parser
from utils.run.hyperparameters import HYPERPARAMETER_FILE, write_hyperparameters


def main() -> None:
    """Parse, write, print."""
    script_parser(__doc__).parse_args()
    write_hyperparameters()
    print(f"wrote {HYPERPARAMETER_FILE}")


if __name__ == "__main__":
    run_main(main)
