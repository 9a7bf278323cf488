from ddpm_jax.cli import prepare_data
from ddpm_jax.cli.run import run

if __name__ == "__main__":
    run(prepare_data.main)
