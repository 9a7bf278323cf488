from ddpm_jax.cli import benchmark
from ddpm_jax.cli.run import run

if __name__ == "__main__":
    run(benchmark.main)
