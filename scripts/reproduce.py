from ddpm_jax.cli import reproduce
from ddpm_jax.cli.run import run

if __name__ == "__main__":
    run(reproduce.main)
