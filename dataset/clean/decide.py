"""Which rows of a set stay, once every row and picture was looked at: copies, repeated texts, boilerplate, validation."""

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

from dataset.clean.duplicates import find_duplicates
from dataset.clean.stages import Settings

CAPTION_CHARACTERS = 12  # of a row's answers; shorter ones ("Yes.") may be many rows' honest answer and are only capped
TRAIN, VALIDATION, REJECTED = 0, 1, 2


@dataclass
class Pictures:
    """The m different pictures of the rows, in the order in which they come first."""

    ids: np.ndarray  # uint64[m], sorted
    order: np.ndarray  # int32[m]: number of the picture with ids[k]
    places: np.ndarray  # int32[m, 2]: row, and which of its pictures

    def number(self, ids: np.ndarray) -> np.ndarray:
        """uint64[k] ids -> int32[k] numbers."""
        return self.order[np.searchsorted(self.ids, ids)]


def read_chunks(work: Path, kind: str, names: tuple[str, ...]) -> dict[str, np.ndarray]:
    """The arrays `names` of all chunks, joined. One file is open at a time: there may be thousands."""
    parts: dict[str, list[np.ndarray]] = {name: [] for name in names}
    for path in sorted(work.glob(f"{kind}-*.npz")):
        with np.load(path) as chunk:
            for name in names:
                parts[name].append(chunk[name])
    return {name: np.concatenate(arrays) for name, arrays in parts.items() if arrays}


def count_repairs(work: Path) -> Counter[str]:
    counts: Counter[str] = Counter()
    for path in sorted(work.glob("rows-*.npz")):
        with np.load(path) as chunk:
            counts.update(json.loads(str(chunk["repairs"])))
    return counts


def list_pictures(rows: dict[str, np.ndarray]) -> Pictures:
    """The different pictures of all rows that are not rejected."""
    row_of = np.repeat(np.arange(len(rows["n_images"])), rows["n_images"])
    starts = np.cumsum(rows["n_images"]) - rows["n_images"]
    ids, first = np.unique(rows["ids"], return_index=True)  # the first of each
    appearance = np.argsort(first, kind="stable")
    order = np.empty(len(ids), np.int32)
    order[appearance] = np.arange(len(ids))
    first = first[appearance]
    places = np.stack([row_of[first], first - starts[row_of[first]]], axis=1).astype(np.int32)
    return Pictures(ids, order, places.reshape(-1, 2))


