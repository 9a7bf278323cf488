"""Plot curves of metrics.jsonl, one line a run: the training loss and the held-out loss by default."""

from pathlib import Path

from ddpm_jax import cli
from ddpm_jax.curves import plot_curves


def main(argv: list[str] | None = None) -> None:
    flags = cli.parser(__doc__, "python scripts/plot_metrics.py --workdir=runs/digits --workdir=runs/cifar10 --output=curves.png")
    flags.add_argument("--workdir", type=Path, required=True, action="append", metavar="DIR", help="a run; repeatable")
    flags.add_argument("--output", type=Path, required=True, metavar="FILE", help="a .png")
    flags.add_argument(
        "--metrics", default="loss,held_out_loss", metavar="A,B", help="names in metrics.jsonl (default: loss,held_out_loss)"
    )
    flags.add_argument("--log", action="store_true", help="logarithmic values")
    options = flags.parse_args(argv)
    plot_curves(options.workdir, options.metrics.split(","), options.output, log=options.log)
    print(f"wrote {options.output}")


if __name__ == "__main__":
    cli.run(main)
