"""Which rows stay, once every row and picture was looked at."""

from collections import Counter
from dataclasses import dataclass

import numpy as np

from dataset.clean.duplicates import find_duplicates
from dataset.clean.settings import Settings

# Shorter answers ("Yes.") may be right for many rows: they are not repeats.
REPEAT_CHARACTERS = 12
TRAIN, VAL, REJECTED = range(3)


@dataclass
class Found:
    """What is known of a set with n rows and m different pictures, numbered as they first come."""

    keys: np.ndarray  # int64[n], of the rows
    rows: np.ndarray  # ROW[n]
    answers: np.ndarray  # uint64[all answers], hashes
    repairs: Counter[str]
    numbers: np.ndarray  # int64[all images]
    places: np.ndarray  # int64[m, 2]: row, which image
    pictures: np.ndarray  # PICTURE[m]
    reasons: list[str]  # of pictures["reason"]

    def __post_init__(self):
        self.ends = np.cumsum(self.rows["n_images"])
        self.starts = self.ends - self.rows["n_images"]

    def pictures_of(self, row: int) -> list[int]:
        """Numbers of the pictures of a row."""
        return self.numbers[self.starts[row] : self.ends[row]].tolist()


def number_pictures(rows: np.ndarray, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(numbers, places) of Found; `images` uint64[all images] are equal for equal ones."""
    _, first, inverse = np.unique(images, return_index=True, return_inverse=True)
    order = np.argsort(first)
    rank = np.empty_like(order)
    rank[order] = np.arange(len(order))
    row = np.repeat(np.arange(len(rows)), rows["n_images"])[first[order]]
    starts = np.cumsum(rows["n_images"]) - rows["n_images"]
    return rank[inverse], np.stack([row, first[order] - starts[row]], axis=1)


def count_validation(n_rows: int, share: float | None) -> int:
    """How many of the rows that stay are for validation, see --val_share."""
    if share is not None:
        return round(share * n_rows)
    # A loss of one or two rows says nothing, so small sets give more.
    least = min(10, n_rows // 5)
    return max(round(0.01 * n_rows), min(100, round(0.1 * n_rows)), least)


class Decision:
    """What becomes of n rows, and why."""

    def __init__(self, settings: Settings, found: Found):
        n_rows = len(found.rows)
        self.settings, self.found, self.rows = settings, found, found.rows
        self.row_of = np.repeat(np.arange(n_rows), self.rows["n_images"])
        self.part = np.where(self.rows["is_rejected"], REJECTED, TRAIN).astype(np.int8)
        # Numbers of the reasons; 0 is for rows whose line says it.
        self.reasons, self.reason = [""], np.zeros(n_rows, np.int16)
        self.cause = np.full(n_rows, -1, np.int32)  # the picture that is why
        self.repeats = np.full(len(found.pictures), -1, np.int32)  # which earlier picture

        for number, reason in sorted(enumerate(found.reasons), key=lambda one: one[1])[1:]:
            self._reject_pictures(found.pictures["reason"] == number, reason)
        if not settings.keep_duplicates and len(found.pictures):
            self._reject_duplicates()
        if not settings.keep_repeats:
            self._reject_repeats()
        self._reject_boilerplate()
        self._choose_validation()

    def _reject(self, is_bad: np.ndarray, reason: str) -> None:
        """Reject the rows bool[n] of those that still stay."""
        is_bad = is_bad & (self.part != REJECTED)
        self.part[is_bad], self.reason[is_bad] = REJECTED, len(self.reasons)
        self.reasons.append(reason)

    def _reject_pictures(self, is_bad: np.ndarray, reason: str) -> None:
        """Reject the rows that show one of the pictures bool[m]; the first one is the cause."""
        # Backwards: of several values for one row the last one stays.
        at = np.flatnonzero(is_bad[self.found.numbers] & (self.part[self.row_of] != REJECTED))[::-1]
        self.cause[self.row_of[at]] = self.found.numbers[at]
        is_bad_row = np.zeros(len(self.part), bool)
        is_bad_row[self.row_of[at]] = True
        self._reject(is_bad_row, reason)

    def _reject_duplicates(self) -> None:
        """Rows with a picture that repeats an earlier one."""
        shown = map(self.found.pictures_of, np.flatnonzero(self.rows["n_images"] > 1))
        together = {(a, b) for row in shown for a in row for b in row if a != b}
        usable = np.flatnonzero(self.found.pictures["reason"] == 0)
        self.repeats, is_near = find_duplicates(self.found.pictures, usable, together)
        self._reject_pictures((self.repeats >= 0) & ~is_near, "image is a copy")
        self._reject_pictures(is_near, "image is nearly a copy")

    def _reject_repeats(self) -> None:
        """Rows whose answers an earlier row has already, about whatever picture."""
        is_candidate = (self.part != REJECTED) & (self.rows["length"] >= REPEAT_CHARACTERS)
        candidates = np.flatnonzero(is_candidate)
        _, first = np.unique(self.rows["text"][candidates], return_index=True)
        is_candidate[candidates[first]] = False
        self._reject(is_candidate, "text is repeated")

    def _reject_boilerplate(self) -> None:
        """Rows all of whose answers were given `max_repeats` times before."""
        limit, n_answers = self.settings.max_repeats, self.rows["n_answers"]
        _, answers = np.unique(self.found.answers, return_inverse=True)
        # only rows with a frequent answer can be that
        is_frequent = np.bincount(answers) > limit
        rows = np.repeat(np.arange(len(self.part)), n_answers)[is_frequent[answers]]
        times = np.zeros(len(is_frequent), np.int32)
        starts = np.cumsum(n_answers) - n_answers
        is_boilerplate = np.zeros(len(self.part), bool)
        for row in np.unique(rows[self.part[rows] != REJECTED]):
            given = answers[starts[row] : starts[row] + n_answers[row]]
            if (times[given] >= limit).all():
                is_boilerplate[row] = True
            else:
                times[given] += 1
        self._reject(is_boilerplate, "answer is boilerplate")

    def _choose_validation(self) -> None:
        """Move some rows to validation; rows joined by shared pictures go together."""
        from scipy.sparse import coo_matrix
        from scipy.sparse.csgraph import connected_components

        staying = np.flatnonzero(self.part != REJECTED)
        wanted = count_validation(len(staying), self.settings.val_share)
        # groups: the parts of a graph with rows and pictures as its nodes
        n_rows, n_pictures = len(self.part), len(self.found.pictures)
        edges = (self.row_of, self.found.numbers + n_rows)
        graph = coo_matrix((np.ones(len(self.row_of), bool), edges), (n_rows + n_pictures,) * 2)
        group = connected_components(graph, directed=False)[1][staying]
        # random groups that still fit
        sizes = np.bincount(group)
        is_chosen = np.zeros(len(sizes), bool)
        for number in np.random.default_rng(self.settings.seed).permutation(np.unique(group)):
            if sizes[number] <= wanted:
                is_chosen[number] = True
                wanted -= sizes[number]
        self.part[staying[is_chosen[group]]] = VAL
