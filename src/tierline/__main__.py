"""`python -m tierline`: the command, where its script is not on the path."""

from tierline.cli import run

run()
