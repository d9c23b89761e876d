"""`python -m emu3`."""

from emu3.cli import main

if __name__ == "__main__":
    main()
