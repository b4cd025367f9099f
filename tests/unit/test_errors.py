"""Errors cross process borders through Ray, so each must survive pickling with its sentence."""

import pickle

import pytest

from pipeline import errors

CLASSES = [
    value for value in vars(errors).values() if isinstance(value, type) and issubclass(value, errors.WiselineError)
]


@pytest.mark.parametrize("kind", CLASSES)
def test_it_survives_pickling(kind: type[errors.WiselineError]) -> None:
    copy = pickle.loads(pickle.dumps(kind("What happened; what to do.")))
    assert type(copy) is kind
    assert str(copy) == "What happened; what to do."


def test_the_gates_failures_survive_too() -> None:
    copy = pickle.loads(pickle.dumps(errors.GateFailed("Missed.", ("reliability", "an edit"))))
    assert (str(copy), copy.failures) == ("Missed.", ("reliability", "an edit"))


def test_every_class_is_in_the_tree_of_the_docstring() -> None:
    assert errors.__doc__ is not None
    assert [kind.__name__ for kind in CLASSES if kind.__name__ not in errors.__doc__] == []
