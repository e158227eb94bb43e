"""The claims of the paper, each run and judged: `swalp reproduce`."""
