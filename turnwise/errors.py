"""The errors a caller can act on. Each message is one line that names the place and the limit."""


class TurnwiseError(Exception):
    """Base of every error turnwise raises on purpose."""


class InvalidInput(TurnwiseError):
    """The input is wrong; `place` says where, as in groups[0].rollouts[3].scores[1]."""

    def __init__(self, place: str, problem: str) -> None:
        super().__init__(f"{place}: {problem}" if place else problem)
        self.place = place
        self.problem = problem
