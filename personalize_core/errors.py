"""What a user can mend."""


class InputError(ValueError):
    """Something that was given to the program is wrong: one sentence says what, where and how to mend it.

    The command line prints the sentence alone; any other exception is a fault of ours and keeps its traceback.
    """


def listed(names) -> str:
    """'a, b and c', for messages that say what is known."""
    names = [str(name) for name in names]
    return " and ".join([", ".join(names[:-1]), names[-1]]) if len(names) > 1 else "".join(names) or "none"
