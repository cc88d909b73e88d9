"""stub"""


def command() -> None:
    pass
