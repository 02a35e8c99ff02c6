"""The kinds of table files that can be read, one in each module."""
