"""The benchmark: ``python -m smi_kernels.bench`` times the scores beside what a user would write instead."""
