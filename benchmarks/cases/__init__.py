"""One module a benchmark: ``python -m benchmarks.cases.layer -o layer.json``."""
