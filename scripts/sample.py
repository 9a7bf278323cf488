from ddpm_jax.cli import sample
from ddpm_jax.cli.run import run

if __name__ == "__main__":
    run(sample.main)
