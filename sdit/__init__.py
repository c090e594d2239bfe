"""sdit: a distributed training system for Switch-DiT, DTR and DiT."""

__version__ = "0.1.0"
