"""Each module prints one table and writes benchmarks/results/NAME.json; ratios within one run."""
