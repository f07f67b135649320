"""The error that a wrong setting raises."""


class ConfigError(ValueError):
    """A setting cannot be used. The message is one sentence: which field, which value, what is allowed."""