class Decision:
    """What becomes of every row: `part` int8[n] is TRAIN, VALIDATION or REJECTED; `reasons` numbers the reasons why."""

    def __init__(self, settings: Settings, rows: dict[str, np.ndarray], pictures: Pictures):
        self.settings, self.rows, self.pictures = settings, rows, pictures
        n_rows = len(rows["n_images"])
        self.part = np.where(rows["is_rejected"], REJECTED, TRAIN).astype(np.int8)
        self.reasons = ["see its chunk"]  # of rows rejected by themselves, which their line says
        self.reason = np.zeros(n_rows, np.int16)
        self.cause = np.full(n_rows, -1, np.int32)  # the picture that is why
        self.picture_of = pictures.number(rows["ids"])  # int32[all pictures of the rows]
        self.row_of = np.repeat(np.arange(n_rows), rows["n_images"])
        self.images = read_chunks(
            settings.work, "images", ("reason", "detail", "digest", "hash", "thumbnail", "size")
        )
        self.repeats = np.full(
            len(pictures.ids), -1, np.int32
        )  # the earlier picture that one repeats

        if len(pictures.ids):
            self._reject_bad_pictures()
            if not settings.keep_duplicates:
                self._reject_duplicates()
        if not settings.keep_repeats:
            self._reject_repeated_texts()
        self._reject_boilerplate()
        self._split()

    def _reject(self, is_bad: np.ndarray, reason: str, causes: np.ndarray | None = None) -> None:
        """Reject the rows bool[n] that are still in."""
        is_bad = is_bad & (self.part != REJECTED)
        if reason not in self.reasons:
            self.reasons.append(reason)
        self.reason[is_bad] = self.reasons.index(reason)
        self.part[is_bad] = REJECTED
        if causes is not None:
            self.cause[is_bad] = causes[is_bad]

    def _reject_rows_with(self, is_bad_picture: np.ndarray, reason: str) -> None:
        """Reject the rows that show one of the pictures bool[m]; the first of them is the cause."""
        at = np.flatnonzero(is_bad_picture[self.picture_of])[::-1]
        causes = np.full(len(self.part), -1, np.int32)
        causes[self.row_of[at]] = self.picture_of[at]  # written from the last to the first
        self._reject(causes >= 0, reason, causes)

    def _reject_bad_pictures(self) -> None:
        for reason in sorted(set(self.images["reason"].tolist()) - {""}):
            self._reject_rows_with(self.images["reason"] == reason, reason)

    def _reject_duplicates(self) -> None:
        good = np.flatnonzero(self.images["reason"] == "")
        position = np.full(
            len(self.pictures.ids), -1, np.int64
        )  # of each picture among the good ones
        position[good] = np.arange(len(good))
        repeats, is_near = find_duplicates(
            *(self.images[name][good] for name in ("digest", "hash", "thumbnail")),
            self._companions(position),
        )
        found = repeats >= 0
        self.repeats[good[found]] = good[repeats[found]]
        for kind, reason in ((~is_near, "image is a copy"), (is_near, "image is nearly a copy")):
            is_repeat = np.zeros(len(self.pictures.ids), bool)
            is_repeat[good[found & kind]] = True
            self._reject_rows_with(is_repeat, reason)

    def _companions(self, position: np.ndarray) -> np.ndarray:
        """int64[k, 2]: pictures that come together in a row."""
        pairs = [np.empty((0, 2), np.int64)]
        starts = np.cumsum(self.rows["n_images"]) - self.rows["n_images"]
        for row in np.flatnonzero(self.rows["n_images"] > 1):
            shown = position[
                self.picture_of[starts[row] : starts[row] + self.rows["n_images"][row]]
            ]
            a, b = np.triu_indices(len(shown), 1)
            pairs.append(np.stack([shown[a], shown[b]], axis=1))
        pairs = np.concatenate(pairs)
        return pairs[(pairs >= 0).all(axis=1)]

    def _reject_repeated_texts(self) -> None:
        """A caption that an earlier row has already, of whatever picture."""
        candidates = np.flatnonzero(
            (self.part != REJECTED) & (self.rows["length"] >= CAPTION_CHARACTERS)
        )
        _, first = np.unique(self.rows["caption"][candidates], return_index=True)
        is_repeat = np.zeros(len(self.part), bool)
        is_repeat[np.delete(candidates, first)] = True
        self._reject(is_repeat, "text is repeated")

    def _reject_boilerplate(self) -> None:
        """Rows all of whose answers were given `max_repeats` times before."""
        _, answer = np.unique(self.rows["answers"], return_inverse=True)
        times = np.zeros(answer.max(initial=-1) + 1, np.int32)
        ends = np.cumsum(self.rows["n_answers"])
        is_boilerplate = np.zeros(len(self.part), bool)
        for row in np.flatnonzero(self.part != REJECTED):
            said = answer[ends[row] - self.rows["n_answers"][row] : ends[row]]
            if (times[said] >= self.settings.max_repeats).all():
                is_boilerplate[row] = True
            else:
                times[said] += 1
        self._reject(is_boilerplate, "answer is boilerplate")

    def _split(self) -> None:
        """Put about `val_share` of the rows into the validation part: rows joined by shared pictures go together."""
        kept = np.flatnonzero(self.part != REJECTED)
        wanted = round(self.settings.val_share * len(kept))
        if not wanted:
            return
        n_rows, n_pictures = len(self.part), len(self.pictures.ids)
        links = coo_matrix(
            (np.ones(len(self.row_of), bool), (self.row_of, self.picture_of + n_rows)),
            (n_rows + n_pictures,) * 2,
        )
        _, group = connected_components(links, directed=False)
        sizes = np.bincount(group[kept], minlength=group.max() + 1)
        for number in np.random.default_rng(self.settings.seed).permutation(np.unique(group[kept])):
            if 0 < sizes[number] <= wanted:
                self.part[kept[group[kept] == number]] = VALIDATION
                wanted -= sizes[number]
            if not wanted:
                break
