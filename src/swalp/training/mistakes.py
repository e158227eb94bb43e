"""The one exception that the command line turns into one line."""


class UserError(Exception):
    """A user's mistake, or the machine's: what was given, what is allowed, how to mend it.

    Its text is one line. Everything else that is raised is a defect of the program.
    """
