"""`python -m danet`."""

from danet.cli import main

main()
