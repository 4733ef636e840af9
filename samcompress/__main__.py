"""``python -m samcompress`` is ``samcompress``."""

from .cli import main

if __name__ == "__main__":
    main()
