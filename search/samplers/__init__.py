"""Which architectures come next: all of them, evolved ones, or those that Optuna's samplers ask for."""
