from ddpm_jax.cli import first_hour
from ddpm_jax.cli.run import run

if __name__ == "__main__":
    run(first_hour.main)
