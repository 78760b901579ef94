"""`python -m personalize_core`: the command line."""

from personalize_core.cli.main import main

if __name__ == "__main__":
    main()
