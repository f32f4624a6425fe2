"""The demo: from nothing to a measured comparison. `python -m examples.demo --help` tells its options."""
