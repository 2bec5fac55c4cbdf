"""Speed and memory, measured: ``harness`` is shared, ``cases`` measure, ``page`` shows what they found."""
