"""``python -m fedsmoothlora`` is the command line too."""

from fedsmoothlora.cli.main import main

if __name__ == "__main__":
    main()
