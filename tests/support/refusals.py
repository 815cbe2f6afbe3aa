"""What is refused, and how."""

import pytest


def refuses(error, message, function, *args, **kwargs):
    with pytest.raises(error) as caught:
        function(*args, **kwargs)
    assert message in str(caught.value)
