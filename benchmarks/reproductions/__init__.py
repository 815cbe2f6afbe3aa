"""Two papers' experiments on real text, each with one command: ``python -m benchmarks.reproductions.<name>``."""
