"""`python -m danet`."""

from danet.cli import main

if __name__ == "__main__":  # not in the processes that `danet bench` starts
    main()
