"""The exceptions of this package: all of them are below ``FedSmoothLoRAError``."""


class FedSmoothLoRAError(Exception):
    """Base class of the errors that this package raises for its users.

    The message says what was wrong, where, and what would be right. The command line prints it without a
    traceback. Every subclass is also below the built-in exception that fits it, such as ``ValueError``.
    """


# Configuration and installation.


class ConfigError(FedSmoothLoRAError, ValueError):
    """A configuration is not valid; the message names the file, the key, the value and the remedy."""
