"""The command line: the paper's defaults, a clear refusal of what cannot be used, help that shows all of it."""
import re

import pytest

from models.peft_configs import UNSUITABLE
from tests.conftest import parsed
from utils.run import hyperparameters
from utils.run.options import build_parser, parse_options

KINDS = ("lora", "ia3")
ACTIONS = build_parser("", KINDS)._actions
NUMERIC = sorted(f"--{action.dest}" for action in ACTIONS if action.type and action.dest not in ("peft_type", "peft_config"))


def test_help_groups_options_and_shows_the_papers_defaults_once(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit) as raised:
        parse_options("PerPEFT", KINDS, ["--help"])
    text = capsys.readouterr().out
    assert raised.value.code == 0
    assert set(re.findall(r"^  --(\w+)", text, re.M)) == set(vars(parsed(["--dataset", "x"])))
    for default in ("./dataset", "./runs", "openai/clip-vit-base-patch32", "1e-06", "0.3"):
        assert f"default: {default}" in text
    assert "(default: None)" not in text
    assert all(line.count("default:") <= 1 for line in text.splitlines())


def test_defaults_are_the_papers():
    options = parsed(["--dataset", "sports_outdoors"])
    expected = {
        "hidden_units": 32, "num_blocks": 2, "num_heads": 4, "maxlen": 10, "dropout_rate": 0.3, "weight_scalar": 0.5, "rank": 4,
        "batch_size": 16, "global_epochs": 10, "num_epochs": 20, "C": 8, "l2_emb": 1e-6, "lr": 1e-4, "wdecay": 1e-4, "trial": 0,
        "clip_model": "openai/clip-vit-base-patch32", "train_dir": "./dataset", "output_dir": "./runs",
        "method": "perpeft", "modality": "both", "negatives": "group", "grouping": "kmeans",
    }  # fmt: skip
    assert {name: getattr(options, name) for name in expected} == expected


FILE = "(perpeft_hyperparameter.pickle)"


@pytest.mark.parametrize(
    ("words", "kinds", "rates", "shown"),
    [
        ("toys_games --peft_type lora", KINDS, (1e-4, 5e-5), f"lr 0.0001 {FILE}, wdecay 5e-05 {FILE}"),
        ("beauty_care --peft_type ia3", KINDS, (1e-4, 1e-5), f"lr 0.0001 {FILE}, wdecay 1e-05 {FILE}"),
        ("beauty_care --peft_type lora --lr 3e-4", KINDS, (3e-4, 1e-5), f"lr 0.0003 (given), wdecay 1e-05 {FILE}"),
        ("beauty_care --peft_type lora --wdecay 0", KINDS, (1e-4, 0), f"lr 0.0001 {FILE}, wdecay 0 (given)"),
        ("arts --method frozen", KINDS, (1e-4, 1e-4), "lr 0.0001 (default), wdecay 0.0001 (default)"),
        ("grocery", KINDS, (1e-4, 1e-4), "lr 0.0001 (default), wdecay 0.0001 (default)"),
        ("demo", KINDS, (1e-3, 1e-4), "lr 0.001 (the demo's), wdecay 0.0001 (the demo's)"),
        ("demo", ("iisan",), (3e-4, 1e-4), "lr 0.0003 (the demo's), wdecay 0.0001 (the demo's)"),
    ],
)
def test_rate_and_decay_come_from_the_pickle_where_they_are_not_given(words, kinds, rates, shown, capsys):
    options = parsed(["--dataset", *words.split()], kinds)
    assert (options.lr, options.wdecay) == rates and shown in capsys.readouterr().out


NONSENSE = ("nan", "inf", "-1", "-1e-9", "2147483649", "1e400", "9" * 400, "many", "", "0x10", "1,5")
MAY_BE_ZERO = {"--wdecay", "--l2_emb", "--dropout_rate", "--weight_scalar", "--trial"}


@pytest.mark.parametrize("option", NUMERIC)
def test_no_number_option_takes_nonsense_nor_zero_where_it_means_nothing(option, capsys):
    for value in NONSENSE if option in MAY_BE_ZERO else (*NONSENSE, "0"):
        with pytest.raises(SystemExit, match="2"):
            parsed(["--dataset", "x", f"{option}={value}"])
        message = capsys.readouterr().err
        assert f"argument {option}: " in message and len(message.splitlines()[-1]) < 200
    if option in MAY_BE_ZERO:
        assert getattr(parsed(["--dataset", "x", f"{option}=0"]), option.strip("-")) == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--num_heads=5", "--num_heads 5 must divide --hidden_units 32"),
        ("--rest", "--rest"),  # not taken for --restart
        ("--gradient_checkpointing", "unrecognized arguments: --gradient_checkpointing"),  # of IISAN
        ("--dropout_rate=1", "argument --dropout_rate"),
        ("--batch_size=1.5", "argument --batch_size"),
        ("--peft_type=adapter", "argument --peft_type"),
        ("--method best", "invalid choice: 'best'"),
        ("--rank=8 --peft_type=ia3", "--rank 8 has no effect with --peft_type ia3"),
        ("--rank=8 --method=none", "--rank 8 has no effect with --method none"),
        ("--precision=bf16 --method=frozen", "--precision bf16 has no effect with --method frozen"),
        ("--gradient_checkpointing --method=frozen", "--gradient_checkpointing has no effect with --method frozen"),
        ("--method global --negatives all", "--negatives all has no effect with --method global"),
        ("--method frozen --grouping random", "--grouping random has no effect with --method frozen"),
        ("--method none --modality text", "--modality text has no effect with --method none"),
        ("--method global --init_from somewhere", "--init_from somewhere has no effect with --method global"),
        ("--method large_global --peft_type ia3", "needs --peft_type lora"),
        ("--clip_model some --text_model other", "--clip_model and --text_model exclude each other"),
        ("--text_model other", "--text_model alone reads titles only; add --modality text"),
        ("--image_model some", "--image_model needs --text_model"),
        ("--text_pooling cls", "--text_pooling needs --text_model"),
        *((f"--peft_type {kind}", f"{kind} cannot be used: {reason}") for kind, reason in UNSUITABLE.items()),
    ],
)
def test_options_that_cannot_be_used_are_named(words, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        parsed(["--dataset", "x", *words.split()], ("iisan",) if "unrecognized" in message else KINDS)
    assert message in " ".join(capsys.readouterr().err.split())


def test_bad_rate_in_the_hyperparameter_file_is_reported(monkeypatch, capsys):
    monkeypatch.setattr(hyperparameters, "read_hyperparameters", lambda *_: {"lr": -1.0, "wdecay": 1e-4})
    with pytest.raises(SystemExit, match="2"):
        parsed(["--dataset", "arts"])
    assert "perpeft_hyperparameter.pickle's lr for arts and lora: -1.0 must be above 0" in capsys.readouterr().err
