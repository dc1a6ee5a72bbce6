"""`python -m rag2.reindex SPEC.json`."""

import sys

from rag2.reindex.worker import main

if __name__ == "__main__":
    main(sys.argv[1:])
