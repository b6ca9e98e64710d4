"""`python -m maseRT` is `masert`."""

from maseRT.cli import main

main()
