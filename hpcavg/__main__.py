"""``python -m hpcavg``."""

from hpcavg.cli.main import main

if __name__ == "__main__":
    main()
