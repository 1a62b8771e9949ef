"""Train a small CLIP on a data set's own images and titles, for where openai/clip-vit-base-patch32 cannot be had."""
from pathlib import Path

from utils.common.console import number, run_main, script_parser
from utils.common.errors import PerPEFTError
from utils.data.dataset import read_dataset
from utils.prepare import small_clip
from utils.prepare.demo import make_demo
from utils.prepare.demo_clip import demo_pairs

SIZES = {  # in the order of `small_clip.Sizes`
    "image_size": "pixels a side", "patch_size": "pixels a side of a patch", "width": "of both towers",
    "layers": "of each tower", "heads": "attention heads a layer",
}  # fmt: skip


def main() -> None:
    """Parse, read images and titles, train, print."""
    parser = script_parser(__doc__, "--train_dir")
    count = number(int, 1, 1_000_000)
    parser.add_argument("--dataset", required=True, help="name of the data set; 'demo' learns from other drawn items")
    parser.add_argument("--output", type=Path, default=None, help="folder to make (default: {train_dir}/{dataset}_small_clip)")
    for name, what in SIZES.items():
        parser.add_argument(f"--{name}", type=count, default=getattr(small_clip.SMALL, name), help=what)
    parser.add_argument("--steps", type=count, default=small_clip.STEPS, help="training steps")
    parser.add_argument("--batch_size", type=count, default=small_clip.BATCH_SIZE, help="pairs a step")
    parser.add_argument("--seed", type=number(int, 0, 2**31), default=0, help="of weights and batches")
    options = parser.parse_args()

    folder = options.output or Path(options.train_dir) / f"{options.dataset}_small_clip"
    if folder.exists():
        raise PerPEFTError(f"{folder} is there already; remove it, or name another folder by --output")
    sizes = small_clip.Sizes(*(getattr(options, name) for name in SIZES))  # checked now, not after minutes of reading
    if options.dataset == "demo":
        make_demo(options.train_dir)
        images, titles = demo_pairs(options.image_size, options.seed)
    else:
        dataset = read_dataset(options.train_dir, options.dataset)
        images, titles = small_clip.read_images(dataset.image_paths, options.image_size), dataset.titles
    training = {name: getattr(options, name) for name in ("steps", "batch_size", "seed")}
    # drawn images are many, and their brand signs too small to be shifted; photographs are few and must not be memorised
    small_clip.train_small_clip(images, titles, folder, sizes, **training, vary=options.dataset != "demo")
    print(f"Use it by --dataset {options.dataset} --clip_model {folder}")


if __name__ == "__main__":
    run_main(main)
