"""`python -m otdd`: the same as the `otdd` command."""

from otdd.cli import main

if __name__ == "__main__":
    main()
