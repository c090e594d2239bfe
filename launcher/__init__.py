"""Scripts that run the commands of `sdit.cli` from a checkout; not part of the installed package."""
