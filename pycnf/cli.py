"""The command line: ``python -m pycnf train | sample | evaluate``.

Only parsing and help live here. Bad input is reported by one sentence on stderr and exit code 2.
"""

from __future__ import annotations

import argparse
import sys
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from .data import BITS_PER_DIM, BITS_PER_DIM_WHERE, SOURCES, TOYS, InputError, nearest
from .flows import SolveError

PROGRAM = "python -m pycnf"

OVERVIEW = f"""\
Trains continuous normalizing flows: give it points, and it learns a density that you
can draw samples from and evaluate.

  {PROGRAM} train 8gaussians      train on a toy density and see pictures (a minute or two)
  {PROGRAM} train digits          train on 8x8 images of handwritten digits
  {PROGRAM} train data.csv        train on your own table: .csv, .npy or .pt
  {PROGRAM} sample runs/data-1    draw new rows from the trained flow
  {PROGRAM} evaluate runs/data-1  its test log-likelihood, beside a Gaussian's

Each training makes a folder runs/NAME-1, runs/NAME-2, ... with pictures, metrics and
checkpoints. Ctrl-C stops and saves; the last line it prints continues where it stopped.

  {PROGRAM} COMMAND --help        every option of a command
  {PROGRAM} --version             versions, instruction set and threads in use
"""

TRAIN = f"""\
Trains a flow on SOURCE and ends with its test log-likelihood and pictures.

SOURCE is one of
  a toy density    {" ".join(list(TOYS)[:4])}
                   {" ".join(list(TOYS)[4:])}
  digits           1797 images of handwritten digits, 8x8 pixels, 17 grey levels
                   (comes with scikit-learn)
  your file        .csv   a number in every cell; header and delimiter are found
                   .npy   a NumPy array, rows x columns
                   .pt    a PyTorch tensor, rows x columns

examples
  {PROGRAM} train pinwheel
  {PROGRAM} train wine.csv --drop class --seed 3
  {PROGRAM} train points.npy --hidden 128,128 --layer concat --activation softplus
  {PROGRAM} train --resume runs/wine-1
  {PROGRAM} train --resume runs/wine-1 --steps 6000     train a finished run on
"""

TRAIN_NOTES = f"""\
what is in the run folder
  pictures/      data beside samples beside density, loss and evaluations (with matplotlib)
  metrics.jsonl  one JSON object a line: loss, validation NLL, function evaluations, ...
  config.json    every choice, yours and the defaults
  best.pt        the checkpoint with the best validation, used by sample and evaluate
  last.pt        the newest checkpoint, used by --resume
  evaluation.json  likelihoods of the test rows

what the numbers mean
  Losses are negative log-likelihoods in nats a row, in the units of your data. Validation and
  test likelihoods use the exact divergence, dopri5 and a tolerance of 1e-5, however cheaply the
  flow was trained. For digits they are shown as bits per dimension,
  {BITS_PER_DIM},
  where
{textwrap.indent(textwrap.fill(BITS_PER_DIM_WHERE + ".", 90), "  ")}
  NFE 26/24 is the number of evaluations of the network in a solve, forward and backward; none
  backward means that what the forward solve computed was kept.

exit codes
  0 done   1 the loss diverged   2 something given cannot be used   130 Ctrl-C, saved
"""


