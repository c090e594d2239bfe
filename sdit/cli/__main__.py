"""`python -m sdit.cli VERB ...`."""

from sdit.cli import main

main()
