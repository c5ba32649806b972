"""`python -m edgetune`."""

from edgetune.cli.main import main

main()
