"""The packaged data set ``movie_reviews``: sentences from film reviews with a human rating.

10,605 sentences, each with the mean of several people's ratings from −4 (very negative) to 4 (very positive). They
are the ground truth published with VADER (Hutto & Gilbert, ICWSM 2014) under the MIT licence, see
``MOVIE_REVIEWS_LICENSE.txt`` beside the data.

The split is fixed: ids divisible by 5 are for evaluation. One such sentence (id 10505) also occurs word for word
among the training sentences and is left out of the evaluation part.

==========================  ========  ==========
rows                        training  evaluation
==========================  ========  ==========
all (``sentiment=False``)   8,484     2,120
positive                    3,993     1,003
negative                    4,067     1,008
both (``sentiment=True``)   8,060     2,011
==========================  ========  ==========
"""

from __future__ import annotations

import gzip
from importlib.resources import files
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from datasets import Dataset

NEUTRAL_BELOW = 0.5


def load_movie_reviews(part: Literal["train", "eval"], sentiment: bool) -> Dataset:
    """One part of the fixed split, in the order of the ids.

    Args:
        part: ``"train"`` or ``"eval"``.
        sentiment: add a ``label`` column, ``"negative"`` or ``"positive"`` by the sign of the rating, and leave out
            the neutral rows, those rated within ±0.5 exclusive.

    Returns:
        Columns ``id`` (int), ``text`` (str), ``rating`` (float, −4 to 4) and, with ``sentiment``, ``label`` (str).
    """
    from datasets import Dataset

    raw = gzip.decompress((files("lorma") / "data" / "movie_reviews.tsv.gz").read_bytes()).decode("utf-8")
    rows = [line.rstrip("\r").split("\t") for line in raw.split("\n") if line]
    training_texts = {text for number, _, text in rows if int(number) % 5}
    columns: dict[str, list[int | float | str]] = {"id": [], "text": [], "rating": []}
    if sentiment:
        columns["label"] = []
    for number, rating, text in rows:
        is_training = int(number) % 5 != 0
        if is_training != (part == "train") or (not is_training and text in training_texts):
            continue
        if sentiment:
            if abs(float(rating)) < NEUTRAL_BELOW:
                continue
            columns["label"].append("positive" if float(rating) > 0 else "negative")
        columns["id"].append(int(number))
        columns["text"].append(text)
        columns["rating"].append(float(rating))
    return Dataset.from_dict(columns)
