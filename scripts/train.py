"""Train a DDPM. A run that was stopped, killed or cut off goes on by itself when the same command is given again.

Writes to the run directory: config.json, checkpoints/, metrics.jsonl, TensorBoard events, samples/, parameters.txt.
SIGTERM or Ctrl-C saves and ends with code 143 or 130. Several hosts: start the same command on each (docs/running.md).
"""

from ddpm_jax import cli
from ddpm_jax.loop import train


def main(argv: list[str] | None = None) -> int:
    flags = cli.parser(
        __doc__, "python scripts/train.py --config=configs/cifar10.py --workdir=runs/cifar10 --config.train.steps=1000"
    )
    cli.add_config(flags)
    cli.add_workdir(flags)
    cli.add_data_dir(flags)
    flags.add_argument("--step", type=cli.step, metavar="N", help="go on from checkpoint N instead of the newest")
    cli.add_hosts(flags)
    options, config = cli.parse_with_config(flags, argv)
    cli.join_hosts(options)
    return train(config, options.workdir, data_dir=options.data_dir, step=options.step)


if __name__ == "__main__":
    cli.run(main)
