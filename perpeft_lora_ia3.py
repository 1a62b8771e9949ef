"""PerPEFT with LoRA or (IA)3 on CLIP: global PEFT, user grouping, personalized PEFT, full-ranking evaluation."""
from utils.run.options import parse_options, run_main
from utils.run.pipeline import open_run


def main(arguments: list[str] | None = None) -> None:
    """The paper's three stages."""
    options = parse_options(__doc__, arguments=arguments, peft_types=("lora", "ia3"))
    with open_run(options) as run:
        if run is None:  # finished before
            return
        if options.inference_only:
            run.evaluate_saved()
            return
        run.train_global()  # 1. one adapter for all users
        if options.method == "perpeft":  # the methods that it is compared with end here
            run.group_users()  # 2. users with like tastes into C groups
            run.train_personalized()  # 3. an adapter for every group
        run.report()


if __name__ == "__main__":
    run_main(main)
