"""The parts of benchmarks/scale.py: what is counted, and the phases of a run that are driven."""
