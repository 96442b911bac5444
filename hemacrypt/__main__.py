"""``python -m hemacrypt``: the same program where the script is not on the path."""

from hemacrypt.cli import main

main()
