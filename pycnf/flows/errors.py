"""What a solve says when it cannot go on."""


class SolveError(RuntimeError):
    """A solve stopped: too many steps, a step too small, or values that are not finite.

    The message names the time, the step size and the sample that is worst off.
    """
