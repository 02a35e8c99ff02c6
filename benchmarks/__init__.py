"""What the software costs, against what it must cost: `make bench`."""
