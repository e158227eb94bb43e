"""Speed and size of `swalp` beside its peers. Run `python -m benchmarks`; the tests never do."""
