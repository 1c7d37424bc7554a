from typing import NamedTuple


class Case(NamedTuple):
    name: str
    image: object
    truth: object
    prediction: object
    accuracy: float
