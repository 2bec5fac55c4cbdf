import pytest

from lorma.training.exits import describe_exit


@pytest.mark.parametrize(
    ("status", "words"),
    [
        (1, "failed with exit code 1"),
        (200, "failed with exit code 200"),
        (-9, "was killed (SIGKILL), perhaps because memory ran out"),
        (137, "was killed (SIGKILL), perhaps because memory ran out"),
        (-11, "was ended by SIGSEGV (segmentation fault)"),
        (143, "was ended by SIGTERM (terminated)"),
        (-200, "failed with exit code -200"),
    ],
)
def test_exit_codes_in_words(status, words):
    assert describe_exit(status) == words
