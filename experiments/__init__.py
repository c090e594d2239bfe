"""Studies whose numbers are kept: convergence.py compares the variants on Fashion-MNIST."""
