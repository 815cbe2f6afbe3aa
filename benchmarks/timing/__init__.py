"""What the timings of all operators share: harness, floors, rows and tables, thresholds, the environment."""
