"""`python -m swalp`: the command line."""

from swalp_command import main

main()
