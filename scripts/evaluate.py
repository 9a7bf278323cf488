from ddpm_jax.cli import evaluate
from ddpm_jax.cli.run import run

if __name__ == "__main__":
    run(evaluate.main)
