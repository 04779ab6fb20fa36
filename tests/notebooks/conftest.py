"""What the tests of exercises share."""

import pytest


@pytest.fixture
def rejects(capsys):
    """Asserts that a check rejects an attempt and says what is wrong."""

    def assert_rejected(check, attempt, says):
        check(attempt)
        out = capsys.readouterr().out
        assert out.startswith("Not yet:")
        assert says in out

    return assert_rejected
