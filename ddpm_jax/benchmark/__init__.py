"""How fast it is: measurements that scripts/benchmark.py makes. docs/performance.md says what they came to."""
