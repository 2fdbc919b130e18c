"""`python -m coldpress` is the `coldpress` command."""

from coldpress.cli.main import main

main()
