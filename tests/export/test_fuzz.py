"""Three hundred spoiled adapter folders; ``make fuzz`` tries ten thousand."""

import pytest

from export.fuzz import MEMORY, run


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_spoiled_adapters_are_loaded_or_refused_in_one_line(tiny_bert, tmp_path):
    fuzz, rise = run(300, 1, tiny_bert, tmp_path)
    assert fuzz.faults == []
    assert fuzz.counts["loaded"] > 10
    assert fuzz.counts["refused"] > 100
    assert rise < MEMORY
