"""What the user can mend: shown as one line, never as a traceback."""


class UserError(ValueError):
    """A mistake in the input or the surroundings; the message is one line that says what to do."""
