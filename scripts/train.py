from ddpm_jax.cli import train
from ddpm_jax.cli.run import run

if __name__ == "__main__":
    run(train.main)
