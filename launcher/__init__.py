"""Thin scripts around the library; each is also `sdit <verb>`."""
