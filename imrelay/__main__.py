"""`python -m imrelay`: the same as the command `imrelay`."""

from imrelay.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
