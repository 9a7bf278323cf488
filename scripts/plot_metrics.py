from ddpm_jax.cli import plot_metrics
from ddpm_jax.cli.run import run

if __name__ == "__main__":
    run(plot_metrics.main)