class _Parser(argparse.ArgumentParser):
    """argparse, but with one sentence for an error and the nearest names for a misspelling."""

    def error(self, message: str) -> NoReturn:
        message = message.removeprefix("argument ")
        if message.startswith("unrecognized arguments: "):
            word = message.removeprefix("unrecognized arguments: ").split()[0].split("=")[0]
            options = [o for action in self._actions for o in action.option_strings]
            raise InputError(
                f"Unknown option {word}{nearest(word, options)}; {self.prog} --help lists them."
                if word.startswith("-")
                else f"'{word}' is one argument too many; {self.prog} --help shows what is wanted."
            )
        raise InputError(f"{message[:1].upper()}{message[1:]} ({self.prog} --help shows how).")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command.

    Args:
        argv: the arguments, ``sys.argv[1:]`` by default.

    Returns:
        The exit code: 0 done, 1 diverged, 2 bad input, 130 interrupted.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a terminal without Unicode gets "?", not a crash
    try:
        return _dispatch(list(sys.argv[1:] if argv is None else argv))
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except SolveError as error:
        print(f"error: The flow has no solution there: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output (head, say) has had enough
        sys.stderr.close()
        return 141
    except OSError as error:
        if error.filename is None:
            raise
        name = str(error.filename)
        shown = name if len(name) <= 60 else name[:57] + "..."
        print(f"error: {shown}: {error.strerror}.", file=sys.stderr)
        return 2


def _dispatch(argv: list[str]) -> int:
    commands: dict[str, tuple[Callable[[], _Parser], Callable[[argparse.Namespace], int]]] = {
        "train": (_train_parser, _train),
        "sample": (_sample_parser, _sample),
        "evaluate": (_evaluate_parser, _evaluate),
    }
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(OVERVIEW, end="")
        return 0
    name, *rest = argv
    if name == "--version":
        print(_version())
        return 0
    if name not in commands:
        if name in SOURCES or Path(name).is_file():
            raise InputError(f"'{name}' is no command; write {PROGRAM} train {name}.")
        raise InputError(
            f"Unknown command '{name}'{nearest(name, commands)}; "
            f"there are {', '.join(commands)} ({PROGRAM} --help shows how to use them)."
        )
    make_parser, command = commands[name]
    return command(make_parser().parse_args(rest))


# ---- train -------------------------------------------------------------------------------------


def _train_parser() -> _Parser:
    parser = _parser("train", "[SOURCE] [options]", TRAIN, TRAIN_NOTES)
    add = _adder(parser, "the run")
    add("source", nargs="?", metavar="SOURCE", help=argparse.SUPPRESS)
    add("--out", type=Path, metavar="DIR", help="run folder (runs/SOURCE-N, the next free N)")
    add("--resume", type=Path, metavar="DIR", help="continue the run in DIR, to the same result")
    add("--steps", type=_whole, metavar="N", help="optimizer steps")
    add("--epochs", type=_number, metavar="N", help="the same, in passes over the training rows")
    add("--patience", type=_whole, metavar="N", help="validations without progress; 0: no limit")
    add("--evaluate-every", type=_whole, metavar="N", help="steps between validations")
    add("--seed", type=_whole, metavar="N", help="of everything random (0)")
    add(
        "--threads",
        type=_whole,
        metavar="N",
        help="CPU threads (1; PyTorch's choice for large batches of wide nets)",
    )
    add("--quiet", action="store_true", help="print nothing but warnings and errors")

    add = _adder(parser, "the data")
    add("--columns", type=_words, metavar="A,B,...", help="keep these columns (names or numbers)")
    add("--drop", type=_words, metavar="A,B,...", help="leave these columns out")
    add("--validation", type=_number, metavar="PART", help="of the rows, to choose by (0.1)")
    add("--test", type=_number, metavar="PART", help="of the rows, to be judged by (0.1)")
    add("--preprocess", metavar="HOW", help="standardize, or whiten (for digits)")

    add = _adder(parser, "the flow (defaults suit the source)")
    add("--hidden", type=_widths, metavar="H,H,...", help="widths of the hidden layers")
    add("--layer", metavar="NAME", help="how layers see time: concatsquash, concat, ignore, ...")
    add("--activation", metavar="NAME", help="tanh, softplus, silu, elu, gelu, sin, ...")
    add("--time", metavar="HOW", help="t, or fourier:F for F Fourier features")
    add("--dtype", metavar="NAME", help="float32 or float64")

    add = _adder(parser, "the solver, while training")
    add("--method", metavar="NAME", help="dopri5, dopri8, tsit5, bosh3, rk4, euler, ...")
    add("--rtol", type=_number, metavar="TOL", help="relative tolerance")
    add("--atol", type=_number, metavar="TOL", help="absolute tolerance")
    add("--step-size", type=_number, metavar="H", help="of fixed-step methods (0.1)")
    add("--divergence", metavar="HOW", help="hutchinson (an estimate) or exact")
    add("--probes", type=_whole, metavar="K", help="Hutchinson probes, instead of exact")
    add("--gradient", metavar="HOW", help="discrete, continuous, seminorm or autograd")

    add = _adder(parser, "the optimizer (AdamW)")
    add("--batch", type=_whole, metavar="ROWS", help="rows a step")
    add("--lr", type=_number, metavar="RATE", help="highest learning rate")
    add("--weight-decay", type=_number, metavar="RATE", help="decoupled weight decay")
    add("--clip", type=_number, metavar="NORM", help="largest norm of the gradient")
    return parser


def _train(arguments: argparse.Namespace) -> int:
    given: dict[str, Any] = vars(arguments)
    source, out, again = (given.pop(name, None) for name in ("source", "out", "resume"))
    quiet = given.pop("quiet", False)
    from .train import resume, start

    if again is not None:
        if source is not None or out is not None:
            raise InputError("--resume takes the run's own folder and source; give neither again.")
        return resume(again, given, quiet)
    if source is None:
        raise InputError(
            f"Give a SOURCE to train on: one of {', '.join(SOURCES)}, or a .csv, .npy or .pt file."
        )
    return start({"source": source, **given}, out, quiet)


# ---- sample ------------------------------------------------------------------------------------


def _sample_parser() -> _Parser:
    about = f"""\
Draws samples from a trained flow, in the units of its data.

examples
  {PROGRAM} sample runs/wine-1                     1000 rows into runs/wine-1/samples.csv
  {PROGRAM} sample runs/wine-1 -n 50 --out new.npy
  {PROGRAM} sample runs/digits-1 -n 100 --out digits.png    a picture beside the data
"""
    parser = _parser("sample", "DIR [options]", about)
    add = _adder(parser, "options")
    add("folder", type=Path, metavar="DIR", help=argparse.SUPPRESS)
    add("-n", "--number", type=_whole, metavar="N", help="how many (1000)")
    add("--out", type=Path, metavar="FILE", help=".csv, .npy, .pt or .png (DIR/samples.csv)")
    add("--seed", type=_whole, metavar="N", help="of the samples (0)")
    add("--checkpoint", type=_which, metavar="WHICH", help="best or last (best)")
    add("--quiet", action="store_true", help="print nothing but warnings and errors")
    return parser


def _sample(arguments: argparse.Namespace) -> int:
    given = vars(arguments)
    from .train.sample import sample

    path = sample(
        given["folder"],
        number=given.get("number", 1000),
        out=given.get("out"),
        seed=given.get("seed", 0),
        which=given.get("checkpoint", "best"),
    )
    if not given.get("quiet"):
        print(path)
    return 0


# ---- evaluate ----------------------------------------------------------------------------------


def _evaluate_parser() -> _Parser:
    about = f"""\
Evaluates a trained flow with the exact divergence: the log-likelihood of its test rows
beside that of a full-covariance Gaussian fitted to the same training rows (for digits also
in bits per dimension), and redraws the pictures. With --data, of other rows.

examples
  {PROGRAM} evaluate runs/wine-1
  {PROGRAM} evaluate runs/wine-1 --data new.csv --out scores.csv    log p(x) of each row
"""
    parser = _parser("evaluate", "DIR [options]", about)
    add = _adder(parser, "options")
    add("folder", type=Path, metavar="DIR", help=argparse.SUPPRESS)
    add("--data", type=Path, metavar="FILE", help="rows to judge instead of the test rows")
    add("--out", type=Path, metavar="FILE", help="write log p(x) of each of these rows (.csv, ...)")
    add("--checkpoint", type=_which, metavar="WHICH", help="best or last (best)")
    add("--quiet", action="store_true", help="print nothing but warnings and errors")
    return parser


def _evaluate(arguments: argparse.Namespace) -> int:
    given = vars(arguments)
    which = given.get("checkpoint", "best")

    def say(text: str) -> None:
        if not given.get("quiet"):
            print(text)

    if "data" in given:
        from .train.sample import score

        say(score(given["folder"], given["data"], given.get("out"), which))
        return 0
    if "out" in given:
        raise InputError("--out writes the scores of --data FILE; give that too.")
    from .train.folder import RunFolder
    from .train.run import show

    show(RunFolder(given["folder"]), say, which)
    return 0


# ---- common ------------------------------------------------------------------------------------


def _parser(name: str, usage: str, about: str, notes: str | None = None) -> _Parser:
    return _Parser(
        prog=f"{PROGRAM} {name}",
        usage=f"{PROGRAM} {name} {usage}",
        description=about,
        epilog=notes,
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(
            prog, max_help_position=28, width=100
        ),
        argument_default=argparse.SUPPRESS,  # only what the user gave; defaults depend on the data
        allow_abbrev=False,
        add_help=False,
    )


def _adder(parser: _Parser, title: str) -> Callable[..., Any]:
    group = parser.add_argument_group(title)
    if len(parser._action_groups) == 3:  # our first; argparse makes two of its own
        group.add_argument("-h", "--help", action="help", help="show this")
    return group.add_argument


def _version() -> str:
    import pycnf

    facts = "\n".join(f"  {name}: {value}" for name, value in pycnf.build_info().items())
    return f"pycnf {pycnf.__version__}\n{facts}"


def _whole(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"'{text}' is not a whole number") from None


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"'{text}' is not a number") from None


def _words(text: str) -> tuple[str, ...]:
    return tuple(word.strip() for word in text.split(",") if word.strip())


def _widths(text: str) -> tuple[int, ...]:
    return tuple(_whole(word) for word in text.split("," if "," in text else "-"))


def _which(text: str) -> str:
    if text not in ("best", "last"):
        raise argparse.ArgumentTypeError(f"'{text}' is neither best nor last")
    return text
