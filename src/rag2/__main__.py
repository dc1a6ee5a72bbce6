"""`python -m rag2` is the command `rag2`."""

from rag2.cli import main

if __name__ == "__main__":
    main()
