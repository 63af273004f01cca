"""The one exception for mistakes that a person can mend."""


class UserError(ValueError):
    """A file or parameter that has to be changed; the message is one sentence that says which and how.

    The command line prints the message alone, and so does a notebook cell: a traceback would
    bury the sentence that helps.
    """

    def _render_traceback_(self) -> list[str]:
        """IPython's hook for how an exception is shown in a notebook."""
        return [f"{type(self).__name__}: {self}"]
