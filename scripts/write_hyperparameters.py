"""Write perpeft_hyperparameter.pickle from the table of the paper's settings in utils/run/hyperparameters.py."""
from utils.run.hyperparameters import HYPERPARAMETER_FILE, write_hyperparameters

if __name__ == "__main__":
    write_hyperparameters()
    print(f"wrote {HYPERPARAMETER_FILE}")
