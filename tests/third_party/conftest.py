"""The package is tested as its author would: see tests/test_tutorial.py."""

collect_ignore = ["backdoorscan_example"]
