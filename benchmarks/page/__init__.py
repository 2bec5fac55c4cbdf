"""docs/speed.md, written from results: ``python -m benchmarks.page``."""
