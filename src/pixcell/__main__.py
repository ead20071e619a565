"""``python -m pixcell``, and the ``pixcell`` command."""

from pixcell.cli import main

if __name__ == "__main__":
    main()
