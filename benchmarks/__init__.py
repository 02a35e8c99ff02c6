"""The costs of the package compared with references: `make bench`."""
